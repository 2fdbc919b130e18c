"""LoRA and DoRA: train a low-rank adapter on a frozen model.

LoRA    W' = W + s B A                        Hu et al. 2021
DoRA    W' = m (W + s B A) / ||W + s B A||    Liu et al. 2024; m, a magnitude for each output, is trained as well
s       alpha / r, or alpha / sqrt(r) with use_rslora (Kalajdzievski 2023)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from coldpress.artifacts.base import Spec
from coldpress.config.candidates import Candidates
from coldpress.passes.adapter_settings import Adaptation, lora_adaptation
from coldpress.passes.adapter_training import AdapterTraining
from coldpress.passes.training_config import AdapterConfig
from coldpress.registry import nearest

__all__ = ["DoRA", "DoRAConfig", "LoRA", "LoRAConfig"]

_STARTS = ("gaussian", "pissa", "olora")


class LoRAConfig(AdapterConfig):
    """Parameters of LoRA."""

    searchable: ClassVar[Mapping[str, Candidates]] = {
        **AdapterConfig.searchable,
        "lora_dropout": Candidates((0.0, 0.05, 0.1)),
    }
    lora_dropout: float = Field(default=0.05, ge=0, lt=1)
    """Dropout on the adapter's input while training."""
    use_dora: bool = False
    """Train a magnitude for each output as well (DoRA)."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) instead of alpha / r, which suits high ranks."""
    init_lora_weights: bool | str = True
    """How the adapter begins: true is as the base, gaussian too; pissa (or pissa_niter_4, faster) and olora take the
    main part of the base's own weights; false is at random."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases of the model to train as well: none, all, or those of the adapted layers."""

    @field_validator("init_lora_weights")
    @classmethod
    def _known_start(cls, value: bool | str) -> bool | str:
        if isinstance(value, str):
            steps = value.removeprefix("pissa_niter_")
            if value not in _STARTS and not (steps != value and steps.isdigit() and int(steps) > 0):
                close = nearest(value, _STARTS)
                hint = (
                    f"did you mean {close}?" if close else "known: true, false, gaussian, pissa, pissa_niter_N, olora"
                )
                raise ValueError(f"there is no initialisation called {value!r}; {hint}")
        return value


class DoRAConfig(LoRAConfig):
    """Parameters of DoRA."""

    use_dora: Literal[True] = True
    """It is what this pass does."""


class LoRA(AdapterTraining):
    """Train a low-rank adapter on a frozen model."""

    Config: ClassVar[type[AdapterConfig]] = LoRAConfig

    def fresh(self, config: Any, spec: Spec) -> Adaptation:
        return lora_adaptation(config, spec)


class DoRA(AdapterTraining):
    """Train a low-rank adapter and a magnitude for each output on a frozen model."""

    Config: ClassVar[type[AdapterConfig]] = DoRAConfig

    def fresh(self, config: Any, spec: Spec) -> Adaptation:
        return lora_adaptation(config, spec)
