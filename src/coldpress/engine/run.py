"""Do what the plan says, step by step: cached or worked, proved, committed, measured, published."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from coldpress.config.load import LoadedConfig
from coldpress.engine.crew import Crew
from coldpress.engine.evaluation import Evaluation
from coldpress.engine.outcome import Outcome
from coldpress.engine.plan import Plan, check_plan, input_artifact, make_plan
from coldpress.engine.result import RunResult
from coldpress.engine.steps import Steps
from coldpress.engine.store import Entry, disk_errors, publish
from coldpress.errors import ColdpressError, Interrupted, PlanError, StoreError
from coldpress.events import Event, Message, ParityMeasured, RunFinished, RunStarted, Sink
from coldpress.record import SearchRecord

__all__ = ["Before", "complete_plan", "run", "run_plan"]


def run(loaded: LoadedConfig, *, sinks: Iterable[Sink] = (), trust_remote_code: bool = False) -> RunResult:
    """Run a workflow to its end.

    Raises ConfigError before any work when it cannot run, StepError and its kin when a step fails, Interrupted when
    the user stops it. Whatever was finished stays in the store, and the next run goes on from there.
    """
    return run_plan(complete_plan(loaded, trust_remote_code=trust_remote_code), tuple(sinks))


def complete_plan(loaded: LoadedConfig, *, trust_remote_code: bool = False, any_steps: bool = False) -> Plan:
    """A plan that can run, of a model that is here: it is downloaded if need be. Raises ConfigError.

    With `any_steps` its steps may be refused: a search has others.
    """
    plan = make_plan(loaded, trust_remote_code=trust_remote_code, hash_everything=True)
    if plan.model.hub_id is not None:
        check_plan(plan, to_run=True)
        _download(plan.model.hub_id, plan.model.revision)
        plan = make_plan(loaded, trust_remote_code=trust_remote_code, hash_everything=True)
    if any_steps:
        kept = tuple(one for one in plan.refusals if not one.path.startswith("passes."))
        check_plan(dataclasses.replace(plan, refusals=kept), to_run=True)
    else:
        check_plan(plan, to_run=True)
    plan.store.prepare()
    _try_output(plan.output_dir)
    with disk_errors(plan.store.root):
        plan.store.digests.save()
    return plan


def _try_output(folder: Path) -> None:
    """Make the output folder, before the work whose result goes there, and leave no trace of that."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"output_dir {folder} cannot be made: {error.strerror}", hint="give another output_dir"
        ) from error
    finally:
        for place in missing:
            with contextlib.suppress(OSError):  # a run beside this one may have written there
                place.rmdir()


@dataclasses.dataclass(frozen=True)
class Before:
    """What led to a run: a search that chose its steps."""

    search: SearchRecord
    config: LoadedConfig
    """With the search in it."""
    seconds: float
    started: str
    warnings: tuple[str, ...]


def run_plan(plan: Plan, sinks: tuple[Sink, ...], before: Before | None = None) -> RunResult:
    """Do what a plan says; see `run`."""
    session = _Session(plan, sinks, before)
    try:
        with plan.store.in_use():
            return session.run()
    except Interrupted:
        raise
    except ColdpressError as error:
        session.failed(error)
        raise
    except KeyboardInterrupt:
        session.crew.stop()
        raise Interrupted(
            "stopped; finished steps are kept", hint="the same command goes on from where this one stopped"
        ) from None
    finally:
        session.crew.close()


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

    def __init__(self, plan: Plan, sinks: tuple[Sink, ...], before: Before | None) -> None:
        self.plan = plan
        self.before = before
        self.sinks = sinks
        self.crew = Crew(plan.loaded.workflow.workflow_id, plan.store.root / "logs", self.emit)
        self.steps = Steps(plan, self.crew, self.emit)
        self.evaluation = Evaluation(plan, functools.partial(self.crew.perform, plan), self.emit)
        self.warnings: list[str] = [] if before is None else [*before.warnings]
        self.parities: list[ParityMeasured] = []
        self.under_way: str | None = None
        """Step that is worked on."""
        self.started = time.perf_counter()
        self.started_at = time.strftime("%Y-%m-%dT%H:%M:%S%z") if before is None else before.started

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
        for step in self.plan.steps:
            if step.unproved is not None:
                self.say(f"handed over without a proof: {step.unproved}", step.name, "warning")
        if workflow.clean_cache:
            self.steps.forget()
        self.crew.warm_up(self.plan)
        model, key = input_artifact(self.plan), self.plan.input_key
        assert key is not None
        entry: Entry | None = None
        if self.plan.steps:
            self.evaluation.input(model, key)
        else:
            self.evaluation.alone(model, key)
        for step in self.plan.steps:
            self.under_way = step.name
            entry = self.steps.do(step, model)
            model, key = entry.artifact(), entry.key
            self.evaluation.step(step, model, key, last=step is self.plan.steps[-1])
        self.under_way = None
        output = None if entry is None else self._publish(entry)
        outcome = self._outcome()
        record = outcome.write(output)
        output = output or model.path
        self.emit(RunFinished(str(output), outcome.seconds, str(record)))
        return RunResult(
            output, record, tuple(self.steps.results), tuple(self.evaluation.scores), outcome.seconds,
            tuple(self.evaluation.unmet), None if self.before is None else self.before.search,
        )  # fmt: skip

    def _outcome(self) -> Outcome:
        seconds = time.perf_counter() - self.started + (0.0 if self.before is None else self.before.seconds)
        search, asked = (None, None) if self.before is None else (self.before.search, self.before.config)
        return Outcome(
            self.plan, self.started_at, seconds, self.steps.results, self.evaluation.scores, self.warnings,
            self.parities, search, asked,
        )  # fmt: skip

    def failed(self, error: ColdpressError) -> None:
        """Leave a record of what was done and why it ended, where the disk still takes one."""
        with contextlib.suppress(StoreError):
            self.say(f"what was done, and why it ended: {self._outcome().write_failure(error, self.under_way)}")

    def _publish(self, entry: Entry) -> Path:
        output_dir = self.plan.output_dir
        target = output_dir / "model"
        if _already_published(output_dir, entry):
            return target
        with disk_errors(output_dir):
            (output_dir / "run.json").unlink(missing_ok=True)
        return publish(entry, output_dir)


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
