"""Training: the loss falls, a killed run goes on as if nothing had happened, and a broken loss stops it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from coldpress.data.packing import IGNORED, TokenSequence
from coldpress.errors import Interrupted, TrainingError
from coldpress.events import EvaluationLoss, Event, Progress
from coldpress.nn.checkpoints import last_checkpoint
from coldpress.nn.loading import load_model
from coldpress.nn.train import TrainingReport, train

ARGUMENTS: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-2,
    "max_steps": 8,
    "save_steps": 2,
    "logging_steps": 1,
    "use_cpu": True,
    "seed": 0,
}


def sequences(count: int = 12) -> list[TokenSequence]:
    draw = random.Random(0)
    made = []
    for _ in range(count):
        ids = [256] + [draw.choice((65, 66, 67)) for _ in range(draw.randrange(5, 14))]
        made.append(TokenSequence(ids, [IGNORED, *ids[1:]]))
    return made


def adapted(folder: Path) -> Any:
    import peft
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = load_model(folder, dtype="float32")
        return peft.get_peft_model(
            model,
            peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["o_proj"], task_type="CAUSAL_LM"),
        )


def run(folder: Path, work: Path, emit: Any = lambda event: None, **arguments: Any) -> tuple[TrainingReport, Any]:
    model = adapted(folder)
    report = train(
        model,
        sequences(),
        sequences(3),
        arguments={**ARGUMENTS, **arguments},
        pad_id=258,
        work=work,
        step="t",
        emit=emit,
    )
    return report, {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


@pytest.fixture(scope="module")
def uninterrupted(tiny_phi3: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainingReport, Any]:
    return run(tiny_phi3, tmp_path_factory.mktemp("whole"))


def assert_equal_runs(found: tuple[TrainingReport, Any], expected: tuple[TrainingReport, Any]) -> None:
    import torch

    assert found[0].losses == expected[0].losses
    assert found[0].log == expected[0].log or [p.get("loss") for p in found[0].log] == [
        p.get("loss") for p in expected[0].log
    ]
    assert found[1].keys() == expected[1].keys()
    assert all(torch.equal(found[1][name], expected[1][name]) for name in expected[1])


def test_report(uninterrupted: tuple[TrainingReport, Any]) -> None:
    report, _ = uninterrupted
    assert report.steps == len(report.losses) == 8
    assert report.losses[-1] < report.losses[0]
    # Trainer logs the same losses, rounded to nothing.
    assert [point["loss"] for point in report.log if "loss" in point] == pytest.approx(report.losses, rel=1e-6)
    assert report.resumed_from is None


def test_progress_and_evaluation(tiny_phi3: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    report, _ = run(tiny_phi3, tmp_path, events.append, eval_strategy="steps", eval_steps=4)
    steps = [event for event in events if isinstance(event, Progress)]
    assert steps[0].done == 1
    assert (steps[-1].done, steps[-1].total, steps[-1].unit) == (8, 8, "steps")
    assert {"loss", "tokens_per_second", "eta_seconds", "learning_rate"} <= set(steps[-1].values)
    assert steps[-1].values["loss"] == report.losses[-1]
    assert len([point for point in report.log if "eval_loss" in point]) == 2
    assert report.eval_loss is not None
    found = [event for event in events if isinstance(event, EvaluationLoss)]
    assert [event.at for event in found] == [4, 8]
    assert [event.loss for event in found] == [point["eval_loss"] for point in report.log if "eval_loss" in point]
    assert (found[1].best, found[1].best_at) == min((event.loss, event.at) for event in found)


def test_sigterm_saves_and_the_next_run_goes_on(
    tiny_phi3: Path, tmp_path: Path, uninterrupted: tuple[TrainingReport, Any]
) -> None:
    def stop(event: Event) -> None:
        if isinstance(event, Progress) and event.done == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="stopped at step") as error:
        run(tiny_phi3, tmp_path, stop, save_steps=100)
    assert "goes on from there" in str(error.value)
    assert signal.getsignal(signal.SIGTERM) == before
    kept = last_checkpoint(tmp_path / "checkpoints")
    assert kept is not None
    again = run(tiny_phi3, tmp_path, save_steps=100)
    assert again[0].resumed_from == int(kept.name.rpartition("-")[2])
    assert_equal_runs(again, uninterrupted)


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = {path!r}
from nn.test_train import run
from coldpress.events import Progress

def kill(event):
    if isinstance(event, Progress) and event.done >= 5:
        os.kill(os.getpid(), signal.SIGKILL)

import coldpress.nn.watch
coldpress.nn.watch.PROGRESS_SECONDS = 0
run(Path({model!r}), Path({work!r}), kill)
"""


def test_kill_and_rerun_end_alike(tiny_phi3: Path, tmp_path: Path, uninterrupted: tuple[TrainingReport, Any]) -> None:
    program = KILLED.format(path=[str(Path(__file__).parents[1])], model=str(tiny_phi3), work=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    kept = last_checkpoint(tmp_path / "checkpoints")
    assert kept is not None
    assert kept.name == "checkpoint-4"
    # One more that was cut short: it must not be resumed from.
    (tmp_path / "checkpoints" / "checkpoint-6").mkdir()
    (tmp_path / "checkpoints" / "checkpoint-6" / "trainer_state.json").write_text("{")
    again = run(tiny_phi3, tmp_path)
    assert again[0].resumed_from == 4
    assert_equal_runs(again, uninterrupted)


def test_a_loss_that_is_not_finite(tiny_phi3: Path, tmp_path: Path) -> None:
    model = adapted(tiny_phi3)

    def poison(event: Event) -> None:
        if isinstance(event, Progress) and event.done == 1:
            next(value for value in model.parameters() if value.requires_grad).data.fill_(float("nan"))

    with pytest.raises(TrainingError, match=r"became nan in step 2; the last finite loss was \d.*sequences \d+, \d+"):
        train(model, sequences(), None, arguments=ARGUMENTS, pad_id=258, work=tmp_path, step="t", emit=poison)


def test_a_loss_that_is_not_finite_in_the_first_step(tiny_phi3: Path, tmp_path: Path) -> None:
    model = adapted(tiny_phi3)
    next(model.parameters()).data.fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"in the first step.*the model itself yields it") as error:
        train(
            model, sequences(), None, arguments=ARGUMENTS, pad_id=258, work=tmp_path, step="t", emit=lambda event: None
        )
    assert "does the checkpoint hold NaN" in str(error.value)
    assert "learning_rate" not in str(error.value)


@pytest.mark.parametrize("optimizer", ["adamw_bnb_8bit", "lion_32bit", "ademamix_8bit", "rmsprop_bnb"])
def test_optimizers_of_bitsandbytes(tiny_phi3: Path, tmp_path: Path, optimizer: str) -> None:
    pytest.importorskip("bitsandbytes")
    report, _ = run(tiny_phi3, tmp_path, optim=optimizer, max_steps=2, learning_rate=1e-4)
    assert report.steps == 2


def test_gradient_checkpointing_says_nothing_of_renames(tiny_phi3: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(
            tiny_phi3,
            tmp_path,
            max_steps=1,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
    said = [str(one.message) for one in caught if issubclass(one.category, FutureWarning)]
    # `adapted` above wraps the model itself, outside of what is tested.
    assert [text for text in said if "is_gradient_checkpointing" not in text] == []


def test_arguments_that_do_not_go_together(tiny_phi3: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="training_args"):
        run(tiny_phi3, tmp_path, lr_scheduler_type="no such schedule")
