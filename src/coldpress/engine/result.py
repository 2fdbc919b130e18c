"""What a run gives back: small frozen values that print well and go into `run.json` as they are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from coldpress.events import ParityMeasured
from coldpress.record import SearchRecord
from coldpress.scores import Score

__all__ = ["RunResult", "Score", "StepResult"]


@dataclass(frozen=True)
class StepResult:
    """A finished step."""

    name: str
    type: str
    key: str
    cached: bool
    seconds: float
    """Of the pass itself, as it was when it ran."""
    peak_bytes: int
    """Highest resident memory of its process."""
    peak_anonymous_bytes: int
    path: Path
    """Its artifact in the store."""
    parity: ParityMeasured | None = None
    parity_seconds: float = 0.0
    parity_peak_bytes: int = 0
    """The proof is a phase of its own, with its own time and peak."""
    ranks: int = 1
    """Processes that ran it together; time and peak are rank 0's."""


@dataclass(frozen=True)
class RunResult:
    """A finished workflow."""

    output: Path
    """Folder of the final model."""
    record: Path
    """`run.json`."""
    steps: tuple[StepResult, ...]
    scores: tuple[Score, ...]
    seconds: float
    unmet: tuple[Score, ...] = ()
    """Scores of the final model that do not meet their goals."""
    search: SearchRecord | None = None
    """The search that chose the steps; None without one."""

    def score(self, model: str, metric: str | None = None, sub_type: str | None = None) -> Score:
        """The first such score of `input` or of a step; raises KeyError."""
        for score in self.scores:
            if score.model == model and metric in (None, score.metric) and sub_type in (None, score.sub_type):
                return score
        raise KeyError(f"no score for {model!r}; measured: {sorted({score.model for score in self.scores})}")
