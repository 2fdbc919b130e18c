"""Write docs/passes.md from the passes' own Config fields: `python docs/make_passes.py`. A test holds them together."""

from __future__ import annotations

import inspect
import json
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path

from pydantic_core import PydanticUndefined

from coldpress.config.candidates import Candidates, candidates_of
from coldpress.described import descriptions_of
from coldpress.registry import PASSES

__all__ = ["page"]

TARGET = Path(__file__).with_name("passes.md")


def _type(annotation: object) -> str:
    """A type as Python writes it, without the bounds that stand beside it."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is type(None):
        return "None"
    if origin is typing.Annotated:
        return _type(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " \\| ".join(_type(one) for one in arguments)
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    for prefix in ("typing.", "collections.abc.", "coldpress.config.schema."):
        text = text.replace(prefix, "")
    return text.replace("|", "\\|")


def _candidates(declared: Mapping[str, Candidates]) -> list[str]:
    """What SEARCHABLE_VALUES stands for in a pass."""
    if not declared:
        return []
    told = [
        f"- `{key}`: {', '.join(json.dumps(value) for value in one.values)}"
        + (" (by default)" if one.by_default else "")
        for key, one in declared.items()
    ]
    return ["", "Candidates of a [search](config.md#search):", "", *told]


def page() -> str:
    lines = [
        "# Passes",
        "",
        "Made from the code by `python docs/make_passes.py`. A parameter stands under the pass in the workflow, beside",
        "`type`; `host`, `evaluator` and `parity` may stand there as well (see [config.md](config.md)).",
    ]
    for name in PASSES:
        cls = PASSES[name]
        lines += [
            "",
            f"## {name}",
            "",
            inspect.getdoc(cls) or "",
            "",
            "| parameter | type | default | |",
            "| --- | --- | --- | --- |",
        ]
        said = descriptions_of(cls.Config)
        for key, field in cls.Config.model_fields.items():
            default = field.get_default(call_default_factory=True)
            shown = "required" if default is PydanticUndefined else f"`{default}`"
            help_text = " ".join(said.get(key, "").split()).replace("|", "\\|")
            lines.append(f"| `{key}` | {_type(field.annotation)} | {shown} | {help_text} |")
        lines += _candidates(candidates_of(cls.Config))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
    sys.stdout.write(f"{TARGET} written\n")
