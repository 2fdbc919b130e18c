"""A workflow of fake passes on the model of the example; workers are real processes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from coldpress.registry import PASSES

__all__ = ["fake_passes", "workflow"]

FAKES = Path(__file__).resolve().parent


@pytest.fixture
def fake_passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Install the fake pass as a plug-in, in this process and in workers."""
    monkeypatch.syspath_prepend(str(FAKES))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FAKES), *filter(None, [os.environ.get("PYTHONPATH")])]))
    monkeypatch.setattr(PASSES, "_all", None)
    yield
    sys.modules.pop("fake_passes", None)
    PASSES._all = None


@pytest.fixture
def workflow(fake_passes: None, tmp_path: Path, phi3: Path) -> Callable[..., dict[str, Any]]:
    """Make a workflow document; each argument is the config of one fake step."""

    def make(*steps: dict[str, Any], **more: Any) -> dict[str, Any]:
        return {
            "input_model": {"type": "HfModel", "model_path": str(phi3)},
            "passes": {f"step{number}": {"type": "Fake", **step} for number, step in enumerate(steps)},
            "cache_dir": str(tmp_path / "cache"),
            "output_dir": str(tmp_path / "output"),
            **more,
        }

    return make
