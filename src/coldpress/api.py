"""The library's front door: what the command line does, as three functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from coldpress.config.load import LoadedConfig
from coldpress.config.load import load_config as _load
from coldpress.engine.plan import Plan, check_plan, make_plan
from coldpress.engine.result import RunResult
from coldpress.engine.run import run as _run
from coldpress.events import Sink
from coldpress.registry import PASSES

__all__ = ["load_config", "plan", "run"]

Source: TypeAlias = str | Path | Mapping[str, Any] | LoadedConfig


def load_config(source: Source, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Read a workflow: a JSON or YAML file, or the same as a mapping.

    `overrides` are `key.path=value`. Raises ConfigError with every problem at once.
    """
    if isinstance(source, LoadedConfig):
        return source
    place: Path | Mapping[str, Any] = Path(source) if isinstance(source, str) else source
    return _load(place, overrides, passes={name: PASSES[name].Config for name in PASSES})


def plan(source: Source, overrides: Sequence[str] = (), *, trust_remote_code: bool = False) -> Plan:
    """What a workflow would do here: steps, cached or not, estimates. Raises ConfigError for what cannot work."""
    made = make_plan(load_config(source, overrides), trust_remote_code=trust_remote_code)
    check_plan(made, to_run=False)
    return made


def run(
    source: Source,
    overrides: Sequence[str] = (),
    *,
    sinks: Iterable[Sink] = (),
    trust_remote_code: bool = False,
) -> RunResult:
    """Run a workflow, or search its space, and return what came out.

    Raises ConfigError before any work, StepError (ParityError, TrainingError ...) when a step fails, Interrupted when
    it is stopped. What was finished is kept: the same call goes on from there. `sinks` get the progress events.
    """
    loaded = load_config(source, overrides)
    if loaded.space is not None:
        from coldpress.search.driver import search

        return search(loaded, sinks=sinks, trust_remote_code=trust_remote_code)
    return _run(loaded, sinks=sinks, trust_remote_code=trust_remote_code)
