"""A workflow that only measures: no passes, an evaluator."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import coldpress
from coldpress.errors import ConfigError
from coldpress.record import read_run
from coldpress.summary import verdict


@pytest.fixture
def document(phi3: Path, tmp_path: Path) -> dict[str, Any]:
    goal = {"type": "threshold", "value": 1000}
    metric = {"name": "size", "type": "size_on_disk", "sub_types": [{"name": "bytes", "goal": goal}]}
    return {
        "input_model": {"type": "HfModel", "model_path": str(phi3)},
        "evaluators": {"size": {"metrics": [metric]}},
        "evaluator": "size",
        "cache_dir": str(tmp_path / "cache"),
        "output_dir": str(tmp_path / "out"),
    }


def test_the_model_is_measured_and_judged(document: dict[str, Any], tmp_path: Path) -> None:
    result = coldpress.run(document)
    assert [score.value for score in result.unmet] == [score.value for score in result.scores]
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["status"] == "done"
    assert record["output"] is None
    assert verdict(read_run(tmp_path / "out")[0]).startswith("size: bytes 14.")
    assert record["scores"][0]["goal"]["met"] is False
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.html", "run.json"]


@pytest.mark.parametrize("less", [{"evaluator": None}, {"evaluate_input_model": False}])
def test_nothing_to_do(document: dict[str, Any], less: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="no passes"):
        coldpress.run({**document, **less})
