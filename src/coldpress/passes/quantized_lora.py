"""QLoRA and LoftQ: train an adapter on a base that is held in 4 bits (Dettmers et al. 2023; Li et al. 2023).

QLoRA's adapter begins as nothing, on weights from which the 4 bits took something. LoftQ's begins with what they took,
as far as its rank can hold it (`nn/loftq.py`).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from coldpress.artifacts.base import Artifact, BaseQuantization, Spec
from coldpress.artifacts.checkpoint_files import copy_configs
from coldpress.artifacts.classifiers import CLASSIFICATION, classifier_layout
from coldpress.data.tokenizer import copy_tokenizer
from coldpress.errors import PlanError
from coldpress.events import Message, Progress
from coldpress.nn.adapted import begins_with_base
from coldpress.nn.adapters import ALL_LINEAR, decoder_linears, four_bit_names
from coldpress.passes.adapter_settings import Adaptation, lora_adaptation, refuse_long_ranks
from coldpress.passes.adapter_training import AdapterTraining
from coldpress.passes.base import Context, PlanContext, Planned
from coldpress.passes.lora import LoRAConfig
from coldpress.passes.training_config import AdapterConfig

__all__ = ["LoftQ", "LoftQConfig", "QLoRA", "QLoRAConfig", "four_bit_notes"]

_FLOPS = 20e9
"""Of the decompositions, a second."""


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


class LoftQConfig(LoRAConfig):
    """Parameters of LoftQ."""

    target_modules: str | tuple[str, ...] | None = ALL_LINEAR
    """Linear layers to adapt: names, a regular expression, or all-linear."""
    init_lora_weights: Literal[True] = True
    """LoftQ is how the adapter begins."""
    loftq_iter: int = Field(default=1, ge=1)
    """Rounds of quantizing and making up for it. After more than one the base is written anew, as it then is."""
    compute_dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Type that 4-bit weights are computed in; null is torch_dtype, and it must equal it."""
    save_quant_config: bool = True
    """Record the quantization with the adapter; false writes the base as the 4 bits leave it instead."""


class QLoRA(AdapterTraining):
    """Train a low-rank adapter on a base held in 4 bits (bitsandbytes)."""

    Config: ClassVar[type[AdapterConfig]] = QLoRAConfig
    libraries: ClassVar[tuple[str, ...]] = (*AdapterTraining.libraries, "bitsandbytes")
    preload: ClassVar[tuple[str, ...]] = ("coldpress.nn.warm_quantized",)

    def fresh(self, config: Any, spec: Spec) -> Adaptation:
        made = lora_adaptation(config, spec)
        if begins_with_base(made.settings):
            raise PlanError(
                f"init_lora_weights {config.init_lora_weights} takes a part out of the base's weights, which 4-bit "
                "weights cannot give up exactly",
                hint="use LoRA; or the pass LoftQ, whose adapter begins with what the 4 bits lose",
            )
        return made

    def quantization(self, config: Any, spec: Spec) -> BaseQuantization | None:
        return spec.base_quantization or self._asked(config)

    def _asked(self, config: Any) -> BaseQuantization:
        return BaseQuantization(config.quant_type, config.double_quant, _compute_dtype(config))

    def refuse_other(self, config: Any, spec: Spec) -> None:
        super().refuse_other(config, spec)
        held, asked = spec.base_quantization, self._asked(config)
        if held is None:
            return
        odd = [
            f"{key} is {getattr(asked, key)}, of the adapter {getattr(held, key)}"
            for key in ("quant_type", "double_quant")
            if key in config.model_fields_set and getattr(asked, key) != getattr(held, key)
        ]
        if asked.compute_dtype != held.compute_dtype:
            odd.append(f"torch_dtype is {asked.compute_dtype}, of the adapter {held.compute_dtype}")
        if odd:
            raise PlanError(
                "the model's adapter was trained on other 4-bit weights: " + "; ".join(odd),
                hint="write the adapter's values",
            )

    def notes(self, config: Any, spec: Spec) -> tuple[str, ...]:
        notes = four_bit_notes(spec)
        if spec.adapter is not None and spec.base_quantization is None:
            notes += ("nothing says that the model's adapter was trained on 4-bit weights; it goes on on them",)
        return notes

    def recorded(self, config: Any) -> bool:
        return bool(config.save_quant_config)


