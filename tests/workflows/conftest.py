"""The seed's project as the document describes it: configs, a model folder and a data set side by side."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@pytest.fixture
def seed(tmp_path: Path, phi3: Path, phrases: Path) -> Path:
    """A folder with the four seed configs, `model-cache/microsoft/phi-3-mini` and `dataset/`."""
    project = tmp_path / "project"
    project.mkdir()
    for config in (HERE / "seed").iterdir():
        shutil.copy(config, project / config.name)
    shutil.copytree(phi3, project / "model-cache" / "microsoft" / "phi-3-mini")
    (project / "dataset").mkdir()
    shutil.copy(phrases / "train.jsonl", project / "dataset" / "dataset-classification.json")
    return project
