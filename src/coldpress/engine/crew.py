"""The worker processes of a run: one that has torch loaded, one that never imports it, a group for some trainings."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from coldpress.artifacts.base import Artifact
from coldpress.config.rules_passes import TRAINING_PASSES
from coldpress.engine.logs import log_folder
from coldpress.engine.plan import Plan, Step
from coldpress.errors import Interrupted
from coldpress.events import Sink
from coldpress.registry import PASSES
from coldpress.systems.group import WorkerGroup
from coldpress.systems.job import Job, artifact_to_dict
from coldpress.systems.local import Worker

__all__ = ["Crew"]

_WORKER_MODULE = "coldpress.engine.worker"


class Crew:
    """Processes that stay warm from job to job, also of one plan after another. Not thread-safe: one job at a time."""

    def __init__(self, name: str, logs: Path, emit: Sink, *, threads: int | None = None) -> None:
        """`name` begins the names of its logs in `logs`; `threads` is what each process may use, all where None."""
        self._name, self._logs, self._emit, self._threads = name, logs, emit, threads
        self._workers: dict[bool, Worker] = {}
        self._group: WorkerGroup | None = None
        """Of the step that runs, where several processes run it."""
        self._preload: dict[bool, tuple[str, ...]] = {True: (), False: ()}
        self._ended = False

    def warm_up(self, plan: Plan) -> None:
        """Start the processes that will be needed: their imports are long, and each of them one thread."""
        alone = [step for step in plan.steps if not step.cached and not step.hosts]
        self._preload = {torch: _preload(one for one in alone if one.needs_torch == torch) for torch in (True, False)}
        missing = [step for step in plan.steps if step.key is None or plan.store.get(step.key) is None]
        if missing:
            alone = [step for step in missing if not step.hosts]
            torch = any(step.needs_torch for step in alone) or any(step.limits is not None for step in missing)
            if torch or alone:
                self._worker(torch)
            if torch and any(not step.needs_torch for step in missing):
                self._worker(False)

    def perform(
        self, plan: Plan, kind: Any, step: str, model: Artifact, torch: bool, advice: str, **parameters: Any
    ) -> dict[str, Any]:
        """Do one job; `advice` is what to change when its process is killed for memory."""
        return self._worker(torch).perform(_job(plan, kind, step, model, parameters), self._emit, advice=lambda: advice)

    def run_pass(self, plan: Plan, step: Step, model: Artifact, out: Path, work: Path) -> dict[str, Any]:
        """Run a step's pass, in one process or in as many as the step has."""
        parameters = {
            "type": step.type, "config": step.config.model_dump(mode="json"), "output": str(out), "work": str(work),
            "logs": str(log_folder(plan, step)),
        }  # fmt: skip
        advice = _memory_advice(step)
        if not step.hosts:
            return self.perform(plan, "pass", step.name, model, step.needs_torch, advice, **parameters)
        self._group = WorkerGroup(
            _WORKER_MODULE,
            hosts=step.hosts,
            device=plan.accelerator.device,
            preload=_preload([step]),
            log=self._log(step.name),
        )
        aside = work / "outputs-of-other-ranks"
        try:
            outputs = [out, *(aside / str(rank) for rank in range(1, self._group.ranks))]
            for folder in outputs[1:]:
                folder.mkdir(parents=True, exist_ok=True)
            jobs = [_job(plan, "pass", step.name, model, {**parameters, "output": str(one)}) for one in outputs]
            result = self._group.perform(jobs, self._emit, advice=lambda: advice)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        # Its memory is wanted for what comes next. (After an error its processes are ended; a stop must reach them.)
        self._group.close()
        self._group = None
        return result

    def stop(self) -> None:
        """Ask the processes to save their work, then end them; there will be no further ones."""
        self._ended = True
        for busy in (self._group, *self._workers.values()):
            if busy is not None:
                busy.stop()

    def close(self) -> None:
        """End the processes, those that are busy too; there will be no further ones."""
        self._ended = True
        for ended in (self._group, *self._workers.values()):
            if ended is not None:
                ended.close()

    def _worker(self, torch: bool) -> Worker:
        if self._ended:
            raise Interrupted("the run has ended")
        worker = self._workers.get(torch)
        if worker is None or not worker.alive:
            few = {} if self._threads is None else dict.fromkeys(_THREADS, str(self._threads))
            # The builder's own threads divide the work; BLAS threads below them cost a factor of two.
            light = {} if torch else {"OPENBLAS_NUM_THREADS": os.environ.get("OPENBLAS_NUM_THREADS", "1")}
            worker = Worker(
                _WORKER_MODULE,
                preload=self._preload[torch],
                log=self._log("torch" if torch else "light"),
                environment={**few, **light},
            )
            self._workers[torch] = worker
        return worker

    def _log(self, name: str) -> Path:
        return self._logs / f"{self._name}-{name}.log"


_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")


def _job(plan: Plan, kind: Any, step: str, model: Artifact, parameters: Mapping[str, Any]) -> Job:
    return Job(
        kind=kind,
        step=step,
        model=artifact_to_dict(model),
        accelerator=plan.accelerator.model_dump(mode="json"),
        data_configs={
            name: config.model_dump(mode="json", exclude_unset=True) for name, config in plan.data_configs.items()
        },
        trust_remote_code=plan.trust_remote_code,
        parameters=parameters,
    )


def _preload(steps: Iterable[Step]) -> tuple[str, ...]:
    """Modules that the passes of these steps import."""
    return tuple(dict.fromkeys(module for step in steps for module in PASSES[step.type].preload))


def _memory_advice(step: Step) -> str:
    """What to change when the operating system killed a step."""
    estimate = "" if step.estimate is None else f"the plan estimated {step.estimate.ram / 1e9:.2f} GB; "
    if step.type in TRAINING_PASSES:
        return estimate + ("lower per_device_train_batch_size or max_seq_len, set gradient_checkpointing, or use QLoRA")
    return estimate + "close other programs or use a machine with more memory"