class LoftQ(AdapterTraining):
    """Train a low-rank adapter that begins with what 4 bits lose of the base (bitsandbytes, nf4)."""

    Config: ClassVar[type[AdapterConfig]] = LoftQConfig
    starts_apart: ClassVar[bool] = True
    libraries: ClassVar[tuple[str, ...]] = QLoRA.libraries
    preload: ClassVar[tuple[str, ...]] = QLoRA.preload

    def fresh(self, config: Any, spec: Spec) -> Adaptation:
        if spec.task == CLASSIFICATION and classifier_layout(spec.config).encoder:
            raise PlanError("LoftQ is for decoders; an encoder is small enough for LoRA", hint="use LoRA")
        made = lora_adaptation(config, spec)
        held = set(four_bit_names(spec.linear_layers()))
        refuse_long_ranks({name: rank for name, rank in made.ranks.items() if name in held}, spec)
        return made

    def adaptation(self, config: Any, spec: Spec) -> Adaptation:
        if spec.adapter is not None:
            raise PlanError(
                "the model has an adapter, and LoftQ is a way to begin one",
                hint="go on with it in QLoRA, or put MergeAdapterWeights before this step",
            )
        return self.fresh(config, spec)

    def quantization(self, config: Any, spec: Spec) -> BaseQuantization | None:
        return BaseQuantization("nf4", double_quant=False, compute_dtype=_compute_dtype(config))

    def plan(self, config: Any, spec: Spec, env: PlanContext) -> Planned:
        planned = super().plan(config, spec, env)
        rounds = config.loftq_iter if _writes_base(config) else 1
        work = sum(min(shape) ** 2 * max(shape) for shape in spec.linear_layers().values()) * (rounds + 1)
        estimate = replace(
            planned.estimate,
            disk=planned.estimate.disk + (spec.bytes if _writes_base(config) else 0),
            seconds=planned.estimate.seconds + work / _FLOPS,
        )
        return replace(planned, estimate=estimate)

    def notes(self, config: Any, spec: Spec) -> tuple[str, ...]:
        if not _writes_base(config):
            return four_bit_notes(spec)
        return (*four_bit_notes(spec), "the base is written anew, as 4 bits leave it; the adapter belongs to that one")

    def recorded(self, config: Any) -> bool:
        return bool(config.save_quant_config)

    def base_folder(self, config: Any, adaptation: Adaptation, model: Artifact, ctx: Context) -> Path:
        if not _writes_base(config):
            return model.model
        from coldpress.nn.loftq import write_base

        folder = ctx.output / "model"
        copy_configs(model.model, folder)
        copy_tokenizer(model.tokenizer_path, folder)
        spec = model.describe()
        quantization = self.quantization(config, spec)
        assert quantization is not None
        write_base(
            model.model,
            folder,
            quantization,
            four_bits=four_bit_names(spec.linear_layers()),
            ranks=adaptation.ranks,
            rounds=config.loftq_iter,
            on_tensor=lambda done, total: ctx.emit(Progress(ctx.step, done, total, "tensors")),
            device="cuda" if ctx.accelerator.device == "gpu" else "cpu",
        )
        return folder

    def begin(self, config: Any, adaptation: Adaptation, adapted: Any, model: Artifact, ctx: Context) -> None:
        from coldpress.nn.loftq import begin_with_residual

        begun = begin_with_residual(adapted, model.model, adaptation.ranks)
        ctx.emit(Message("info", f"{begun} adapters begin with what 4 bits lose of their layers", ctx.step))


def _writes_base(config: LoftQConfig) -> bool:
    """Whether the record of the quantization alone does not say what the base is."""
    return config.loftq_iter > 1 or not config.save_quant_config


def _compute_dtype(config: QLoRAConfig | LoftQConfig) -> str:
    if config.compute_dtype not in (None, config.torch_dtype):
        raise PlanError(
            f"compute_dtype {config.compute_dtype} differs from torch_dtype {config.torch_dtype}",
            hint="set both to the same, or leave compute_dtype out",
        )
    return config.torch_dtype


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
