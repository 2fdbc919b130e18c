"""What a search chooses from: dimensions, and points as one choice for each dimension that exists in them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

__all__ = ["Dimension", "Point", "Space"]

Point: TypeAlias = Mapping[str, int]
"""Name of a dimension -> index of its choice; only dimensions that exist in the point."""


@dataclass(frozen=True)
class Dimension:
    """One thing that a search chooses."""

    name: str
    """`lora` (which of the alternatives), `lora.r`, `lora.training_args.learning_rate`, `lora[QLoRA].r`."""
    step: str
    """The step of the workflow that it belongs to."""
    choices: tuple[Any, ...]
    """Plain JSON values; of alternatives unique labels (`LoRA`, `ModelBuilder 2`)."""
    of: tuple[str, int] | None = None
    """The alternatives' dimension and the index in it on which this one exists; None: it always exists."""

    def exists(self, point: Point) -> bool:
        """Whether it exists beside the choices made so far."""
        return self.of is None or point.get(self.of[0]) == self.of[1]

    def __str__(self) -> str:
        return f"{self.name} ({len(self.choices)})"


@dataclass(frozen=True)
class Space:
    """Dimensions in the order of the steps; alternatives come before what depends on them."""

    dimensions: tuple[Dimension, ...] = ()

    def __str__(self) -> str:
        return ", ".join(str(dimension) for dimension in self.dimensions) or "nothing"

    @property
    def size(self) -> int:
        """Number of distinct points; 1 where there is nothing to choose."""
        below: dict[tuple[str, int], list[Dimension]] = {}
        for dimension in self.dimensions:
            if dimension.of is not None:
                below.setdefault(dimension.of, []).append(dimension)

        def count(dimension: Dimension) -> int:
            return sum(
                math.prod(count(child) for child in below.get((dimension.name, index), ()))
                for index in range(len(dimension.choices))
            )

        return math.prod(count(dimension) for dimension in self.dimensions if dimension.of is None)

    @property
    def steps(self) -> tuple[str, ...]:
        """Steps with something to choose, in order."""
        return tuple(dict.fromkeys(dimension.step for dimension in self.dimensions))

    def of_step(self, step: str) -> Space:
        """What there is to choose in one step."""
        return Space(tuple(dimension for dimension in self.dimensions if dimension.step == step))

    def points(self) -> Iterator[dict[str, int]]:
        """Every point, in order, the last dimension fastest."""
        return self._points(0, {})

    def _points(self, place: int, chosen: dict[str, int]) -> Iterator[dict[str, int]]:
        while place < len(self.dimensions) and not self.dimensions[place].exists(chosen):
            place += 1
        if place == len(self.dimensions):
            yield chosen
            return
        dimension = self.dimensions[place]
        for index in range(len(dimension.choices)):
            yield from self._points(place + 1, {**chosen, dimension.name: index})

    def walk(self, choose: Callable[[Dimension], int]) -> dict[str, int]:
        """A point, dimension by dimension as they come to exist; `choose` gives the index of a choice."""
        point: dict[str, int] = {}
        for dimension in self.dimensions:
            if dimension.exists(point):
                point[dimension.name] = choose(dimension)
        return point

    def settings(self, point: Point) -> dict[str, Any]:
        """The values and labels that a point stands for."""
        self.check(point)
        return {one.name: one.choices[point[one.name]] for one in self.dimensions if one.name in point}

    def check(self, point: Point) -> None:
        """Raise ValueError for what is no point of this space, or of its first steps."""
        by_name = {dimension.name: dimension for dimension in self.dimensions}
        for name, index in point.items():
            if name not in by_name:
                raise ValueError(f"the space has no dimension {name!r}; it has {self}")
            dimension = by_name[name]
            if not 0 <= index < len(dimension.choices):
                raise ValueError(f"{name} has choices 0 to {len(dimension.choices) - 1}, got {index}")
            if dimension.of is not None and point.get(dimension.of[0], 0) != dimension.of[1]:
                raise ValueError(f"{name} exists only where {dimension.of[0]} is {dimension.of[1]}")
