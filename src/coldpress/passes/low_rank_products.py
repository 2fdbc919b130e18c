"""LoHa and LoKr: adapters whose contribution is a product of two small matrices that is not the ordinary one.

    LoHa    W' = W + s (A1 B1) * (A2 B2)    element by element: rank up to r * r at twice LoRA's size (FedPara)
    LoKr    W' = W + s kron(C, D)           Kronecker product: of high rank, and smaller than LoRA
    s       alpha / r

Hyeon-Woo et al. 2022; Yeh et al. 2024 (LyCORIS). Both make the whole contribution [out, in] in every step, which takes
the memory of one more layer and no dropout on the input; they have dropouts of their own.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from coldpress.artifacts.base import Spec
from coldpress.passes.adapter_settings import Adaptation, resolve_adapter
from coldpress.passes.adapter_training import AdapterTraining
from coldpress.passes.training_config import AdapterConfig

__all__ = ["LoHa", "LoHaConfig", "LoKr", "LoKrConfig"]


class LoHaConfig(AdapterConfig):
    """Parameters of LoHa."""

    rank_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the contribution's rows left out in a training step."""
    module_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Chance that a layer does without its adapter in a training step."""
    init_weights: bool = True
    """Begin as the base; false begins at random."""


class LoKrConfig(AdapterConfig):
    """Parameters of LoKr."""

    rank_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the contribution's rows left out in a training step."""
    rank_dropout_scale: bool = False
    """Scale the rows that stay, so that their sum stays the same on average."""
    module_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Chance that a layer does without its adapter in a training step."""
    decompose_both: bool = False
    """Make the left matrix a product of rank r as well, where it is large enough."""
    decompose_factor: int = Field(default=-1, ge=-1)
    """Height and width of the left matrix; -1 is what comes nearest to the roots of the layer's own."""
    init_weights: bool | Literal["lycoris"] = True
    """Begin as the base, with zeros in the left matrix (true) or in the right one (lycoris); false begins at random."""

    @field_validator("decompose_factor")
    @classmethod
    def _is_a_factor(cls, value: int) -> int:
        if value == 0:
            raise ValueError("must be -1, or 1 and more")
        return value


class LoHa(AdapterTraining):
    """Train a Hadamard product of two low-rank matrices on a frozen model."""

    Config: ClassVar[type[AdapterConfig]] = LoHaConfig
    peft_type: ClassVar[str] = "LOHA"

    def fresh(self, config: Any, spec: Spec) -> Adaptation:
        own = {key: getattr(config, key) for key in ("rank_dropout", "module_dropout", "init_weights")}
        return resolve_adapter(config, spec, self.peft_type, own)


class LoKr(AdapterTraining):
    """Train a Kronecker product of two small matrices on a frozen model."""

    Config: ClassVar[type[AdapterConfig]] = LoKrConfig
    peft_type: ClassVar[str] = "LOKR"

    def fresh(self, config: Any, spec: Spec) -> Adaptation:
        keys = (
            "rank_dropout", "rank_dropout_scale", "module_dropout", "init_weights",
            "decompose_both", "decompose_factor",
        )  # fmt: skip
        return resolve_adapter(config, spec, self.peft_type, {key: getattr(config, key) for key in keys})
