"""One trial: its plan, its steps, and its measurements from cheap to dear for as long as it is in the race.

The proof of the last step stands between what is read off its files and what is measured by running it. (Steps before
the last are proved as they are done: other trials go on from them.)
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from coldpress.artifacts.base import Artifact
from coldpress.config.load import LoadedConfig
from coldpress.config.metrics import Metric
from coldpress.config.space import Point
from coldpress.engine.crew import Crew
from coldpress.engine.evaluation import Baselines, Evaluation
from coldpress.engine.plan import Plan, Step, input_artifact, make_plan
from coldpress.engine.steps import Steps
from coldpress.engine.store import Store
from coldpress.errors import ColdpressError, ConfigError, Interrupted, StoreError
from coldpress.evaluate.measure import is_cost
from coldpress.events import Sink
from coldpress.goals import bound
from coldpress.scores import Score
from coldpress.search.gate import Gate
from coldpress.search.objectives import Objective, dearness, is_cheap, missed
from coldpress.search.trials import Trial, no_worse, total_violation
from coldpress.units import apart, quantity, wanted

__all__ = ["Asked", "Bench", "Planned", "again", "plan_trial", "run_trial", "unmeasured"]

_ENDS_ALL = (Interrupted, StoreError)
"""Errors that are not the trial's: the next one would end the same way."""
_QUALITY = ("accuracy", "perplexity", "divergence", "custom", "lm_eval")


@dataclass(frozen=True)
class Asked:
    """A setting that is to be tried."""

    number: int
    point: Point
    settings: Mapping[str, Any]
    steps: int | None = None
    """So many of the workflow's steps; None is all, and only then goals stop it."""
    rivals: tuple[Trial, ...] = ()
    """What it competes with: where one of them is no worse, nothing dear is done for it."""
    certain: bool = False
    """Its last step is to be proved, whatever is known of it before."""
    lacking: float = 0.0
    """What it may lack of its goals and be measured on, to know how much it lacks in all."""


@dataclass(frozen=True)
class Planned:
    """A trial before it runs: a plan, or the reason why it will not run."""

    asked: Asked
    plan: Plan | None = None
    refused: Trial | None = None
    reason: str = ""
    """Why it is refused, in words that it shares with others."""


@dataclass
class Bench:
    """What trials share: what is known of the input, who may use the machine, what was made already."""

    emit: Sink
    measuring: Crew
    """Measures cost, with all the machine."""
    gate: Gate = field(default_factory=Gate)
    baselines: Baselines = field(default_factory=dict)
    objectives: tuple[Objective, ...] = ()
    seen: set[str] = field(default_factory=set)
    """Keys of the steps that a trial asked for."""
    steps_run: int = 0
    steps_shared: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


def plan_trial(
    asked: Asked,
    loaded: LoadedConfig,
    baselines: Baselines,
    *,
    trust_remote_code: bool,
    hash_everything: bool = True,
    store: Store | None = None,
) -> Planned:
    """The plan of a setting; refused where it cannot work, or where its size is provably out of bounds.

    `baselines`: scores of the input. `hash_everything` and `store` are those of `make_plan`.
    """

    def out(why: str, violation: float = 0.0, reason: str = "") -> Planned:
        trial = _trial(asked, "pruned", why=why, violation=violation, judged=False)
        return Planned(asked, refused=trial, reason=reason or why)

    try:
        resolved = loaded.at(asked.point)
    except ConfigError as error:
        return out("; ".join(f"{one.path}: {one.message}" for one in error.problems))
    if asked.steps is not None:
        passes = dict(list(resolved.workflow.passes.items())[: asked.steps])
        resolved = dataclasses.replace(resolved, workflow=resolved.workflow.model_copy(update={"passes": passes}))
    plan = make_plan(resolved, trust_remote_code=trust_remote_code, hash_everything=hash_everything, store=store)
    # What a training reports to a service goes to a folder of its own.
    plan = dataclasses.replace(plan, output_dir=plan.output_dir / "trials" / str(asked.number))
    problems = [*plan.refusals, *plan.blockers]
    if problems:
        return out("; ".join(one.message for one in problems))
    weights = plan.steps[-1].model_bytes
    too_large = None if asked.steps is not None else _too_large(plan, baselines)
    if too_large is not None:
        metric, allowed = too_large
        have, most = apart(weights, allowed, "bytes")
        why = f"{metric}: its weights alone are {have}, allowed are {most}"
        reason = f"{metric}: weights alone are over {quantity(allowed, 'bytes')}"
        return out(why, (weights - allowed) / (abs(allowed) or 1.0), reason)
    return Planned(asked, plan)


