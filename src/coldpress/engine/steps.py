"""The steps of a plan, done one by one: cached or worked, proved, committed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import coldpress
from coldpress.artifacts.base import Artifact
from coldpress.engine.logs import log_folder, logs_elsewhere, reporters_of
from coldpress.engine.outcome import LIBRARIES
from coldpress.engine.plan import Plan, Step
from coldpress.engine.proof import judge, parity_text, refuse_if_too_far, text_identity
from coldpress.engine.result import StepResult
from coldpress.engine.store import Entry
from coldpress.errors import ColdpressError, StepError
from coldpress.events import Message, Sink, StepFailed, StepFinished, StepStarted
from coldpress.hardware import library_versions
from coldpress.systems.job import artifact_from_dict, artifact_to_dict

__all__ = ["Steps", "Workers"]


class Workers(Protocol):
    """Who does the jobs: a crew."""

    def perform(
        self, plan: Plan, kind: Any, step: str, model: Artifact, torch: bool, advice: str, **parameters: Any
    ) -> dict[str, Any]: ...

    def run_pass(self, plan: Plan, step: Step, model: Artifact, out: Path, work: Path) -> dict[str, Any]: ...


class Steps:
    """Does the steps of one plan with a crew, and keeps what came out."""

    def __init__(self, plan: Plan, crew: Workers, emit: Sink) -> None:
        self.plan, self._crew, self._emit = plan, crew, emit
        self.results: list[StepResult] = []
        """Of the steps that are done."""

    def locked(self, step: Step) -> AbstractContextManager[None]:
        """Hold a step's key; say so when another run holds it."""
        assert step.key is not None
        waiting = "it is being made already, by another run or trial; waiting for it"
        return self.plan.store.lock(step.key, lambda: self._say(waiting, step.name))

    def forget(self) -> None:
        """Delete what the store has of them."""
        for step in self.plan.steps:
            if step.key is not None:
                with self.locked(step):
                    self.plan.store.forget(step.key)

    def _say(self, text: str, step: str) -> None:
        self._emit(Message("info", text, step))

    def do(self, step: Step, model: Artifact, *, prove: bool = True) -> Entry:
        """The finished step, from the store or worked on `model` now; raises StepError and its kin.

        Without `prove` it may lie in the store unproved, until `prove` or whoever uses it next measures it.
        """
        assert step.key is not None
        with self.locked(step):
            entry = self.plan.store.get(step.key, touch=True)
            cached = entry is not None
            if entry is None:
                entry = self._work(step, model, prove=prove)
            elif prove:
                entry = self._proved(step, model, entry)
        if cached and (told := logs_elsewhere(self.plan, step, entry)) is not None:
            self._say(told, step.name)
        result = _step_result(step, entry, cached)
        self.results.append(result)
        self._emit(
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

    def prove(self, step: Step, model: Artifact, entry: Entry) -> None:
        """Prove the step that was done last, where that was put off; raises ParityError beyond its limit."""
        with self.locked(step):
            entry = self._proved(step, model, self.plan.store.get(entry.key) or entry)
        self.results[-1] = _step_result(step, entry, self.results[-1].cached)

    def _work(self, step: Step, model: Artifact, *, prove: bool) -> Entry:
        """Run the pass, check what it made, prove it, commit it. On failure nothing of it stays but its checkpoints."""
        assert step.key is not None
        self._emit(StepStarted(step.name, step.type, step.key))
        out, work = self.plan.store.partial(step.key)
        done = False
        try:
            result = self._crew.run_pass(self.plan, step, model, out, work)
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
            if prove and step.limits is not None:
                record["parity"] = self._prove(step, model, artifact)
            entry = self.plan.store.commit(step.key, artifact, record)
            done = True
            return entry
        except ColdpressError as error:
            self._emit(StepFailed(step.name, step.type, str(error)))
            raise _at_step(error, step, self.results) from error
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
        self._emit(StepStarted(step.name, "parity"))
        advice = (
            "the result and one layer of its input are in memory: free some, or set parity.enabled to false for this "
            "step (run.json then says that nothing was proved)"
        )
        result = self._crew.perform(
            self.plan, "parity", step.name, candidate, True, advice,
            reference=artifact_to_dict(reference), text=parity_text(self.plan, step),
        )  # fmt: skip
        figures = {name: result[name] for name in ("seconds", "peak_bytes", "peak_anonymous_bytes")}
        parity = {**result["parity"], **figures, "text": text_identity(self.plan, step)}
        self._emit(judge(step, parity))
        return parity


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


def _at_step(error: ColdpressError, step: Step, before: Sequence[StepResult]) -> ColdpressError:
    """The same error, saying where it happened and what is already done."""
    done = ", ".join(result.name for result in before)
    message = error.message if step.name in error.message else f"step {step.name} ({step.type}): {error.message}"
    if done:
        message += f"\n  finished before it, and kept: {done}"
    return type(error)(message, hint=error.hint)
