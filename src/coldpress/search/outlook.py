"""What is known of a search before its first trial: from plans alone, so nothing is loaded, run or measured.

Which settings are out is found as in the search itself (`trial_run.plan_trial`). The size of the input, which goals may
compare with, is that of its files.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coldpress.config.load import LoadedConfig
from coldpress.config.search_strategy import SearchStrategy
from coldpress.config.space import Space
from coldpress.engine.evaluation import INPUT, Baselines
from coldpress.engine.plan import Plan, input_artifact
from coldpress.errors import CheckpointError, ConfigError
from coldpress.evaluate.size import files_to_run
from coldpress.scores import Measurement, Score
from coldpress.search.trial_run import Asked, plan_trial, unmeasured

__all__ = ["Outlook", "first_setting", "look_ahead", "most_trials"]

_LOOKED_AT = 1000
"""Settings to look at for one that is a config."""


@dataclass(frozen=True)
class Outlook:
    """A search, as far as its plans tell."""

    trials: int
    """Settings that are tried at most; those that a plan rules out are not counted."""
    planned: int
    """Settings that were planned: the first so many of the space."""
    out: Mapping[str, int]
    """Why settings are out -> how many, the most first."""
    unmet: bool
    """Whether every setting there is would miss a goal."""

    @property
    def ruled_out(self) -> int:
        """Of the planned."""
        return sum(self.out.values())


def most_trials(strategy: SearchStrategy, space: Space) -> int:
    """Trials of a space at most."""
    samples = strategy.sampler_config.max_samples or space.size
    return min(samples, space.size, strategy.max_iter or samples)


def first_setting(loaded: LoadedConfig) -> tuple[LoadedConfig, Mapping[str, Any]]:
    """The first setting that is a config, and its values; raises the first one's ConfigError where none of many is."""
    assert loaded.space is not None
    refused: ConfigError | None = None
    for point in itertools.islice(loaded.space.points(), _LOOKED_AT):
        try:
            return loaded.at(point), loaded.space.settings(point)
        except ConfigError as error:  # noqa: PERF203
            refused = refused or error
    assert refused is not None
    raise refused


def look_ahead(loaded: LoadedConfig, plan: Plan, *, most: int = 200) -> Outlook:
    """Plan the settings of a search, at most so many. `plan`: of one of them.

    None is planned where something is missing that all of them need.
    """
    assert loaded.space is not None
    assert loaded.workflow.strategy is not None
    if plan.blockers or any(not one.path.startswith("passes.") for one in plan.refusals):
        most = 0
    baselines = _sizes(plan)
    out: Counter[str] = Counter()
    planned, sizes = 0, 0
    for number, point in enumerate(itertools.islice(loaded.space.points(), most), 1):
        asked = Asked(number, point, loaded.space.settings(point))
        found = plan_trial(
            asked, loaded, baselines, trust_remote_code=plan.trust_remote_code, hash_everything=False, store=plan.store
        )
        planned += 1
        if found.refused is not None:
            out[found.reason] += 1
            sizes += found.refused.violation > 0
    unmet = planned == loaded.space.size == sum(out.values()) and sizes > 0
    return Outlook(most_trials(loaded.workflow.strategy, loaded.space), planned, dict(out.most_common()), unmet)


def _sizes(plan: Plan) -> Baselines:
    """Size of the input by every metric of size."""
    if plan.model.artifact is None or not plan.loaded.workflow.evaluate_input_model:
        return {}
    try:
        files = files_to_run(input_artifact(plan))
    except CheckpointError:  # refused by the plan
        return {}
    total = float(sum(path.stat().st_size for path in files))
    evaluation = unmeasured(plan, {})
    return {
        (evaluation.identity(metric), sub.name): Score.of(
            INPUT,
            metric.name,
            Measurement(sub.name, total, "bytes", False, len(files), 0.0),
            priority=-1,
            cached=False,
        )
        for evaluator in plan.evaluators.values()
        for metric in evaluator.measured
        if metric.type == "size_on_disk"
        for sub in metric.sub_types
    }