def _too_large(plan: Plan, baselines: Baselines) -> tuple[str, float] | None:
    """The metric whose goal of size is missed, which needs no run to know, and the size that is allowed."""
    weights = plan.steps[-1].model_bytes
    evaluation = unmeasured(plan, baselines)
    for metric, decides in evaluation.metrics_of(plan.steps[-1], last=True):
        if metric.type != "size_on_disk" or not decides:
            continue
        for sub in metric.sub_types:
            baseline = evaluation.baseline(metric, sub.name)
            if sub.goal is None or (sub.goal.type != "threshold" and baseline is None):
                continue
            allowed = bound(sub.goal, baseline, higher_is_better=False)
            if weights > allowed:
                return metric.name, allowed
    return None


def unmeasured(plan: Plan, baselines: Baselines) -> Evaluation:
    """What a plan says of its measurements, for those who ask before anything can be measured."""

    def nothing(*_: Any, **__: Any) -> dict[str, Any]:
        raise AssertionError("a plan measures nothing")

    return Evaluation(plan, nothing, lambda event: None, baselines=baselines)


def again(twin: Trial, asked: Asked) -> Trial:
    """A setting that makes the very model of another trial."""
    return dataclasses.replace(
        twin, number=asked.number, point=asked.point, settings=asked.settings, seconds=0.0, same_as=twin.number
    )


def run_trial(asked: Asked, plan: Plan, crew: Crew, bench: Bench) -> Trial:
    """Do the steps and measure the result. What goes wrong in it is the trial's end, not the search's.

    Raises Interrupted and StoreError: a cache that cannot be written ends every trial.
    """
    started = time.perf_counter()
    run = _Run(asked, plan, crew, bench)
    try:
        run.go()
    except _ENDS_ALL:
        raise
    except ColdpressError as error:
        return _trial(
            asked, "failed", why=_first_line(error), scores=tuple(run.scores), key=run.key, judged=False,
            seconds=time.perf_counter() - started,
        )  # fmt: skip
    unmet = missed(run.judged)
    beaten = run.beaten_by is not None
    return _trial(
        asked,
        "unproved" if beaten else "infeasible" if unmet else "feasible",
        why=f"trial {run.beaten_by} is no worse" if beaten else "; ".join(_said(score) for score in unmet),
        violation=run.lacks,
        judged=not (run.left_out or beaten or run.key is None or asked.steps is not None),
        scores=tuple(run.scores),
        key=run.key,
        seconds=time.perf_counter() - started,
        proved=run.proved,
    )


