"""Full fine-tuning: train all weights of a model, or a part of them, and write a whole checkpoint.

What is trained is held in float32 with AdamW's two moments and a gradient: 16 bytes a number, beside 2 for the bf16
copy that a step computes with. The checkpoint is written in the types of the one that came in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from coldpress.artifacts.base import Artifact, Spec
from coldpress.artifacts.checkpoint_files import copy_configs
from coldpress.artifacts.classifiers import ClassifierTensors, labels_of
from coldpress.artifacts.quantized import open_checkpoint
from coldpress.artifacts.tensors import TensorSource
from coldpress.config.candidates import Candidates
from coldpress.data.tokenizer import Tokenizer, copy_tokenizer
from coldpress.errors import PlanError
from coldpress.events import Progress
from coldpress.hardware import Hardware
from coldpress.nn.imports import needs_bitsandbytes
from coldpress.nn.trained_part import trained_part
from coldpress.passes.base import Context, Limits, PlanContext, Planned
from coldpress.passes.classification import as_trained, trained_config, write_config
from coldpress.passes.fine_tuning import (
    computes_in,
    prepared_data,
    refuse_untrainable,
    require_packages,
    seed_of,
    sequence_length,
    train_model,
    training_notes,
    whole_on,
)
from coldpress.passes.training_arguments import training_arguments
from coldpress.passes.training_config import TrainingConfig
from coldpress.passes.training_estimate import TrainingMemory, training_estimate, training_memory
from coldpress.passes.training_record import document_training

__all__ = ["FullFinetune", "FullFinetuneConfig"]

SHARD_BYTES = 5_000_000_000
"""Of a file of the checkpoint, as Transformers once divided it; tools of every kind read that."""


class FullFinetuneConfig(TrainingConfig):
    """Parameters of FullFinetune."""

    searchable: ClassVar[Mapping[str, Candidates]] = {"training_args.learning_rate": Candidates((1e-5, 2e-5, 5e-5))}
    trainable_modules: tuple[str, ...] | None = None
    """Parts to train: names of modules (mlp, layers.31, norm), or regular expressions for whole names; null is all."""
    freeze: tuple[str, ...] | None = None
    """Parts of these to leave as they are, named the same way."""


class FullFinetune:
    """Train the weights of a model itself, and write a whole checkpoint."""

    Config: ClassVar[type[FullFinetuneConfig]] = FullFinetuneConfig
    version: ClassVar[int] = 1
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "accelerate", "tokenizers")
    preload: ClassVar[tuple[str, ...]] = ("coldpress.nn.warm_training",)
    needs_torch: ClassVar[bool] = True
    takes: ClassVar[str] = "checkpoint"
    distributed: ClassVar[bool] = True

    def plan(self, config: FullFinetuneConfig, spec: Spec, env: PlanContext) -> Planned:
        require_packages(type(self).__name__, self.libraries)
        refuse_untrainable(config, spec, env)
        if spec.adapter is not None:
            raise PlanError(
                "the model has an adapter, and full fine-tuning trains the weights below it",
                hint="put MergeAdapterWeights before this step",
            )
        if spec.packings:
            raise PlanError(
                f"the model is quantized ({len(spec.packings)} matrices), and such weights cannot be trained",
                hint="take the unquantized model; or LoRA, which leaves it as it is",
            )
        spec = as_trained(spec)
        trained = set(trained_part((tensor.name for tensor in spec.tensors), config.trainable_modules, config.freeze))
        count = sum(math.prod(tensor.shape) for tensor in spec.tensors if tensor.name in trained)
        length, notes = sequence_length(config, spec, env)
        notes += training_notes(config, env)
        if count < spec.parameters:
            notes += (f"trains {count:,} of {spec.parameters:,} parameters",)
        planned = Spec(
            kind="checkpoint", config=spec.config, tensors=spec.tensors, precision=spec.precision, task=spec.task
        )
        memory = self.memory(config, spec, env.hardware, env.accelerator.device, count)
        name = env.data(config.train_data_config).name
        estimate = training_estimate(config, spec, env, memory, length, name, written=4 * count)
        return Planned(planned, estimate, notes)

    def memory(
        self, config: FullFinetuneConfig, spec: Spec, hardware: Hardware, device: str, count: int
    ) -> TrainingMemory:
        """Where `count` weights train, in float32."""
        return training_memory(
            config, spec, hardware, device, trained=count, quantization=None, whole=count == spec.parameters
        )

    def limits(self, config: FullFinetuneConfig, spec: Spec) -> Limits | None:
        return None  # training changes the model on purpose

    def run(self, config: FullFinetuneConfig, model: Artifact, ctx: Context) -> Artifact:
        from coldpress.nn import imports

        spec = model.describe()
        tokenizer = Tokenizer.load(model.tokenizer_path)
        prepared = prepared_data(config, spec, tokenizer, ctx)
        optimizer = str(training_arguments(config, ctx)[0].get("optim") or "")
        imports.load_training(quantized=needs_bitsandbytes(optimizer))
        from coldpress.nn.whole_model import write_checkpoint

        classifier = trained_config(spec, prepared, tokenizer)
        with open_checkpoint(model.model, spec.config) as stored:
            base: TensorSource = stored
            if classifier is not None:
                base = ClassifierTensors(stored, classifier, spec.precision, len(labels_of(classifier)))
            loaded = _loaded(config, base, model.model, classifier, ctx)
            count = sum(one.numel() for one in loaded.parameters() if one.requires_grad)
            memory = self.memory(config, as_trained(spec), ctx.hardware, ctx.accelerator.device, count)
            record = train_model(config, loaded, prepared, tokenizer, memory, ctx)
            if ctx.rank == 0:
                write_checkpoint(
                    loaded,
                    base,
                    ctx.output,
                    shard_bytes=SHARD_BYTES,
                    on_tensor=lambda done, total: ctx.emit(Progress(ctx.step, done, total, "tensors")),
                )
        made = Artifact(path=ctx.output, kind="checkpoint", model=ctx.output)
        if ctx.rank > 0:
            return made
        copy_configs(model.model, ctx.output)
        if classifier is not None:
            write_config(ctx.output, classifier)
        for folder in dict.fromkeys((model.tokenizer_path, model.model)):
            copy_tokenizer(folder, ctx.output)
        document_training(
            ctx.output,
            record,
            method=type(self).__name__,
            config=config,
            arguments=record["arguments"],
            prepared=prepared,
            model=model,
            ctx=ctx,
        )
        return made


def _loaded(
    config: FullFinetuneConfig, base: TensorSource, folder: Path, classifier: Mapping[str, Any] | None, ctx: Context
) -> Any:
    """The model with what trains in float32 and the rest frozen."""
    import torch

    from coldpress.nn.loading import load_model
    from coldpress.nn.whole_model import check_names, train_only

    with torch.random.fork_rng(devices=[]):  # a classifier's head is drawn
        torch.manual_seed(seed_of(config))
        loaded = load_model(
            folder,
            dtype="float32",  # no bit of what is trained is lost
            trust_remote_code=ctx.trust_remote_code,
            device_map=whole_on(config, ctx),
            classifier=classifier,
        )
    check_names(loaded, base.infos(), folder)
    names = [name for name, _ in loaded.named_parameters()]
    train_only(loaded, set(trained_part(names, config.trainable_modules, config.freeze)), computes_in(config, ctx)[0])
    return loaded
