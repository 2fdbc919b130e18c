"""The services that a training reports to while it runs (`report_to`).

TensorBoard and MLflow write into a folder of the run's output, where they can be watched while the training goes on;
what the user's environment says (TENSORBOARD_LOGGING_DIR, MLFLOW_TRACKING_URI) comes first. Other services go where
their own settings say. A resumed training goes on in the same log: TensorBoard hides what was logged after the
checkpoint, MLflow continues the same run.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coldpress.config.reporters import REPORTERS, reporters_asked
from coldpress.errors import Interrupted, MissingExtraError, TrainingError
from coldpress.events import Message, Sink
from coldpress.hardware import library_versions

__all__ = ["reporting", "require_reporters"]

_RUN_FILE = "mlflow-run.json"
"""In the work folder: which MLflow run to go on with."""


def require_reporters(report_to: Any) -> None:
    """Raise MissingExtraError for a service whose package is not installed."""
    absent = [
        name for name in reporters_asked(report_to) if not any(library_versions(REPORTERS.get(name, (name,))).values())
    ]
    if absent:
        packages = " ".join(REPORTERS.get(name, (name,))[0] for name in absent)
        raise MissingExtraError(
            f"report_to names {', '.join(absent)}, and the package for it is not installed",
            hint=f"pip install {packages}, or take it out of report_to",
        )


@dataclass(frozen=True)
class _Training:
    """What a reporter may want to know."""

    step: str
    logs: Path
    work: Path
    resumed_at: int | None
    emit: Sink

    def say(self, text: str) -> None:
        self.emit(Message("info", text, self.step))


@contextlib.contextmanager
def reporting(
    report_to: Any, *, step: str, logs: Path, work: Path, resumed_at: int | None, emit: Sink
) -> Iterator[list[Any]]:
    """Trainer callbacks of the services that `report_to` names, opened, and closed at the end, whatever the end is.

    `logs` is where they write, `work` the folder that outlives a killed run, `resumed_at` the training step of the
    checkpoint. Raises MissingExtraError for what is not installed, TrainingError for what cannot be opened.
    """
    names = reporters_asked(report_to)
    require_reporters(names)
    training = _Training(step, logs, work, resumed_at, emit)
    with contextlib.ExitStack() as stack:
        callbacks = []
        for name in names:
            open_one = _OPENED.get(name, _other(name))
            callbacks.append(stack.enter_context(open_one(training)))
        yield callbacks


@contextlib.contextmanager
def _tensorboard(training: _Training) -> Iterator[Any]:
    from transformers.integrations.integration_utils import TensorBoardCallback

    if importlib.util.find_spec("tensorboard") is not None:
        from torch.utils.tensorboard import SummaryWriter
    else:
        from tensorboardX import SummaryWriter
    folder = os.environ.get("TENSORBOARD_LOGGING_DIR") or str(training.logs / "tensorboard")
    purge = None if training.resumed_at is None else training.resumed_at + 1
    folder = os.path.expanduser(folder)  # noqa: PTH111 - as Transformers' callback does
    writer = SummaryWriter(log_dir=folder, purge_step=purge)
    callback = TensorBoardCallback(writer)
    callback.logging_dir = folder  # it opens it again for an evaluation after the last step
    training.say(f"reports to TensorBoard: tensorboard --logdir {folder}")
    try:
        yield callback
    finally:
        writer.close()
        if callback.tb_writer is not None:
            callback.tb_writer.close()


@contextlib.contextmanager
def _mlflow(training: _Training) -> Iterator[Any]:
    """One MLflow run, ended as what it came to. Without a server of the user's, its files lie in the logs."""
    ours = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_ALLOW_FILE_STORE": "true"}
    with _environment("MLFLOW_", ours):
        import mlflow
        from transformers.integrations.integration_utils import MLflowCallback

        uri = os.environ.get("MLFLOW_TRACKING_URI") or (training.logs / "mlflow").resolve().as_uri()
        memory = training.work / _RUN_FILE
        try:
            mlflow.set_tracking_uri(uri)
            run = mlflow.start_run(run_id=_known_run(memory, uri), run_name=training.step).info.run_id
        except mlflow.exceptions.MlflowException as error:
            raise TrainingError(
                f"report_to: MLflow at {uri} cannot be used: {error}",
                hint="see MLFLOW_TRACKING_URI, or take mlflow out of report_to",
            ) from error
        training.work.mkdir(parents=True, exist_ok=True)
        memory.write_text(json.dumps({"uri": uri, "run": run}), encoding="utf-8")
        training.say(f"reports to MLflow: run {run} at {uri}")
        status = "FAILED"
        try:
            yield MLflowCallback()
            status = "FINISHED"
        except (Interrupted, KeyboardInterrupt):
            status = "KILLED"
            raise
        finally:
            mlflow.flush_async_logging()
            mlflow.end_run(status)


def _known_run(memory: Path, uri: str) -> str | None:
    """The run that a killed training was writing to the same place."""
    if not memory.is_file():
        return None
    known = json.loads(memory.read_text(encoding="utf-8"))
    return str(known["run"]) if known["uri"] == uri else None


def _other(name: str) -> Callable[[_Training], contextlib.AbstractContextManager[Any]]:
    """A service whose callback Transformers has and whose settings are its own."""

    @contextlib.contextmanager
    def opened(training: _Training) -> Iterator[Any]:
        from transformers.integrations.integration_utils import get_reporting_integration_callbacks

        try:
            (made,) = get_reporting_integration_callbacks([name])
            callback = made()
        except (RuntimeError, ImportError, ValueError) as error:
            raise TrainingError(
                f"report_to: {name} cannot be used: {error}", hint=f"set it up, or take {name} out of report_to"
            ) from error
        training.say(f"reports to {name}, where its own settings say")
        yield callback

    return opened


_OPENED: Mapping[str, Callable[[_Training], contextlib.AbstractContextManager[Any]]] = {
    "tensorboard": _tensorboard,
    "mlflow": _mlflow,
}


@contextlib.contextmanager
def _environment(prefix: str, values: Mapping[str, str]) -> Iterator[None]:
    """These variables set where they are not; afterwards all of the prefix are as they were, whoever changed them."""
    before = {name: value for name, value in os.environ.items() if name.startswith(prefix)}
    os.environ.update({**values, **before})
    try:
        yield
    finally:
        for name in [name for name in os.environ if name.startswith(prefix)]:
            del os.environ[name]
        os.environ.update(before)
