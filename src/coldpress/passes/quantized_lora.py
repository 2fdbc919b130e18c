"""QLoRA: train an adapter on a base that is held in 4 bits (Dettmers et al. 2023)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from coldpress.artifacts.base import BaseQuantization, Spec
from coldpress.errors import PlanError
from coldpress.nn.adapted import begins_with_base
from coldpress.nn.adapters import decoder_linears, four_bit_names
from coldpress.passes.adapter_settings import Adaptation, lora_adaptation
from coldpress.passes.adapter_training import AdapterTraining
from coldpress.passes.lora import LoRAConfig
from coldpress.passes.training_config import AdapterConfig

__all__ = ["QLoRA", "QLoRAConfig", "four_bit_notes"]


class QLoRAConfig(LoRAConfig):
    """Parameters of QLoRA."""

    compute_dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Type that 4-bit weights are computed in; null is torch_dtype, and it must equal it."""
    double_quant: bool = False
    """Quantize the scales of the 4-bit blocks too."""
    quant_type: Literal["nf4", "fp4"] = "nf4"
    """The 4-bit data type."""
    save_quant_config: bool = True
    """Record the quantization with the adapter, so that a merge goes into the weights it was trained on."""


class QLoRA(AdapterTraining):
    """Train a low-rank adapter on a base held in 4 bits (bitsandbytes)."""

    Config: ClassVar[type[AdapterConfig]] = QLoRAConfig
    libraries: ClassVar[tuple[str, ...]] = (*AdapterTraining.libraries, "bitsandbytes")
    preload: ClassVar[tuple[str, ...]] = ("coldpress.nn.warm_quantized",)

    def adaptation(self, config: Any, spec: Spec) -> Adaptation:
        made = lora_adaptation(config, spec)
        if begins_with_base(made.settings):
            raise PlanError(
                f"init_lora_weights {config.init_lora_weights} takes a part out of the base's weights, which 4-bit "
                "weights cannot give up exactly",
                hint="use LoRA; or the pass LoftQ, whose adapter begins with what the 4 bits lose",
            )
        return made

    def quantization(self, config: Any, spec: Spec) -> BaseQuantization | None:
        if config.compute_dtype not in (None, config.torch_dtype):
            raise PlanError(
                f"compute_dtype {config.compute_dtype} differs from torch_dtype {config.torch_dtype}",
                hint="set both to the same, or leave compute_dtype out",
            )
        return BaseQuantization(config.quant_type, config.double_quant, config.torch_dtype)

    def notes(self, config: Any, spec: Spec) -> tuple[str, ...]:
        return four_bit_notes(spec)

    def recorded(self, config: Any) -> bool:
        return bool(config.save_quant_config)


def four_bit_notes(spec: Spec) -> tuple[str, ...]:
    """How much of a model can be held in 4 bits; raises PlanError where nothing can."""
    inner, held = decoder_linears(spec.linear_layers()), four_bit_names(spec.linear_layers())
    if not held:
        raise PlanError(
            "no linear layer of the model can be held in 4 bits: none has rows of whole blocks of 64 weights",
            hint="use LoRA",
        )
    left = len(inner) - len(held)
    return (
        (f"{left} of {len(inner)} linear layers stay unquantized: their rows are not whole blocks of 64",)
        if left
        else ()
    )
