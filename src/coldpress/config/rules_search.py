"""Dialect rules for `search_strategy`: Olive's flat form, and its names before v0.8."""

from __future__ import annotations

from coldpress.config.rewriting import Custom, Drop, Rename, Rewriting, Rule, Version
from coldpress.config.tree import Node, from_plain, join_path

__all__ = ["RULES", "write_old_samples"]

V07: Version = (0, 7)

_SAMPLERS = {"exhaustive": "sequential", "nsgaii": "nsga2"}
"""Older or Optuna's names of samplers, in small letters."""
_OLD_SAMPLES = 1
"""Settings that Olive up to v0.7 tried where nobody said how many, but for its exhaustive search."""
_OF_TPE = "parameters are modelled together, and each alternative's for itself"
_TWICE = "no setting is tried twice"
_BEST = "the best model is handed over; all results stand in run.json"
_FLAT = ("max_samples", "seed", "num_samples")


def _lowered(rw: Rewriting, rule: Rule, parent: Node, at: str) -> None:
    """Values of choices are read in any case."""
    node = parent.members[rule.key]
    if isinstance(node.value, str):
        node.value = node.value.lower().replace("_", "-")


def _sampler(rw: Rewriting, rule: Rule, parent: Node, at: str) -> None:
    node = parent.members["sampler"]
    if not isinstance(node.value, str):
        return
    lowered = node.value.lower()
    if lowered == "qmc":
        hint = "nearest: random; or sequential, tpe, nsga2"
        rw.refuse(parent, "sampler", "qmc is a sampler of older Olives that Coldpress does not have", hint)
        return
    if lowered in _SAMPLERS:
        rw.told(rule.name, node, f"{at}.sampler = {_SAMPLERS[lowered]}")
    node.value = _SAMPLERS.get(lowered, lowered)


def _flat(rw: Rewriting, rule: Rule, parent: Node, at: str) -> None:
    """What belongs to the sampler, beside it."""
    node = parent.members[rule.key]
    block = parent.members.get("sampler_config")
    if block is None:
        block = from_plain({}, join_path(parent.path, "sampler_config"), parent, "rule")
        parent.members["sampler_config"] = block
    if block.mapping is None:  # it is wrong, and told
        rw.refuse_silently(parent, rule.key)
        return
    if rw.move(parent, rule.key, block, rule.key):
        rw.told(rule.name, node, f"{at}.sampler_config.{rule.key}")


def _forget(rw: Rewriting, rule: Rule, parent: Node, at: str) -> None:
    """A null means: not given."""
    del parent.members[rule.key]


def write_old_samples(rw: Rewriting) -> None:
    """How many settings an older file took for granted."""
    strategy = rw.root.get("search_strategy")
    if rw.dialect not in ("0.6", "0.7") or strategy is None or strategy.text("sampler") in (None, "sequential"):
        return
    if strategy.mapping is not None:
        block = strategy.mapping.setdefault("sampler_config", strategy.child("sampler_config", {}))
        rw.default("defaults", block, "max_samples", _OLD_SAMPLES, "search_strategy.sampler_config")


RULES: tuple[Rule, ...] = (
    *(
        Rule("search_strategy", key, Custom(_forget), None, lambda node: node.value is None)
        for key in ("execution_order", "sampler", "search_algorithm", "sampler_config", "search_algorithm_config",
                    "output_model_num")
    ),
    Rule("search_strategy", "search_algorithm", Rename("sampler"), V07),
    Rule("search_strategy", "search_algorithm_config", Rename("sampler_config"), V07),
    Rule("search_strategy", "sampler", Custom(_sampler)),
    Rule("search_strategy", "execution_order", Custom(_lowered)),
    Rule("search_strategy", "output_model_num", Drop(_BEST, warn=True)),
    *(Rule("search_strategy", key, Custom(_flat), V07 if key == "num_samples" else None) for key in _FLAT),
    Rule("sampler_config", "num_samples", Rename("max_samples"), V07),
    *(
        Rule(level, key, action, until, when)
        for level in ("search_strategy", "sampler_config")
        for key, action, until, when in (
            ("multivariate", Drop(_OF_TPE), None, None),
            ("group", Drop(_OF_TPE), None, None),
            ("with_replacement", Drop(_TWICE), V07, lambda node: not node.value),
            ("with_replacement", Drop(_TWICE, warn=True), V07, None),
        )
    ),
)  # fmt: skip
