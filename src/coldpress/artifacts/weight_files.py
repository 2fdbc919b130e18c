"""The files of a model that hold its weights, and their size: what a model takes on disk but for its tokenizer."""

from __future__ import annotations

from pathlib import Path

from coldpress.artifacts.base import Artifact

__all__ = ["weight_bytes", "weight_files"]

_SUFFIXES = frozenset((".safetensors", ".bin", ".pt", ".pth", ".onnx", ".data"))


def weight_files(artifact: Artifact) -> tuple[Path, ...]:
    """Weights of the model, wherever they lie, and of the adapter on it; an ONNX graph counts as well."""
    folders = dict.fromkeys(folder for folder in (artifact.model, artifact.adapter) if folder is not None)
    return tuple(
        path for folder in folders for path in sorted(folder.iterdir()) if path.suffix in _SUFFIXES and path.is_file()
    )


def weight_bytes(artifact: Artifact) -> int:
    """Their size."""
    return sum(path.stat().st_size for path in weight_files(artifact))
