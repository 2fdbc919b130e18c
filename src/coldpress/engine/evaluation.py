"""The measuring of a run's models: by its evaluators, cached or in a worker, judged by their goals.

    quality     of the input once, then of each result that has an evaluator
    cost        of a result and the input in turn, in one session: only so does a noisy machine not decide
    goals       against the input's score; those of the last result decide the run's exit code

A score is kept by all that it depends on: the model's key, the metric, the data, the user's script, the libraries; of
a cost also the models it was compared with and the machine. What a task file of lm-eval reads is not known here, so
nothing of it is kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from coldpress.artifacts.base import Artifact
from coldpress.config.metrics import Evaluator, LmEvalMetric, Metric
from coldpress.digest import digest_files, digest_value
from coldpress.engine.plan import Plan, Step
from coldpress.engine.proof import data_identity
from coldpress.engine.result import Score
from coldpress.evaluate.measure import in_turn, needs_torch
from coldpress.events import ScoreMeasured, Sink, StepStarted
from coldpress.goals import is_relative, judge
from coldpress.hardware import library_versions
from coldpress.scores import Measurement
from coldpress.systems.job import artifact_to_dict

__all__ = ["INPUT", "Baselines", "Evaluation"]

INPUT = "input"
_VERSION = 3
"""Part of the key of a cached score; raised when a score would come out differently."""
_LIBRARIES = ("torch", "transformers", "onnxruntime", "onnxruntime-genai", "lm-eval", "evaluate", "torchmetrics")
_UNMEASURED = {"name", "batch_size", "data_config"}
"""Keys of a metric that change nothing about its numbers; the data is identified by its contents."""

Perform = Callable[..., dict[str, Any]]
Baselines = dict[tuple[str, str], Score]
"""Scores of the input: (identity of the metric, sub type) -> score."""


@dataclasses.dataclass(frozen=True)
class _Model:
    label: str
    artifact: Artifact
    key: str


class Evaluation:
    """What has been measured so far. `perform` does a job of kind `evaluate` (see `engine.run`)."""

    def __init__(self, plan: Plan, perform: Perform, emit: Sink, *, baselines: Baselines | None = None) -> None:
        """`baselines`: what is known of the input already, from another plan of the same workflow."""
        self._plan, self._perform, self._emit = plan, perform, emit
        self._input: _Model | None = None
        self.baselines: Baselines = dict(baselines or {})
        self.scores: list[Score] = []
        self.unmet: list[Score] = []
        """Of the last result: goals that it does not meet."""

    def input(self, model: Artifact, key: str) -> None:
        """Measure the quality of the input, where the workflow asks for it; its cost is measured beside a result's."""
        workflow = self._plan.loaded.workflow
        if not workflow.evaluate_input_model:
            return
        self._input = _Model(INPUT, model, key)
        for metric in self._of_input():
            known = all((self.identity(metric), sub.name) in self.baselines for sub in metric.sub_types)
            if not in_turn(metric) and not known:
                found = self._found(metric, [self._input])
                self._take(metric, self._input, *found[INPUT])

    def alone(self, model: Artifact, key: str) -> None:
        """Measure the input of a workflow without passes; its goals decide over the run."""
        name = self._plan.loaded.workflow.evaluator
        assert name is not None, "the plan refuses a workflow with nothing to do"
        for metric in self._evaluator(name).measured:
            self.measure(metric, INPUT, model, key, decides=True)

    def step(self, step: Step, model: Artifact, key: str, *, last: bool) -> None:
        """Measure a result by the step's evaluator, and the last one by the workflow's."""
        for metric, decides in self.metrics_of(step, last=last):
            self.measure(metric, step.name, model, key, decides=decides)

    def metrics_of(self, step: Step, *, last: bool) -> list[tuple[Metric, bool]]:
        """What a result is measured by, each with whether its goals decide over the run."""
        final = self._plan.loaded.workflow.evaluator if last else None
        decides = final if final is not None else step.evaluator if last else None
        names = [name for name in dict.fromkeys((step.evaluator, final)) if name is not None]
        return [(metric, name == decides) for name in names for metric in self._evaluator(name).measured]

    def measure(self, metric: Metric, label: str, model: Artifact, key: str, *, decides: bool) -> list[Score]:
        """Scores of a result by one metric; its cost is measured beside the input's."""
        candidate = _Model(label, model, key)
        beside = [self._input] if in_turn(metric) and self._input is not None else []
        found = self._found(metric, [*beside, candidate])
        for one in beside:
            self._take(metric, one, *found[one.label])
        scores = self._take(metric, candidate, *found[label])
        self.unmet += [score for score in scores if decides and score.goal is not None and not score.goal.met]
        return scores

    def baseline(self, metric: Metric, sub_type: str) -> Score | None:
        """The input's score of this number, if it was measured."""
        return self.baselines.get((self.identity(metric), sub_type))

    def _of_input(self) -> Iterator[Metric]:
        """Metrics of the workflow's evaluator, and those of a pass's whose goals compare with the input."""
        workflow = self._plan.loaded.workflow
        seen = set()
        for name in (workflow.evaluator, *(step.evaluator for step in self._plan.steps)):
            if name is None:
                continue
            for metric in self._evaluator(name).measured:
                wanted = name == workflow.evaluator or any(
                    sub.goal is not None and is_relative(sub.goal) for sub in metric.sub_types
                )
                identity = self.identity(metric)
                if wanted and identity not in seen:
                    seen.add(identity)
                    yield metric

    def _evaluator(self, name: str) -> Evaluator:
        return self._plan.evaluator(name)

    # -- numbers ------------------------------------------------------------------------------------------------------

    def _found(self, metric: Metric, models: list[_Model]) -> dict[str, tuple[list[Measurement], bool]]:
        """Numbers of each model, and whether they were there already."""
        key = self._key(metric, models)
        found = None if key is None else self._plan.store.score(key)
        cached = found is not None
        if found is None:
            label, first = models[-1].label, models[-1].artifact
            self._emit(StepStarted(label, "evaluate", detail=metric.name))
            kinds = {one.artifact.kind for one in (*models, *(() if self._input is None else (self._input,)))}
            kinds = kinds if metric.type == "divergence" else {one.artifact.kind for one in models}
            result = self._perform(
                "evaluate", label, first, needs_torch(metric, kinds), "use a smaller batch_size in the metric",
                metric=metric.model_dump(mode="json"),
                models={one.label: artifact_to_dict(one.artifact) for one in models},
                reference=None if self._input is None else artifact_to_dict(self._input.artifact),
            )  # fmt: skip
            found = {"scores": result["scores"], "seconds": result["seconds"], "peak_bytes": result["peak_bytes"]}
            if key is not None:
                self._plan.store.put_score(key, found)
        by_label = found["scores"]
        if len(models) == 1:  # a step of another name may have made the same model
            by_label = {models[0].label: next(iter(by_label.values()))}
        return {
            label: ([Measurement(**{**one, "details": dict(one["details"])}) for one in each], cached)
            for label, each in by_label.items()
        }

    def _take(self, metric: Metric, model: _Model, found: list[Measurement], cached: bool) -> list[Score]:
        """Numbers as scores, judged by the goals of the metric; an earlier score of the same number is replaced."""
        made = []
        identity = self.identity(metric)
        for one in found:
            sub = next((sub for sub in metric.sub_types if sub.name == one.sub_type), None)
            score = Score.of(model.label, metric.name, one, priority=-1 if sub is None else sub.priority, cached=cached)
            if model.label == INPUT:
                self.baselines[identity, one.sub_type] = score
            judged = model.label != INPUT or not self._plan.steps
            if judged and sub is not None and sub.goal is not None:
                score = dataclasses.replace(score, goal=judge(sub.goal, score, self.baseline(metric, one.sub_type)))
            made.append(score)
            self._record(score)
        return made

    def _record(self, score: Score) -> None:
        same = (score.model, score.metric, score.sub_type)
        self.scores[:] = [one for one in self.scores if (one.model, one.metric, one.sub_type) != same]
        self.scores.append(score)
        goal = score.goal
        self._emit(
            ScoreMeasured(
                model=score.model,
                metric=score.metric,
                sub_type=score.sub_type,
                value=score.value,
                unit=score.unit,
                higher_is_better=score.higher_is_better,
                n=score.n,
                standard_error=score.standard_error,
                cached=score.cached,
                goal=None if goal is None else f"{goal.type} {goal.value:g}",
                goal_bound=None if goal is None else goal.bound,
                goal_met=None if goal is None else goal.met,
            )
        )

    # -- keys ---------------------------------------------------------------------------------------------------------

    def _key(self, metric: Metric, models: list[_Model]) -> str | None:
        """Of a score in the store; None where it depends on what nobody knows."""
        if isinstance(metric, LmEvalMetric) and (metric.task_files or metric.include_path is not None):
            return None
        machine = (self._plan.hardware.processor, self._plan.hardware.threads) if in_turn(metric) else None
        return digest_value(
            {
                "version": _VERSION,
                "models": {one.label if in_turn(metric) else "model": one.key for one in models},
                "reference": self._input.key if metric.type == "divergence" and self._input is not None else None,
                "metric": self.identity(metric),
                "libraries": library_versions(_LIBRARIES),
                "machine": machine,
            }
        )

    def identity(self, metric: Metric) -> str:
        """Digest of all that decides on a metric's numbers but the model: also which scores compare with each other."""
        fields = metric.model_dump(mode="json", exclude=_UNMEASURED)
        fields["sub_types"] = [{"name": sub["name"], "config": sub["metric_config"]} for sub in fields["sub_types"]]
        name = getattr(metric, "data_config", None)
        digests = self._plan.store.digests
        data = None if name is None else data_identity(self._plan.data_configs[name], digests)
        scripts = _scripts(metric)
        return digest_value({**fields, "data": data, "scripts": digest_files(scripts, digests) if scripts else None})


def _scripts(metric: Metric) -> Mapping[str, Path]:
    """The user's Python behind a metric."""
    if metric.type != "custom" or metric.user_config.user_script is None:
        return {}
    found = {"script": Path(metric.user_config.user_script)}
    if metric.user_config.script_dir is not None:
        folder = Path(metric.user_config.script_dir)
        found |= {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*.py"))}
    return found
