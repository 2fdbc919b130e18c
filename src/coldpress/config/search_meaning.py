"""Whether a search can tell which of two results is better."""

from __future__ import annotations

from coldpress.config.pass_tree import is_searched, steps
from coldpress.config.tree import Node, problem_at
from coldpress.errors import Problem

__all__ = ["check_objectives"]


def check_objectives(root: Node) -> list[Problem]:
    """A search without an evaluator, or with evaluators that rank nothing and ask for nothing."""
    strategy = root.get("search_strategy")
    if strategy is None or not is_searched(root):
        return []
    last = list(steps(root).values())[-1:]
    given = [node for user in (root, *(last[0] if last else ())) if (node := user.get("evaluator")) is not None]
    named = [node.value for node in given if isinstance(node.value, str)]
    if len(named) < len([node for node in given if node.value is not None]):
        return []  # of a wrong type, and told
    known = root.get("evaluators")
    names = list(known.mapping) if known is not None and known.mapping is not None else []
    if not named:
        there = f"there are: {', '.join(names)}" if names else "there are none yet"
        hint = f"write evaluator: NAME ({there}), or search_strategy: false"
        return [problem_at(strategy, "a search compares results, and no evaluator measures them", hint=hint)]
    evaluators = [root.get("evaluators", name) for name in named]
    if any(one is None or one.damaged for one in evaluators) or any(map(_objective, evaluators)):
        return []
    message = f"a search compares results, and nothing in {', '.join(dict.fromkeys(named))} has a priority or a goal"
    hint = f"give one of evaluators.{named[0]}.metrics sub_types: [{{name: ..., priority: 1}}], or a goal there"
    if any(one is not None and one.get("tasks") is not None for one in evaluators):
        hint += "; for tasks write a metric of type lm_eval"
    return [problem_at(strategy, message, hint=hint)]


def _objective(evaluator: Node | None) -> bool:
    metrics = None if evaluator is None else evaluator.get("metrics")
    for metric in (metrics.items if metrics is not None else None) or []:
        subs = metric.get("sub_types")
        for sub in (subs.items if subs is not None else None) or []:
            priority, goal = sub.get("priority"), sub.get("goal")
            # What is no number is told elsewhere, and meant as one.
            if priority is not None and not (isinstance(priority.value, int) and priority.value < 1):
                return True
            if goal is not None and goal.value is not None:
                return True
    return False
