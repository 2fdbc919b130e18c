"""What every fine-tuning pass does: check what cannot be trained, prepare the data, train, and keep the record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from coldpress.artifacts.base import Spec
from coldpress.artifacts.classifiers import CLASSIFICATION
from coldpress.config.schema import DataConfig
from coldpress.data.prepare import Prepared, check_masks, clamp, prepare
from coldpress.data.splits import split_seed
from coldpress.data.tokenizer import Tokenizer
from coldpress.errors import DataError, MissingExtraError, PlanError
from coldpress.events import Message
from coldpress.hardware import library_versions
from coldpress.nn.imports import needs_bitsandbytes
from coldpress.nn.reporters import require_reporters
from coldpress.nn.train import Batching
from coldpress.passes.base import Context, PlanContext
from coldpress.passes.classification import for_classifier, refuse_unclassifiable
from coldpress.passes.training_arguments import optimizer_on_cpu, training_arguments
from coldpress.passes.training_config import TrainingConfig
from coldpress.passes.training_estimate import TrainingMemory, choose_batching, divided, free_memory, size_of
from coldpress.passes.training_ranks import ranks_note, refuse_sharding

__all__ = [
    "computes_in",
    "longest_record",
    "prepared_data",
    "refuse_untrainable",
    "require_packages",
    "seed_of",
    "sequence_length",
    "train_model",
    "training_notes",
    "whole_on",
]


SHOWN_TOKENS = 24
"""Of a training sequence, in a message."""


def require_packages(name: str, libraries: Sequence[str]) -> None:
    """Raise MissingExtraError for libraries of the pass `name` that are not installed."""
    absent = [library for library, version in library_versions(tuple(libraries)).items() if version is None]
    if absent:
        raise MissingExtraError(f"{name} needs {', '.join(absent)}, not installed", hint="pip install 'coldpress[cpu]'")


def refuse_untrainable(config: TrainingConfig, spec: Spec, env: PlanContext) -> None:
    """Raise PlanError for what no method can train."""
    require_reporters(config.training_args.get("report_to"))
    if spec.kind != "checkpoint":
        raise PlanError("an ONNX model cannot be fine-tuned", hint="put this step before the build")
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "max_position_embeddings"):
        size_of(spec, key, 1)
    if config.eval_data_config is not None and config.eval_dataset_size is not None:
        raise PlanError("eval_data_config and eval_dataset_size exclude each other", hint="leave one out")
    on_gpu = env.accelerator.device == "gpu"
    if on_gpu and not env.hardware.gpus:
        raise PlanError(
            "the config asks for a GPU to train on, and this machine has none that nvidia-smi lists",
            hint='nothing falls back to the CPU by itself: set the accelerator\'s device to "cpu"',
        )
    if config.torch_dtype == "float16" and not on_gpu:
        raise PlanError("torch_dtype float16 trains on GPUs only", hint="use bfloat16 or float32 on the CPU")
    held_out = config.eval_data_config is not None or config.eval_dataset_size is not None
    strategy = str(config.training_args.get("eval_strategy") or "no")
    if strategy != "no" and not held_out:
        raise PlanError(
            f"eval_strategy {strategy} needs data to evaluate on", hint="set eval_dataset_size, or eval_data_config"
        )
    optimizer = str(config.training_args.get("optim") or "")
    if not on_gpu:
        optimizer = optimizer_on_cpu(optimizer)
    if needs_bitsandbytes(optimizer) and library_versions(("bitsandbytes",))["bitsandbytes"] is None:
        raise MissingExtraError(
            f"optim {optimizer} needs bitsandbytes, not installed",
            hint="pip install 'coldpress[cpu]', or use adamw_torch",
        )
    refuse_sharding(config.training_args, env)
    pre = env.data(config.train_data_config).pre_process_data_config
    if spec.task == CLASSIFICATION:
        refuse_unclassifiable(spec, pre)
    elif pre.completion_only_loss and pre.strategy.startswith("join"):
        raise PlanError(f"completion_only_loss does not go with {pre.strategy}", hint='set "strategy": "pack"')


def seed_of(config: TrainingConfig) -> int:
    """Of what is drawn at random before the training; Transformers' own default where the config says none."""
    seed = config.training_args.get("seed")
    return 42 if seed is None else int(seed)


def sequence_length(config: TrainingConfig, spec: Spec, env: PlanContext) -> tuple[int, tuple[str, ...]]:
    """Tokens of a sequence, and what there is to say about that; raises PlanError."""
    data = env.data(config.train_data_config)
    length, notes = clamp(data.pre_process_data_config, spec.context_length)
    try:
        check_masks(data.pre_process_data_config)
    except DataError as error:
        raise PlanError(f"data config {data.name}: {error.message}", hint=error.hint) from error
    return length, notes


