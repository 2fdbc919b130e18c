"""Any older dialect, written out in today's language."""

from __future__ import annotations

import os
from pathlib import Path

from coldpress.config.document import document_text
from coldpress.config.load import LoadedConfig
from coldpress.config.rewriting import Rewrite
from coldpress.errors import UsageError

__all__ = ["write_migrated"]


def write_migrated(config: LoadedConfig, target: Path, *, force: bool = False) -> tuple[Rewrite, ...]:
    """Write a loaded config to `target` in today's flat form, and return the rules that made it so.

    JSON or YAML by the name's ending. Remarks are not carried over. An existing file is kept unless `force`.
    """
    if target.is_dir():
        raise UsageError(f"{target} is a folder", hint="give the name of a new file")
    text = document_text(config.document, target)
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


def _replace(target: Path, text: str) -> None:
    """A temporary file and a rename, so that the old file is whole until the new one is."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.new")
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        temporary.replace(target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UsageError(f"{target} cannot be written: {error.strerror or error}") from error
