"""Samplers over small spaces, told figures that are computed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from coldpress.config.space import Dimension, Space
from coldpress.errors import MissingExtraError
from coldpress.search import samplers
from coldpress.search.samplers import Sampler, make_sampler

GRID = Space(
    (
        Dimension("x", "s", (1, 2, 3, 4, 5, 6)),
        Dimension("y", "s", ("a", "b", "c", "d")),
        Dimension("z", "s", (True, False)),
    )
)
BRANCHED = Space(
    (
        Dimension("p", "p", ("LoRA", "QLoRA")),
        Dimension("p[LoRA].r", "p", (8, 16, 32), ("p", 0)),
        Dimension("p[QLoRA].q", "p", (1, 2), ("p", 1)),
        Dimension("b", "b", (32, 128)),
    )
)
NAMES = ("sequential", "random", "tpe", "nsga2")


def make(name: Any, space: Space, seed: int = 1, objectives: int = 1, budget: int = 16) -> Sampler:
    return make_sampler(name, space, objectives=objectives, seed=seed, budget=budget)


def asked(
    sampler: Sampler, told: Callable[[Mapping[str, int]], tuple[list[float | None], float]], count: int = 999
) -> list[Any]:
    found = []
    while len(found) < count and (point := sampler.ask()) is not None:
        found.append(tuple(sorted(point.items())))
        sampler.tell(point, *told(point))
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("space", [GRID, BRANCHED], ids=["grid", "branched"])
def test_every_point_once_and_then_none(name: str, space: Space) -> None:
    found = asked(make(name, space), lambda point: ([float(sum(point.values()))], 0.0))
    assert len(found) == len(set(found)) == space.size
    assert {tuple(sorted(point.items())) for point in space.points()} == set(found)


@pytest.mark.parametrize("name", NAMES[1:])
def test_the_seed_decides(name: str) -> None:
    def run(seed: int) -> list[Any]:
        return asked(make(name, GRID, seed), lambda point: ([float(point["x"])], 0.0), 20)

    assert run(3) == run(3)
    assert run(3) != run(4)


@pytest.mark.parametrize("name", ["tpe", "nsga2"])
def test_what_failed_or_misses_goals_without_figures_is_taken(name: str) -> None:
    def told(point: Mapping[str, int]) -> tuple[list[float | None], float]:
        if point["y"] == 0:
            return [None, None], 1e6
        return [float(point["x"]), None if point["z"] else 2.0], 0.5 if point["z"] else 0.0

    assert len(asked(make(name, GRID, objectives=2), told)) == GRID.size


def test_several_points_may_be_out_at_once() -> None:
    sampler = make("tpe", GRID)
    out = [sampler.ask() for _ in range(5)]
    for point in reversed(out):
        assert point is not None
        sampler.tell(point, [1.0], 0.0)
    assert len({tuple(sorted(point.items())) for point in out if point}) == 5


def _position_of_best(
    name: str, seed: int, told: Callable[[Mapping[str, int]], tuple[list[float | None], float]]
) -> int:
    values = {tuple(sorted(point.items())): told(point) for point in GRID.points()}
    best = min(loss[0] for loss, violation in values.values() if not violation and loss[0] is not None)
    order = asked(make(name, GRID, seed), told)
    return next(place for place, key in enumerate(order, 1) if values[key] == ([best], 0.0))


def test_tpe_finds_the_best_point_within_goals_sooner_than_chance() -> None:
    def told(point: Mapping[str, int]) -> tuple[list[float | None], float]:
        loss = 3.0 * point["x"] + (0.0, 5.0, 9.0, 2.0)[point["y"]] + point["z"]
        return [loss], max(0.0, 2 - point["x"] + 2.0 * (point["y"] == 0))

    seeds = range(1, 12)
    learned = statistics.median(_position_of_best("tpe", seed, told) for seed in seeds)
    chance = statistics.median(_position_of_best("random", seed, told) for seed in seeds)
    assert learned <= 16 < chance


@pytest.mark.parametrize("name", NAMES)
def test_without_optuna_the_extra_is_named_before_any_work(name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samplers.importlib.util, "find_spec", lambda _: None)
    if name in ("sequential", "random"):
        assert make(name, GRID).ask() is not None
        return
    with pytest.raises(MissingExtraError, match="needs the package optuna") as caught:
        samplers.check_sampler(name)
    assert "coldpress[cpu]" in (caught.value.hint or "")
