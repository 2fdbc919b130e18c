"""Runs as a report sees them: the record, and the training curves that lie beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from coldpress.record import RunRecord, TrainingRecord, read_run, read_training

__all__ = ["Run", "load_runs", "run_of"]


_UNNAMED = "default_workflow"
"""What a workflow without an id is called."""


@dataclass(frozen=True)
class Run:
    """One run."""

    name: str
    """As the page calls it; no two on a page are alike."""
    folder: Path
    """Output folder, or wherever the record lies."""
    record: RunRecord
    trainings: Mapping[str, TrainingRecord] = field(default_factory=dict, repr=False)
    """By step; a step whose curve is not there is absent."""


def run_of(record: RunRecord, folder: Path, name: str | None = None) -> Run:
    """A record with the curves beside it; raises StoreError for one that is damaged."""
    trainings = {
        step.name: read_training(folder / step.training_file)
        for step in record.steps
        if step.training_file is not None and (folder / step.training_file).is_file()
    }
    return Run(name or _title(record, folder), folder, record, trainings)


def _title(record: RunRecord, folder: Path) -> str:
    """The workflow's id where somebody gave it one, else the model and what was done to it."""
    if record.workflow not in ("", _UNNAMED):
        return record.workflow
    base = "" if record.input_model is None else record.input_model.name
    done = " → ".join(dict.fromkeys(step.type for step in record.steps))
    return ": ".join(part for part in (base, done) if part) or folder.name


def load_runs(places: Sequence[Path]) -> list[Run]:
    """Output folders or records; raises StoreError.

    Several are called by their workflows' ids, or by their folders where an id is missing or stands twice.
    """
    found = [read_run(place) for place in places]
    folders = [path.resolve().parent for _, path in found]
    if len(found) == 1:
        return [run_of(found[0][0], folders[0])]
    names = [record.workflow for record, _ in found]
    if len(set(names) - {"", _UNNAMED}) < len(names):
        names = _distinct(folders)
    return [run_of(record, folder, name) for (record, _), folder, name in zip(found, folders, names, strict=True)]


def _distinct(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart; the same folder twice is numbered."""
    for length in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-length:]) for folder in folders]
        if len(set(names)) == len(set(folders)):
            break
    return [
        name if names.count(name) == 1 else f"{name} ({names[: place + 1].count(name)})"
        for place, name in enumerate(names)
    ]
