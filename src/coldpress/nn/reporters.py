"""What a training tells while it runs: the evaluation loss and the best so far."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from coldpress.events import EvaluationLoss

__all__ = ["evaluation_loss"]


def evaluation_loss(step: str, history: Iterable[Mapping[str, Any]]) -> EvaluationLoss | None:
    """The last evaluation in Trainer's log, and the best one; None before the first.

    A resumed training has the log of what came before, so its best is the best of all.
    """
    found = [(float(point["eval_loss"]), int(point["step"])) for point in history if "eval_loss" in point]
    if not found:
        return None
    best, best_at = min(found)
    loss, at = found[-1]
    return EvaluationLoss(step, at, loss, best, best_at)
