"""Any older dialect, written out in today's language."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coldpress.config.document import document_text
from coldpress.config.load import LoadedConfig
from coldpress.config.rewriting import Rewrite
from coldpress.errors import UsageError

__all__ = ["write_migrated"]

_INPUTS = frozenset((
    "adapter_path", "data_files", "data_name", "hosts", "include_path", "model_path", "script_dir", "tasks",
    "user_script",
))  # fmt: skip
"""Keys of files and folders that are looked up from the config's folder (`engine/places.py`), where they are there."""


def write_migrated(config: LoadedConfig, target: Path, *, force: bool = False) -> tuple[Rewrite, ...]:
    """Write a loaded config to `target` in today's flat form, and return the rules that made it so.

    JSON or YAML by the name's ending. Remarks are not carried over. An existing file is kept unless `force`. Inputs
    that lie beside the old file keep their meaning in another folder; what a run makes goes beside the new file.
    """
    if target.is_dir():
        raise UsageError(f"{target} is a folder", hint="give the name of a new file")
    old = Path.cwd() if config.path is None else config.path.parent.resolve()
    new = target.parent.resolve()
    document = config.document if old == new else _moved(config.document, "", old, new)
    text = document_text(document, target)
    if force:
        _replace(target, text)
        return config.rewrites
    try:
        with target.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
    except FileExistsError as error:
        raise UsageError(f"{target} exists already", hint="choose another name, or --force") from error
    except OSError as error:
        raise UsageError(f"{target} cannot be written: {error.strerror or error}") from error
    return config.rewrites


def _moved(value: Any, key: str, old: Path, new: Path) -> Any:
    """A value with the relative paths of inputs in folder `old` as they are from folder `new`."""
    if isinstance(value, Mapping):
        if key in _INPUTS and "type" in value:  # a resource of Azure ML
            return value
        # Below data_files stand splits.
        return {name: _moved(one, key if key in _INPUTS else name, old, new) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_moved(one, key, old, new) for one in value]
    if key not in _INPUTS or not isinstance(value, str) or Path(value).is_absolute() or not (old / value).exists():
        return value
    return Path(os.path.relpath(old / value, new)).as_posix()


def _replace(target: Path, text: str) -> None:
    """A temporary file and a rename, so that the old file is whole until the new one is."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.new")
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        temporary.replace(target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UsageError(f"{target} cannot be written: {error.strerror or error}") from error
