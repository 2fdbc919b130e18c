"""Every file that makes a model what it is counts for the store's key."""

from __future__ import annotations

from pathlib import Path

from coldpress.artifacts.base import Artifact
from coldpress.engine.places import model_files


def test_weights_of_every_kind_count(tmp_path: Path) -> None:
    for name in ("config.json", "pytorch_model.bin", "model.safetensors", "tokenizer.model", "README.md", "run.json"):
        (tmp_path / name).write_bytes(b"{}")
    found = model_files(Artifact(tmp_path, "checkpoint", tmp_path))
    assert sorted(found) == ["config.json", "model.safetensors", "pytorch_model.bin", "tokenizer.model"]
