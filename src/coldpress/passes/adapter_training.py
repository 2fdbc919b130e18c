"""What the adapter passes have in common: plan and run around PEFT's settings of one kind.

The result is the base model by reference, plus `adapter/`: PEFT's files, the tokenizer, and `training.json` with the
loss of every step, the arguments and what was trained. Where the frozen layers are held in 4 bits while training, the
artifact records how, so that a merge can add the adapter to the very weights it was trained on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from coldpress.artifacts.base import Artifact, BaseQuantization, Spec
from coldpress.data.tokenizer import Tokenizer, copy_tokenizer
from coldpress.errors import PlanError
from coldpress.nn.adapted import begins_with_base, put_adapter_on, save_adapter, starting_products
from coldpress.nn.imports import needs_bitsandbytes
from coldpress.passes.adapter_settings import Adaptation, trained_parameters
from coldpress.passes.base import Context, Limits, PlanContext, Planned
from coldpress.passes.fine_tuning import (
    computes_in,
    prepared_data,
    refuse_untrainable,
    require_packages,
    sequence_length,
    train_model,
    training_notes,
    whole_on,
    write_record,
)
from coldpress.passes.training_arguments import training_arguments
from coldpress.passes.training_config import AdapterConfig
from coldpress.passes.training_estimate import training_estimate

__all__ = ["AdapterTraining"]


class AdapterTraining:
    """Base of the adapter passes; each says its settings (`adaptation`) and how the base is held (`quantization`)."""

    Config: ClassVar[type[AdapterConfig]] = AdapterConfig
    version: ClassVar[int] = 2
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "peft", "accelerate", "tokenizers")
    preload: ClassVar[tuple[str, ...]] = ("coldpress.nn.warm_training",)
    needs_torch: ClassVar[bool] = True
    distributed: ClassVar[bool] = True

    def adaptation(self, config: Any, spec: Spec) -> Adaptation:
        """The adapter to train; raises PlanError."""
        raise NotImplementedError

    def quantization(self, config: Any, spec: Spec) -> BaseQuantization | None:
        """How the frozen layers are held; None is as they are."""
        return None

    def plan(self, config: Any, spec: Spec, env: PlanContext) -> Planned:
        require_packages(type(self).__name__, self.libraries)
        refuse_untrainable(config, spec, env)
        if spec.adapter is not None:
            raise PlanError("the model has an adapter already", hint="put MergeAdapterWeights before this step")
        adaptation = self.adaptation(config, spec)
        quantization = self.quantization(config, spec)
        if quantization is not None and spec.packings:
            raise PlanError(
                "the model is quantized already, so it cannot be held in 4 bits of bitsandbytes",
                hint="take the unquantized model, or train a plain LoRA adapter",
            )
        if quantization is not None and config.training_args.get("fsdp"):
            raise PlanError("FSDP does not divide 4-bit weights", hint="leave fsdp out: each process holds them all")
        length, notes = sequence_length(config, spec, env)
        notes = (*adaptation.notes, *notes, *training_notes(config, env), *self.notes(config, spec))
        planned = Spec(
            kind="checkpoint",
            config=spec.config,
            tensors=spec.tensors,
            precision=spec.precision,
            adapter=adaptation.result,
            base_quantization=quantization if self.recorded(config) else None,
        )
        trained = trained_parameters(adaptation, spec)
        name = env.data(config.train_data_config).name
        return Planned(planned, training_estimate(config, spec, env, trained, quantization, length, name), notes)

    def notes(self, config: Any, spec: Spec) -> tuple[str, ...]:
        """More that is worth telling before the run; raises PlanError."""
        return ()

    def recorded(self, config: Any) -> bool:
        """Whether the artifact says how the base was held."""
        return True

    def limits(self, config: Any, spec: Spec) -> Limits | None:
        return None  # training changes the model on purpose

    def run(self, config: Any, model: Artifact, ctx: Context) -> Artifact:
        from coldpress.nn import imports

        spec = model.describe()
        adaptation, quantization = self.adaptation(config, spec), self.quantization(config, spec)
        tokenizer = Tokenizer.load(model.tokenizer_path)
        prepared = prepared_data(config, spec, tokenizer, ctx)
        optimizer = str(training_arguments(config, ctx)[0].get("optim") or "")
        imports.load_training(quantized=quantization is not None or needs_bitsandbytes(optimizer))
        folder = self.base_folder(config, adaptation, model, ctx)
        base = self.loaded(config, quantization, folder, ctx)
        adapted = put_adapter_on(
            base, adaptation.peft_type, adaptation.settings, int(config.training_args.get("seed") or 42)
        )
        self.begin(config, adaptation, adapted, model, ctx)
        start = starting_products(adapted) if begins_with_base(adaptation.settings) else None
        record = train_model(config, adapted, prepared, tokenizer, ctx)
        adapter = ctx.output / "adapter"
        if ctx.rank == 0:
            save_adapter(adapted, adapter, adaptation.targets.peft, settings=adaptation.saved, start=start)
            copy_tokenizer(model.tokenizer_path, adapter)
            write_record(adapter, {**record, "method": type(self).__name__})
        return Artifact(
            path=ctx.output,
            kind="checkpoint",
            model=folder,
            adapter=adapter,
            tokenizer=adapter,
            base_quantization=quantization if self.recorded(config) else None,
        )

    def base_folder(self, config: Any, adaptation: Adaptation, model: Artifact, ctx: Context) -> Path:
        """Where the base lies that is trained on."""
        return model.model

    def begin(self, config: Any, adaptation: Adaptation, adapted: Any, model: Artifact, ctx: Context) -> None:
        """Give a fresh adapter other first values than PEFT did."""

    def loaded(self, config: Any, quantization: BaseQuantization | None, folder: Path, ctx: Context) -> Any:
        """The base model, to be frozen."""
        import torch

        from coldpress.nn.loading import four_bit_layers, load_model

        dtype, slow_bf16 = computes_in(config, ctx)
        base = load_model(
            folder,
            dtype=dtype if quantization is None else quantization.compute_dtype,
            trust_remote_code=ctx.trust_remote_code,
            quantization=quantization,
            device_map=whole_on(config, ctx),
        )
        if quantization is not None and slow_bf16:
            for layer in four_bit_layers(base).values():
                layer.compute_dtype = torch.float32
        if config.training_args.get("gradient_checkpointing"):
            base.enable_input_require_grads()
            base.config.use_cache = False
        return base
