"""A metric of the config on models: which function measures it, and what is made of its numbers.

    metric x models -> numbers of each model

Quality is measured model by model; cost is measured of all models in turn (`cost`). Which it is depends on the metric
alone, so a caller hands over whatever models it wants compared.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Mapping
from typing import Any

from coldpress.config.metrics import Metric
from coldpress.errors import StepError
from coldpress.evaluate.bench import Bench
from coldpress.scores import Measurement

__all__ = ["in_turn", "measure", "needs_torch"]

_QUALITY = {
    "accuracy": "coldpress.evaluate.accuracy:measure",
    "perplexity": "coldpress.evaluate.perplexity:measure",
    "divergence": "coldpress.evaluate.divergence:measure",
    "size_on_disk": "coldpress.evaluate.size:measure",
    "custom": "coldpress.evaluate.user_functions:measure",
    "lm_eval": "coldpress.evaluate.harness:measure",
}
_COST = {
    "latency": "coldpress.evaluate.cost:measure_latency",
    "throughput": "coldpress.evaluate.cost:measure_latency",
    "generation": "coldpress.evaluate.cost:measure_generation",
    "memory": "coldpress.evaluate.cost:measure_memory",
    "load_time": "coldpress.evaluate.cost:measure_load_time",
}
_DIRECTED_BY_USER = ("custom",)


def in_turn(metric: Metric) -> bool:
    """Whether models are measured side by side: what it costs to run them."""
    return metric.type in _COST


def needs_torch(metric: Metric, kinds: set[str]) -> bool:
    """Whether a process that never imports torch can measure models of these kinds."""
    named = metric.type == "accuracy" and metric.backend == "torch_metrics"
    return "checkpoint" in kinds or metric.type in ("custom", "lm_eval") or named


def measure(metric: Metric, benches: Mapping[str, Bench]) -> dict[str, list[Measurement]]:
    """The numbers of a metric, of each model; raises StepError for one that is NaN."""
    module, _, name = {**_QUALITY, **_COST}[metric.type].partition(":")
    function: Any = getattr(importlib.import_module(module), name)
    if in_turn(metric):
        found: dict[str, list[Measurement]] = function(metric, benches)
    else:
        found = {label: function(metric, bench) for label, bench in benches.items()}
    return {label: [_checked(one, metric, benches[label]) for one in each] for label, each in found.items()}


def _checked(found: Measurement, metric: Metric, bench: Bench) -> Measurement:
    """Raise for NaN; take the user's direction where nobody else knows it, and say so where it is the wrong one."""
    if math.isnan(found.value):
        raise StepError(
            f"{metric.name}.{found.sub_type} of {bench.model.path} is not a number",
            hint="are the model's weights complete and finite?",
        )
    asked = next((sub.higher_is_better for sub in metric.sub_types if sub.name == found.sub_type), None)
    if asked is None or asked == found.higher_is_better:
        return found
    theirs = metric.type == "accuracy" and metric.backend == "huggingface_metrics"
    if theirs or metric.type in _DIRECTED_BY_USER:
        return dataclasses.replace(found, higher_is_better=asked)
    better = "higher" if found.higher_is_better else "lower"
    bench.warn(f"{metric.name}.{found.sub_type} is better where it is {better}; higher_is_better in the config is wrong")
    return found
