"""Write docs/run-record.md from the record's own types: `python docs/make_record.py`. A test holds them together."""

from __future__ import annotations

import inspect
import sys
import types
import typing
from pathlib import Path

from pydantic import BaseModel

from coldpress import record
from coldpress.described import descriptions_of

__all__ = ["page"]

TARGET = Path(__file__).with_name("run-record.md")
HEAD = """# The record of a run

Made from the code by `python docs/make_record.py`. `coldpress schema --record` prints the same as JSON Schema:
that of `run.json`, in which `$defs/TrainingRecord` is that of `training.json`.

An output folder holds

| file | what |
| --- | --- |
| `model/` | the model, with a card (`README.md`); an adapter in it has a card of its own |
| `report.html` | the run as a page: see [report.md](report.md) |
| `run.json` | the run as data; where it is, the model beside it is whole and belongs to it |
| `failed.json` | the same of the last run, if that failed; `run.json` and `model/` are then of an earlier one |
| `logs/STEP/training.json` | every figure of a training step; what `report_to` wrote lies beside it |

Sizes are bytes, times seconds, losses nats per token. Numbers that are not finite are null. A reader should ignore
fields that it does not know; `record_version` is raised when one that it may know changes its meaning.
"""
PARTS = (
    ("run.json, failed.json", record.RunRecord),
    ("A step", record.StepRecord),
    ("A training, in a step", record.TrainingSummary),
    ("training.json", record.TrainingRecord),
    ("A search", record.SearchRecord),
    ("A dimension of a search", record.DimensionRecord),
    ("An objective of a search", record.ObjectiveRecord),
    ("A trial of a search", record.TrialRecord),
    ("A score", record.ScoreRecord),
    ("A comparison of a result with its input", record.ParityRecord),
    ("A model", record.ModelRecord),
    ("Data of a training", record.DataRecord),
    ("What was trained", record.TrainedRecord),
    ("What a goal asked", record.GoalRecord),
    ("The output", record.OutputRecord),
    ("An error", record.ErrorRecord),
    ("The machine", record.HardwareRecord),
    ("A GPU", record.GpuRecord),
)


def _type(annotation: object) -> str:
    """A type as JSON has it."""
    if annotation is type(None):
        return "null"
    if annotation is typing.Any:
        return "any value"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return next(title for title, part in PARTS if part is annotation).lower()
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(one) for one in arguments)
    if origin is tuple:
        return f"list of ({_type(arguments[0])})" if arguments[-1] is Ellipsis else "pair of whole numbers"
    if origin is not None:
        return "object"
    return {str: "text", int: "whole number", float: "number", bool: "true, false"}[typing.cast("type", annotation)]


def page() -> str:
    lines = [HEAD]
    for title, part in PARTS:
        own = [name for name in part.model_fields if name in part.__annotations__]
        lines += [f"## {title}", "", inspect.getdoc(part) or "", ""]
        if len(own) < len(part.model_fields):
            lines += ["Besides what the summary in the step has:", ""]
        lines += ["| field | type | |", "| --- | --- | --- |"]
        said = descriptions_of(part)
        for name in own:
            field = part.model_fields[name]
            text = " ".join(said.get(name, "").split())
            lines.append(f"| `{name}` | {_type(field.annotation)} | {text} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
    sys.stdout.write(f"{TARGET} written\n")
