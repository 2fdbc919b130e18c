"""From any Olive dialect, v0.3 to v0.13, to today's language.

Which dialect a file speaks is told from its keys: each old key has a last version, each new one a first. The file is
read as the newest version in which all of them are valid; where there is none, the keys that clash are the error. What
keys say is rewritten by the rules of the `rules_*` modules; what a dialect took for granted is written out as well.

Nesting (`config`, `params`, `engine`) tells nothing: Olive accepts both forms today. Neither do the names of
Transformers' training arguments, which depend on the Transformers of the day, nor `HfModel`, which many files hold
beside the data configs of 0.6: it came first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pydantic import BaseModel

from coldpress.config import rules_data, rules_metrics, rules_model, rules_passes, rules_search, rules_workflow
from coldpress.config.defaults import write_defaults
from coldpress.config.pass_tree import pass_nodes, steps
from coldpress.config.rewriting import Rename, Rewrite, Rewriting, Rule, Version
from coldpress.config.tree import Node, problem_at

__all__ = ["Rewrite", "legacy_names", "translate"]

_VERSIONS: dict[Version, str] = {(0, 6): "0.6", (0, 7): "0.7", (0, 8): "0.8", (0, 9): "0.9"}
"""Last versions that some rule knows, and what their dialect is called. 0.6 stands for v0.3 to v0.6."""

_TODAY: Version = (99,)
_SHOWN = 5
"""Clashing keys that a message lists."""

_RULES = (
    *rules_workflow.RULES, *rules_search.RULES, *rules_model.RULES, *rules_data.RULES, *rules_metrics.RULES,
    *rules_passes.RULES,
)  # fmt: skip


def _by_level() -> dict[str, list[Rule]]:
    table: dict[str, list[Rule]] = {}
    for rule in _RULES:
        table.setdefault(rule.level, []).append(rule)
    return table


_TABLE = _by_level()
_TRAINING = {name.lower(): name for name in rules_passes.TRAINING_PASSES}

_SINCE: tuple[tuple[str, str, Version], ...] = (
    ("pre_process", "strategy", (0, 7)),
    ("pre_process", "max_seq_len", (0, 7)),
    ("pass:LoRA", "r", (0, 8)),
    ("pass:LoRA", "alpha", (0, 8)),
    ("pass:QLoRA", "r", (0, 8)),
    ("pass:QLoRA", "alpha", (0, 8)),
    ("pass:LoftQ", "r", (0, 8)),
    ("pass:LoftQ", "alpha", (0, 8)),
)
"""Level, key and the first Olive version that knew it."""


def legacy_names(level: str) -> set[str]:
    """Older names that a level still takes, for did-you-mean."""
    rules = [*_TABLE.get(level, ()), *(rule for rule in rules_workflow.FINISH_RULES if rule.level == level)]
    return {rule.key for rule in rules if rule.key != "*"}


def translate(root: Node, passes: Mapping[str, type[BaseModel]]) -> Rewriting:
    """Rewrite the tree in place, level by level, and tell what was done."""
    rw = Rewriting(root, passes)
    if root.mapping is None:
        return rw
    _unfold_blocks(rw)
    _detect(rw)
    for level, node, at in _levels(root):
        if level == "accelerator":
            continue
        known = rw.passes[level[5:]].model_fields if level.startswith("pass:") else {}
        for rule in _TABLE.get(level, ()):
            if rule.key not in known and rule.fires(node):
                rw.apply(rule, node, at)
    _finish(rw)
    write_defaults(rw)
    rules_search.write_old_samples(rw)
    rw.rewrites.sort(key=lambda rewrite: rewrite.line or 0)
    return rw


def _finish(rw: Rewriting) -> None:
    """What touches several places: engine-level providers, workspaces and data roots move to where they belong."""
    root, systems = rw.root, rw.root.get("systems")
    for rule in rules_workflow.FINISH_RULES:
        if rule.level == "workflow" and rule.fires(root):
            rw.apply(rule, root, "")
    for level, node, at in _levels(root):
        if level == "accelerator":
            for rule in _TABLE[level]:
                if rule.fires(node):
                    rw.apply(rule, node, at)
    systems = root.get("systems")
    for rule in rules_workflow.FINISH_RULES:
        if rule.level == "systems" and systems is not None and systems.mapping is not None:
            rw.apply(rule, systems, "systems")


def _levels(root: Node) -> Iterator[tuple[str, Node, str]]:
    """Every mapping that has rules, top down; what rules move below a mapping is seen when it is reached."""
    yield "workflow", root, ""
    search = root.get("search_strategy")
    if search is not None and search.mapping is not None:
        yield "search_strategy", search, "search_strategy"
        sampler = search.get("sampler_config")
        if sampler is not None and sampler.mapping is not None:
            yield "sampler_config", sampler, "search_strategy.sampler_config"
    model = root.get("input_model")
    if model is not None and model.mapping is not None:
        yield "model", model, "input_model"
        load = model.get("load_kwargs")
        if load is not None and load.mapping is not None and root.get("input_model") is model:
            yield "load_kwargs", load, "input_model.load_kwargs"
    yield from _pass_levels(root)
    systems = root.get("systems")
    if systems is not None and systems.mapping is not None:
        yield "systems", systems, "systems"
        for name, system in list(systems.mapping.items()):
            if system.mapping is not None:
                yield "system", system, f"systems.{name}"
                accelerators = system.get("accelerators")
                for index, item in enumerate((accelerators.items if accelerators else None) or []):
                    if item.mapping is not None:
                        yield "accelerator", item, f"systems.{name}.accelerators.{index}"
    yield from _evaluator_levels(root)
    yield from _data_levels(root)


def _data_levels(root: Node) -> Iterator[tuple[str, Node, str]]:
    data = root.get("data_configs")
    if data is None or data.items is None:
        return
    yield "data_configs", data, "data_configs"
    for index, config in enumerate(list(data.items)):
        at = f"data_configs.{index}"
        if config.mapping is None:
            continue
        yield "data_config", config, at
        for key, level in (("load_dataset_config", "load_dataset"), ("pre_process_data_config", "pre_process")):
            block = config.get(key)
            if block is not None and block.mapping is not None:
                yield level, block, f"{at}.{key}"


def _evaluator_levels(root: Node) -> Iterator[tuple[str, Node, str]]:
    evaluators = root.get("evaluators")
    for name, evaluator in list((evaluators.mapping if evaluators and evaluators.mapping else {}).items()):
        at = f"evaluators.{name}"
        if evaluator.mapping is None:
            continue
        yield "evaluator", evaluator, at
        metrics = evaluator.get("metrics")
        for index, metric in enumerate((metrics.items if metrics else None) or []):
            if metric.mapping is None:
                continue
            yield "metric", metric, f"{at}.metrics.{index}"
            subs = metric.get("sub_types")
            for number, sub in enumerate((subs.items if subs else None) or []):
                if sub.mapping is not None:
                    yield "sub_type", sub, f"{at}.metrics.{index}.sub_types.{number}"


def _pass_levels(root: Node) -> Iterator[tuple[str, Node, str]]:
    passes = root.get("passes")
    if passes is None or passes.mapping is None:
        return
    yield "passes", passes, "passes"
    for at, entry in pass_nodes(root):
        yield "pass", entry, at
        kind = _TRAINING.get((entry.text("type") or "").lower())
        if kind is not None:
            yield f"pass:{kind}", entry, at
            arguments = entry.get("training_args")
            if arguments is not None and arguments.mapping is not None:
                yield "training_args", arguments, f"{at}.training_args"


def _unfold_blocks(rw: Rewriting) -> None:
    """Lift every nested block, so that rules see one form."""
    root = rw.root
    rw.unfold(root, "engine")
    model = root.get("input_model")
    if model is not None:
        rw.unfold(model, "config")
    for nodes in steps(root).values():
        for node in nodes:
            rw.unfold(node, "config")
    for section, key in (("systems", "config"), ("evaluators", "type_args")):
        named = root.get(section)
        for item in (named.mapping if named and named.mapping else {}).values():
            rw.unfold(item, key)
    data = root.get("data_configs")
    items = (list(data.mapping.values()) if data.mapping else data.items) if data else None
    for item in items or []:
        for block in ("load_dataset_config", "pre_process_data_config"):
            below = item.get(block)
            if below is not None:
                rw.unfold(below, "params")


def _detect(rw: Rewriting) -> None:
    """The newest version in which every key of the file is valid."""
    old: list[tuple[Version, Node]] = []
    new: list[tuple[Version, Node]] = []
    since = {(level, key): version for level, key, version in _SINCE}
    for level, node, _ in _levels(rw.root):
        finish = [rule for rule in rules_workflow.FINISH_RULES if rule.level == level]
        for rule in (*_TABLE.get(level, ()), *finish):
            found = node.get(rule.key)
            if rule.until and found is not None and found.origin == "file" and rule.fires(node):
                old.append((rule.until, found))
        for key, found in (node.mapping or {}).items():
            first = since.get((level, key))
            if first and found.origin == "file":
                new.append((first, found))
    newest = min((until for until, _ in old), default=_TODAY)
    rw.dialect = _VERSIONS.get(newest, "today")
    clash = [(version, node) for version, node in new if version > newest]
    if clash:
        _report_clash(rw, old, clash, newest)


def _report_clash(
    rw: Rewriting, old: list[tuple[Version, Node]], clash: list[tuple[Version, Node]], newest: Version
) -> None:
    first = min(version for version, _ in clash)
    before = _named([node for until, node in old if until < first])
    after = _named([node for _, node in clash])
    message = (
        f"the file mixes dialects: up to Olive {_VERSIONS[newest]} only: {before}; "
        f"from Olive {_VERSIONS[first]} on only: {after}"
    )
    rw.mixed = True
    node = min((node for _, node in clash), key=lambda node: node.line or 0)
    today = {rule.key: rule.action.to for rule in _RULES if rule.until and isinstance(rule.action, Rename)}
    keys = dict.fromkeys(node.path.split(".")[-1] for until, node in old if until < first)
    names = ", ".join(f"{key} is {today[key]} today" for key in keys if key in today)
    hint = "write all of them in one dialect" + (f": {names}" if names else "")
    rw.problems.append(problem_at(node, message, hint=hint, at_key=True))


def _named(nodes: list[Node]) -> str:
    rest = f" and {len(nodes) - _SHOWN} more" if len(nodes) > _SHOWN else ""
    nodes = sorted(nodes, key=lambda node: node.line or 0)[:_SHOWN]
    return (
        ", ".join(node.path + (f" (line {line})" if (line := node.key_line or node.line) else "") for node in nodes)
        + rest
    )
