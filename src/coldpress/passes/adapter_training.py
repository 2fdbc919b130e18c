"""What the adapter passes have in common: plan and run around PEFT's settings of one kind.

The result is the base model by reference, plus `adapter/`: PEFT's files, the tokenizer, and `training.json` with the
loss of every step, the arguments and what was trained. Where the frozen layers are held in 4 bits while training, the
artifact records how, so that a merge can add the adapter to the very weights it was trained on.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from coldpress.artifacts.base import Artifact, BaseQuantization, Spec
from coldpress.data.tokenizer import Tokenizer, copy_tokenizer
from coldpress.errors import PlanError
from coldpress.hardware import Hardware
from coldpress.nn.adapted import begins_with_base, put_adapter_on, save_adapter, starting_products, take_adapter_up
from coldpress.nn.imports import needs_bitsandbytes
from coldpress.passes.adapter_continued import continued, refuse_other_settings
from coldpress.passes.adapter_settings import Adaptation, trained_parameters
from coldpress.passes.base import Context, Limits, PlanContext, Planned
from coldpress.passes.classification import as_trained, trained_config, write_config
from coldpress.passes.fine_tuning import (
    computes_in,
    longest_record,
    prepared_data,
    refuse_untrainable,
    require_packages,
    seed_of,
    sequence_length,
    train_model,
    training_notes,
    whole_on,
)
from coldpress.passes.rehearsal import rehearse, require_disk
from coldpress.passes.training_arguments import training_arguments
from coldpress.passes.training_config import AdapterConfig
from coldpress.passes.training_estimate import TrainingMemory, size_of, training_estimate, training_memory
from coldpress.passes.training_record import document_training

__all__ = ["AdapterTraining"]


class AdapterTraining:
    """Base of the adapter passes; each says what it makes (`fresh`) and how the base is held (`quantization`)."""

    Config: ClassVar[type[AdapterConfig]] = AdapterConfig
    version: ClassVar[int] = 2
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "peft", "accelerate", "tokenizers")
    preload: ClassVar[tuple[str, ...]] = ("coldpress.nn.warm_training",)
    needs_torch: ClassVar[bool] = True
    takes: ClassVar[str] = "checkpoint"
    peft_type: ClassVar[str] = "LORA"
    starts_apart: ClassVar[bool] = False
    """Whether `begin` gives the adapter a start that changes the base."""
    distributed: ClassVar[bool] = True

    def fresh(self, config: Any, spec: Spec) -> Adaptation:
        """A new adapter to train; raises PlanError."""
        raise NotImplementedError

    def adaptation(self, config: Any, spec: Spec) -> Adaptation:
        """The adapter to train: a new one, or that of the model; raises PlanError."""
        spec = as_trained(spec)
        return self.fresh(config, spec) if spec.adapter is None else continued(config, spec, self.peft_type)

    def quantization(self, config: Any, spec: Spec) -> BaseQuantization | None:
        """How the frozen layers are held; None is as they are. Raises PlanError."""
        if spec.base_quantization is not None:
            raise PlanError(
                f"the model's adapter was trained on {spec.base_quantization.quant_type} weights",
                hint="go on with it in QLoRA, or put MergeAdapterWeights before this step",
            )
        return None

    def plan(self, config: Any, spec: Spec, env: PlanContext) -> Planned:
        require_packages(type(self).__name__, self.libraries)
        refuse_untrainable(config, spec, env)
        adaptation = self.adaptation(config, spec)
        if adaptation.goes_on:
            self.refuse_other(config, spec)
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
            task=spec.task,
        )
        memory = self.memory(
            config, adaptation, quantization, as_trained(spec), env.hardware, env.accelerator.device, length
        )
        name = env.data(config.train_data_config).name
        written = 4 * trained_parameters(adaptation, as_trained(spec))
        return Planned(planned, training_estimate(config, spec, env, memory, length, name, written=written), notes)

    def memory(
        self,
        config: Any,
        adaptation: Adaptation,
        quantization: BaseQuantization | None,
        spec: Spec,
        hardware: Hardware,
        device: str,
        longest: int,
    ) -> TrainingMemory:
        layers = max(1, size_of(spec, "num_hidden_layers", 1))
        return training_memory(
            config,
            spec,
            hardware,
            device,
            trained=trained_parameters(adaptation, spec),
            quantization=quantization,
            rank=sum(adaptation.ranks.values()) // layers,
            longest=None if self.peft_type != "LORA" or adaptation.settings.get("use_dora") else longest,
        )

    def refuse_other(self, config: Any, spec: Spec) -> None:
        """Raise PlanError for what is given and differs from the adapter that the model has."""
        refuse_other_settings(config, as_trained(spec))

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
        classifier = trained_config(spec, prepared, tokenizer)
        base = self.loaded(config, quantization, folder, classifier, ctx)
        start = None
        if adaptation.goes_on:
            assert model.adapter is not None
            adapted = take_adapter_up(base, model.adapter, adaptation.settings)
        else:
            adapted = put_adapter_on(base, adaptation.peft_type, adaptation.settings, seed_of(config))
            self.begin(config, adaptation, adapted, model, ctx)
            start = starting_products(adapted) if begins_with_base(adaptation.settings) else None
        adapter = ctx.output / "adapter"
        own = os.path.relpath(folder, adapter) if folder.is_relative_to(ctx.output) else str(folder)
        settings = {**adaptation.saved, "base_model_name_or_path": own}
        made = Artifact(
            path=ctx.output,
            kind="checkpoint",
            model=folder,
            adapter=adapter,
            tokenizer=adapter,
            base_quantization=quantization if self.recorded(config) else None,
            task=model.task,
        )

        def save(place: Path) -> None:
            save_adapter(adapted, place, adaptation.targets.peft, settings=settings, start=start)
            if classifier is not None:
                write_config(place, classifier)

        sizes = as_trained(spec)
        if ctx.rank == 0:
            require_disk(ctx.work, 4 * trained_parameters(adaptation, sizes))
            rehearse(
                made,
                adaptation.result,
                save,
                ctx.work,
                begins_as_base=not self.starts_apart and adaptation.begins_as_base,
            )
        memory = self.memory(
            config, adaptation, quantization, sizes, ctx.hardware, ctx.accelerator.device, longest_record(prepared)
        )
        record = train_model(config, adapted, prepared, tokenizer, memory, ctx)
        if ctx.rank == 0:
            save(adapter)
            copy_tokenizer(model.tokenizer_path, adapter)
            went_on = {"goes_on_with": str(model.adapter)} if adaptation.goes_on else {}
            document_training(
                adapter,
                {**record, **went_on},
                method=type(self).__name__,
                config=config,
                arguments=record["arguments"],
                prepared=prepared,
                model=model,
                ctx=ctx,
            )
        return made

    def base_folder(self, config: Any, adaptation: Adaptation, model: Artifact, ctx: Context) -> Path:
        """Where the base lies that is trained on."""
        return model.model

    def begin(self, config: Any, adaptation: Adaptation, adapted: Any, model: Artifact, ctx: Context) -> None:
        """Give a fresh adapter other first values than PEFT did."""

    def loaded(
        self,
        config: Any,
        quantization: BaseQuantization | None,
        folder: Path,
        classifier: Mapping[str, Any] | None,
        ctx: Context,
    ) -> Any:
        """The base model, to be frozen."""
        import torch

        from coldpress.nn.loading import four_bit_layers, load_model

        dtype, slow_bf16 = computes_in(config, ctx)
        with torch.random.fork_rng(devices=[]):  # a classifier's head is drawn
            torch.manual_seed(seed_of(config))
            base = load_model(
                folder,
                dtype=dtype if quantization is None else quantization.compute_dtype,
                trust_remote_code=ctx.trust_remote_code,
                quantization=quantization,
                device_map=whole_on(config, ctx),
                classifier=classifier,
            )
        if quantization is not None and slow_bf16:
            for layer in four_bit_layers(base).values():
                layer.compute_dtype = torch.float32
        return base
