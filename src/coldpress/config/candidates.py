"""What a parameter is tried with when a search is asked to choose: declared by the type of a pass's parameters.

    class LoRAConfig(Frozen):
        searchable: ClassVar[Mapping[str, Candidates]] = {"r": Candidates((16, 32, 64), by_default=True)}

A training argument is named with its block: `training_args.learning_rate`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

__all__ = ["Candidates", "candidates_of"]


@dataclass(frozen=True)
class Candidates:
    """Values that SEARCHABLE_VALUES stands for."""

    values: tuple[Any, ...]
    by_default: bool = False
    """Searched where the file is silent and `include_pass_params` is on. Olive's own defaults, and no others."""
    only_with: tuple[str, tuple[Any, ...]] | None = None
    """Another parameter and those of its values with which this one has an effect."""
    unless: tuple[str, ...] = ()
    """Parameters that decide this one when they are given: it is then not searched by default."""
    not_for: tuple[str, ...] = ()
    """Execution providers that decide it: it is not searched by default for models that are made for them."""


def candidates_of(model: type[BaseModel]) -> Mapping[str, Candidates]:
    """Candidates by parameter; empty where the type declares none."""
    declared: Mapping[str, Candidates] = getattr(model, "searchable", {})
    return declared
