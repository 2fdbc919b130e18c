"""The metric `accuracy`: how often a model is right, by whatever way it can answer.

A model with a classification head answers by it; a causal model by the likelihood of each label, or by what it writes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from coldpress.config.metrics import OF_TEXT, OWN_ACCURACY, AccuracyMetric, PerplexityMetric
from coldpress.errors import PlanError
from coldpress.evaluate.answers import read_answers
from coldpress.evaluate.bench import Bench
from coldpress.evaluate.classification import accuracy, averaged, exact_match
from coldpress.evaluate.encoders import config_of, is_encoder
from coldpress.evaluate.predictions import Predictions, by_generation, by_head, by_likelihood
from coldpress.scores import Measurement

__all__ = ["answers_of", "measure"]

_WRITTEN = ("exact_match",)


def measure(metric: AccuracyMetric, bench: Bench) -> list[Measurement]:
    """All sub types of a metric; the model answers each record once for each way that they need."""
    made: dict[bool, Predictions] = {}

    def predictions(written: bool, complete: bool) -> Predictions:
        if written not in made:
            made[written] = answers_of(metric, bench, written=written, complete=complete)
        return made[written]

    written = metric.answer_by == "generation"
    return [_one(sub, metric, bench, predictions, written) for sub in metric.sub_types]


def _one(
    sub: Any, metric: AccuracyMetric, bench: Bench, predictions: Callable[[bool, bool], Predictions], written: bool
) -> Measurement:
    import numpy as np

    config = dict(sub.metric_config or {})
    if metric.backend == "huggingface_metrics":
        from coldpress.evaluate.named_metrics import from_evaluate

        return from_evaluate(sub.name, config, predictions(written, False), metric.seed)
    if sub.name in OF_TEXT:
        from coldpress.evaluate.perplexity import measure as of_text

        asked = {"sub_types": [{"name": sub.name}], "data_config": metric.data_config, "runner": metric.runner}
        (found,) = of_text(PerplexityMetric.model_validate({"name": metric.name, "type": "perplexity", **asked}), bench)
        return found
    if sub.name not in OWN_ACCURACY:
        from coldpress.evaluate.named_metrics import from_torchmetrics

        return from_torchmetrics(sub.name, config, predictions(written, True), metric.seed)
    one = predictions(written or sub.name in _WRITTEN, _needs_all(metric))
    clusters = one.prompts
    if sub.name == "accuracy_score":
        return accuracy(one.truth, one.predicted, clusters)
    if sub.name == "exact_match":
        return exact_match(one.truth, one.predicted, clusters)
    return averaged(
        sub.name, one.truth, one.predicted, clusters, np.random.default_rng(metric.seed),
        known=one.labels, average=config.get("average", "macro"), positive=config.get("positive"),
    )  # fmt: skip


def _needs_all(metric: AccuracyMetric) -> bool:
    """Whether some sub type reads the scores of all labels."""
    return metric.backend == "torch_metrics" and any(sub.name not in OWN_ACCURACY for sub in metric.sub_types)


def answers_of(metric: Any, bench: Bench, *, written: bool, complete: bool) -> Predictions:
    """What the model of a bench answers to the records of a metric; warns of those that were left out."""
    config, tokenizer = bench.data(metric.data_config), bench.tokenizer()
    options: dict[str, Any] = {"batch_size": metric.batch_size, "emit": bench.emit, "step": bench.step}
    if is_encoder(config_of(bench.model)):
        if written:
            raise PlanError(
                f"{bench.model.path} is an encoder and writes nothing, so it has no exact_match",
                hint="use accuracy_score, or answer_by: likelihood",
            )
        found = by_head(bench.runner(("classification",), metric.runner), tokenizer, config, bench.model, **options)
    elif written:
        free = all(sub.name in _WRITTEN for sub in metric.sub_types)
        answers = read_answers(config, tokenizer, labels=metric.labels, free=free)
        runner = bench.runner(("generation",), metric.runner)
        found = by_generation(runner, tokenizer, answers, max_new_tokens=metric.max_new_tokens, **options)
    else:
        answers = read_answers(config, tokenizer, labels=metric.labels)
        runner = bench.runner(("log-likelihood",), metric.runner)
        found = by_likelihood(runner, tokenizer, answers, complete=complete, **options)
    if found.left_out:
        bench.warn(f"{found.left_out} records of {config.name} are longer than the model's context and were left out")
    return found
