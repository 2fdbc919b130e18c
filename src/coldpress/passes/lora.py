"""LoRA and QLoRA: train a low-rank adapter on a frozen model (Hu et al. 2021; Dettmers et al. 2023).

The result is the base model by reference, plus `adapter/`: PEFT's files, the tokenizer, and `training.json` with the
loss of every step. Under QLoRA the frozen linear layers are held in 4 bits while training; the artifact records how,
so that a merge can add the adapter to the very weights it was trained on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from coldpress.artifacts.base import AdapterSpec, Artifact, BaseQuantization, Spec
from coldpress.config.schema import DataConfig, Frozen
from coldpress.data.prepare import Prepared, check_masks, clamp, prepare
from coldpress.data.splits import split_seed
from coldpress.data.tokenizer import Tokenizer, copy_tokenizer
from coldpress.errors import DataError, MissingExtraError, PlanError
from coldpress.events import Message
from coldpress.hardware import library_versions
from coldpress.nn.adapters import Targets, decoder_linears, four_bit_names, resolve_modules_to_save, resolve_targets
from coldpress.nn.imports import needs_bitsandbytes
from coldpress.passes.base import Context, Limits, PlanContext, Planned
from coldpress.passes.training_arguments import optimizer_on_cpu, training_arguments
from coldpress.passes.training_estimate import size_of, training_estimate

__all__ = ["LoRA", "LoRAConfig", "QLoRA", "QLoRAConfig"]


class LoRAConfig(Frozen):
    """Parameters of LoRA."""

    train_data_config: str | DataConfig
    """Data to train on."""
    eval_data_config: str | DataConfig | None = None
    """Data to measure the evaluation loss on."""
    eval_dataset_size: float | int | None = Field(default=None, gt=0)
    """Part of the training data to hold out instead: a share below 1, or a number of rows."""
    r: int = Field(default=64, ge=1)
    """Rank of the adapter."""
    alpha: float = Field(default=16, gt=0)
    """The adapter's contribution is scaled by alpha / r."""
    lora_dropout: float = Field(default=0.05, ge=0, lt=1)
    """Dropout on the adapter's input while training."""
    target_modules: str | tuple[str, ...] | None = None
    """Linear layers to adapt: names, a regular expression, or all-linear; null is the usual attention layers."""
    modules_to_save: tuple[str, ...] | None = None
    """Modules to train whole, besides the adapter."""
    torch_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Type of the frozen weights and of the matrix products; the adapter itself is always float32."""
    training_args: Mapping[str, Any] = Field(default_factory=dict)
    """Transformers' TrainingArguments."""


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


