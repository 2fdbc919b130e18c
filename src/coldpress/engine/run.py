"""Do what the plan says, step by step: cached or worked, proved, committed, measured, published."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import coldpress
from coldpress.artifacts.base import Artifact
from coldpress.config.load import LoadedConfig
from coldpress.config.rules_passes import TRAINING_PASSES
from coldpress.engine.evaluation import Evaluation
from coldpress.engine.logs import log_folder, logs_elsewhere, reporters_of
from coldpress.engine.outcome import LIBRARIES, Outcome
from coldpress.engine.plan import Plan, Step, check_plan, input_artifact, make_plan
from coldpress.engine.proof import judge, parity_text, refuse_if_too_far, text_identity
from coldpress.engine.result import RunResult, StepResult
from coldpress.engine.store import Entry, disk_errors, publish
from coldpress.errors import ColdpressError, Interrupted, PlanError, StepError, StoreError
from coldpress.events import (
    Event,
    Message,
    ParityMeasured,
    RunFinished,
    RunStarted,
    Sink,
    StepFailed,
    StepFinished,
    StepStarted,
)
from coldpress.hardware import library_versions
from coldpress.registry import PASSES
from coldpress.systems.group import WorkerGroup
from coldpress.systems.job import Job, artifact_from_dict, artifact_to_dict
from coldpress.systems.local import Worker

__all__ = ["run"]

_WORKER_MODULE = "coldpress.engine.worker"


def run(loaded: LoadedConfig, *, sinks: Iterable[Sink] = (), trust_remote_code: bool = False) -> RunResult:
    """Run a workflow to its end.

    Raises ConfigError before any work when it cannot run, StepError and its kin when a step fails, Interrupted when
    the user stops it. Whatever was finished stays in the store, and the next run goes on from there.
    """
    plan = make_plan(loaded, trust_remote_code=trust_remote_code, hash_everything=True)
    if plan.model.hub_id is not None:
        check_plan(plan, to_run=True)
        _download(plan.model.hub_id, plan.model.revision)
        plan = make_plan(loaded, trust_remote_code=trust_remote_code, hash_everything=True)
    check_plan(plan, to_run=True)
    plan.store.prepare()
    with disk_errors(plan.store.root):
        plan.store.digests.save()
    session = _Session(plan, tuple(sinks))
    try:
        with plan.store.in_use():
            return session.run()
    except Interrupted:
        raise
    except ColdpressError as error:
        session.failed(error)
        raise
    except KeyboardInterrupt:
        session.stop()
        raise Interrupted(
            "stopped; finished steps are kept", hint="the same command goes on from where this one stopped"
        ) from None
    finally:
        session.close()


def _download(hub_id: str, revision: str | None) -> None:
    """Fetch a checkpoint from the hub into its cache: configs, tokenizer, safetensors, or .bin where there are none."""
    try:
        from huggingface_hub import list_repo_files, snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ModuleNotFoundError as error:
        raise PlanError(
            f"{hub_id} is on the hub, and huggingface_hub is not installed", hint="pip install 'coldpress[cpu]'"
        ) from error
    # Its base is the root of whatever HTTP library the hub's uses; a lost connection is that and no OSError.
    unreachable: tuple[Any, ...] = (*HfHubHTTPError.__bases__, OSError)
    patterns = ["*.json", "*.model", "*.jinja", "*.txt", "*.py"]
    try:
        safe = any(name.endswith(".safetensors") for name in list_repo_files(hub_id, revision=revision))
    except (*unreachable, HFValidationError):
        safe = True  # without a network the snapshot is whatever was fetched before
    try:
        snapshot_download(
            hub_id, revision=revision, allow_patterns=[*patterns, "*.safetensors" if safe else "pytorch_model*.bin"]
        )
    except (*unreachable, HFValidationError) as error:
        answered = getattr(error, "response", None) is not None or isinstance(error, HFValidationError)
        hub = "the hub did not give it" if answered else "the hub cannot be reached"
        raise PlanError(
            f"the model {hub_id!r} is no folder here, and {hub}: {type(error).__name__}: {error}",
            hint="check the name and the network; a private model needs HF_TOKEN in the environment",
        ) from error


class _Session:
    """One run: its plan, its worker processes, what it has measured so far."""

    def __init__(self, plan: Plan, sinks: tuple[Sink, ...]) -> None:
        self.plan = plan
        self.sinks = sinks
        self.workers: dict[bool, Worker] = {}
        self.group: WorkerGroup | None = None
        """Of the step that runs, where several processes run it."""
        self.steps: list[StepResult] = []
        self.evaluation = Evaluation(plan, self._perform, self.emit)
        self.warnings: list[str] = []
        self.parities: list[ParityMeasured] = []
        self.under_way: str | None = None
        """Step that is worked on."""
        self._light_soon = False
        self.started = time.perf_counter()
        self.started_at = time.strftime("%Y-%m-%dT%H:%M:%S%z")

    def emit(self, event: Event) -> None:
        if isinstance(event, Message) and event.level == "warning":
            self.warnings.append(f"{event.step}: {event.text}" if event.step else event.text)
        if isinstance(event, ParityMeasured):
            self.parities.append(event)
        for sink in self.sinks:
            sink(event)

    def say(self, text: str, step: str = "", level: Any = "info") -> None:
        self.emit(Message(level, text, step))

    def run(self) -> RunResult:
        workflow = self.plan.loaded.workflow
        self.emit(RunStarted(workflow.workflow_id, tuple(step.name for step in self.plan.steps)))
        for note in self.plan.notes:
            self.say(note)
        if workflow.clean_cache:
            self._forget()
        self._warm_up()
        model, key = input_artifact(self.plan), self.plan.input_key
        assert key is not None
        self.evaluation.input(model, key)
        entry: Entry | None = None
        for step in self.plan.steps:
            self.under_way = step.name
            entry = self._step(step, model)
            model, key = entry.artifact(), entry.key
            self.evaluation.step(step, model, key, last=step is self.plan.steps[-1])
        self.under_way = None
        output = self._publish(entry)
        outcome = self._outcome()
        record = outcome.write(output)
        self.emit(RunFinished(str(output), outcome.seconds, str(record)))
        return RunResult(
            output, record, tuple(self.steps), tuple(self.evaluation.scores), outcome.seconds,
            tuple(self.evaluation.unmet),
        )  # fmt: skip

    def _outcome(self) -> Outcome:
        seconds = time.perf_counter() - self.started
        return Outcome(
            self.plan, self.started_at, seconds, self.steps, self.evaluation.scores, self.warnings, self.parities
        )

    def failed(self, error: ColdpressError) -> None:
        """Leave a record of what was done and why it ended, where the disk still takes one."""
        with contextlib.suppress(StoreError):
            self.say(f"what was done, and why it ended: {self._outcome().write_failure(error, self.under_way)}")

    def _forget(self) -> None:
        for step in self.plan.steps:
            if step.key is not None:
                with self._locked(step):
                    self.plan.store.forget(step.key)

    def _locked(self, step: Step) -> AbstractContextManager[None]:
        """Hold a step's key; say so when another run holds it."""
        assert step.key is not None
        waiting = "another run is making this step; waiting for it"
        return self.plan.store.lock(step.key, lambda: self.say(waiting, step.name))

    # -- workers ------------------------------------------------------------------------------------------------------

    def _warm_up(self) -> None:
        """Start the process with torch, if it will be needed: its imports are long. The other one follows."""
        missing = [step for step in self.plan.steps if step.key is None or self.plan.store.get(step.key) is None]
        if missing:
            alone = [step for step in missing if not step.hosts]
            torch = any(step.needs_torch for step in alone) or any(step.limits is not None for step in missing)
            if torch or alone:
                self._worker(torch)
            self._light_soon = torch and any(not step.needs_torch for step in missing)

    def _relay(self, event: Event) -> None:
        """An event of a worker. Its first one says that its imports are done: now the other may import."""
        if self._light_soon:
            self._light_soon = False
            self._worker(False)
        self.emit(event)

    def _worker(self, torch: bool) -> Worker:
        worker = self.workers.get(torch)
        if worker is None or not worker.alive:
            steps = [
                step for step in self.plan.steps if step.needs_torch == torch and not step.cached and not step.hosts
            ]
            worker = Worker(
                _WORKER_MODULE,
                preload=_preload(steps),
                log=self._log("torch" if torch else "light"),
                # The builder's own threads divide the work; BLAS threads below them cost a factor of two.
                environment={} if torch else {"OPENBLAS_NUM_THREADS": os.environ.get("OPENBLAS_NUM_THREADS", "1")},
            )
            self.workers[torch] = worker
        return worker

    def _log(self, name: str) -> Path:
        return self.plan.store.root / "logs" / f"{self.plan.loaded.workflow.workflow_id}-{name}.log"

    def _perform(
        self, kind: Any, step: str, model: Artifact, torch: bool, advice: str, **parameters: Any
    ) -> dict[str, Any]:
        job = self._job(kind, step, model, parameters)
        return self._worker(torch).perform(job, self._relay, advice=lambda: advice)

    def _run_pass(self, step: Step, model: Artifact, out: Path, work: Path) -> dict[str, Any]:
        """In one process, or in as many as the step has."""
        parameters = {
            "type": step.type, "config": step.config.model_dump(mode="json"), "output": str(out), "work": str(work),
            "logs": str(log_folder(self.plan, step)),
        }  # fmt: skip
        advice = _memory_advice(step)
        if not step.hosts:
            return self._perform("pass", step.name, model, step.needs_torch, advice, **parameters)
        self.group = WorkerGroup(
            _WORKER_MODULE,
            hosts=step.hosts,
            device=self.plan.accelerator.device,
            preload=_preload([step]),
            log=self._log(step.name),
        )
        aside = work / "outputs-of-other-ranks"
        try:
            outputs = [out, *(aside / str(rank) for rank in range(1, self.group.ranks))]
            for folder in outputs[1:]:
                folder.mkdir(parents=True, exist_ok=True)
            jobs = [self._job("pass", step.name, model, {**parameters, "output": str(folder)}) for folder in outputs]
            result = self.group.perform(jobs, self.emit, advice=lambda: advice)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        # Its memory is wanted for what comes next. (After an error its processes are ended; a stop must reach them.)
        self.group.close()
        self.group = None
        return result

    def _job(self, kind: Any, step: str, model: Artifact, parameters: Mapping[str, Any]) -> Job:
        return Job(
            kind=kind,
            step=step,
            model=artifact_to_dict(model),
            accelerator=self.plan.accelerator.model_dump(mode="json"),
            data_configs={name: config.model_dump(mode="json") for name, config in self.plan.data_configs.items()},
            trust_remote_code=self.plan.trust_remote_code,
            parameters=parameters,
        )

    def stop(self) -> None:
        for busy in (self.group, *self.workers.values()):
            if busy is not None:
                busy.stop()

    def close(self) -> None:
        for ended in (self.group, *self.workers.values()):
            if ended is not None:
                ended.close()

    # -- steps --------------------------------------------------------------------------------------------------------

    def _step(self, step: Step, model: Artifact) -> Entry:
        assert step.key is not None
        with self._locked(step):
            entry = self.plan.store.get(step.key, touch=True)
            cached = entry is not None
            entry = self._work(step, model) if entry is None else self._proved(step, model, entry)
        if cached and (told := logs_elsewhere(self.plan, step, entry)) is not None:
            self.say(told, step.name)
        result = _step_result(step, entry, cached)
        self.steps.append(result)
        self.emit(
            StepFinished(
                step=step.name,
                kind=step.type,
                cached=cached,
                seconds=result.seconds,
                peak_bytes=result.peak_bytes,
                peak_anonymous_bytes=result.peak_anonymous_bytes,
                output=str(entry.path),
            )
        )
        return entry

    def _work(self, step: Step, model: Artifact) -> Entry:
        """Run the pass, check what it made, prove it, commit it. On failure nothing of it stays but its checkpoints."""
        assert step.key is not None
        self.emit(StepStarted(step.name, step.type, step.key))
        out, work = self.plan.store.partial(step.key)
        done = False
        try:
            result = self._run_pass(step, model, out, work)
            artifact = artifact_from_dict(result["artifact"])
            if (difference := step.spec.mismatch(artifact.describe())) is not None:
                raise StepError(
                    f"step {step.name} made something else than was planned: {difference}",
                    hint="this is a bug in the pass; please report it with the config",
                )
            record = {
                "pass": step.type,
                "step": step.name,
                "coldpress": coldpress.__version__,
                "libraries": library_versions(LIBRARIES),
                "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "config": step.config.model_dump(mode="json"),
                "refers_to": _refers_to(artifact, self.plan.store.root),
                "ranks": sum(host.slots for host in step.hosts) or 1,
                **{name: result[name] for name in ("seconds", "peak_bytes", "peak_anonymous_bytes")},
                **({"logs": str(log_folder(self.plan, step))} if reporters_of(step) else {}),
            }
            if step.limits is not None:
                record["parity"] = self._prove(step, model, artifact)
            entry = self.plan.store.commit(step.key, artifact, record)
            done = True
            return entry
        except ColdpressError as error:
            self.emit(StepFailed(step.name, step.type, str(error)))
            raise _at_step(error, step, self.steps) from error
        finally:
            if not done:
                self.plan.store.discard(step.key, keep_work=True)

    def _proved(self, step: Step, model: Artifact, entry: Entry) -> Entry:
        """A finished step, measured if it was not (on this text), and judged by the limits of today."""
        if step.limits is None:
            return entry
        parity = entry.record.get("parity")
        if parity is None or parity.get("text") != text_identity(self.plan, step):
            parity = self._measure(step, model, entry.artifact())
            entry = self.plan.store.amend(entry, parity=parity)
        refuse_if_too_far(step, judge(step, parity))
        return entry

    def _prove(self, step: Step, reference: Artifact, candidate: Artifact) -> dict[str, Any]:
        """Compare the result of a step with its input on text; raises ParityError beyond the limit."""
        parity = self._measure(step, reference, candidate)
        refuse_if_too_far(step, judge(step, parity))
        return parity

    def _measure(self, step: Step, reference: Artifact, candidate: Artifact) -> dict[str, Any]:
        self.emit(StepStarted(step.name, "parity"))
        result = self._perform(
            "parity", step.name, candidate, True, "the result and one layer of its input are in memory: free some, "
            "or set parity.enabled to false for this step (run.json then says that nothing was proved)",
            reference=artifact_to_dict(reference), text=parity_text(self.plan, step),
        )  # fmt: skip
        figures = {name: result[name] for name in ("seconds", "peak_bytes", "peak_anonymous_bytes")}
        parity = {**result["parity"], **figures, "text": text_identity(self.plan, step)}
        self.emit(judge(step, parity))
        return parity

    # -- output -------------------------------------------------------------------------------------------------------

    def _publish(self, entry: Entry | None) -> Path:
        assert entry is not None, "the plan refuses a workflow without passes"
        output_dir = self.plan.output_dir
        target = output_dir / "model"
        if _already_published(output_dir, entry):
            return target
        with disk_errors(output_dir):
            (output_dir / "run.json").unlink(missing_ok=True)
        return publish(entry, output_dir)


