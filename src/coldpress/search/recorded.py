"""A search as its record, and the figures of a trial as people read them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from coldpress.config.load import LoadedConfig
from coldpress.config.search_strategy import SearchStrategy
from coldpress.config.space import Space
from coldpress.record import DimensionRecord, ObjectiveRecord, ScoreRecord, SearchRecord, TrialRecord
from coldpress.scores import Score
from coldpress.search.objectives import Objective
from coldpress.search.trial_run import Bench
from coldpress.search.trials import Choice, Trial, front, nearest
from coldpress.summary import Measured

__all__ = ["figures", "search_record"]


def figures(trial: Trial, objectives: Sequence[Objective]) -> Mapping[str, str]:
    """Objectives first, then what has a goal."""
    wanted: dict[str, Score] = {}
    for objective in objectives:
        score = objective.of(trial.scores)
        if score is not None:
            wanted[str(objective)] = score
    for score in trial.scores:
        if score.goal is not None:
            wanted.setdefault(str(Objective(score.metric, score.sub_type, 0)), score)
    return {name: Measured(score.value, score.standard_error).text(score.unit) for name, score in wanted.items()}


def search_record(
    loaded: LoadedConfig,
    space: Space,
    strategy: SearchStrategy,
    trials: Sequence[Trial],
    whole: Sequence[Trial],
    objectives: Sequence[Objective],
    choice: Choice | None,
    *,
    bench: Bench,
    seconds: float,
    stopped: str,
) -> SearchRecord:
    """`whole`: trials of all steps, of which one may be handed over."""
    met = choice is not None and choice.trial.state == "feasible"
    complete = {trial.number for trial in whole}
    return SearchRecord(
        execution_order=strategy.execution_order,
        sampler=strategy.sampler,
        seed=strategy.sampler_config.seed,
        space=tuple(DimensionRecord(name=one.name, choices=one.choices) for one in space.dimensions),
        size=space.size,
        objectives=tuple(_objective(one, trials) for one in objectives),
        trials=tuple(_trial(trial, whole=trial.number in complete) for trial in trials),
        front=tuple(trial.number for trial in front(whole, objectives)),
        winner=None if choice is None else choice.trial.number,
        why="" if choice is None else choice.why,
        met=met,
        nearest=() if met else tuple(trial.number for trial in nearest(whole)),
        config=None if choice is None else loaded.at(choice.trial.point).document,
        steps_run=bench.steps_run,
        steps_shared=bench.steps_shared,
        seconds=round(seconds, 3),
        stopped=stopped,
    )


def _objective(objective: Objective, trials: Sequence[Trial]) -> ObjectiveRecord:
    known = next((score for trial in trials if (score := objective.of(trial.scores)) is not None), None)
    if known is None:
        return ObjectiveRecord(metric=objective.metric, sub_type=objective.sub_type)
    return ObjectiveRecord(
        metric=objective.metric,
        sub_type=objective.sub_type,
        unit=known.unit,
        higher_is_better=known.higher_is_better,
    )


def _trial(trial: Trial, *, whole: bool) -> TrialRecord:
    return TrialRecord(
        number=trial.number,
        settings=trial.settings,
        state=trial.state,
        why=trial.why,
        violation=trial.violation,
        judged=trial.judged,
        scores=tuple(ScoreRecord.model_validate(dataclasses.asdict(score)) for score in trial.scores),
        seconds=round(trial.seconds, 3),
        key=trial.key,
        same_as=trial.same_as,
        whole=whole,
    )
