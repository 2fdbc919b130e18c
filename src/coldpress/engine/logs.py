"""Where the services that a training reports to write: into the run's output, where the user looks, not the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from coldpress.config.reporters import reporters_asked
from coldpress.engine.plan import Plan, Step
from coldpress.engine.store import Entry

__all__ = ["log_folder", "logs_elsewhere", "reporters_of"]


def _arguments(step: Step) -> dict[str, Any]:
    return dict(getattr(step.config, "training_args", None) or {})


def reporters_of(step: Step) -> tuple[str, ...]:
    """The services that the step's `report_to` names."""
    return reporters_asked(_arguments(step).get("report_to"))


def log_folder(plan: Plan, step: Step) -> Path:
    """`logging_dir` of the training arguments, else a folder of the step's in the output."""
    named = _arguments(step).get("logging_dir")
    return plan.places.output(named) if named else plan.output_dir / "logs" / step.name


def logs_elsewhere(plan: Plan, step: Step, entry: Entry) -> str | None:
    """What to say of a finished step whose logs are not where this run's would be: where they are, or were."""
    written = entry.record.get("logs")
    if not reporters_of(step) or written is None or Path(written) == log_folder(plan, step):
        return None
    names = ", ".join(reporters_of(step))
    gone = "" if Path(written).is_dir() else " (no longer there)"
    return f"it was trained before; what it told {names} is in {written}{gone}"
