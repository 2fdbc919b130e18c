"""A metric of the config on models: which function measures it, and what is made of its numbers.

    metric x models -> numbers of each model

Quality is measured model by model; cost is measured of all models in turn (`cost`). Which it is depends on the metric
alone, so a caller hands over whatever models it wants compared.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from coldpress.artifacts.classifiers import is_classifier
from coldpress.config.metrics import (
    OF_TEXT,
    TORCH_METRICS,
    CustomMetric,
    LmEvalMetric,
    MemoryMetric,
    Metric,
)
from coldpress.errors import StepError
from coldpress.evaluate.bench import Bench
from coldpress.evaluate.encoders import is_encoder
from coldpress.hardware import detect
from coldpress.registry import nearest
from coldpress.scores import Measurement

__all__ = ["in_turn", "is_cost", "measure", "needs_torch", "refusal"]

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


def is_cost(kind: str) -> bool:
    """Whether a type of metric is of what it costs to run a model."""
    return kind in _COST


def in_turn(metric: Metric) -> bool:
    """Whether models are measured side by side: what it costs to run them."""
    return is_cost(metric.type)


def needs_torch(metric: Metric, kinds: set[str]) -> bool:
    """Whether a process that never imports torch can measure models of these kinds."""
    named = metric.type == "accuracy" and any(sub.name in TORCH_METRICS for sub in metric.sub_types)
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
    bench.warn(
        f"{metric.name}.{found.sub_type} is better where it is {better}; higher_is_better in the config is wrong"
    )
    return found


def refusal(metric: Metric, config: Mapping[str, Any] | None) -> tuple[str, str | None] | None:
    """Why a metric cannot be measured, as far as its files, this machine and a model's config.json tell.

    (message, hint). Without a config what is said is about the metric alone. Reads no weights and runs nothing of the
    user's.
    """
    if config is None:
        alone = _REFUSALS.get(metric.type)
        return None if alone is None else alone(metric)
    if not is_encoder(config):
        if metric.type == "divergence" and any(sub.name == "cosine_similarity" for sub in metric.sub_types):
            return f"{metric.name}: cosine_similarity is of embeddings, and the model is a decoder", "use kl"
        return None
    kind = next(iter(config.get("architectures") or ["an encoder"]))
    classifies = is_classifier(config)
    if metric.type in ("generation", "perplexity", "lm_eval"):
        return f"{metric.name}: the model is an encoder ({kind}) and writes nothing, so it has no {metric.type}", None
    if metric.type == "divergence" and any((sub.name == "cosine_similarity") == classifies for sub in metric.sub_types):
        if classifies:
            return (
                f"{metric.name}: the model has classes ({kind}) and no embeddings",
                "use kl, which is of classes then",
            )
        return f"{metric.name}: the model is an encoder ({kind}) and predicts no next token", "use cosine_similarity"
    if metric.type == "accuracy" and not classifies:
        return (
            f"{metric.name}: the model is an encoder without a classification head ({kind}), so it has no accuracy",
            "use divergence with cosine_similarity, or a custom metric",
        )
    if metric.type == "accuracy" and any(sub.name in ("exact_match", *OF_TEXT) for sub in metric.sub_types):
        return f"{metric.name}: the model is an encoder ({kind}) and writes nothing", "use accuracy_score"
    return None


def _script_refusal(metric: CustomMetric) -> tuple[str, str | None] | None:
    """What is wrong with the user's script, without running it."""
    user = metric.user_config
    name = user.evaluate_func or user.metric_func
    if user.user_script is None or name is None:
        return None  # told when the file is checked
    path = Path(user.user_script)
    if not path.is_file():
        return f"{metric.name}: there is no script {path}", _RELATIVE
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError) as error:
        return f"{metric.name}: {path} is no Python: {error}", None
    defined = {bound for node in ast.walk(tree) for bound in _bound_by(node)}
    if name not in defined and "*" not in defined:
        close = nearest(name, defined)
        return f"{metric.name}: {path} has no function {name!r}", f"did you mean {close}?" if close else None
    if any(isinstance(node, ast.AsyncFunctionDef) and node.name == name for node in tree.body):
        return f"{metric.name}: {name} of {path} is async, and it is called as a plain function", "write def"
    return None


def _bound_by(node: ast.AST) -> list[str]:
    """Names that a node gives something to, wherever it stands: under a condition, in a tuple, in a loop."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [alias.asname or alias.name for alias in node.names]
    return [node.id] if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else []


def _task_refusal(metric: LmEvalMetric) -> tuple[str, str | None] | None:
    """Task files that are not there. Names of tasks are the harness's, which takes seconds to list them."""
    missing = [name for name in metric.task_files if not Path(name).is_file()]
    if missing:
        return f"{metric.name}: there is no task file {', '.join(missing)}", _RELATIVE
    folder = metric.include_path
    if folder is not None and not Path(folder).is_dir():
        return f"{metric.name}: there is no folder {folder} of task files", _RELATIVE
    return None


def _memory_refusal(metric: MemoryMetric) -> tuple[str, str | None] | None:
    if all(sub.name != "peak_vram" for sub in metric.sub_types) or detect().gpus:
        return None
    return f"{metric.name}: peak_vram is of a GPU, and this machine has none that nvidia-smi lists", "leave it out"


_RELATIVE = "relative paths start at the config file's folder"
_REFUSALS: Mapping[str, Callable[[Any], tuple[str, str | None] | None]] = {
    "custom": _script_refusal,
    "lm_eval": _task_refusal,
    "memory": _memory_refusal,
}
"""Type of metric -> what is wrong with it whatever the model."""
