"""Services that a training reports to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from coldpress.data.packing import IGNORED, TokenSequence
from coldpress.errors import Interrupted, MissingExtraError, TrainingError
from coldpress.events import Event, Message, Progress
from coldpress.nn.loading import load_model
from coldpress.nn.reporters import require_reporters
from coldpress.nn.train import TrainingReport, train


def run(folder: Path, work: Path, emit: Any = lambda event: None, **arguments: Any) -> TrainingReport:
    import peft
    import torch

    rows = [[256, *[65 + (place * step) % 3 for place in range(6 + step)]] for step in range(12)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = peft.get_peft_model(
            load_model(folder, dtype="float32"), peft.LoraConfig(r=4, target_modules=["o_proj"], task_type="CAUSAL_LM")
        )
    given = {"max_steps": 6, "save_steps": 2, "eval_strategy": "steps", "eval_steps": 4, "logging_steps": 1}
    sequences = [TokenSequence(ids, [IGNORED, *ids[1:]]) for ids in rows]
    return train(
        model,
        sequences,
        sequences[:3],
        arguments={**given, "use_cpu": True, "learning_rate": 1e-2, **arguments},
        pad_id=258,
        work=work,
        step="tuned",
        emit=emit,
        logs=work.parent / "logs",
    )


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    """What TensorBoard would draw."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder))
    read.Reload()
    return [(event.step, event.value) for event in read.Scalars(name)]


def mlflow_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.tracking import MlflowClient

    return list(MlflowClient(folder.as_uri()).search_runs(["0"]))


def test_tensorboard_and_mlflow_get_every_figure(
    tiny_phi3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    pytest.importorskip("mlflow")
    events: list[Event] = []
    report = run(tiny_phi3, tmp_path / "work", events.append, report_to=["tensorboard", "mlflow"])
    said = [event.text for event in events if isinstance(event, Message)]
    assert f"reports to TensorBoard: tensorboard --logdir {tmp_path / 'logs' / 'tensorboard'}" in said

    drawn = scalars(tmp_path / "logs" / "tensorboard", "train/loss")
    assert [step for step, _ in drawn] == [1, 2, 3, 4, 5, 6]
    # TensorBoard keeps float32.
    assert [value for _, value in drawn] == pytest.approx(report.losses, rel=1e-6)
    held_out = [point["eval_loss"] for point in report.log if "eval_loss" in point]
    evaluated = scalars(tmp_path / "logs" / "tensorboard", "eval/loss")
    assert [step for step, _ in evaluated] == [4, 6], "the second comes after Trainer's end"
    assert [value for _, value in evaluated] == pytest.approx(held_out, rel=1e-6)

    (one,) = mlflow_runs(tmp_path / "logs" / "mlflow", monkeypatch)
    assert (one.info.run_name, one.info.status) == ("tuned", "FINISHED")
    assert one.data.params["max_steps"] == "6"
    assert one.data.metrics["eval_loss"] == pytest.approx(held_out[-1])
    assert not [name for name in os.environ if name.startswith("MLFLOW_") and name != "MLFLOW_ALLOW_FILE_STORE"]


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = {path!r}
connected = []
def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        connected.append((event, str(arguments[1:])))
sys.addaudithook(watch)
from nn.test_reporters import run
from coldpress.events import Progress
import coldpress.nn.train
coldpress.nn.train.PROGRESS_SECONDS = 0

def kill(event):
    if {kill} and isinstance(event, Progress) and event.done >= 5:
        os.kill(os.getpid(), signal.SIGKILL)

run(Path({model!r}), Path({work!r}), kill, report_to=["tensorboard", "mlflow"])
print(connected)
"""


def test_a_killed_training_goes_on_in_the_same_logs_and_nothing_leaves_the_machine(
    tiny_phi3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    pytest.importorskip("mlflow")

    def program(kill: bool) -> subprocess.CompletedProcess[str]:
        text = KILLED.format(
            path=[str(Path(__file__).parents[1])], model=str(tiny_phi3), work=str(tmp_path / "work"), kill=kill
        )
        return subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False)

    assert program(kill=True).returncode == -signal.SIGKILL
    again = program(kill=False)
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[-1] == "[]", "it reached for the network"
    assert [step for step, _ in scalars(tmp_path / "logs" / "tensorboard", "train/loss")] == [1, 2, 3, 4, 5, 6]
    (one,) = mlflow_runs(tmp_path / "logs" / "mlflow", monkeypatch)
    assert one.info.status == "FINISHED"


def test_a_training_that_fails_or_is_stopped_is_no_finished_run(
    tiny_phi3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")

    def stop(event: Event) -> None:
        if isinstance(event, Progress) and event.done == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        run(tiny_phi3, tmp_path / "stopped" / "work", stop, report_to="mlflow")

    def fail(event: Event) -> None:
        if isinstance(event, Progress):
            raise TrainingError("the loss became nan")

    with pytest.raises(TrainingError, match="the loss became"):
        run(tiny_phi3, tmp_path / "failed" / "work", fail, report_to="mlflow")
    for name, status in (("stopped", "KILLED"), ("failed", "FAILED")):
        (one,) = mlflow_runs(tmp_path / name / "logs" / "mlflow", monkeypatch)
        assert one.info.status == status


def test_the_environment_comes_first(tiny_phi3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    pytest.importorskip("mlflow")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "mine"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "tracked").as_uri())
    run(tiny_phi3, tmp_path / "work", report_to=["tensorboard", "mlflow"], max_steps=1, logging_dir="theirs")
    assert not (tmp_path / "logs").exists()
    assert scalars(tmp_path / "mine", "train/loss")
    assert len(mlflow_runs(tmp_path / "tracked", monkeypatch)) == 1
    assert os.environ["MLFLOW_TRACKING_URI"] == (tmp_path / "tracked").as_uri()


def test_what_is_not_installed_is_said_with_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingExtraError, match="report_to names swanlab, comet_ml") as caught:
        require_reporters(["swanlab", "none", "comet_ml"])
    assert caught.value.hint == "pip install swanlab comet_ml, or take it out of report_to"
    installed = tmp_path / "swanlab-0.1.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: swanlab\nVersion: 0.1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    require_reporters("swanlab")
    require_reporters(None)
    require_reporters("none")