class _Run:
    """A trial under way."""

    def __init__(self, asked: Asked, plan: Plan, crew: Crew, bench: Bench) -> None:
        self.asked, self.plan, self.crew, self.bench = asked, plan, crew, bench
        self.steps = Steps(plan, _Shared(crew, bench.gate), bench.emit)
        self.evaluation = Evaluation(plan, self._perform, bench.emit, baselines=bench.baselines)
        self.scores: list[Score] = []
        self.judged: list[Score] = []
        """Scores whose goals decide."""
        self.left_out = False
        """Whether a goal was not judged, because others were missed."""
        self.key: str | None = None
        """Of the last step, once it is done."""
        self.proved = False
        self.beaten_by: int | None = None
        """Number of a rival that is no worse."""

    @property
    def lacks(self) -> float:
        """Of its goals together, as far as they were judged."""
        return total_violation(self.judged)

    def go(self) -> None:
        """All steps; after each what its evaluator asks, until it lacks more than it may."""
        model, key = input_artifact(self.plan), self.plan.input_key
        assert key is not None
        self.evaluation.input(model, key)
        for step in self.plan.steps:
            assert step.key is not None
            last = step is self.plan.steps[-1]
            with self.bench.lock:
                fresh = step.key not in self.bench.seen and self.plan.loaded.workflow.clean_cache
                self.bench.seen.add(step.key)
            if fresh:
                with self.steps.locked(step):
                    self.plan.store.forget(step.key)
            entry = self.steps.do(step, model, prove=not last)
            with self.bench.lock:
                if self.steps.results[-1].cached:
                    self.bench.steps_shared += 1
                else:
                    self.bench.steps_run += 1
            before, model, key = model, entry.artifact(), entry.key
            metrics = sorted(self.evaluation.metrics_of(step, last=last), key=lambda pair: dearness(pair[0]))
            met = self._measured([one for one in metrics if is_cheap(one[0])], step, model, key)
            if last:
                self.key = key
                self.proved = step.limits is None or self.asked.certain or (met and self._in_race(step))
                if self.proved:
                    self.steps.prove(step, before, entry)
            if self.beaten_by is not None:
                return
            if not self._measured([one for one in metrics if not is_cheap(one[0])], step, model, key):
                return

    def _measured(self, metrics: Sequence[tuple[Metric, bool]], step: Step, model: Artifact, key: str) -> bool:
        """Measure a result, of one that misses a goal only the other goals; False where it lacks more than it may."""
        whole = self.asked.steps is None
        for metric, decides in metrics:
            goals = any(sub.goal is not None for sub in metric.sub_types)
            if whole and self.lacks > (self.asked.lacking if goals else 0.0):
                self.left_out = self.left_out or goals
                continue
            found = self.evaluation.measure(metric, step.name, model, key, decides=decides)
            self.scores += found
            if whole or metric.type in _QUALITY:
                self.judged += found
        return not whole or self.lacks <= self.asked.lacking

    def _in_race(self, step: Step) -> bool:
        """Whether the last step's result may still be chosen, as far as is known before its proof."""
        own = [score for score in self.scores if score.model == step.name]
        rival = no_worse(own, self.asked.rivals, self.bench.objectives)
        self.beaten_by = None if rival is None else rival.number
        return rival is None

    def _perform(
        self, kind: Any, step: str, model: Artifact, torch: bool, advice: str, **parameters: Any
    ) -> dict[str, Any]:
        """A measurement: what is timed, alone and by the processes that have the whole machine."""
        if is_cost(parameters["metric"]["type"]):
            with self.bench.gate.alone():
                return self.bench.measuring.perform(self.plan, kind, step, model, torch, advice, **parameters)
        with self.bench.gate.shared():
            return self.crew.perform(self.plan, kind, step, model, torch, advice, **parameters)


class _Shared:
    """A crew whose jobs let others work beside them."""

    def __init__(self, crew: Crew, gate: Gate) -> None:
        self._crew, self._gate = crew, gate

    def perform(self, *arguments: Any, **parameters: Any) -> dict[str, Any]:
        with self._gate.shared():
            return self._crew.perform(*arguments, **parameters)

    def run_pass(self, *arguments: Any) -> dict[str, Any]:
        with self._gate.shared():
            return self._crew.run_pass(*arguments)


def _trial(asked: Asked, state: Any, **more: Any) -> Trial:
    return Trial(asked.number, asked.point, asked.settings, state, **more)


def _first_line(error: ColdpressError) -> str:
    return error.message.splitlines()[0]


def _said(score: Score) -> str:
    """A goal that is missed, in words."""
    assert score.goal is not None
    name = Objective(score.metric, score.sub_type, 0)
    sure = "" if score.goal.sure or score.standard_error is None else ", within two standard errors"
    return f"{name} {wanted(score.value, score.goal.bound, score.unit, higher_is_better=score.higher_is_better)}{sure}"
