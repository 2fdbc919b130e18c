"""A training of two processes from a config: killed, continued, and the same as one process with twice the rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import psutil
import pytest

import coldpress
from coldpress.errors import ConfigError, WorkerKilledError
from coldpress.events import Event, Message, Progress
from fakes.tiny_models import make_checkpoint

Make = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """`ranks` processes with as many rows each as make four a step; `name` keeps caches apart."""
    tmp_path = tmp_path_factory.mktemp("training")
    model = make_checkpoint(tmp_path / "model")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"row {'x' * (number % 7)} {number}"}) + "\n" for number in range(22)))

    def make(ranks: int, name: str, **arguments: Any) -> dict[str, Any]:
        accelerator = {"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}
        return {
            "input_model": {"type": "HfModel", "model_path": str(model)},
            "systems": {"here": {"type": "LocalSystem", "accelerators": [accelerator] * ranks}},
            "host": "here",
            "data_configs": [
                {
                    "name": "rows",
                    "load_dataset_config": {"data_name": "json", "data_files": str(rows)},
                    "pre_process_data_config": {"text_field": "text", "strategy": "line-by-line", "max_seq_len": 32},
                }
            ],
            "passes": {
                "tune": {
                    "type": "LoRA",
                    "train_data_config": "rows",
                    "eval_dataset_size": 4,
                    "r": 4,
                    "lora_dropout": 0.0,
                    "torch_dtype": "float32",
                    "training_args": {
                        "per_device_train_batch_size": 4 // ranks,
                        "gradient_accumulation_steps": 1,
                        "num_train_epochs": 2,
                        "learning_rate": 1e-3,
                        "logging_steps": 1,
                        "eval_strategy": "steps",
                        "eval_steps": 5,
                        "save_strategy": "steps",
                        "save_steps": 2,
                        **arguments,
                    },
                }
            },
            "cache_dir": str(tmp_path / name / "cache"),
            "output_dir": str(tmp_path / name / "output"),
        }

    return make


@pytest.fixture(scope="module")
def alone(training: Make) -> Any:
    """The result of one process."""
    return coldpress.run(training(1, "one"))


def record(result: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((result.output / "adapter" / "training.json").read_text())
    return found


def assert_same_training(found: Any, expected: Any) -> None:
    from safetensors.torch import load_file

    one, other = record(found), record(expected)
    assert len(one["losses"]) == 10  # 18 rows in steps of 4, twice
    assert one["losses"] == pytest.approx(other["losses"], rel=1e-5)
    assert one["eval_loss"] == pytest.approx(other["eval_loss"], rel=1e-5)
    assert one["tokens"] == other["tokens"]
    adapters = [load_file(run.output / "adapter" / "adapter_model.safetensors") for run in (found, expected)]
    assert adapters[0].keys() == adapters[1].keys()
    for name, value in adapters[1].items():
        # Adam divides by the gradient's size: where that is next to nothing, the order of sums is seen.
        assert float((adapters[0][name] - value).abs().max()) < 1e-4


def test_killed_and_continued(training: Make, alone: Any) -> None:
    document = training(2, "two")
    killed: list[int] = []

    def kill(event: Event) -> None:
        if isinstance(event, Progress) and event.done >= 5 and not killed:
            for process in psutil.Process().children():
                if process.environ().get("RANK") == "1":
                    killed.append(process.pid)
                    process.kill()

    with pytest.raises(WorkerKilledError, match="rank 1 of 2 is gone, and the others were ended"):
        coldpress.run(document, sinks=[kill])
    events: list[Event] = []
    result = coldpress.run(document, sinks=[events.append])
    said = [event.text for event in events if isinstance(event, Message)]
    assert [text for text in said if text.startswith("goes on from the checkpoint at step")]
    assert record(result)["resumed_from"] >= 4
    assert_same_training(result, alone)


def test_sharded(training: Make, alone: Any) -> None:
    result = coldpress.run(training(2, "sharded", fsdp=True))
    assert_same_training(result, alone)
    notes = coldpress.plan(training(2, "plan", fsdp=True)).steps[0].notes
    assert notes[0].startswith("2 processes: about ")
    assert "rows of a step: 2 processes x 2 = 4 (FSDP: each holds a part of the weights)" in notes


def test_fsdp_with_one_process_is_refused(training: Make) -> None:
    with pytest.raises(ConfigError, match="divides a model among processes, and there is one"):
        coldpress.plan(training(1, "one", fsdp=True))
