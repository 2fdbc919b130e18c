"""What a training takes: memory and time, by arithmetic on the config and the sizes of the model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from coldpress.artifacts.base import BaseQuantization, Spec
from coldpress.errors import CheckpointError
from coldpress.hardware import Hardware
from coldpress.nn.adapters import four_bit_names
from coldpress.passes.base import Estimate, PlanContext

if TYPE_CHECKING:
    from coldpress.passes.training_config import TrainingConfig

__all__ = ["size_of", "training_estimate"]

_PROCESS_BYTES = 500 << 20
"""torch, Transformers and PEFT loaded."""
_FLOPS_PER_THREAD = {True: 50e9, False: 25e9}
"""Reached while training on a CPU, by whether products run in bf16; measured on one machine with AVX512."""
_GPU_FLOPS = 100e12
_BYTES_PER_TOKEN = 4.0
"""Of text, in English."""


def training_estimate(
    config: TrainingConfig,
    spec: Spec,
    env: PlanContext,
    trained: int,
    quantization: BaseQuantization | None,
    length: int,
    data_name: str,
) -> Estimate:
    """Memory: weights, optimizer, activations and logits of a batch. Time: 6 operations a weight and token.

    `trained` counts the numbers that are trained beside the weights, in float32.
    """
    linear = spec.linear_layers()
    width = {"float32": 4, "bfloat16": 2, "float16": 4}[config.torch_dtype]
    if config.torch_dtype == "bfloat16" and env.accelerator.device == "cpu" and not env.hardware.fast_bf16:
        width = 4
    in_four_bits = sum(math.prod(linear[name]) for name in four_bit_names(linear)) if quantization else 0
    weights = (spec.parameters - in_four_bits) * width + int(in_four_bits * 0.57)
    arguments = config.training_args
    rows = int(arguments.get("per_device_train_batch_size") or 8)
    tokens = rows * length
    layers = size_of(spec, "num_hidden_layers", 1)
    hidden = size_of(spec, "hidden_size", 1)
    inner = size_of(spec, "intermediate_size", 4 * hidden)
    kept = 1 if arguments.get("gradient_checkpointing") else layers
    activations = tokens * (kept * (16 * hidden + 6 * inner) + layers * hidden) * 2
    logits = tokens * size_of(spec, "vocab_size", 1) * (4 + 4 + 2)
    memory = weights + trained * 16 + activations + logits
    adapter = trained * 4
    seconds = (
        6 * spec.parameters * _total_tokens(config, env, data_name, rows, length) / _speed(env.hardware, env, width)
    )
    on_gpu = env.accelerator.device == "gpu"
    return Estimate(
        ram=_PROCESS_BYTES + (weights if on_gpu else memory),
        vram=memory if on_gpu else 0,
        disk=adapter * 8,  # the adapter, and two checkpoints with optimizer states
        seconds=5.0 + seconds,
    )


def size_of(spec: Spec, key: str, default: int) -> int:
    """A size of the model, or the default where config.json has none; raises CheckpointError for what is no size."""
    value = spec.config.get(key)
    if value is None:
        return default
    if type(value) is not int or value < 1:
        raise CheckpointError(
            f"config.json of the model: {key} is {value!r}, must be a whole number above 0",
            hint="is the download complete? Otherwise correct the key in config.json",
        )
    return value


def _speed(hardware: Hardware, env: PlanContext, width: int) -> float:
    return _GPU_FLOPS if env.accelerator.device == "gpu" else hardware.threads * _FLOPS_PER_THREAD[width == 2]


def _total_tokens(config: TrainingConfig, env: PlanContext, data_name: str, rows: int, length: int) -> float:
    arguments = config.training_args
    size = config.eval_dataset_size
    share = 1 - size if isinstance(size, float) and size < 1 else 1.0
    per_epoch = env.data_bytes.get(data_name, 1 << 20) / _BYTES_PER_TOKEN * share
    total = per_epoch * float(arguments.get("num_train_epochs") or 3)
    steps = int(arguments.get("max_steps") or -1)
    if steps > 0:
        total = min(total, float(steps) * rows * int(arguments.get("gradient_accumulation_steps") or 1) * length)
    return total
