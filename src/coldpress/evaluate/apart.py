"""Models measured in a process of their own, for a command that prints the scores.

A metric may hold the user's Python, and a model its own: either may print, close standard output, crash, or end the
process. Here it does so beside the command, which tells what became of it. What is printed goes to standard error.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

from coldpress.artifacts.base import Artifact
from coldpress.config.metrics import Metric
from coldpress.config.schema import DataConfig
from coldpress.errors import ColdpressError, StepError, WorkerKilledError
from coldpress.evaluate.session import evaluate_models
from coldpress.events import Sink
from coldpress.scores import Score

__all__ = ["evaluate_apart"]

_GRACE_SECONDS = 5.0
"""How long the process may take to end when the user stops it; a function of the user's may not let it."""


def evaluate_apart(
    models: Mapping[str, Artifact],
    metrics: Sequence[Metric],
    data_configs: Mapping[str, DataConfig],
    *,
    emit: Sink,
    trust_remote_code: bool = False,
) -> list[Score]:
    """As `evaluate_models`; raises StepError where the process ends before it has the scores."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(there, (models, metrics, data_configs), trust_remote_code))
    process.start()
    there.close()
    try:
        while not isinstance(told := here.recv(), list | ColdpressError):
            emit(told)
    except EOFError:
        process.join()
        raise _ended(process.exitcode or 0) from None
    except BaseException:
        process.terminate()
        process.join(_GRACE_SECONDS)
        process.kill()
        raise
    process.join()
    if isinstance(told, ColdpressError):
        raise told
    return told


def _work(answers: Connection, asked: tuple[Any, ...], trust_remote_code: bool) -> None:
    """In the process: events as they come, then the scores, or the error that there are none for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the command as well, which then ends this process
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.dup2(2, 1)
    sys.stdout = open(1, "w", encoding="utf-8", errors="replace", buffering=1, closefd=False)  # noqa: SIM115 - it stays
    with contextlib.suppress(KeyboardInterrupt):
        try:
            answers.send(evaluate_models(*asked, emit=answers.send, trust_remote_code=trust_remote_code))
        except ColdpressError as error:
            answers.send(error)


def _ended(code: int) -> StepError:
    if code == -getattr(signal, "SIGKILL", 9):
        return WorkerKilledError(
            "the process that measures was killed (signal 9), as the operating system does when memory runs out",
            hint="use a smaller batch_size in the metric, or close other programs",
        )
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return StepError(
        f"the process that measures ended with {how} before it had the scores",
        hint="what it printed stands above; does a function of a custom metric end or crash it?",
    )
