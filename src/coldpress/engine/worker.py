"""The process that does the work: jobs in, events and results out.

`python -m coldpress.engine.worker [MODULE ...]` imports the modules while it waits, then reads one job a line. The real
standard output carries the answers only; whatever libraries print goes to standard error, which is the step's log.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from queue import Queue
from typing import Any

from pydantic import TypeAdapter

from coldpress.artifacts.base import Artifact
from coldpress.config.metrics import Metric
from coldpress.config.schema import Accelerator, DataConfig
from coldpress.engine.store import as_store_error
from coldpress.errors import ColdpressError, MissingExtraError, StoreError
from coldpress.events import Event, Progress, event_to_json
from coldpress.hardware import detect
from coldpress.memory import PeakMeter
from coldpress.passes.base import Context
from coldpress.registry import PASSES
from coldpress.systems.job import Job, artifact_from_dict, artifact_to_dict
from coldpress.systems.remote import STOP_LINE

__all__ = ["main", "perform"]


def perform(job: Job, emit: Callable[[Event], None]) -> dict[str, Any]:
    """Do one job in this process."""
    peak = PeakMeter()

    def with_memory(event: Event) -> None:
        if isinstance(event, Progress):
            event = replace(event, values={**event.values, "memory_bytes": float(peak.now)})
        emit(event)

    data_configs = {name: DataConfig.model_validate(value) for name, value in job.data_configs.items()}
    context = Context(
        step=job.step,
        output=Path(job.parameters.get("output", ".")),
        work=Path(job.parameters.get("work", ".")),
        hardware=detect(),
        accelerator=Accelerator.model_validate(job.accelerator),
        data_configs=data_configs,
        emit=with_memory,
        trust_remote_code=job.trust_remote_code,
        logs=Path(job.parameters["logs"]) if "logs" in job.parameters else None,
        rank=int(os.environ.get("RANK", 0)),
        ranks=int(os.environ.get("WORLD_SIZE", 1)),
        neighbours=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
    )
    model = artifact_from_dict(job.model)
    if job.kind != "evaluate":
        while _RUNNERS:
            _RUNNERS.pop().close()
    if job.kind == "pass":
        while _REFERENCES:
            _REFERENCES.pop().close()
    started = time.perf_counter()
    with peak:
        result = _KINDS[job.kind](job, model, context)
    return {
        **result,
        "seconds": time.perf_counter() - started,
        "peak_bytes": peak.total,
        "peak_anonymous_bytes": peak.anonymous,
    }


def _run_pass(job: Job, model: Artifact, context: Context) -> dict[str, Any]:
    made = PASSES[job.parameters["type"]]()
    config = made.Config.model_validate(job.parameters["config"])
    return {"artifact": artifact_to_dict(made.run(config, model, context))}


def _run_parity(job: Job, model: Artifact, context: Context) -> dict[str, Any]:
    """The reference stays open for the next proof, until a pass runs here."""
    from coldpress.parity import KeptReference, prove

    if not _REFERENCES:
        _REFERENCES.append(KeptReference())
    reference = artifact_from_dict(job.parameters["reference"])
    return {"parity": prove(reference, model, context, **job.parameters["text"], kept=_REFERENCES[0])}


def _run_evaluate(job: Job, model: Artifact, context: Context) -> dict[str, Any]:
    """Models stay loaded for the next metric; whatever else is done lets go of them (`perform`)."""
    from coldpress.evaluate.bench import Bench, OpenRunners
    from coldpress.evaluate.measure import measure

    if not _RUNNERS:
        _RUNNERS.append(OpenRunners(trust_remote_code=job.trust_remote_code))
    models = {label: artifact_from_dict(one) for label, one in job.parameters["models"].items()}
    reference = job.parameters.get("reference")
    against = None if reference is None else artifact_from_dict(reference)
    _RUNNERS[0].keep([*models.values(), *([] if against is None else [against])])
    benches = {
        label: Bench(
            model=one,
            runners=_RUNNERS[0],
            data_configs=context.data_configs,
            reference=against,
            emit=context.emit,
            step=job.step,
            device=context.accelerator.device,
            trust_remote_code=job.trust_remote_code,
        )
        for label, one in models.items()
    }
    found = measure(TypeAdapter(Metric).validate_python(job.parameters["metric"]), benches)
    return {"scores": {label: [asdict(one) for one in each] for label, each in found.items()}}


_RUNNERS: list[Any] = []
"""The open runners of this process, if any (`evaluate.bench.OpenRunners`)."""

_REFERENCES: list[Any] = []
"""What proofs of this process compare with, if anything (`parity.KeptReference`)."""

_KINDS: dict[str, Callable[[Job, Artifact, Context], dict[str, Any]]] = {
    "pass": _run_pass,
    "parity": _run_parity,
    "evaluate": _run_evaluate,
}


def main() -> None:
    # A private copy of standard output for answers; everything else that is printed goes to the log.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    lines: Queue[str | None] = Queue()
    busy = threading.Event()
    threading.Thread(target=_read, args=(lines, busy), daemon=True).start()
    for module in sys.argv[1:]:
        importlib.import_module(module)

    def answer(text: str) -> None:
        answers.write(text + "\n")

    while (line := lines.get()) is not None:
        busy.set()
        try:
            reply = {"result": perform(Job.from_dict(json.loads(line)), lambda event: answer(event_to_json(event)))}
        except Exception as error:  # noqa: BLE001 - the one place in a worker: every failure becomes an answer
            traceback.print_exc()
            reply = {"error": _explain(error)}
        answer(json.dumps(reply))
        if reply.get("error", {}).get("type") == "Interrupted":
            break  # it was asked to stop, and its work is saved
        busy.clear()
    # Taking thousands of modules apart takes a second, and nothing of theirs outlives this process.
    sys.stderr.flush()
    answers.flush()
    os._exit(0)


def _read(lines: Queue[str | None], busy: threading.Event) -> None:
    """Hand over jobs as they come. When the parent is gone there is nobody to work for."""
    for line in sys.stdin:
        if line == STOP_LINE:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            lines.put(line)
    if busy.is_set():
        os._exit(1)
    lines.put(None)


def _explain(error: Exception) -> dict[str, Any]:
    """Type, message and hint of a failure, as JSON."""
    known: Exception = error
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, FileNotFoundError):
        known = as_store_error(error, Path(str(error.filename or Path.cwd())))
    elif "No space left on device" in str(error) and not isinstance(error, StoreError):
        known = as_store_error(OSError(28, "No space left on device"), Path.cwd())
    elif isinstance(error, ModuleNotFoundError):
        known = MissingExtraError(
            f"the package {error.name} is not installed", hint="pip install 'coldpress[cpu]' (or [gpu])"
        )
    elif isinstance(error, MemoryError):
        known = ColdpressError(f"not enough memory: {error}", hint="use a smaller batch or a shorter max_seq_len")
    if isinstance(known, ColdpressError):
        return {"type": type(known).__name__, "message": known.message, "hint": known.hint}
    return {"type": type(error).__name__, "message": str(error), "hint": None}


if __name__ == "__main__":
    main()
