"""The data configs that a plan uses, held against the first rows of their files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from coldpress.artifacts.classifiers import CLASSIFICATION
from coldpress.data.columns import wrong_columns
from coldpress.data.sources import files_of
from coldpress.data.tokenizer import chat_template_of
from coldpress.engine.fits import Refuse
from coldpress.errors import CheckpointError, DataError
from coldpress.evaluate.encoders import is_encoder

if TYPE_CHECKING:
    from coldpress.engine.plan import Plan

__all__ = ["check_columns"]


def check_columns(plan: Plan, refuse: Refuse) -> None:
    """Refuse columns that a data config in use names and its files do not have."""
    has_template = True  # said of a model that is not here
    if plan.model.artifact is not None:
        with contextlib.suppress(CheckpointError):  # the plan, or the step that needs it, says what is wrong with it
            has_template = chat_template_of(plan.model.artifact.tokenizer_path) is not None
    told: set[tuple[str, str]] = set()
    for name, classes in dict.fromkeys(_uses(plan)):
        config = plan.data_configs.get(name)
        if config is None or not _is_here(plan, name):
            continue
        for key, error in wrong_columns(config, classes=classes, has_template=has_template):
            path = f"data_configs.{name}.{key}"
            if (path, error.message) not in told:
                told.add((path, error.message))
                refuse(error.message, path, error.hint)


def _uses(plan: Plan) -> Iterator[tuple[str, bool | None]]:
    """Names of data configs, each with whether its label is a class; None where the model is not known."""
    for step in plan.steps:
        classes = None if step.spec.unknown else step.spec.task == CLASSIFICATION
        named = [value for field, value in dict(step.config).items() if field.endswith("data_config")]
        for name in (*named, step.parity.data_config if step.limits else None):
            if isinstance(name, str):
                yield name, classes
    model = plan.input_spec
    classes = None if model.unknown else model.task == CLASSIFICATION or is_encoder(model.config)
    for evaluator in plan.evaluators.values():
        for metric in evaluator.measured:
            name = getattr(metric, "data_config", None)
            if name is not None and not (metric.type == "custom" and metric.user_config.evaluate_func):
                yield name, classes


def _is_here(plan: Plan, name: str) -> bool:
    """Whether there is something to look at; what is not there, or empty, is told already."""
    try:
        return all(path.stat().st_size for path in files_of(plan.data_configs[name]).values())
    except DataError:
        return False
