"""Services that a training can report to (`report_to` of the training arguments), and what each needs installed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["REPORTERS", "reporters_asked"]

REPORTERS: Mapping[str, tuple[str, ...]] = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "mlflow": ("mlflow", "mlflow-skinny"),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
    "comet_ml": ("comet_ml",),
    "neptune": ("neptune",),
    "clearml": ("clearml",),
    "dvclive": ("dvclive",),
    "swanlab": ("swanlab",),
    "codecarbon": ("codecarbon",),
    "azure_ml": ("azureml-core",),
}
"""Transformers' name of each, and the distributions of which one must be installed; the first is the usual one."""


def reporters_asked(value: Any) -> tuple[str, ...]:
    """The services that a value of `report_to` names, each once; none for null and `none`."""
    names = [value] if isinstance(value, str) else list(value or ())
    return tuple(dict.fromkeys(str(name) for name in names if name != "none"))
