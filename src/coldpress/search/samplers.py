"""Which point of the space is tried next.

    sequential   the points in order
    random       each point once, in random order
    tpe          tree-structured Parzen estimator, over one objective or several (Optuna)
    nsga2        NSGA-II, an evolutionary sampler for several objectives (Optuna)

Optuna's samplers know goals as constraints: a point that misses some is told with how much it lacks, and one that gave
no figures with more than any goal's. No point is given out twice. The same seed and the same answers give the same
points, so a search that was killed goes through the ones that are done again, from the store, and goes on.
"""

from __future__ import annotations

import importlib.util
import random
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol, TypeAlias

from coldpress.config.space import Dimension, Point, Space
from coldpress.errors import MissingExtraError

__all__ = ["Sampler", "SamplerName", "check_sampler", "make_sampler"]

SamplerName: TypeAlias = Literal["sequential", "random", "tpe", "nsga2"]
_TRIES = 16
"""Proposals that may repeat a point before one is drawn from those that are left."""
_LISTED = 100_000
"""Points up to which a space is listed to draw from what is left."""


class Sampler(Protocol):
    """Gives points out and hears what came of them."""

    def ask(self) -> Point | None:
        """A point that was not given out before; None when there is none left."""
        ...

    def tell(self, point: Point, losses: Sequence[float | None], violation: float) -> None:
        """What a point came to: losses of the objectives as far as measured; violation is 0 where all goals are met."""
        ...


def check_sampler(name: SamplerName) -> None:
    """Raise MissingExtraError where the package of a sampler is not installed."""
    if name in ("tpe", "nsga2") and importlib.util.find_spec("optuna") is None:
        raise MissingExtraError(
            f"the sampler {name} needs the package optuna, which is not installed",
            hint="pip install 'coldpress[cpu]' (or [gpu]), or take the sampler random or sequential",
        )


def make_sampler(name: SamplerName, space: Space, *, objectives: int, seed: int, budget: int) -> Sampler:
    """`budget`: points that will be asked for, about. Raises MissingExtraError."""
    check_sampler(name)
    if name == "sequential":
        return _Sequential(space)
    if name == "random":
        return _Random(space, seed)
    return _Optuna(name, space, objectives=objectives, seed=seed, budget=budget)


def _key(point: Point) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(point.items()))


class _Sequential:
    def __init__(self, space: Space) -> None:
        self._points: Iterator[Point] = iter(space.points())

    def ask(self) -> Point | None:
        return next(self._points, None)

    def tell(self, point: Point, losses: Sequence[float | None], violation: float) -> None:
        """Order does not depend on results."""


class _Left:
    """Points that were not given out yet."""

    def __init__(self, space: Space, seed: int) -> None:
        self._space = space
        self._random = random.Random(seed)
        self._given: set[tuple[tuple[str, int], ...]] = set()

    @property
    def none(self) -> bool:
        return len(self._given) >= self._space.size

    def take(self, point: Point) -> bool:
        """Whether it was there to give out; it is given out now."""
        key = _key(point)
        if key in self._given:
            return False
        self._given.add(key)
        return True

    def draw(self) -> Point | None:
        """One of them, each as likely (in a space too large to list: by trying)."""
        if self.none:
            return None
        if self._space.size <= _LISTED:
            left = [point for point in self._space.points() if _key(point) not in self._given]
            point = self._random.choice(left)
            self.take(point)
            return point
        while True:
            drawn = self._space.walk(lambda dimension: self._random.randrange(len(dimension.choices)))
            if self.take(drawn):
                return drawn


class _Random:
    def __init__(self, space: Space, seed: int) -> None:
        self._left = _Left(space, seed)

    def ask(self) -> Point | None:
        return self._left.draw()

    def tell(self, point: Point, losses: Sequence[float | None], violation: float) -> None:
        """Order does not depend on results."""


class _Optuna:
    def __init__(self, name: str, space: Space, *, objectives: int, seed: int, budget: int) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space = space
        self._left = _Left(space, seed)
        self._objectives = objectives
        self._worst: list[float] = [0.0] * objectives
        self._trials: dict[tuple[tuple[str, int], ...], Any] = {}
        self._failed = optuna.trial.TrialState.FAIL
        sampler: Any
        if name == "tpe":
            with warnings.catch_warnings():  # `group`, without which a conditional space is drawn from at random
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                sampler = optuna.samplers.TPESampler(
                    seed=seed, multivariate=True, group=True, n_startup_trials=_startup(budget)
                )
        else:
            sampler = optuna.samplers.NSGAIISampler(seed=seed, population_size=max(4, min(50, budget // 4)))
        self._study = optuna.create_study(directions=["minimize"] * objectives, sampler=sampler)

    def ask(self) -> Point | None:
        for _ in range(_TRIES):
            if self._left.none:
                return None
            trial = self._study.ask()
            point = self._walk(trial)
            if self._left.take(point):
                self._trials[_key(point)] = trial
                return point
            self._study.tell(trial, state=self._failed)  # a repetition, which it does not learn from
        drawn = self._left.draw()
        if drawn is not None:
            self._study.enqueue_trial(dict(drawn))
            trial = self._study.ask()
            self._walk(trial)
            self._trials[_key(drawn)] = trial
        return drawn

    def _walk(self, trial: Any) -> Point:
        """Numbers that rise or fall are a range to it, all else is a choice without order."""

        def suggested(dimension: Dimension) -> int:
            count = len(dimension.choices)
            if _ordered(dimension.choices):
                found: int = trial.suggest_int(dimension.name, 0, count - 1)
                return found
            chosen: int = trial.suggest_categorical(dimension.name, list(range(count)))
            return chosen

        return self._space.walk(suggested)

    def tell(self, point: Point, losses: Sequence[float | None], violation: float) -> None:
        trial = self._trials.pop(_key(point))
        known = [one for one in losses if one is not None]
        if len(known) == self._objectives:
            self._worst = [max(pair) for pair in zip(self._worst, known, strict=True)]
        # A point outside the goals is ranked by its violation alone; a value has to be there all the same.
        filled = [self._worst[place] if one is None else one for place, one in enumerate(losses)]
        trial.set_constraint("goals", violation)
        self._study.tell(trial, filled)


def _ordered(choices: Sequence[Any]) -> bool:
    numbers = [one for one in choices if isinstance(one, int | float) and not isinstance(one, bool)]
    return len(numbers) == len(choices) and sorted(numbers) in (numbers, numbers[::-1])


def _startup(budget: int) -> int:
    """Points drawn at random before the model is asked."""
    return max(4, min(10, budget // 3))
