"""From a config to Transformers' TrainingArguments: what follows from the machine, and what the config says over it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coldpress.passes.base import Context

if TYPE_CHECKING:
    from coldpress.passes.training_config import TrainingConfig

__all__ = ["optimizer_on_cpu", "training_arguments"]


def optimizer_on_cpu(name: str) -> str:
    """The optimizer itself, or what stands in for one with paged memory, which only NVIDIA GPUs have."""
    if name.startswith("paged_adamw"):
        return "adamw_torch"
    return {"paged_ademamix_32bit": "ademamix"}.get(name, name.removeprefix("paged_"))


def training_arguments(config: TrainingConfig, ctx: Context) -> tuple[dict[str, Any], list[str]]:
    """Transformers' TrainingArguments: the config's, over what follows from the machine."""
    on_gpu = ctx.accelerator.device == "gpu"
    given = {name: value for name, value in config.training_args.items() if name != "output_dir"}
    notes = []
    optimizer = str(given.get("optim") or "")
    if not on_gpu and optimizer.startswith("paged_"):
        given["optim"] = optimizer_on_cpu(optimizer)
        notes.append(f"optim {optimizer} needs an NVIDIA GPU; {given['optim']} is used")
    if given.get("optim", "adamw_torch") == "adamw_torch" and not given.get("fsdp"):
        given["optim"] = "adamw_torch_fused"  # the same arithmetic in one kernel
    if given.get("gradient_checkpointing"):
        given.setdefault("gradient_checkpointing_kwargs", {"use_reentrant": False})
    ours: dict[str, Any] = {"bf16": config.torch_dtype == "bfloat16" and (on_gpu or ctx.hardware.fast_bf16)}
    if on_gpu:
        ours["fp16"] = config.torch_dtype == "float16"
    else:
        ours.update(use_cpu=True, dataloader_pin_memory=False)
    merged = {**ours, **given}
    notes.append(
        f"computes in {'bfloat16' if merged['bf16'] else 'float16' if merged.get('fp16') else 'float32'} "
        f"on {'the GPU' if on_gpu else f'{max(1, ctx.hardware.threads // ctx.neighbours)} CPU threads'}"
    )
    if ctx.ranks > 1:
        notes[-1] += f", in each of {ctx.ranks} processes"
    return merged, notes