def _preload(steps: Iterable[Step]) -> tuple[str, ...]:
    """Modules that the passes of these steps import."""
    return tuple(dict.fromkeys(module for step in steps for module in PASSES[step.type].preload))


def _step_result(step: Step, entry: Entry, cached: bool) -> StepResult:
    record = entry.record
    parity = record.get("parity") if step.limits is not None else None
    measured = None if parity is None else judge(step, parity)
    return StepResult(
        name=step.name,
        type=step.type,
        key=entry.key,
        cached=cached,
        seconds=record["seconds"],
        peak_bytes=record["peak_bytes"],
        peak_anonymous_bytes=record["peak_anonymous_bytes"],
        ranks=record.get("ranks", 1),
        path=entry.path,
        parity=measured,
        parity_seconds=0.0 if parity is None else parity["seconds"],
        parity_peak_bytes=0 if parity is None else parity["peak_bytes"],
    )


def _refers_to(artifact: Artifact, root: Path) -> list[str]:
    """Keys of other steps in the store that this artifact points into."""
    steps = (root / "steps").resolve()
    places = [place for place in (artifact.model, artifact.adapter, artifact.tokenizer) if place is not None]
    keys = {place.relative_to(steps).parts[0] for place in places if place.is_relative_to(steps)}
    return sorted(keys)


