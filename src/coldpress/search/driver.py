"""A search from its first trial to the model that is handed over.

Trials are asked of the sampler and told to it in one order, whatever order they end in: with the same seed a search
that was stopped goes through the same trials again, finds them in the store, and goes on where it was.

    joint          a trial is a setting of all steps
    pass-by-pass   the settings of one step are tried on the best result of the steps before it; where what comes of it
                   misses a goal, the next best is gone on with
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from coldpress.config.load import LoadedConfig
from coldpress.config.search_strategy import SearchStrategy
from coldpress.config.space import Point, Space
from coldpress.engine.crew import Crew
from coldpress.engine.evaluation import Evaluation
from coldpress.engine.outcome import Outcome
from coldpress.engine.plan import Plan, input_artifact
from coldpress.engine.result import RunResult
from coldpress.engine.run import Before, complete_plan, run_plan
from coldpress.errors import ColdpressError, ConfigError, Interrupted, StepError, StoreError, UnmetError
from coldpress.events import (
    Event,
    Message,
    SearchFinished,
    SearchStarted,
    Sink,
    TrialFinished,
    TrialStarted,
)
from coldpress.record import SearchRecord
from coldpress.search.gate import Room
from coldpress.search.objectives import losses, objectives_of
from coldpress.search.outlook import first_setting, most_trials
from coldpress.search.recorded import figures, search_record
from coldpress.search.samplers import check_sampler, make_sampler
from coldpress.search.trial_run import Asked, Bench, Planned, again, plan_trial, run_trial
from coldpress.search.trials import Choice, Trial, choose, nearest, ranked
from coldpress.summary import lacks_text
from coldpress.units import settings_text

__all__ = ["search"]

_CORES_A_TRIAL = 4
"""Fewer than these make a trial slower than it makes the search faster."""


def search(loaded: LoadedConfig, *, sinks: Iterable[Sink] = (), trust_remote_code: bool = False) -> RunResult:
    """Search the space of a workflow and hand over the best model that meets the goals.

    Without one that does, the nearest is handed over, and `RunResult.unmet` says what it lacks. Raises UnmetError where
    there is no model to hand over, StepError where every trial failed, Interrupted, and ConfigError or
    MissingExtraError before any work.
    """
    assert loaded.space is not None
    assert loaded.workflow.strategy is not None
    check_sampler(loaded.workflow.strategy.sampler)
    first, _ = first_setting(loaded)
    plan = complete_plan(first, trust_remote_code=trust_remote_code, any_steps=True)
    driver = _Search(loaded, plan, loaded.workflow.strategy, tuple(sinks), trust_remote_code)
    with plan.store.in_use():  # nobody prunes it for as long
        before, resolved = driver.run()
    final = complete_plan(resolved, trust_remote_code=trust_remote_code)
    return run_plan(final, tuple(sinks), before)


_IN_VAIN = 1000
"""Settings in a row that are refused, or are models that are there, after which no further ones are looked at: in a
large space that would not end."""


class _Stopped(Exception):
    """A limit of the search is reached: why."""


class _Search:
    def __init__(
        self, loaded: LoadedConfig, plan: Plan, strategy: SearchStrategy, sinks: tuple[Sink, ...], trust: bool
    ) -> None:
        assert loaded.space is not None
        self.loaded, self.plan, self.strategy, self.trust = loaded, plan, strategy, trust
        self.space: Space = loaded.space
        self.objectives = objectives_of(plan.evaluators.values())
        self.trials: list[Trial] = []
        self.stopped = ""
        self.warnings: list[str] = []
        self._sinks = sinks
        self._said: set[str] = set()
        self._sinks_lock = threading.Lock()
        self._started = time.perf_counter()
        self._started_at = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self._count = strategy.max_concurrent_trials or max(1, plan.hardware.cores // _CORES_A_TRIAL)
        threads = None if self._count == 1 else max(1, plan.hardware.threads // self._count)
        self._crews = [self._crew(f"trials-{number}", threads) for number in range(self._count)]
        measuring = self._crews[0] if self._count == 1 else self._crew("measuring", None)
        self._bench = Bench(self._emit, measuring, objectives=self.objectives)
        self._idle: queue.SimpleQueue[Crew] = queue.SimpleQueue()
        for crew in self._crews:
            self._idle.put(crew)
        self._pool = ThreadPoolExecutor(max_workers=self._count)
        self._room = Room(plan.hardware.available)

    def _crew(self, name: str, threads: int | None) -> Crew:
        workflow = self.loaded.workflow.workflow_id
        return Crew(f"{workflow}-{name}", self.plan.store.root / "logs", self._emit, threads=threads)

    # -- events -------------------------------------------------------------------------------------------------------

    def _emit(self, event: Event) -> None:
        """To the sinks, one at a time; what every trial says again is said once."""
        with self._sinks_lock:
            trial = getattr(_under_way, "number", None)
            if isinstance(event, Message):
                if event.text in self._said:
                    return
                self._said.add(event.text)
                if event.level == "warning":
                    self.warnings.append(f"{event.step}: {event.text}" if event.step else event.text)
            elif trial is not None:
                event = _of_trial(event, trial)
            if isinstance(event, Message) and trial is not None:
                event = dataclasses.replace(event, step=f"trial {trial} {event.step}".rstrip())
            for sink in self._sinks:
                sink(event)

    # -- the whole ----------------------------------------------------------------------------------------------------

    def run(self) -> tuple[Before, LoadedConfig]:
        """Every trial, and the config of the one that is handed over."""
        try:
            return self._run()
        except Interrupted:
            raise
        except StoreError as error:
            self._failed(error)
            raise type(error)(f"{error.message}; {self._so_far()}", hint=error.hint) from error
        except ColdpressError as error:
            self._failed(error)
            raise
        except KeyboardInterrupt:
            for crew in {*self._crews, self._bench.measuring}:
                crew.stop()
            raise Interrupted(
                self._so_far(), hint="the same command goes through what is done and on from there"
            ) from None
        finally:
            for crew in {*self._crews, self._bench.measuring}:
                crew.close()
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _run(self) -> tuple[Before, LoadedConfig]:
        workflow = self.loaded.workflow
        self._emit(
            SearchStarted(
                workflow.workflow_id, self.strategy.sampler, self.space.size, most_trials(self.strategy, self.space)
            )
        )
        for note in self.plan.notes:
            self._emit(Message("info", note))
        asked = self.strategy.sampler_config.max_samples
        if asked > self.space.size and self.strategy.execution_order == "joint":
            text = f"max_samples is {asked} and the space has {self.space.size} settings: each is tried once"
            self._emit(Message("info", text))
        self._measure_input()
        try:
            if self.strategy.execution_order == "joint":
                self._joint()
            else:
                self._pass_by_pass()
        except _Stopped as stopped:
            self.stopped = str(stopped)
        return self._conclude()

    def _measure_input(self) -> None:
        """Once, before the trials; so far as all of them compare with it."""
        model, key = input_artifact(self.plan), self.plan.input_key
        assert key is not None
        perform = functools.partial(self._crews[0].perform, self.plan)
        evaluation = Evaluation(self.plan, perform, self._emit)
        self._crews[0].warm_up(self.plan)
        evaluation.input(model, key)
        self._bench.baselines.update(evaluation.baselines)

    def _joint(self) -> None:
        for _ in self._tried(self.space, {}, None):
            pass

    def _pass_by_pass(self) -> None:
        if self.space.steps:
            self._descend(list(self.space.steps), {})
        else:
            self._joint()

    def _descend(self, levels: list[str], prefix: Point) -> bool:
        """Try one step's settings on what was chosen before it, and go on from the best; whether the goals were met."""
        step, *deeper = levels
        names = list(self.loaded.workflow.passes)
        upto = names.index(step) + 1 if deeper else None
        found = list(self._tried(self.space.of_step(step), prefix, upto))
        if not deeper:
            return any(trial.state == "feasible" for trial in found)
        for trial in ranked(found, self.objectives):
            certain = trial if trial.proved else self._certain(trial, upto)
            if certain.state != "failed" and self._descend(deeper, trial.point):
                return True
        return False

    # -- trials -------------------------------------------------------------------------------------------------------

    def _tried(self, space: Space, prefix: Point, steps: int | None) -> Iterator[Trial]:
        """Trials of a space in the order of asking, as they are done; `prefix` is what was chosen before.

        Raises _Stopped at a limit of the strategy.
        """
        config = self.strategy.sampler_config
        budget = most_trials(self.strategy, space)
        sampler = make_sampler(
            self.strategy.sampler, space, objectives=len(self.objectives), seed=config.seed, budget=budget
        )
        running: deque[tuple[Point, Future[Trial]]] = deque()
        done: list[Trial] = []
        samples = config.max_samples or space.size
        run = in_vain = 0
        exhausted = False
        try:
            while True:
                while run < samples and len(running) < self._count and not self._limit(len(running)):
                    point = sampler.ask()
                    exhausted = point is None
                    if point is None:
                        break
                    # Those told by now, and not whoever is done by now: that depends on the machine.
                    planned = self._plan({**prefix, **point}, steps, len(running), tuple(done))
                    run += planned.refused is None  # what the plan rules out costs nothing, so it does not count
                    running.append((point, self._pool.submit(self._try, planned)))
                if not running:
                    if run < samples and not exhausted:
                        raise _Stopped(self._limit(0))
                    return
                point, future = running.popleft()
                trial = self._done(future.result())
                done.append(trial)
                sampler.tell(point, losses(self.objectives, trial.scores), trial.told)
                yield trial
                if self.strategy.stop_when_goals_met and steps is None and trial.state == "feasible":
                    raise _Stopped("a trial met every goal")
                in_vain = in_vain + 1 if trial.state == "pruned" or trial.same_as is not None else 0
                if in_vain >= _IN_VAIN:
                    raise _Stopped(f"{in_vain} settings one after the other that need no run")
        finally:
            for _, future in running:
                future.cancel()  # those under way end with their processes

    def _limit(self, running: int) -> str:
        """Why no further trial begins; empty while there is none."""
        strategy = self.strategy
        begun = sum(trial.state != "pruned" and trial.same_as is None for trial in self.trials) + running
        if strategy.max_iter is not None and begun >= strategy.max_iter:
            return f"max_iter: {strategy.max_iter} trials"
        if strategy.max_time is not None and time.perf_counter() - self._started >= strategy.max_time:
            return f"max_time: {strategy.max_time:g} s"
        return ""

    def _plan(self, point: Point, steps: int | None, running: int, rivals: tuple[Trial, ...]) -> Planned:
        """A trial that is to run beside the others."""
        number = len(self.trials) + running + 1
        asked = Asked(number, point, self.space.settings(point), steps, rivals)
        planned = plan_trial(asked, self.loaded, self._bench.baselines, trust_remote_code=self.trust)
        twin = None if planned.plan is None else self._twin(planned.plan.steps[-1].key)
        if twin is None:
            return planned
        # Options without effect beside others make settings that are the same model.
        return Planned(asked, refused=again(twin, asked))

    def _twin(self, key: str | None) -> Trial | None:
        """The trial that made this very model."""
        return next((one for one in self.trials if key is not None and one.key == key and one.same_as is None), None)

    def _try(self, planned: Planned) -> Trial:
        if planned.refused is not None:
            return planned.refused
        assert planned.plan is not None
        crew = self._idle.get()
        _under_way.number = planned.asked.number
        try:
            with self._room.taken(planned.plan.estimate.ram):
                self._emit(TrialStarted(planned.asked.number, planned.asked.settings))
                return run_trial(planned.asked, planned.plan, crew, self._bench)
        finally:
            _under_way.number = None
            self._idle.put(crew)

    def _done(self, trial: Trial) -> Trial:
        """Note a trial and tell of it; one that made the very model of another is that one again."""
        twin = self._twin(trial.key)
        if twin is not None:
            trial = dataclasses.replace(trial, same_as=twin.number)
        self.trials.append(trial)
        self._tell(trial)
        return trial

    def _certain(self, trial: Trial, steps: int | None, lacking: float = 0.0) -> Trial:
        """A trial that is to be handed over or gone on with, proved now, and measured on while it lacks no more."""
        asked = Asked(trial.number, trial.point, trial.settings, steps, certain=True, lacking=lacking)
        planned = plan_trial(asked, self.loaded, self._bench.baselines, trust_remote_code=self.trust)
        found = dataclasses.replace(self._try(planned), same_as=trial.same_as)
        self.trials[trial.number - 1] = found
        self._tell(found)
        return found

    def _tell(self, trial: Trial) -> None:
        choice = self._choice()
        best = choice is not None and choice.trial is trial
        self._emit(
            TrialFinished(
                trial.number,
                trial.settings,
                trial.state,
                trial.why,
                figures(trial, self.objectives),
                trial.seconds,
                best,
            )
        )

    # -- the end ------------------------------------------------------------------------------------------------------

    def _whole(self) -> list[Trial]:
        """Trials of the whole workflow: of a part of its steps nothing can be handed over."""
        step_of = {dimension.name: dimension.step for dimension in self.space.dimensions}
        return [one for one in self.trials if {step_of[name] for name in one.point} == set(self.space.steps)]

    def _choice(self) -> Choice | None:
        return choose(self._whole(), self.objectives)

    def _conclude(self) -> tuple[Before, LoadedConfig]:
        choice = self._final()
        record = self._record(choice)
        states = Counter(trial.state for trial in self._whole())
        self._emit(
            SearchFinished(
                len(self.trials),
                states["feasible"],
                choice.trial.number,
                choice.why,
                record.seconds,
                self.stopped,
                states["unproved"],
            )
        )
        seconds = time.perf_counter() - self._started
        found = self.loaded.at(choice.trial.point)
        kept = found.workflow.model_copy(update={"clean_cache": False})  # its steps are those of this search
        before = Before(record, self.loaded, seconds, self._started_at, tuple(self.warnings))
        return before, dataclasses.replace(found, workflow=kept)

    def _final(self) -> Choice:
        """What is handed over: the best of those whose proof holds.

        Where none meets the goals, whoever may lack the least is measured on, until one is known to lack no more.
        """
        while True:
            choice = self._choice() or self._nearest(self._whole())
            if choice.trial.proved and choice.trial.judged:
                return choice
            known = [one.violation for one in nearest(self._whole(), len(self.trials)) if one.proved and one.judged]
            self._certain(choice.trial, None, min(known, default=math.inf))

    def _nearest(self, trials: list[Trial]) -> Choice:
        """Of trials of which none meets the goals, the one with a model that lacks the least."""
        near = [trial for trial in nearest(trials, len(trials)) if trial.key is not None]
        if near:
            why = f"no trial meets every goal; of the models there are this one lacks the least: {near[0].why}"
            return Choice(near[0], why)
        listed = "".join(
            f"\n  trial {one.number} ({settings_text(one.settings)}) {lacks_text(one)}: {one.why}"
            for one in nearest(trials)
        )
        if listed:
            raise UnmetError(
                f"no setting can meet the goals, and none was run; the nearest:{listed}",
                hint="loosen the goal, or widen the space",
            )
        if not self.trials:
            raise StepError(
                f"no trial was begun before the limit of the search ({self.stopped})",
                hint="raise it: measuring the input model counts too",
            )
        reasons: dict[str, list[int]] = {}
        for trial in trials or self.trials:
            reasons.setdefault(trial.why, []).append(trial.number)
        told = "".join(f"\n  {why} (trial {', '.join(map(str, ones))})" for why, ones in list(reasons.items())[:5])
        refused = all(trial.state == "pruned" for trial in self.trials)
        if refused and self.plan.refusals:
            raise ConfigError(self.plan.refusals)
        raise StepError(
            f"all {len(self.trials)} trials failed, so there is no model to hand over:{told}",
            hint="`coldpress plan` and a run with search_strategy: false show more of one setting",
        )

    def _record(self, choice: Choice | None) -> SearchRecord:
        return search_record(
            self.loaded, self.space, self.strategy, self.trials, self._whole(), self.objectives, choice,
            bench=self._bench, seconds=time.perf_counter() - self._started, stopped=self.stopped,
        )  # fmt: skip

    def _failed(self, error: ColdpressError) -> None:
        """Leave a record of the trials, and of why there is no result."""
        outcome = Outcome(
            self.plan, self._started_at, time.perf_counter() - self._started, (), (), self.warnings,
            search=self._record(None), asked=self.loaded,
        )  # fmt: skip
        with contextlib.suppress(StoreError):
            self._emit(Message("info", f"what was tried, and why it ended: {outcome.write_failure(error, None)}"))

    def _so_far(self) -> str:
        choice = self._choice()
        best = (
            ""
            if choice is None
            else f"; best so far: trial {choice.trial.number} ({settings_text(choice.trial.settings)})"
        )
        count = len(self.trials)
        kept = (
            "before the first trial was done"
            if not count
            else f"after {count} trial{'s' * (count > 1)}, kept in the cache"
        )
        return f"stopped {kept}{best}"


_under_way = threading.local()
"""Number of the trial that the thread is busy with."""


def _of_trial(event: Event, number: int) -> Event:
    """The event with `trial N` before the name of the step."""
    for name in ("step", "model"):
        value = getattr(event, name, None)
        if isinstance(value, str) and value != "input":
            change: dict[str, Any] = {name: f"trial {number} {value}"}
            return dataclasses.replace(event, **change)
    return event
