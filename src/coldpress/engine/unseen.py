"""What speaks against a workflow whatever its model is: what passes say of their parameters alone, and their order.

check, and a plan whose model is still on a hub -> the same errors that the plan of the model would hold
"""

from __future__ import annotations

from coldpress.config.load import LoadedConfig
from coldpress.errors import PlanError, Problem
from coldpress.registry import PASSES

__all__ = ["without_the_model"]

_KINDS = {"checkpoint": "a Hugging Face checkpoint", "onnx": "an ONNX model"}


def without_the_model(loaded: LoadedConfig) -> list[Problem]:
    """Of a workflow without a search; every problem stands at its pass."""
    found: list[Problem] = []
    kind, maker = "checkpoint", "input_model"
    for name, entry in loaded.workflow.passes.items():
        made = PASSES[entry.type]
        path = f"passes.{name}"
        takes = getattr(made, "takes", kind)
        if takes != kind:
            hint = "put ModelBuilder before it" if takes == "onnx" else f"put it before {maker}"
            message = f"{entry.type} takes {_KINDS[takes]}, and {maker} is {_KINDS[kind]}"
            found.append(_problem(loaded, path, message, hint))
        if hasattr(made, "check"):
            try:
                made.check(entry.config)
            except PlanError as error:
                found.append(_problem(loaded, path, error.message, error.hint))
        after = getattr(made, "makes", kind)
        kind, maker = after, name if after != kind else maker
    return found


def _problem(loaded: LoadedConfig, path: str, message: str, hint: str | None) -> Problem:
    return Problem(message, path=path, file=str(loaded.path or ""), line=loaded.line_of(path), hint=hint)
