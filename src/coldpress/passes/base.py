"""The contract of a pass: `plan` is arithmetic on Specs, `run` turns one artifact into another.

A pass is a class without state. `plan` reads configs and headers only, imports no framework and raises `PlanError` for
what cannot work; `run` does the work in a worker process and returns an artifact inside `ctx.output`. The engine checks
that the artifact describes itself as the planned Spec, compares it with its input on text where `limits` says so, and
commits it to the store. A pass never touches the store, and never proves itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from coldpress.artifacts.base import Artifact, Spec
from coldpress.config.schema import Accelerator, DataConfig, Frozen
from coldpress.errors import PlanError
from coldpress.events import Sink
from coldpress.hardware import Hardware

__all__ = ["Context", "Estimate", "Limits", "Pass", "PlanContext", "Planned"]

C = TypeVar("C", bound=Frozen, contravariant=True)


@dataclass(frozen=True)
class Estimate:
    """What a step is expected to take. Bytes and seconds."""

    ram: int = 0
    """Peak anonymous memory of the step's process."""
    vram: int = 0
    disk: int = 0
    """What it writes, temporary files included."""
    seconds: float = 0.0


@dataclass(frozen=True)
class Limits:
    """How far the result of a step may be from its input, on text."""

    kl: float
    """Mean KL divergence, nats per token."""
    perplexity_increase: float
    """Relative: 0.05 is 5 %."""


@dataclass(frozen=True)
class Planned:
    """What a step will yield."""

    spec: Spec
    estimate: Estimate
    notes: tuple[str, ...] = ()
    """Choices worth telling before the run, one line each."""
    model_bytes: int | None = None
    """Of the result's weights on disk, or less; None: those of the spec's tensors."""


@dataclass(frozen=True)
class PlanContext:
    """What a plan may look at besides the Spec."""

    hardware: Hardware
    accelerator: Accelerator
    data_configs: Mapping[str, DataConfig]
    """By name, paths already absolute."""
    data_bytes: Mapping[str, int]
    """Size of the files behind each data config; absent where unknown."""
    ranks: int = 1
    """Processes that run the step together, where the pass can (`distributed`)."""
    neighbours: int = 1
    """Ranks that share the memory of one device."""

    def data(self, reference: str | DataConfig) -> DataConfig:
        return _data_config(self.data_configs, reference)


@dataclass(frozen=True)
class Context:
    """What a running pass gets."""

    step: str
    """The step's name in the workflow."""
    output: Path
    """Empty folder that becomes the artifact."""
    work: Path
    """Folder that outlives a killed run under the same key: checkpoints go here."""
    hardware: Hardware
    accelerator: Accelerator
    data_configs: Mapping[str, DataConfig]
    emit: Sink
    trust_remote_code: bool = False
    logs: Path | None = None
    """Folder in the run's output that a training's reporters write into."""
    rank: int = 0
    """Of several processes that run the step together, which this is. Only rank 0 writes the result: the output folder
    of the others is thrown away, and of what they tell only errors count."""
    ranks: int = 1
    neighbours: int = 1
    """Ranks that share the memory of this process's device, itself among them."""

    def data(self, reference: str | DataConfig) -> DataConfig:
        return _data_config(self.data_configs, reference)


def _data_config(known: Mapping[str, DataConfig], reference: str | DataConfig) -> DataConfig:
    if isinstance(reference, DataConfig):
        return reference
    if reference not in known:
        raise PlanError(f"there is no data config called {reference!r}; there are: {', '.join(known) or 'none'}")
    return known[reference]


class Pass(Protocol[C]):
    """One kind of step. `distributed: ClassVar[bool] = True` says that several processes can do `run` together.

    `takes` and `makes: ClassVar[str]` name the one kind of model that goes in and that comes out, where they are given:
    checkpoint or onnx. A static method `check(config)` raises PlanError for parameters that no model can have.
    """

    Config: ClassVar[type[Any]]
    """Its parameters: a frozen pydantic model that forbids unknown keys."""
    version: ClassVar[int]
    """Part of the cache key; raised when output bytes change."""
    libraries: ClassVar[tuple[str, ...]]
    """Distributions whose versions are part of the cache key."""
    preload: ClassVar[tuple[str, ...]]
    """Modules that `run` imports, so that a waiting process can import them early."""
    needs_torch: ClassVar[bool]
    """Whether `run` needs the process that has torch loaded."""

    def plan(self, config: C, spec: Spec, env: PlanContext) -> Planned:
        """What comes out, what it takes; raises PlanError."""
        ...

    def limits(self, config: C, spec: Spec) -> Limits | None:
        """How far the result may be from the input `spec`; None when the step changes the model on purpose."""
        ...

    def run(self, config: C, model: Artifact, ctx: Context) -> Artifact:
        """Do it; the artifact lies in `ctx.output`."""
        ...
