"""Worker processes.

A worker is `python -m MODULE`, kept warm: it reads jobs as JSON lines on its standard input and answers with events on
its standard output; what libraries print goes to a log file. Two kinds are used: one that has torch loaded, and one
that never imports it. A worker that is told to stop (SIGTERM) may save its work first; one whose parent is gone ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from coldpress import errors
from coldpress.errors import ColdpressError, StepError, WorkerKilledError
from coldpress.events import Sink, event_from_dict
from coldpress.systems.hosts import Host
from coldpress.systems.job import Job
from coldpress.systems.remote import STOP_LINE, environment_line, remote_command

__all__ = ["STOP_GRACE_SECONDS", "Worker"]

STOP_GRACE_SECONDS = 60.0
"""How long a worker may take to save its work when the user stops the run."""

_ENVIRONMENT = {
    "PYTHONUNBUFFERED": "1",
    # GNU OpenMP's threads spin 300,000 times before they sleep. 10,000 times are as good on a quiet machine, and milder
    # beside a busy one, which long computations then leave to it (see nn/threads.py).
    "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "10000"),
    # Statistics, progress bars and tokenizer forks of the libraries have no place in a worker.
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "warning",
}


class Worker:
    """One warm process. Not thread-safe: one job at a time."""

    def __init__(
        self,
        module: str,
        *,
        preload: tuple[str, ...],
        log: Path,
        environment: Mapping[str, str],
        host: Host | None = None,
    ) -> None:
        """Start it, on another machine if `host` is one; `preload` names modules it imports before its first job."""
        self.log = log
        self._log_file: TextIO = log.open("w", encoding="utf-8")
        self._away = host is not None
        environment = {**os.environ, **_ENVIRONMENT, **environment}
        arguments = [module, *preload]
        self._process = subprocess.Popen(
            [sys.executable, "-m", *arguments] if host is None else remote_command(host, arguments),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log_file,
            text=True,
            encoding="utf-8",
            env=environment,
            # Ctrl-C reaches this process alone; the worker is then asked to stop in good order.
            start_new_session=os.name == "posix",
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )
        if self._away:
            self._write(environment_line(environment))

    @property
    def alive(self) -> bool:
        return self.exit_code is None

    @property
    def exit_code(self) -> int | None:
        """None while it runs; below zero for a signal."""
        return self._process.poll()

    def _write(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # it is gone: whoever waits for its answer finds out how
            self._process.stdin.write(line)
            self._process.stdin.flush()

    def perform(self, job: Job, emit: Sink, *, advice: Callable[[], str]) -> dict[str, Any]:
        """Run one job to its end and return its result.

        Raises what the job raised, or WorkerKilledError when the process is gone; `advice` then tells what to change.
        """
        assert self._process.stdout is not None
        self._write(json.dumps(job.to_dict()) + "\n")
        for line in self._process.stdout:
            try:
                answer = json.loads(line)
            except ValueError:
                continue  # a native library that writes to the descriptor itself
            if "result" in answer:
                result: dict[str, Any] = answer["result"]
                return result
            if "error" in answer:
                raise self._error(job, answer["error"])
            emit(event_from_dict(answer))
        raise self._killed(job, self._process.wait(), advice())

    def _error(self, job: Job, error: Mapping[str, Any]) -> ColdpressError:
        cls = getattr(errors, error["type"], None)
        if isinstance(cls, type) and issubclass(cls, ColdpressError) and cls is not errors.ConfigError:
            raised = cls(error["message"], hint=error["hint"])
        else:
            raised = StepError(f"{error['type']}: {error['message']}", hint=f"the whole story stands in {self.log}")
        return raised

    def _killed(self, job: Job, code: int, advice: str) -> ColdpressError:
        tail = self.tail()
        if code == -getattr(signal, "SIGKILL", 9):
            return WorkerKilledError(
                f"the process of step {job.step} was killed (signal 9), "
                "as the operating system does when memory runs out",
                hint=advice,
            )
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return StepError(f"the process of step {job.step} ended with {how}{tail}", hint=f"its log is {self.log}")

    def tail(self, lines: int = 5) -> str:
        """The last lines of the log, for an error message."""
        self._log_file.flush()
        try:
            text = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        except OSError:
            return ""
        return "".join(f"\n  | {line}" for line in text[-lines:])

    def ask_to_stop(self) -> None:
        """Ask it to save its work and end."""
        if self._away:
            self._write(STOP_LINE)
        elif self.alive:
            self._process.terminate()

    def stop(self) -> None:
        """Ask it to save and end, then make it end."""
        if self.alive:
            self.ask_to_stop()
            self.wait(STOP_GRACE_SECONDS)
        self.close()

    def kill(self) -> None:
        """End it at once."""
        if self.alive:
            self._process.kill()
            self._process.wait()

    def hang_up(self) -> None:
        """Send it no more jobs: idle, it ends."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            with contextlib.suppress(OSError):  # the pipe broke: the process is gone
                self._process.stdin.close()

    def close(self) -> None:
        """End an idle worker."""
        self.hang_up()
        self.wait(5.0)
        self.kill()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log_file.close()

    def wait(self, seconds: float) -> None:
        """Until it ended by itself, so long at most."""
        end = time.monotonic() + seconds
        while self.alive and time.monotonic() < end:
            time.sleep(0.02)
