"""Every exception of Coldpress, and the exit code each one ends the command with.

    ColdpressError                     1
    ├── UsageError                     2   the command line is wrong
    │   ├── ConfigError                2   the config file is wrong: carries every problem at once
    │   ├── PlanError                  2   the workflow cannot work as written (found before any weight is read)
    │   │   └── UnsupportedModelError  2   no architecture row for this model
    │   └── MissingExtraError          2   an optional package is not installed
    ├── DataError                      1   a data file or a record cannot be used
    ├── CheckpointError                1   a model file is damaged, incomplete or not what it says
    ├── StepError                      1   a step of the workflow failed
    │   ├── ParityError                1   the result is too far from what it came from
    │   ├── TrainingError              1   the training went wrong (loss not finite, nothing to train ...)
    │   └── WorkerKilledError          1   the operating system ended the step's process
    ├── StoreError                     1   the cache or an output folder cannot be read or written
    │   └── DiskFullError              1   no space left
    ├── UnmetError                     3   a search is done, and nothing that it may hand over meets the goals
    └── Interrupted                  130   the user stopped the run

A message says the rule, the value, the place and the way out. `hint` is the way out where it fits on one line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = [
    "CheckpointError",
    "ColdpressError",
    "ConfigError",
    "DataError",
    "DiskFullError",
    "Interrupted",
    "MissingExtraError",
    "ParityError",
    "PlanError",
    "Problem",
    "StepError",
    "StoreError",
    "TrainingError",
    "UnmetError",
    "UnsupportedModelError",
    "UsageError",
    "WorkerKilledError",
]


class ColdpressError(Exception):
    """Root of the tree. `hint`, where given, is printed on a line of its own."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n  hint: {self.hint}"

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, self.hint))


def _rebuild(cls: type[ColdpressError], message: str, hint: str | None) -> ColdpressError:
    error = cls.__new__(cls)
    ColdpressError.__init__(error, message, hint=hint)
    return error


class UsageError(ColdpressError):
    exit_code = 2


@dataclass(frozen=True)
class Problem:
    """One root cause in a config file."""

    message: str
    path: str = ""
    """Where in the config, in dots: `passes.lora.r`."""
    file: str = ""
    line: int | None = None
    """1-based."""
    column: int | None = None
    hint: str | None = None

    def __str__(self) -> str:
        place = ":".join(str(part) for part in (self.file, self.line) if part)
        head = ": ".join(part for part in (place, self.path, self.message) if part)
        return head if self.hint is None else f"{head} ({self.hint})"


class ConfigError(UsageError):
    """Every problem found in a config, in file order."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[object, ...]:
        return (ConfigError, (self.problems,))


class PlanError(UsageError):
    """The workflow cannot work as written."""


class UnsupportedModelError(PlanError):
    """The architecture of a model has no row in the table."""


class MissingExtraError(UsageError):
    """A package that this feature needs is not installed."""


class DataError(ColdpressError):
    """A data file or a record cannot be used."""


class CheckpointError(ColdpressError):
    """A model file is damaged, incomplete or not what it says."""


class StepError(ColdpressError):
    """A step failed; the message names the step."""


class ParityError(StepError):
    """The result of a step is too far from what it came from."""


class TrainingError(StepError):
    """The training went wrong."""


class WorkerKilledError(StepError):
    """The operating system ended the step's process."""


class StoreError(ColdpressError):
    """The cache or an output folder cannot be read or written."""


class DiskFullError(StoreError):
    """No space left on the device."""


class UnmetError(ColdpressError):
    """A search is done, and no candidate met the goals, and none can be handed over."""

    exit_code = 3


class Interrupted(ColdpressError):
    """The user stopped the run."""

    exit_code = 130
