"""Training: the loss falls, a killed run goes on as if nothing had happened, and a broken loss stops it."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import coldpress.data.packing
from coldpress.data.packing import IGNORED, TokenSequence
from coldpress.data.tokenizer import Tokenizer
from coldpress.errors import Interrupted, TrainingError
from coldpress.events import EvaluationLoss, Event, Message, Progress
from coldpress.nn.checkpoints import last_checkpoint
from coldpress.nn.loading import load_model
from coldpress.nn.train import Batching, Stopping, TrainingReport, train

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


def adapted(folder: Path, dropout: float = 0.1, dtype: str = "float32") -> Any:
    import peft
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = load_model(folder, dtype=dtype)
        made = peft.get_peft_model(
            model,
            peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=["o_proj"], task_type="CAUSAL_LM"),
        )
        for value in made.parameters():
            value.data = value.data.float() if value.requires_grad else value.data
        return made


def run(
    folder: Path,
    work: Path,
    emit: Any = lambda event: None,
    *,
    dropout: float = 0.1,
    batching: Batching | None = None,
    stopping: Stopping | None = None,
    **arguments: Any,
) -> tuple[TrainingReport, Any]:
    """As a long training computes, with whole layers, though it is short."""
    model = adapted(folder, dropout)
    with mock.patch("coldpress.nn.train.SHORT_FLOPS", 0):
        report = train(
            model,
            sequences(),
            sequences(3),
            arguments={**ARGUMENTS, **arguments},
            pad_id=258,
            work=work,
            step="t",
            emit=emit,
            batching=batching,
            stopping=stopping,
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


def test_a_short_training_is_spared_whole_layers(
    tiny_phi3: Path, tmp_path: Path, uninterrupted: tuple[TrainingReport, Any]
) -> None:
    model = adapted(tiny_phi3)
    report = train(
        model, sequences(), None, arguments=ARGUMENTS, pad_id=258, work=tmp_path, step="t", emit=lambda event: None
    )
    assert "decoder layer" in uninterrupted[0].fused
    assert "decoder layer" not in report.fused


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
from coldpress.events import Event, Message, Progress

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


def test_the_best_weights_are_handed_over(tiny_phi3: Path, tmp_path: Path) -> None:
    import torch

    settings = {"learning_rate": 0.3, "lr_scheduler_type": "constant", "eval_strategy": "steps", "eval_steps": 1}
    report, weights = run(tiny_phi3, tmp_path / "best", **settings, max_steps=10, save_steps=100)
    evaluated = {point["step"]: point["eval_loss"] for point in report.log if "eval_loss" in point}
    assert len(evaluated) == 10
    assert report.best_step is not None, "so high a rate does not end at its best"
    assert report.eval_loss == evaluated[report.best_step] == min(evaluated.values())
    _, until = run(tiny_phi3, tmp_path / "until", **settings, max_steps=report.best_step, save_steps=100)
    assert all(torch.equal(weights[name], until[name]) for name in until)
    last, _ = run(
        tiny_phi3, tmp_path / "last", stopping=Stopping(load_best=False), **settings, max_steps=10, save_steps=100
    )
    assert last.best_step is None
    assert last.eval_loss == evaluated[10]


def test_early_stopping(tiny_phi3: Path, tmp_path: Path) -> None:
    settings = {"learning_rate": 0.3, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 40}
    report, _ = run(tiny_phi3, tmp_path, stopping=Stopping(patience=2), **settings)
    assert report.steps < 40
    assert report.best_step == report.steps - 2


def test_evaluation_without_saying_when(tiny_phi3: Path, tmp_path: Path) -> None:
    report, _ = run(tiny_phi3, tmp_path, eval_strategy="steps", max_steps=20)
    assert [point["step"] for point in report.log if "eval_loss" in point] == list(range(2, 21, 2))


def test_how_a_step_is_cut_changes_nothing(tiny_phi3: Path, tmp_path: Path) -> None:
    whole, _ = run(tiny_phi3, tmp_path / "whole", dropout=0.0)
    for name, batching in (("tokens", Batching(tokens=16)), ("records", Batching(records=1))):
        cut, _ = run(tiny_phi3, tmp_path / name, dropout=0.0, batching=batching)
        # 1e-5: float32 sums in another order.
        assert cut.losses == pytest.approx(whole.losses, rel=1e-5), name


def test_batch_times_accumulation_is_what_counts(tiny_phi3: Path, tmp_path: Path) -> None:
    one, _ = run(tiny_phi3, tmp_path / "one", per_device_train_batch_size=1, gradient_accumulation_steps=4)
    four, _ = run(tiny_phi3, tmp_path / "four", per_device_train_batch_size=4, gradient_accumulation_steps=1)
    assert one.losses == four.losses


def test_one_micro_batch_is_tried_where_room_is_short(tiny_phi3: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    plain, _ = run(tiny_phi3, tmp_path / "plain", dropout=0.0)
    batching = Batching(64, room=1 << 20, most=64)
    tried, _ = run(tiny_phi3, tmp_path / "tried", events.append, dropout=0.0, batching=batching)
    assert any("one micro-batch took" in event.text for event in events if isinstance(event, Message))
    assert tried.losses == pytest.approx(plain.losses, rel=1e-5), "it leaves no trace"


def test_bfloat16_needs_no_autocast_and_trains_alike(tiny_phi3: Path, tmp_path: Path) -> None:
    import torch

    losses = []
    for dtype, bf16 in (("float32", False), ("bfloat16", True)):
        model = adapted(tiny_phi3, 0.0, dtype)
        report = train(
            model,
            sequences(),
            None,
            arguments={**ARGUMENTS, "bf16": bf16},
            pad_id=258,
            work=tmp_path / dtype,
            step="t",
            emit=lambda event: None,
        )
        losses.append(report.losses)
    assert {value.dtype for value in model.parameters() if value.requires_grad} == {torch.float32}
    # bfloat16 has 8 bits; over a batch of tokens its errors average out.
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


def test_tokens_are_counted(tiny_phi3: Path, tmp_path: Path) -> None:
    report, _ = run(tiny_phi3, tmp_path, max_steps=-1, num_train_epochs=2, save_steps=100)
    assert report.tokens == 2 * sum(len(one.ids) for one in sequences())
    assert report.tokens_per_second > 0


def test_a_learning_rate_that_diverges(phi3: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(phi3)
    text = (Path(coldpress.data.packing.__file__).parent / "parity_text.txt").read_text(encoding="utf-8")
    parts = [text[start : start + 120] for start in range(0, 1920, 120)]
    rows = [TokenSequence(list(one.ids), list(one.ids)) for one in tokenizer.encode(parts)]
    model = adapted(phi3, 0.0)
    with pytest.raises(TrainingError, match="the loss diverges: it began at") as error:
        train(
            model,
            rows,
            None,
            arguments={**ARGUMENTS, "learning_rate": 3.0, "lr_scheduler_type": "constant", "max_steps": 60},
            pad_id=tokenizer.pad_id,
            work=tmp_path,
            step="t",
            emit=lambda event: None,
        )
    assert "its batch is the training sequences" in error.value.message
    assert "lower learning_rate" in (error.value.hint or "")
    kept = tmp_path / "last-good"
    assert f"is kept in {kept}" in error.value.message
    assert (kept / "adapter_model.safetensors").is_file()


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_torch_compile(tiny_phi3: Path, tmp_path: Path) -> None:
    plain, _ = run(tiny_phi3, tmp_path / "plain", dropout=0.0, max_steps=2)
    compiled, _ = run(tiny_phi3, tmp_path / "compiled", dropout=0.0, max_steps=2, torch_compile=True)
    assert compiled.form == "padded"
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-5)
