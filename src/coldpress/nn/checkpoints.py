"""Checkpoints of a training on disk: which one to go on from, and weights that are kept apart from them.

work/checkpoints/checkpoint-40/     written by Trainer: weights, optimizer, schedule, random state
                 ... curve.json     losses so far, the best evaluation
                 ... complete       written last: every file and its size; what does not match is passed over
work/best.safetensors               trained weights with the lowest evaluation loss
work/last-good/                     what was trained, as of the last step before a training broke
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coldpress.errors import TrainingError

__all__ = ["BEST", "is_whole", "last_checkpoint", "read_weights", "resume_point", "write_weights"]

BEST = "best.safetensors"


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint holds every file that it was saved with, at its size."""
    try:
        sizes = json.loads((checkpoint / "complete").read_text(encoding="utf-8"))
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is whole."""
    found = [
        (int(match.group(1)), path)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and is_whole(path)
    ]
    return max(found)[1] if found else None


def resume_point(folder: Path, asked: Any) -> tuple[Path | None, list[str]]:
    """Where to go on from, and the names of checkpoints that were cut short and are taken away.

    `asked` is the config's resume_from_checkpoint: False starts afresh, a text names a checkpoint of Trainer's.
    """
    if asked is False:
        shutil.rmtree(folder, ignore_errors=True)
        return None, []
    own = last_checkpoint(folder)
    if own is None and isinstance(asked, str):
        if not (Path(asked) / "trainer_state.json").is_file():
            raise TrainingError(f"resume_from_checkpoint: {asked} is not a checkpoint of Trainer")
        own = Path(asked)
    broken = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if path != own and path.name.startswith("checkpoint-") and not is_whole(path):
            broken.append(path.name)
            shutil.rmtree(path, ignore_errors=True)
    return own, sorted(broken)


def write_weights(path: Path, weights: Mapping[str, Any]) -> None:
    """Tensors into a safetensors file, at once or not at all."""
    from safetensors.torch import save_file

    partial = path.with_name(path.name + ".partial")
    save_file({name: tensor.detach().contiguous().cpu() for name, tensor in weights.items()}, partial)
    partial.replace(path)


def read_weights(path: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    found: dict[str, Any] = load_file(path)
    return found
