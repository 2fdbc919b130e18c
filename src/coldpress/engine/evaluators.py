"""Which evaluators a plan uses, with paths resolved, and what of them the models to be measured cannot give."""

from __future__ import annotations

from collections.abc import Iterable

from coldpress.artifacts.base import Spec
from coldpress.config.metrics import Evaluator
from coldpress.config.schema import Workflow
from coldpress.engine.places import Places
from coldpress.evaluate.measure import refusal

__all__ = ["Refused", "resolve_evaluators"]

Refused = tuple[str, str, str | None]
"""Message, place in the config, hint."""


def resolve_evaluators(
    workflow: Workflow, uses: Iterable[tuple[str | None, Iterable[Spec]]], places: Places
) -> tuple[dict[str, Evaluator], list[Refused]]:
    """`uses`: names of evaluators, each with models that it measures."""
    users: dict[str, list[Spec]] = {}
    for name, measured in uses:
        if name is not None:
            users.setdefault(name, []).extend(measured)
    found: dict[str, Evaluator] = {}
    refused: list[Refused] = []
    for name, specs in users.items():
        evaluator = workflow.evaluators[name]
        metrics = tuple(places.metric(metric) for metric in evaluator.measured)
        found[name] = Evaluator.model_construct(**{**dict(evaluator), "type": None, "tasks": None, "metrics": metrics})
        configs = [None, *(one.config for one in specs if one.unknown is None)]
        for number, metric in enumerate(metrics):
            told = next((text for config in configs if (text := refusal(metric, config)) is not None), None)
            if told is not None:
                place = f"metrics.{number}" if number < len(evaluator.metrics or ()) else "tasks"
                refused.append((told[0], f"evaluators.{name}.{place}", told[1]))
    return found, refused
