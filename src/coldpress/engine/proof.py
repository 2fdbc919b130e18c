"""The proof of a step: on which text, judged by which limits. The measuring itself is `coldpress.parity`, in a worker.

What was measured is kept with the step; limits are judged again at every run, and a step that was made without a proof,
or proved on other text, is measured when it is next used.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from coldpress.config.schema import AzureMLResource, DataConfig
from coldpress.data.sources import files_of
from coldpress.data.splits import split_seed
from coldpress.digest import DigestMemory, digest_files, digest_value
from coldpress.engine.plan import Plan, Step
from coldpress.errors import ParityError
from coldpress.events import ParityMeasured

__all__ = ["data_identity", "judge", "parity_text", "refuse_if_too_far", "text_identity"]

_VERSION = 1
"""Part of what a measurement is recognised by; raised when the same models would measure differently."""
_SURE = 3.0
"""Standard errors by which perplexity must have moved beyond its limit: chance alone does so once in 700 proofs."""
_WAY_OUT: Mapping[str, str] = {
    "int8": "use a smaller block (int4_block_size), keep some nodes in floating point, use fp32 or fp16",
    "int4": "use a smaller block (int4_block_size), profile: accurate, int8",
}
"""Of a build that rounds."""
_FLOATS = ("fp32", "fp16", "bf16")


def judge(step: Step, measured: Mapping[str, Any]) -> ParityMeasured:
    """What was measured, against the limits of today."""
    assert step.limits is not None
    names = {field.name for field in dataclasses.fields(ParityMeasured)} - {"step", "passed", "limit"}
    figures = {name: value for name, value in measured.items() if name in names}
    most = step.limits.perplexity_increase
    passed, sign = figures["kl"] <= step.limits.kl, "+"
    if math.isfinite(figures["perplexity"]) and math.isfinite(figures["perplexity_reference"]):
        growth = math.log(figures["perplexity"] / figures["perplexity_reference"])
        if _changes_nothing(step):  # then a fall is as suspicious as growth; rounding may fall
            growth, sign = abs(growth), "±"
        passed = passed and growth - _SURE * figures["standard_error"] <= math.log1p(most)
    else:
        passed = False
    limit = f"KL {step.limits.kl:g}, perplexity {sign}{most:.1%} beyond {_SURE:g} standard errors"
    return ParityMeasured(step=step.name, passed=passed, limit=limit, **figures)


def _changes_nothing(step: Step) -> bool:
    return step.spec.kind == "onnx" and step.spec.precision == "fp32"


def refuse_if_too_far(step: Step, event: ParityMeasured) -> None:
    """Raise ParityError for a result beyond its limit."""
    if event.passed:
        return
    raise ParityError(
        f"the result of {event.step} is too far from its input: mean KL {event.kl:.4g} nats, "
        f"perplexity {event.perplexity_reference:.4g} -> {event.perplexity:.4g} "
        f"({event.growth}) on {event.tokens} {event.compared}; the limit is {event.limit}",
        hint=_way_out(step, event),
    )


def _way_out(step: Step, event: ParityMeasured) -> str:
    """What may be wrong where a proof failed, and what to do about it."""
    assert step.limits is not None
    if not math.isfinite(event.perplexity_reference):
        return "the input itself is broken: its perplexity is not a number. Are its weights complete and finite?"
    if step.spec.kind == "onnx" and step.spec.precision in _FLOATS:
        return (
            f"{step.spec.precision} rounds next to nothing, so weights, config.json and graph disagree, and a greater "
            "max_kl is not the answer. Does config.json belong to these weights? If it does, please report the model "
            f"family ({step.spec.model_type})"
        )
    option = "max_kl" if event.kl > step.limits.kl else "max_perplexity_increase"
    if step.spec.kind != "onnx" and 10 * event.kl <= step.limits.kl and step.parity.data_config is None:
        return (
            "the two agree on what they expect (KL), so the text is one that neither expects: name text of the model's "
            f"own kind in passes.{event.step}.parity.data_config, or raise {option} there"
        )
    finer = _WAY_OUT.get(step.spec.precision, "do the adapter and this base belong together?")
    return f"{finer}, or raise passes.{event.step}.parity.{option}"


def parity_text(plan: Plan, step: Step) -> dict[str, Any]:
    """Which text to compare on: what the config names, else held-out data of a training step, else of the evaluator."""
    text: dict[str, Any] = {"tokens": step.parity.tokens, "data_config": step.parity.data_config, "held_out": None}
    if step.parity.data_config is not None:
        return text
    for other in plan.steps:
        train = getattr(other.config, "train_data_config", None)
        if train is None:
            continue
        held_out = getattr(other.config, "eval_data_config", None)
        share = getattr(other.config, "eval_dataset_size", None)
        if held_out is not None:
            return {**text, "data_config": held_out}
        if share is not None:
            seed = split_seed(other.config.training_args)
            return {**text, "data_config": train, "held_out": {"size": share, "seed": seed}}
    evaluator = plan.loaded.workflow.evaluator
    if evaluator is not None:
        named = (getattr(metric, "data_config", None) for metric in plan.evaluator(evaluator).measured)
        return {**text, "data_config": next((name for name in named if name is not None), None)}
    return text


def text_identity(plan: Plan, step: Step) -> str:
    """Digest of all that decides on which tokens a step is proved."""
    text = parity_text(plan, step)
    name = text["data_config"]
    data = None if name is None else data_identity(plan.data_configs[name], plan.store.digests)
    return digest_value({"version": _VERSION, **text, "data_config": data})


def data_identity(config: DataConfig, memory: DigestMemory) -> dict[str, Any]:
    """What identifies the records of a data config: its settings and the contents of its files."""
    files = {} if isinstance(config.load_dataset_config.data_files, AzureMLResource) else files_of(config)
    return {
        "settings": config.model_dump(mode="json", exclude={"name": True, "load_dataset_config": {"data_files"}}),
        "files": digest_files(files, memory) if files else None,
    }