class LoRA:
    """Train a low-rank adapter on a frozen model."""

    Config: ClassVar[type[LoRAConfig]] = LoRAConfig
    version: ClassVar[int] = 1
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "peft", "accelerate", "tokenizers")
    preload: ClassVar[tuple[str, ...]] = ("coldpress.nn.warm_training",)
    needs_torch: ClassVar[bool] = True

    def plan(self, config: LoRAConfig, spec: Spec, env: PlanContext) -> Planned:
        self._require_packages()
        _refuse(config, spec, env)
        for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "max_position_embeddings"):
            size_of(spec, key, 1)
        targets = resolve_targets(config.target_modules, spec.linear_layers(), spec.model_type)
        resolve_modules_to_save(config.modules_to_save, (tensor.name for tensor in spec.tensors))
        data = env.data(config.train_data_config)
        pre = data.pre_process_data_config
        length, notes = clamp(pre, spec.context_length)
        try:
            check_masks(pre)
        except DataError as error:
            raise PlanError(f"data config {data.name}: {error.message}", hint=error.hint) from error
        if targets.note:
            notes = (targets.note, *notes)
        notes += _notes(config, env)
        quantization = self._quantization(config)
        if quantization is not None:
            notes += _four_bit_notes(spec)
        recorded = quantization if getattr(config, "save_quant_config", True) else None
        planned = Spec(
            kind="checkpoint",
            config=spec.config,
            tensors=spec.tensors,
            precision=spec.precision,
            adapter=AdapterSpec(config.r, config.alpha, targets.names),
            base_quantization=recorded,
        )
        return Planned(planned, training_estimate(config, spec, env, targets, quantization, length, data.name), notes)

    def limits(self, config: LoRAConfig, spec: Spec) -> Limits | None:
        return None  # training changes the model on purpose

    def run(self, config: LoRAConfig, model: Artifact, ctx: Context) -> Artifact:
        from coldpress.nn import imports

        quantization = self._quantization(config)
        spec = model.describe()
        targets = resolve_targets(config.target_modules, spec.linear_layers(), spec.model_type)
        tokenizer = Tokenizer.load(model.tokenizer_path)
        prepared = self._data(config, spec, tokenizer, ctx)
        optimizer = str(training_arguments(config, ctx)[0].get("optim") or "")
        imports.load_training(quantized=quantization is not None or needs_bitsandbytes(optimizer))
        peft_model = _adapted(config, spec, targets, quantization, model, ctx)
        report = self._train(config, peft_model, prepared, tokenizer, ctx)
        folder = ctx.output / "adapter"
        _save(peft_model, folder, targets)
        copy_tokenizer(model.tokenizer_path, folder)
        (folder / "training.json").write_text(json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")
        return Artifact(
            path=ctx.output,
            kind="checkpoint",
            model=model.model,
            adapter=folder,
            tokenizer=folder,
            base_quantization=quantization if getattr(config, "save_quant_config", True) else None,
        )

    def _require_packages(self) -> None:
        absent = [name for name, version in library_versions(self.libraries).items() if version is None]
        if absent:
            raise MissingExtraError(
                f"{type(self).__name__} needs {', '.join(absent)}, not installed", hint="pip install 'coldpress[cpu]'"
            )

    def _quantization(self, config: LoRAConfig) -> BaseQuantization | None:
        return None

    def _data(self, config: LoRAConfig, spec: Spec, tokenizer: Tokenizer, ctx: Context) -> Prepared:
        held_out: DataConfig | float | int | None = config.eval_dataset_size
        if config.eval_data_config is not None:
            held_out = ctx.data(config.eval_data_config)
        prepared = prepare(
            ctx.data(config.train_data_config),
            tokenizer,
            context_length=spec.context_length,
            held_out=held_out,
            seed=split_seed(config.training_args),
        )
        for note in prepared.notes:
            ctx.emit(Message("warning", note, ctx.step))
        for fact in prepared.facts:
            ctx.emit(Message("info", fact, ctx.step))
        train, held = prepared.train, prepared.held_out
        said = f"trains on {len(train.sequences)} sequences, {train.tokens} tokens, {train.loss_tokens} with loss"
        if held is not None:
            said += f"; holds out {len(held.sequences)} sequences, {held.tokens} tokens"
        ctx.emit(Message("info", said, ctx.step))
        return prepared

    def _train(
        self, config: LoRAConfig, peft_model: Any, prepared: Prepared, tokenizer: Tokenizer, ctx: Context
    ) -> Any:
        from coldpress.nn.train import train

        pre = ctx.data(config.train_data_config).pre_process_data_config
        arguments, notes = training_arguments(config, ctx)
        for note in notes:
            ctx.emit(Message("info", note, ctx.step))
        return train(
            peft_model,
            prepared.train.sequences,
            None if prepared.held_out is None else prepared.held_out.sequences,
            arguments=arguments,
            pad_id=tokenizer.pad_id,
            padding_side=pre.padding_side,
            use_mask=pre.use_attention_mask,
            work=ctx.work,
            step=ctx.step,
            emit=ctx.emit,
        )


class QLoRA(LoRA):
    """LoRA on a base held in 4 bits (bitsandbytes)."""

    Config: ClassVar[type[LoRAConfig]] = QLoRAConfig
    libraries: ClassVar[tuple[str, ...]] = (*LoRA.libraries, "bitsandbytes")
    preload: ClassVar[tuple[str, ...]] = ("coldpress.nn.warm_quantized",)

    def _quantization(self, config: LoRAConfig) -> BaseQuantization:
        assert isinstance(config, QLoRAConfig)
        if config.compute_dtype not in (None, config.torch_dtype):
            raise PlanError(
                f"compute_dtype {config.compute_dtype} differs from torch_dtype {config.torch_dtype}",
                hint="set both to the same, or leave compute_dtype out",
            )
        return BaseQuantization(config.quant_type, config.double_quant, config.torch_dtype)


def _refuse(config: LoRAConfig, spec: Spec, env: PlanContext) -> None:
    """Raise PlanError for what cannot be trained."""
    if spec.kind != "checkpoint":
        raise PlanError("an ONNX model cannot be fine-tuned", hint="put this step before the build")
    if spec.adapter is not None:
        raise PlanError("the model has an adapter already", hint="put MergeAdapterWeights before this step")
    if config.eval_data_config is not None and config.eval_dataset_size is not None:
        raise PlanError("eval_data_config and eval_dataset_size exclude each other", hint="leave one out")
    on_gpu = env.accelerator.device == "gpu"
    if on_gpu and not env.hardware.gpus:
        raise PlanError("the config asks for a GPU, and there is none", hint='set the accelerator\'s device to "cpu"')
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
    pre = env.data(config.train_data_config).pre_process_data_config
    if pre.completion_only_loss and pre.strategy.startswith("join"):
        raise PlanError(f"completion_only_loss does not go with {pre.strategy}", hint='set "strategy": "pack"')


def _notes(config: LoRAConfig, env: PlanContext) -> tuple[str, ...]:
    notes = []
    if "output_dir" in config.training_args:
        notes.append("training_args.output_dir is not used: checkpoints lie in the cache until the step is done")
    if env.accelerator.device == "cpu":
        optimizer = str(config.training_args.get("optim") or "")
        if optimizer.startswith("paged_"):
            notes.append(f"optim {optimizer} needs an NVIDIA GPU; on the CPU {optimizer_on_cpu(optimizer)} is used")
        if config.torch_dtype == "bfloat16" and not env.hardware.fast_bf16:
            notes.append("this CPU has no bf16 instructions: it computes in float32, which is faster here")
    return tuple(notes)


def _four_bit_notes(spec: Spec) -> tuple[str, ...]:
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


def _adapted(
    config: LoRAConfig,
    spec: Spec,
    targets: Targets,
    quantization: BaseQuantization | None,
    model: Artifact,
    ctx: Context,
) -> Any:
    """The frozen model with a fresh adapter on it, ready to train."""
    import peft
    import torch

    from coldpress.nn import imports
    from coldpress.nn.loading import four_bit_layers, load_model

    on_gpu = ctx.accelerator.device == "gpu"
    slow_bf16 = config.torch_dtype == "bfloat16" and not on_gpu and not ctx.hardware.fast_bf16
    base = load_model(
        model.model,
        dtype="float32"
        if (slow_bf16 and quantization is None) or config.torch_dtype == "float16"
        else config.torch_dtype,
        trust_remote_code=ctx.trust_remote_code,
        quantization=quantization,
        device_map={"": 0} if on_gpu else None,
    )
    if quantization is not None and slow_bf16:
        for layer in four_bit_layers(base).values():
            layer.compute_dtype = torch.float32
    if config.training_args.get("gradient_checkpointing"):
        base.enable_input_require_grads()
        base.config.use_cache = False
    settings = peft.LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(targets.peft),
        modules_to_save=None if config.modules_to_save is None else list(config.modules_to_save),
        bias="none",
        task_type="CAUSAL_LM",
    )
    # The adapter's first values are drawn here, before Trainer seeds; the caller's generator is left as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(config.training_args.get("seed") or 42))
        with imports.quiet_renames():
            adapted = peft.get_peft_model(base, settings)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def _save(model: Any, folder: Any, targets: Targets) -> None:
    """PEFT's files. `target_modules` is written as it was resolved: PEFT may have shortened it to something wider."""
    model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
    path = folder / "adapter_config.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    record["target_modules"] = list(targets.peft)
    path.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")