def training_notes(config: TrainingConfig, env: PlanContext) -> tuple[str, ...]:
    """What of the config is done in another way."""
    notes = []
    if env.ranks > 1:
        notes.append(ranks_note(config.training_args, env))
    if "output_dir" in config.training_args:
        notes.append("training_args.output_dir is not used: checkpoints lie in the cache until the step is done")
    if env.accelerator.device == "cpu":
        optimizer = str(config.training_args.get("optim") or "")
        if optimizer.startswith("paged_"):
            notes.append(f"optim {optimizer} needs an NVIDIA GPU; on the CPU {optimizer_on_cpu(optimizer)} is used")
        if config.torch_dtype == "bfloat16" and not env.hardware.fast_bf16:
            notes.append("this CPU has no bf16 instructions: it computes in float32, which is faster here")
    return tuple(notes)


def whole_on(config: TrainingConfig, ctx: Context) -> dict[str, int] | None:
    """Where the model is loaded: on the GPU, unless FSDP brings its parts there; None is in memory."""
    on_gpu = ctx.accelerator.device == "gpu" and not (ctx.ranks > 1 and config.training_args.get("fsdp"))
    return {"": 0} if on_gpu else None


def computes_in(config: TrainingConfig, ctx: Context) -> tuple[str, bool]:
    """(type that frozen weights are loaded in, whether bf16 was asked for on a CPU that is slow at it)."""
    on_gpu = ctx.accelerator.device == "gpu"
    slow_bf16 = config.torch_dtype == "bfloat16" and not on_gpu and not ctx.hardware.fast_bf16
    # float16 is a matter of mixed precision: its weights stay float32.
    return ("float32" if slow_bf16 or config.torch_dtype == "float16" else config.torch_dtype), slow_bf16


def prepared_data(config: TrainingConfig, spec: Spec, tokenizer: Tokenizer, ctx: Context) -> Prepared:
    """Training and held-out sequences; what there is to say about them is told."""
    held_out: DataConfig | float | int | None = config.eval_dataset_size
    if config.eval_data_config is not None:
        held_out = ctx.data(config.eval_data_config)
    classifies = spec.task == CLASSIFICATION
    prepared = prepare(
        ctx.data(config.train_data_config),
        tokenizer,
        context_length=spec.context_length,
        held_out=held_out,
        seed=split_seed(config.training_args),
        classes=classifies,
    )
    for note in prepared.notes:
        ctx.emit(Message("warning", note, ctx.step))
    for fact in prepared.facts:
        ctx.emit(Message("info", fact, ctx.step))
    if classifies:
        prepared = for_classifier(prepared, spec, tokenizer)
    train, held = prepared.train, prepared.held_out
    with_loss = f"{train.loss_tokens} with loss"
    if prepared.classes is not None:
        with_loss = f"of {len(prepared.classes)} classes: {', '.join(prepared.classes[:8])}"
    said = f"trains on {len(train.sequences)} sequences, {train.tokens} tokens, {with_loss}"
    if held is not None:
        said += f"; holds out {len(held.sequences)} sequences, {held.tokens} tokens"
    ctx.emit(Message("info", said, ctx.step))
    return prepared


def train_model(
    config: TrainingConfig, model: Any, prepared: Prepared, tokenizer: Tokenizer, memory: TrainingMemory, ctx: Context
) -> dict[str, Any]:
    """Train what requires gradients in `model`, in place; returns the record of the training."""
    from coldpress.nn.changes import Fingerprints
    from coldpress.nn.train import Stopping, train

    pre = ctx.data(config.train_data_config).pre_process_data_config
    arguments, notes = training_arguments(config, ctx)
    for note in notes:
        ctx.emit(Message("info", note, ctx.step))
    sequences = prepared.train.sequences
    batching = _batching(config, prepared, memory, ctx)
    before = Fingerprints.of(model)
    report = train(
        model,
        sequences,
        None if prepared.held_out is None else prepared.held_out.sequences,
        arguments=arguments,
        pad_id=tokenizer.pad_id,
        padding_side=pre.padding_side,
        work=ctx.work,
        step=ctx.step,
        emit=ctx.emit,
        logs=ctx.logs,
        batching=batching,
        stopping=Stopping(config.load_best, config.early_stopping_patience, config.early_stopping_threshold),
        describe=lambda row: tokenizer.decode(sequences[row].ids[:SHOWN_TOKENS]),
    )
    changes = before.compared_with(model)
    level: Any = "info" if changes.layers_changed else "warning"
    ctx.emit(Message(level, changes.text, ctx.step))
    return {**report.to_dict(), "arguments": arguments, "trained": changes.to_dict()}


def longest_record(prepared: Prepared) -> int:
    """Tokens of it."""
    return max(max(getattr(one, "lengths", None) or (len(one.ids),)) for one in prepared.train.sequences)


def _batching(config: TrainingConfig, prepared: Prepared, memory: TrainingMemory, ctx: Context) -> Batching:
    """How much runs at once, from the longest record and the memory that is free now."""
    device = ctx.accelerator.device
    longest = longest_record(prepared)
    room = free_memory(ctx.hardware, ctx.accelerator, ctx.neighbours)
    batching, said = choose_batching(config, divided(memory, config, ctx.ranks), room, device, longest)
    if ctx.ranks > 1 and config.training_args.get("fsdp"):
        batching = replace(batching, room=None)  # before the model is divided, a micro-batch would show too much
    if said:
        ctx.emit(Message("info", said, ctx.step))
    return batching
