"""Fixtures shared by all tests: where the real models and texts lie, when they are here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def _shared() -> Path | None:
    named = os.environ.get("COLDPRESS_SHARED")
    place = Path(named) if named else ROOT.parent / "shared"
    return place if (place / "models").is_dir() else None


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models and texts; the test is skipped when it is absent."""
    place = _shared()
    if place is None:
        pytest.skip("the shared models and texts are not here (COLDPRESS_SHARED names their folder)")
    return place


@pytest.fixture(scope="session")
def phi3() -> Path:
    """The 7M-parameter Phi-3 that ships with the example."""
    return ROOT / "examples" / "phrase-classification" / "model"


@pytest.fixture(scope="session")
def phrases() -> Path:
    """The data set that ships with the example: a folder with train.jsonl and test.jsonl."""
    return ROOT / "examples" / "phrase-classification" / "dataset"
