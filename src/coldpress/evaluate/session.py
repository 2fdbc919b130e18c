"""Models measured side by side in this process: the first is what the others are compared with.

A run measures through its workers (`engine.evaluation`); this is for a command or a program that has models at hand.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from coldpress.artifacts.base import Artifact
from coldpress.config.metrics import Metric
from coldpress.config.schema import DataConfig
from coldpress.errors import PlanError
from coldpress.evaluate.bench import Bench, OpenRunners
from coldpress.evaluate.encoders import config_of
from coldpress.evaluate.measure import measure, refusal
from coldpress.events import Sink, StepStarted
from coldpress.goals import is_relative, judge
from coldpress.scores import Score

__all__ = ["evaluate_models"]


def evaluate_models(
    models: Mapping[str, Artifact],
    metrics: Sequence[Metric],
    data_configs: Mapping[str, DataConfig],
    *,
    emit: Sink = lambda event: None,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> list[Score]:
    """Scores of each model by each metric, judged by the goals; raises PlanError for what cannot be measured.

    Goals are judged of all models but the first, or of the only one; a relative goal needs two.
    """
    baseline = next(iter(models)) if len(models) > 1 else None
    _refuse(models, metrics, baseline)
    runners = OpenRunners(trust_remote_code=trust_remote_code)
    reference = None if baseline is None else models[baseline]
    scores: list[Score] = []
    try:
        for metric in metrics:
            emit(StepStarted(" and ".join(models), "evaluate", detail=metric.name))
            benches = {
                label: Bench(
                    model=model,
                    runners=runners,
                    data_configs=data_configs,
                    reference=reference,
                    emit=emit,
                    step=label,
                    device=device,
                    trust_remote_code=trust_remote_code,
                )
                for label, model in models.items()
            }
            found = measure(metric, benches)
            for label, each in found.items():
                priorities = {sub.name: sub.priority for sub in metric.sub_types}
                scores += [Score.of(label, metric.name, one, priority=priorities.get(one.sub_type, -1)) for one in each]
    finally:
        runners.close()
    return [_judged(score, metrics, scores, baseline) for score in scores]


def _refuse(models: Mapping[str, Artifact], metrics: Sequence[Metric], baseline: str | None) -> None:
    """Everything that cannot be measured, before anything is loaded."""
    problems = []
    hints = []
    for metric in metrics:
        configs = [None, *(config_of(model) for model in models.values())]
        refused = next((one for config in configs if (one := refusal(metric, config)) is not None), None)
        if refused is not None:
            problems.append(refused[0])
            hints.append(refused[1])
        relative = [sub for sub in metric.sub_types if sub.goal is not None and is_relative(sub.goal)]
        if baseline is None and relative:
            asked = ", ".join(f"{sub.name} {sub.goal.type}" for sub in relative if sub.goal is not None)
            problems.append(f"{metric.name}: a goal compares with another model, and there is one only ({asked})")
            hints.append("compare two models, or use a threshold")
    if problems:
        raise PlanError("; ".join(problems), hint=next((hint for hint in hints if hint), None))


def _judged(score: Score, metrics: Sequence[Metric], scores: Sequence[Score], baseline: str | None) -> Score:
    if score.model == baseline:
        return score
    metric = next(one for one in metrics if one.name == score.metric)
    goal = next((sub.goal for sub in metric.sub_types if sub.name == score.sub_type), None)
    if goal is None:
        return score
    before = next(
        (one for one in scores if (one.model, one.metric, one.sub_type) == (baseline, score.metric, score.sub_type)),
        None,
    )
    return dataclasses.replace(score, goal=judge(goal, score, before))
