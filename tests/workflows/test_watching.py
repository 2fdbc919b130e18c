"""A training that reports while it runs, as part of a workflow: the logs lie where the user finds them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import coldpress
from coldpress.engine.logs import log_folder, reporters_of
from coldpress.errors import ConfigError
from coldpress.events import Event, Message

pytestmark = pytest.mark.xdist_group("watching")  # they share one training


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    phi3 = Path(__file__).resolve().parents[2] / "examples" / "phrase-classification" / "model"
    project = tmp_path_factory.mktemp("project")
    rows = [json.dumps({"text": f"this is phrase number {i}"}) for i in range(12)]
    (project / "train.jsonl").write_text("\n".join(rows) + "\n")
    shutil.copytree(phi3, project / "model")
    return {
        "input_model": {"type": "HfModel", "model_path": str(project / "model")},
        "data_configs": [
            {
                "name": "train",
                "type": "HuggingfaceContainer",
                "load_dataset_config": {"data_name": "json", "data_files": str(project / "train.jsonl")},
                "pre_process_data_config": {"text_field": "text", "strategy": "line-by-line", "max_seq_len": 32},
            }
        ],
        "passes": {
            "tune": {
                "type": "LoRA",
                "r": 2,
                "target_modules": ["o_proj"],
                "train_data_config": "train",
                "training_args": {"max_steps": 2, "logging_steps": 1, "report_to": ["tensorboard"]},
            }
        },
        "cache_dir": str(project / "cache"),
        "output_dir": str(project / "output"),
    }


def said(document: dict[str, Any]) -> list[str]:
    events: list[Event] = []
    coldpress.run(document, sinks=[events.append])
    return [event.text for event in events if isinstance(event, Message)]


def test_logs_lie_in_the_output(document: dict[str, Any]) -> None:
    pytest.importorskip("tensorboard")
    logs = Path(document["output_dir"]) / "logs" / "tune" / "tensorboard"
    assert f"reports to TensorBoard: tensorboard --logdir {logs}" in said(document)
    assert list(logs.glob("events.out.tfevents.*"))


def test_a_cached_training_says_where_its_logs_are(document: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    said(document)
    assert not [text for text in said(document) if "trained before" in text], "they are where this run's would be"
    other = {**document, "output_dir": str(tmp_path / "other")}
    logs = Path(document["output_dir"]) / "logs" / "tune"
    assert f"it was trained before; what it told tensorboard is in {logs}" in said(other)
    assert not (tmp_path / "other" / "logs" / "tune" / "tensorboard").exists()


@pytest.mark.parametrize(("named", "place"), [("/logs/of/mine", "/logs/of/mine"), ("runs", "{config}/runs")])
def test_a_folder_of_ones_own(document: dict[str, Any], tmp_path: Path, named: str, place: str) -> None:
    pytest.importorskip("tensorboard")
    asks = json.loads(json.dumps(document))
    asks["passes"]["tune"]["training_args"]["logging_dir"] = named
    config = tmp_path / "workflow.json"
    config.write_text(json.dumps(asks))
    plan = coldpress.plan(config)
    assert log_folder(plan, plan.steps[0]) == Path(place.format(config=tmp_path))
    assert reporters_of(plan.steps[0]) == ("tensorboard",)


def test_a_service_that_is_not_installed_stops_the_plan(document: dict[str, Any]) -> None:
    asks = json.loads(json.dumps(document))
    asks["passes"]["tune"]["training_args"]["report_to"] = ["tensorboard", "swanlab"]
    with pytest.raises(ConfigError, match="swanlab") as caught:
        coldpress.plan(asks)
    assert caught.value.exit_code == 2
    assert "pip install swanlab" in str(caught.value)
