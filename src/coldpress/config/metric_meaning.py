"""What single keys of evaluators cannot show: numbers that do not exist, goals that contradict or cannot be reached."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from coldpress.config.metrics import METRIC_TYPES, OF_TEXT, OWN_ACCURACY, TORCH_METRICS
from coldpress.config.pass_tree import pass_nodes
from coldpress.config.schema import PreProcess
from coldpress.config.tree import Node, problem_at
from coldpress.errors import Problem
from coldpress.registry import nearest

__all__ = ["check_metrics"]

_AVERAGED = ("precision", "recall", "f1_score")
_OF_AVERAGES = ("average", "positive")
_OF_EVALUATE = ("load_params", "compute_params", "result_key")


@dataclass(frozen=True)
class _Range:
    """What a number can be, and which way is better."""

    low: float
    high: float
    higher_is_better: bool
    open_low: bool = False
    """The lowest value is never reached."""


_SHARE = _Range(0, 1, True)
_COST = _Range(0, math.inf, False, open_low=True)
_SPEED = _Range(0, math.inf, True, open_low=True)
_RANGES: Mapping[tuple[str, str], _Range] = {
    **{("accuracy", name): _SHARE for name in OWN_ACCURACY if name not in OF_TEXT},
    **{("accuracy", name): _Range(0, 1, one.higher_is_better) for name, one in TORCH_METRICS.items() if one.unit},
    **{("accuracy", name): _Range(-1, 1, True) for name, one in TORCH_METRICS.items() if not one.unit},
    **{(kind, "perplexity"): _Range(1, math.inf, False) for kind in ("accuracy", "perplexity")},
    **{(kind, name): _Range(0, math.inf, False) for kind in ("accuracy", "perplexity") for name in OF_TEXT[1:]},
    ("divergence", "kl"): _Range(0, math.inf, False),
    ("divergence", "top1_agreement"): _SHARE,
    ("divergence", "cosine_similarity"): _Range(-1, 1, True),
    ("throughput", ""): _SPEED,
    ("generation", "prefill_tokens_per_second"): _SPEED,
    ("generation", "decode_tokens_per_second"): _SPEED,
    **{(kind, ""): _COST for kind in ("latency", "generation", "memory", "load_time", "size_on_disk")},
}
"""(type, sub type) -> range; an empty sub type is any other of the type. Nothing is known of custom and lm_eval."""


def check_metrics(root: Node) -> list[Problem]:
    """Contradictions in the evaluators. Values of a wrong type are left to the check of types."""
    evaluators = root.get("evaluators")
    problems: list[Problem] = []
    for evaluator in evaluators.mapping.values() if evaluators is not None and evaluators.mapping else ():
        problems += _twice(evaluator)
        for metric in _items(evaluator, "metrics"):
            problems += _metric(metric)
        problems += _both_ways(evaluator)
    return problems + _without_baseline(root) + _without_answers(root)


def _items(node: Node, key: str) -> list[Node]:
    block = node.get(key)
    return [item for item in (block.items if block is not None else None) or [] if item.mapping is not None]


def _number(node: Node | None) -> float | None:
    value = None if node is None else node.value
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


# -- one metric -------------------------------------------------------------------------------------------------------


def _metric(metric: Node) -> list[Problem]:
    kind = metric.text("type")
    if kind is None or kind not in METRIC_TYPES:
        return []
    problems = []
    for sub in _items(metric, "sub_types"):
        if kind == "accuracy":
            problems += _accuracy(metric, sub)
        problems += _goal(kind, sub)
    if kind == "custom":
        problems += _custom(metric)
    window, stride = _number(metric.get("window")), _number(metric.get("stride"))
    if kind == "perplexity" and window is not None and stride is not None and stride >= window:
        message = f"stride {stride:g} leaves no context in a window of {window:g}"
        problems.append(problem_at(metric.get("stride") or metric, message, hint="make it smaller than window"))
    return problems


def _accuracy(metric: Node, sub: Node) -> list[Problem]:
    """A sub type that does not exist, and settings without effect."""
    name, place = sub.text("name"), sub.get("name")
    theirs = metric.text("backend") == "huggingface_metrics"
    if name is None or place is None:
        return []
    if not theirs and name not in OWN_ACCURACY and name not in TORCH_METRICS:
        known = (*OWN_ACCURACY, *TORCH_METRICS)
        close = nearest(name, known) or next((one for one in known if one.startswith(name.lower())), None)
        hint = f"did you mean {close}?" if close else f"one of: {', '.join(known)}"
        return [problem_at(place, f"accuracy has no number called {name!r}", hint=hint)]
    config = sub.get("metric_config")
    if config is None or config.mapping is None or name in TORCH_METRICS:
        return []
    allowed = _OF_EVALUATE if theirs else _OF_AVERAGES if name in _AVERAGED else ()
    problems = []
    for key, node in config.mapping.items():
        if key not in allowed:
            close = nearest(key, allowed)
            hint = f"did you mean {close}?" if close else f"known here: {', '.join(allowed) or 'nothing'}"
            problems.append(problem_at(node, "unknown key", hint=hint, at_key=True))
    average = config.get("average")
    if average is not None and "average" in allowed:
        values = ("macro", "micro", "weighted", "binary")
        if average.value not in values:
            problems.append(problem_at(average, f"must be one of {', '.join(values)}, got {average.value!r}"))
        if average.value == "binary" and config.get("positive") is None:
            problems.append(problem_at(average, "binary needs positive: the answer whose figure it is"))
    return problems


def _custom(metric: Node) -> list[Problem]:
    user = metric.get("user_config")
    if user is None or user.mapping is None:
        return []
    given = [key for key in ("evaluate_func", "metric_func") if user.text(key)]
    problems = []
    if len(given) != 1:
        what = "both are given" if given else "none is given"
        problems.append(problem_at(user, f"needs one of evaluate_func and metric_func, and {what}"))
    elif user.text("user_script") is None:
        problems.append(problem_at(user, f"{given[0]} needs user_script, the file that it stands in"))
    if given == ["metric_func"] and metric.get("data_config") is None:
        problems.append(problem_at(metric, "metric_func needs data_config, the records that the model answers"))
    return problems


# -- goals ------------------------------------------------------------------------------------------------------------


def _goal(kind: str, sub: Node) -> list[Problem]:
    """A goal that no model can reach, or that asks for the opposite of what it says."""
    goal = sub.get("goal")
    value = None if goal is None else _number(goal.get("value"))
    asked = None if goal is None else goal.text("type")
    name = sub.text("name") or ""
    if goal is None or value is None or asked is None:
        return []
    place = goal.get("value") or goal
    if kind == "divergence" and asked != "threshold":
        message = f"{name} is measured against the input model already, so a goal of type {asked} has nothing to add"
        return [problem_at(goal.get("type") or goal, message, hint="use a threshold")]
    if asked != "threshold" and value < 0:
        other = _opposite(asked)
        return [problem_at(place, f"{asked} must not be negative, got {value:g}", hint=f"use {other} {-value:g}")]
    span = _RANGES.get((kind, name)) or _RANGES.get((kind, ""))
    if span is None:
        return []
    if asked == "threshold":
        return _threshold(kind, name, span, value, place)
    widest = span.high - span.low
    if not asked.startswith("percent-") and value > widest:
        hint = f"{name} is a share: write {value / 100:g} for {value:g} points" if widest == 1 else None
        message = f"{name} moves between {span.low:g} and {span.high:g}, so it cannot change by {value:g}"
        return [problem_at(place, message, hint=hint)]
    if asked == "percent-min-improvement" and not span.higher_is_better and value >= 100:
        return [problem_at(place, f"{kind} {name} cannot fall by {value:g} percent: it would be 0 or less")]
    return []


def _opposite(asked: str) -> str:
    prefix = "percent-" if asked.startswith("percent-") else ""
    return f"{prefix}{'max-degradation' if asked.endswith('min-improvement') else 'min-improvement'}"


def _threshold(kind: str, name: str, span: _Range, value: float, place: Node) -> list[Problem]:
    said = f"{kind} {name}".strip()
    if span.higher_is_better and value > span.high:
        hint = f"{name} is a share: write {value / 100:g} for {value:g} %" if span.high == 1 and value <= 100 else None
        return [problem_at(place, f"{said} is at most {span.high:g}, so no model reaches {value:g}", hint=hint)]
    if not span.higher_is_better and (value < span.low or (value == span.low and span.open_low)):
        return [problem_at(place, f"{said} is lower-is-better and never as low as {value:g}, so no model reaches it")]
    return []


def _twice(evaluator: Node) -> list[Problem]:
    """Names and priorities that occur twice."""
    problems = []
    names: dict[str, Node] = {}
    ranks: dict[float, Node] = {}
    for metric in _items(evaluator, "metrics"):
        name, place = metric.text("name"), metric.get("name")
        if name is not None and place is not None and names.setdefault(name, place) is not place:
            problems.append(problem_at(place, f"two metrics of this evaluator are called {name!r}"))
        for sub in _items(metric, "sub_types"):
            node = sub.get("priority")
            rank = _number(node)
            if node is not None and rank is not None and rank > 0 and ranks.setdefault(rank, node) is not node:
                message = f"two numbers of this evaluator have priority {rank:g}"
                problems.append(problem_at(node, message, hint="rank them 1, 2, 3 ..."))
    return problems


def _both_ways(evaluator: Node) -> list[Problem]:
    """One number with thresholds that exclude each other: at least so much, and at most less."""
    floors: dict[tuple[str, ...], float] = {}
    ceilings: dict[tuple[str, ...], float] = {}
    problems = []
    seen: dict[tuple[str, ...], Node] = {}
    for metric, sub, goal in _goals(evaluator):
        value = _number(goal.get("value"))
        if goal.text("type") != "threshold" or value is None:
            continue
        number = (metric.text("type") or "", metric.text("data_config") or "", sub.text("name") or "")
        better = sub.get("higher_is_better")
        span = _RANGES.get((number[0], number[2])) or _RANGES.get((number[0], ""))
        higher = better.value if better is not None and isinstance(better.value, bool) else None
        higher = (span.higher_is_better if span is not None else True) if higher is None else higher
        mine, other = (floors, ceilings) if higher else (ceilings, floors)
        mine[number] = max(mine.get(number, value), value) if higher else min(mine.get(number, value), value)
        if number in other and floors[number] > ceilings[number]:
            first = seen[number]
            message = (
                f"contradicts the goal on line {first.line}: {number[2]} must be {floors[number]:g} or more "
                f"and {ceilings[number]:g} or less"
            )
            problems.append(problem_at(goal, message, hint="which way is better? Keep one of them"))
        seen.setdefault(number, goal)
    return problems


def _goals(evaluator: Node) -> Iterator[tuple[Node, Node, Node]]:
    for metric in _items(evaluator, "metrics"):
        for sub in _items(metric, "sub_types"):
            goal = sub.get("goal")
            if goal is not None and goal.mapping is not None:
                yield metric, sub, goal


def _users(root: Node) -> list[Node]:
    return [root, *(node for _, node in pass_nodes(root))]


def _in_use(root: Node) -> list[Node]:
    """Evaluators that the workflow or one of its passes names."""
    named = dict.fromkeys(name for user in _users(root) if (name := user.text("evaluator")) is not None)
    return [node for name in named if (node := root.get("evaluators", name)) is not None]


def _without_baseline(root: Node) -> list[Problem]:
    """Relative goals where the input model is not measured."""
    asked = root.get("evaluate_input_model")
    if asked is None or asked.value is not False:
        return []
    problems = []
    for evaluator in _in_use(root):
        for _, _, goal in _goals(evaluator):
            kind = goal.text("type")
            if kind is not None and kind != "threshold":
                message = f"{kind} compares with the input model, which is not measured (evaluate_input_model: false)"
                hint = "set evaluate_input_model to true, or use a threshold"
                problems.append(problem_at(goal.get("type") or goal, message, hint=hint))
    return problems


def _without_answers(root: Node) -> list[Problem]:
    """Metrics in use that score a data config without an answer: one problem for each data config."""
    data = root.get("data_configs")
    by_name = {config.text("name"): config for config in (data.items if data is not None else None) or []}
    problems: dict[str, Problem] = {}
    for metric in (metric for evaluator in _in_use(root) for metric in _items(evaluator, "metrics")):
        name = metric.text("data_config")
        config = by_name.get(name) if name is not None else metric.get("data_config")
        if config is None or config.mapping is None or config.damaged or not _wants_answers(metric):
            continue
        if not _has_answers(config.get("pre_process_data_config")):
            said = f"the data config {name}" if name else "this data config"
            message = f"{said} names no answer, so {metric.text('type')} has nothing to compare with"
            hint = f"add label_col, the answer's column, to pre_process_data_config of {name or 'this data config'}"
            problems.setdefault(config.path, problem_at(metric.get("data_config") or metric, message, hint=hint))
    return list(problems.values())


def _wants_answers(metric: Node) -> bool:
    kind = metric.text("type")
    if kind == "custom":
        return metric.get("user_config", "metric_func") is not None
    names = [sub.text("name") for sub in _items(metric, "sub_types")] or ["accuracy_score"]
    return kind == "accuracy" and any(name not in OF_TEXT for name in names)


def _has_answers(block: Node | None) -> bool:
    """Whether a block says what the answers are, or leaves it to the form of the records."""
    if block is None or block.mapping is None:
        return block is not None and block.value is not None  # of a wrong type, which is told elsewhere

    def value(key: str) -> object:
        node = block.get(key)
        return PreProcess.model_fields[key].default if node is None else node.value

    if block.damaged or value("label_col") is not None or value("chat_template"):
        return True
    if value("format") not in ("auto", "text", None):
        return True
    template = value("text_template")
    return isinstance(template, str) and "|loss}" in template