def _already_published(output_dir: Path, entry: Entry) -> bool:
    """Whether the last run put this very model there and nobody changed it."""
    import json

    try:
        record = json.loads((output_dir / "run.json").read_text(encoding="utf-8"))
        if record["output"]["key"] != entry.key:
            return False
        for name, (size, mtime_ns) in record["output"]["files"].items():
            status = (output_dir / "model" / name).stat()
            if (status.st_size, status.st_mtime_ns) != (size, mtime_ns):
                return False
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return True


def _memory_advice(step: Step) -> str:
    """What to change when the operating system killed a step."""
    estimate = "" if step.estimate is None else f"the plan estimated {step.estimate.ram / 1e9:.2f} GB; "
    if step.type in TRAINING_PASSES:
        return estimate + ("lower per_device_train_batch_size or max_seq_len, set gradient_checkpointing, or use QLoRA")
    return estimate + "close other programs or use a machine with more memory"


def _at_step(error: ColdpressError, step: Step, before: list[StepResult]) -> ColdpressError:
    """The same error, saying where it happened and what is already done."""
    done = ", ".join(result.name for result in before)
    message = error.message if step.name in error.message else f"step {step.name} ({step.type}): {error.message}"
    if done:
        message += f"\n  finished before it, and kept: {done}"
    return type(error)(message, hint=error.hint)
