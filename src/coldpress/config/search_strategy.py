"""How settings are looked for: the `search_strategy` of a workflow."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from coldpress.config.frozen import Frozen

__all__ = ["SamplerConfig", "SearchStrategy"]


class SamplerConfig(Frozen):
    """How many settings are tried, and the seed that chooses them."""

    max_samples: int = Field(default=0, ge=0)
    """Settings to try, at most; 0: the whole space."""
    seed: int = Field(default=1, ge=0, lt=1 << 32)
    """Seed of the samplers that draw: the same seed tries the same settings."""


class SearchStrategy(Frozen):
    """How settings are looked for."""

    execution_order: Literal["joint", "pass-by-pass"] = "joint"
    """joint: settings of all passes are chosen together; pass-by-pass: one pass after the other, each on the best
    result of the one before."""
    sampler: Literal["sequential", "random", "tpe", "nsga2"] = "tpe"
    """What chooses the next setting. sequential: in order; random: by chance; tpe: a tree-structured Parzen estimator,
    which learns from what was tried; nsga2: a genetic algorithm for several objectives."""
    sampler_config: SamplerConfig = SamplerConfig()
    """How many settings are tried, and the seed that chooses them."""
    max_iter: int | None = Field(default=None, ge=1)
    """Trials after which the search ends, failed ones included; null: no such end."""
    max_time: float | None = Field(default=None, gt=0)
    """Seconds after which no further trial begins; null: no such end."""
    stop_when_goals_met: bool = False
    """End with the first result that meets every goal."""
    include_pass_params: bool = True
    """Search the parameters that a pass has candidates for and the file does not give, as Olive does; false searches
    only what the file lists."""
    max_concurrent_trials: int | None = Field(default=None, ge=1, le=64)
    """Trials at the same time, at most; null: as many as memory and cores allow."""
