"""What is seen and decided while a training runs: losses, progress, when to save, what was best, when to stop.

A training is stopped by a loss that is no number, and by one that diverges: for `DIVERGED_STEPS` steps its smoothed
value is above a limit, the lowest of

    the mean of the first steps + 2, or half of it where that is more
    the first loss + 3                                      (one batch is chance, but no update had spoilt it)
    what a guess among all tokens would give + 0.5          (where the first batch was below that)

Either names the batch and keeps the last good weights.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coldpress.errors import TrainingError
from coldpress.events import EvaluationLoss, Message, Progress, Sink

__all__ = ["CURVE", "Evaluations", "Watch", "diverged_by"]

CURVE = "curve.json"
"""In a checkpoint: all that this module must know to go on."""
CHECKPOINT_SECONDS = 120.0
"""Between checkpoints, when the config does not say when to save."""
CHECKPOINT_SHARE = 0.05
"""Saving takes at most this share of the time: slow disks and large adapters are saved less often."""
PROGRESS_SECONDS = 0.2
"""Between progress events."""
SMOOTHING = 0.9
"""Weight of the past in the smoothed loss."""
FIRST_STEPS = 10
"""Steps whose mean is where the loss began."""
DIVERGED_STEPS = 5
BEYOND_FIRST, BEYOND_GUESSING = 3.0, 0.5
"""Nats per token."""


def diverged_by(start: float) -> float:
    """By how much the smoothed loss may exceed its start, nats: 2, or half of a high start."""
    return max(2.0, start / 2)


@dataclass
class Evaluations:
    """Losses on held-out data, and what follows from them."""

    patience: int | None = None
    """Evaluations without improvement after which training ends; None: never."""
    threshold: float = 0.0
    """Less than this is no improvement."""
    best: float | None = None
    best_step: int | None = None
    since: int = 0
    """Evaluations since the last improvement."""

    def add(self, loss: float, step: int) -> bool:
        """Whether this is the best so far."""
        if self.best is None or loss < self.best:
            small = self.best is not None and loss > self.best - self.threshold
            self.since = self.since + 1 if small else 0
            self.best, self.best_step = loss, step
            return True
        self.since += 1
        return False

    @property
    def enough(self) -> bool:
        return self.patience is not None and self.since >= self.patience


@dataclass
class Watch:
    """One training. `describe` says what stands in a training sequence, by its index."""

    step: str
    emit: Sink
    timed: bool
    """Save by the clock, since the config does not say when."""
    describe: Callable[[int], str] = str
    everyone: Callable[[Sequence[int]], Sequence[int]] = tuple
    """From the rows of this process to those of all that train the model."""
    guessing: float | None = None
    """Loss of a guess among all tokens, the logarithm of their number; None where that says nothing."""
    evaluations: Evaluations = field(default_factory=Evaluations)
    losses: list[float] = field(default_factory=list)
    tokens: int = 0
    """Trained on so far, padding not counted."""
    resumed_from: int | None = None
    stop_asked: bool = False
    stopped: bool = False
    _values: dict[str, float] = field(default_factory=dict)
    _smoothed: float | None = None
    _risen: int = 0
    _first: float = field(default_factory=time.monotonic)
    _shown: float = field(default_factory=time.monotonic)
    _saved: float = field(default_factory=time.monotonic)
    _first_step: int = 0
    _first_tokens: int = 0
    _save_began: float | None = None
    _save_took: float = 0.0
    _rows: tuple[int, ...] = ()

    def begin(self) -> None:
        """Training starts now; what came before does not count into the rates."""
        self._first = self._shown = self._saved = time.monotonic()
        self._first_tokens = self.tokens

    def resume(self, checkpoint: Path) -> None:
        self.resumed_from = self._first_step = int(checkpoint.name.rpartition("-")[2])
        try:
            kept = json.loads((checkpoint / CURVE).read_text(encoding="utf-8"))
        except FileNotFoundError:  # a checkpoint of Trainer's that the config names
            kept = {}
        for loss in kept.get("losses", ()):
            self.losses.append(float(loss))
            self._smooth(float(loss))
        self.tokens = int(kept.get("tokens", 0))
        for name in ("best", "best_step", "since"):
            if kept.get(name) is not None:
                setattr(self.evaluations, name, kept[name])
        self.emit(Message("info", f"goes on from the checkpoint at step {self.resumed_from}", self.step))

    # -- a step -------------------------------------------------------------------------------------------------------

    def add(self, loss: float, tokens: int, rows: tuple[int, ...]) -> None:
        """The loss of one step, before its weights change; raises TrainingError for one that ends the training."""
        self._rows = rows
        done = len(self.losses)
        if not math.isfinite(loss):
            raise self.broken(f"the loss {'is' if done == 0 else 'became'} {loss}", done)
        self.losses.append(loss)
        self.tokens += tokens
        self._smooth(loss)
        if self._risen >= DIVERGED_STEPS:
            raise TrainingError(
                f"the loss diverges: it began at {self.losses[0]:.4g} and is {self._smoothed:.4g} in step {done + 1} "
                f"(smoothed; {self._limit():.4g} is the limit); {self._where()}",
                hint="lower learning_rate, add warmup_steps, or set max_grad_norm",
            )

    def _smooth(self, loss: float) -> None:
        self._smoothed = loss if self._smoothed is None else SMOOTHING * self._smoothed + (1 - SMOOTHING) * loss
        self._risen = self._risen + 1 if self._smoothed > self._limit() else 0

    def _limit(self) -> float:
        """What the smoothed loss must not stay above."""
        begun = self.losses[:FIRST_STEPS]
        limit = begun[0] + BEYOND_FIRST
        if len(self.losses) > FIRST_STEPS:
            limit = min(limit, _mean(begun) + diverged_by(_mean(begun)))
        if self.guessing is not None and begun[0] < self.guessing:
            limit = min(limit, self.guessing + BEYOND_GUESSING)
        return limit

    @property
    def good(self) -> bool:
        """Whether the loss is where it should be: weights of now are worth keeping."""
        return self._risen == 0

    def broken(self, what: str, done: int) -> TrainingError:
        """What to raise when a figure of step `done + 1` is no number."""
        if done == 0:
            return TrainingError(
                f"{what} in the first step, before any weight was changed: the model itself yields it; {self._where()}",
                hint="does the checkpoint hold NaN or infinite weights, or overflow in this torch_dtype?",
            )
        return TrainingError(
            f"{what} in step {done + 1}; the last finite loss was {self.losses[-1]:.4g}; {self._where()}",
            hint="lower learning_rate, set max_grad_norm, or look at the data with `coldpress data`",
        )

    def _where(self) -> str:
        """The batch, in words: the first rows of it with their text."""
        rows = list(self.everyone(self._rows))
        named = ", ".join(str(row) for row in rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
        shown = f"; sequence {rows[0]} begins {self.describe(rows[0])!r}" if rows else ""
        return f"its batch is the training sequences {named}{shown}"

    def wants_save(self) -> bool:
        """Whether it is time for a checkpoint, by the clock."""
        pause = max(CHECKPOINT_SECONDS, self._save_took / CHECKPOINT_SHARE)
        return self.timed and time.monotonic() - self._saved > pause

    def end_of_step(self, state: Any, control: Any, *, save: bool, stop: bool) -> None:
        """Trainer's step is done. `save` and `stop` are what all processes agreed on."""
        now = time.monotonic()
        done, total = int(state.global_step), int(state.max_steps)
        if stop and done < total:
            self.stopped = control.should_save = control.should_training_stop = True
        elif save and done < total:
            control.should_save = True
        if control.should_save:
            self._save_began = now
        if now - self._shown >= PROGRESS_SECONDS or done in (1, total):
            self._shown = now
            values = {"loss": self.losses[-1], **self._rates(done, total, now)}
            self.emit(Progress(self.step, done, total, "steps", values))

    def _rates(self, done: int, total: int, now: float) -> dict[str, float]:
        seconds = max(now - self._first, 1e-9)
        made = max(done - self._first_step, 1)
        return {
            "tokens_per_second": (self.tokens - self._first_tokens) / seconds,
            "eta_seconds": seconds / made * (total - done),
            **self._values,
        }

    # -- evaluations, logs, checkpoints -------------------------------------------------------------------------------

    def evaluated(self, loss: float, step: int) -> bool:
        """Whether these weights are the best so far."""
        best = self.evaluations.add(loss, step)
        assert self.evaluations.best is not None
        self._values.update(eval_loss=loss, best_eval_loss=self.evaluations.best)
        self.emit(EvaluationLoss(self.step, step, loss, self.evaluations.best, self.evaluations.best_step or step))
        return best

    def logged(self, logs: Mapping[str, Any]) -> None:
        self._values.update({name: float(logs[name]) for name in ("learning_rate", "grad_norm") if name in logs})

    def saved(self, checkpoint: Path) -> None:
        """Mark a checkpoint as complete, after all that Trainer wrote is on disk."""
        ours = self.evaluations
        curve = {
            "losses": self.losses,
            "tokens": self.tokens,
            "best": ours.best,
            "best_step": ours.best_step,
            "since": ours.since,
        }
        (checkpoint / CURVE).write_text(json.dumps(curve), encoding="utf-8")
        sizes = {}
        for path in sorted(checkpoint.rglob("*")):
            if path.is_file():
                with path.open("rb+") as file:
                    os.fsync(file.fileno())
                sizes[path.relative_to(checkpoint).as_posix()] = path.stat().st_size
        mark = checkpoint / "complete.partial"
        mark.write_text(json.dumps(sizes), encoding="utf-8")
        mark.replace(checkpoint / "complete")
        self._saved = time.monotonic()
        self._save_took = self._saved - (self._save_began or self._saved)
        self._save_began = None


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
