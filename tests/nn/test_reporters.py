"""What a training tells while it runs."""

from __future__ import annotations

from coldpress.events import EvaluationLoss
from coldpress.nn.reporters import evaluation_loss


def test_the_best_evaluation_is_of_all_that_came_before() -> None:
    """Trainer's log as it stands after a resume: what came before is in it."""
    history = [
        {"loss": 2.0, "step": 1},
        {"eval_loss": 1.5, "step": 2},
        {"eval_loss": 1.25, "step": 4},
        {"loss": 1.9, "step": 5},
        {"eval_loss": 1.75, "step": 6},
    ]
    assert evaluation_loss("t", history) == EvaluationLoss("t", at=6, loss=1.75, best=1.25, best_at=4)
    assert evaluation_loss("t", history[:2]) == EvaluationLoss("t", at=2, loss=1.5, best=1.5, best_at=2)
    assert evaluation_loss("t", history[:1]) is None
