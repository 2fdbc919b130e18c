"""What a training takes, by arithmetic on the config and the sizes of the model: memory, time, and how to batch.

    T   tokens that go through the model at once        w   bytes of a number, as the model computes
    H   hidden size                                     Q, K   width of all query heads, of all key heads
    I   width of the feed-forward part                  r   rank

    kept of a layer for the backward pass, in numbers of w bytes a token (see nn/fused.py for what is not):
        2 H   the residual stream before each half      2 H   both norms' results
        2 Q + 2 K   queries, keys, values and the attention's result      Q   the same once more, packed
        3 I   gate, up and their product                r for each adapted layer
    with dropout, a byte more for each input of an adapted layer
    with checkpointing: H a layer, and one layer as above

On a CPU the allocator takes 1.6 times that (`_ALLOCATOR`), and 1.2 times where layers are computed whole. Frozen
weights in the checkpoint's own type are mapped from its files there: they take room, and are no anonymous memory.

Constants that are measured say so; benchmarks/estimate_memory.py holds the sum against real trainings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from coldpress.artifacts.base import BaseQuantization, Spec
from coldpress.artifacts.classifiers import GENERATION
from coldpress.config.schema import Accelerator
from coldpress.errors import CheckpointError, PlanError, TrainingError
from coldpress.hardware import Hardware
from coldpress.nn.adapters import four_bit_names
from coldpress.nn.train import DEFAULT_ROWS, Batching
from coldpress.passes.base import Estimate, PlanContext
from coldpress.units import parse_size, size

if TYPE_CHECKING:
    from coldpress.passes.training_config import TrainingConfig

__all__ = [
    "TrainingMemory",
    "choose_batching",
    "divided",
    "free_memory",
    "rows_of_step",
    "size_of",
    "training_estimate",
    "training_memory",
]

_PROCESS_BYTES = 390_000_000
"""Anonymous memory of a process with torch, Transformers and PEFT loaded, and of what its first steps leave: kernels
made for their shapes, freed pieces (measured: benchmarks/estimate_memory.py)."""
_ALLOCATOR = {"cpu": 1.6, "gpu": 1.15}
"""Memory taken for each byte that is kept: freed pieces that fit nothing, buffers of kernels. Measured on the CPU."""
_WHOLE_LAYERS, _WHOLE_TYPES, _WHOLE_LENGTH = 1.2, ("llama", "phi3", "qwen2"), 512
"""The same where adapters of such models are trained on a CPU, on records of such a length (see nn/fused_block.py)."""
_AT_ONCE = {"cpu": 2048, "gpu": 8192}
"""Tokens of a micro-batch, at most: matrix products are long enough by then."""
_LOGITS_BYTES = {"cpu": 2 * (16 << 20), "gpu": 2 * (256 << 20)}
"""A slice of logits and what is computed of it, see nn/cross_entropy.py."""
_TIGHT = 0.5
"""Part of the room from which on one micro-batch is tried before the training."""
_ROOM = 0.85
"""Part of the free memory that a training plans with."""
_FLOPS_PER_THREAD = {True: 300e9, False: 50e9}
"""Roughly reached while training on a CPU, by whether products run in bf16."""
_GPU_FLOPS = 100e12
_BYTES_PER_TOKEN = 4.0
"""Of text, in English."""


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of a training, in parts."""

    process: int
    weights: int
    """Frozen ones, as they are held."""
    mapped: int
    """The part of the frozen weights that lies in mapped files."""
    trained: int
    """What trains: values, gradients, the optimizer's state."""
    layer: int
    """A token, of one layer."""
    layers: int
    stream: int
    """A token, in each layer under checkpointing."""
    rest: int
    """A token, outside of the layers: the last hidden states and their gradient, transients of the backward pass (of
    whole layers, the attention's shares in one record and their gradient)."""
    fixed: int
    """Of a micro-batch of any size: logits of a slice, a dequantized matrix."""

    def of_token(self, checkpointing: bool) -> int:
        kept = self.layers * self.stream + self.layer if checkpointing else self.layers * self.layer
        return kept + self.rest

    def held(self) -> int:
        """Without any micro-batch."""
        return self.process + self.weights + self.trained + self.fixed

    def total(self, tokens: int, checkpointing: bool) -> int:
        return self.held() + tokens * self.of_token(checkpointing)


def training_memory(
    config: TrainingConfig,
    spec: Spec,
    hardware: Hardware,
    device: str,
    *,
    trained: int,
    quantization: BaseQuantization | None,
    rank: int = 0,
    whole: bool = False,
    longest: int | None = None,
) -> TrainingMemory:
    """`trained` numbers train, in float32; `rank` is the sum over the adapted matrices of a layer. `whole`: all weights
    train, so none is held frozen. `longest`: tokens of a record, where the adapter is a plain one."""
    linear = spec.linear_layers()
    width = {"float32": 4, "bfloat16": 2, "float16": 4}[config.torch_dtype]
    if config.torch_dtype == "bfloat16" and device == "cpu" and not hardware.fast_bf16:
        width = 4
    in_four_bits = sum(math.prod(linear[name]) for name in four_bit_names(linear)) if quantization else 0
    weights = 0 if whole else (spec.parameters - in_four_bits) * width + int(in_four_bits * 0.57)
    layers, hidden = size_of(spec, "num_hidden_layers", 1), size_of(spec, "hidden_size", 1)
    inner = size_of(spec, "intermediate_size", 4 * hidden)
    heads = size_of(spec, "num_attention_heads", 1)
    head = size_of(spec, "head_dim", hidden // heads)
    queries, keys = heads * head, size_of(spec, "num_key_value_heads", heads) * head
    layer = width * (4 * hidden + 3 * queries + 2 * keys + 3 * inner + rank)
    if rank and getattr(config, "lora_dropout", 0):
        layer += 5 * hidden + queries + inner
    if whole:  # linear layers of autograd's own, and norms that are trained: float32 copies of their inputs
        layer += 4 * 4 * hidden
    in_one = device == "cpu" and longest is not None and _in_one(config, spec, longest)
    shares = 2 * width * heads * longest if in_one and longest else 0
    allocator = _WHOLE_LAYERS if in_one else _ALLOCATOR[device]
    largest = max((math.prod(shape) for shape in linear.values()), default=0)
    return TrainingMemory(
        process=_PROCESS_BYTES,
        weights=weights,
        mapped=weights if device == "cpu" and not in_four_bits and spec.precision == config.torch_dtype else 0,
        trained=trained * _bytes_trained(config.training_args),
        layer=int(allocator * layer),
        layers=layers,
        stream=int(_ALLOCATOR[device] * width * hidden),
        rest=int(_ALLOCATOR[device] * width * (6 * hidden + 4 * inner)) + shares,
        fixed=_LOGITS_BYTES[device] + (largest * (width + 4) if quantization else 0),
    )


def _in_one(config: TrainingConfig, spec: Spec, longest: int) -> bool:
    """Whether whole layers are computed at once (`nn.fused_block`), as far as the configs say."""
    rope = spec.config.get("rope_parameters") or spec.config.get("rope_scaling") or {}
    part = rope.get("partial_rotary_factor") if isinstance(rope, dict) else None
    part = part or spec.config.get("partial_rotary_factor") or 1.0
    window = spec.config.get("sliding_window") or longest
    plain = part == 1.0 and not spec.config.get("attention_dropout") and not config.training_args.get("torch_compile")
    return (
        plain and spec.model_type in _WHOLE_TYPES and spec.task == GENERATION and longest <= min(_WHOLE_LENGTH, window)
    )


def _bytes_trained(arguments: Mapping[str, Any]) -> int:
    """Of a number that trains: itself, its gradient, and the optimizer's state, float32 unless it says otherwise."""
    optimizer = str(arguments.get("optim") or "adamw_torch")
    if "8bit" in optimizer:
        return 4 + 4 + 2
    if optimizer.startswith(("sgd", "adafactor")):
        return 4 + 4 + (4 if float(arguments.get("sgd_momentum") or 0) else 0)
    if optimizer.startswith(("lion", "rmsprop")):
        return 4 + 4 + 4
    return 4 + 4 + 8


def rows_of_step(arguments: Mapping[str, Any]) -> int:
    """Rows between two updates of a process."""
    rows = int(arguments.get("per_device_train_batch_size") or DEFAULT_ROWS)
    return rows * int(arguments.get("gradient_accumulation_steps") or 1)


def choose_batching(
    config: TrainingConfig, memory: TrainingMemory, room: int, device: str, longest: int
) -> tuple[Batching, str | None]:
    """How much to run at once in `room` bytes, where the longest record has `longest` tokens; and what to say of it.

    Checkpointing is as the config says; where it says nothing, it is chosen when one record does not fit without it.
    Raises TrainingError for what does not fit at all.
    """
    asked = config.training_args.get("gradient_checkpointing")
    free = int(room * _ROOM) - memory.held()
    records = None if config.batch == "auto" else config.batch
    for checkpointing in [bool(asked)] if asked is not None else [False, True]:
        fits = free // memory.of_token(checkpointing)
        if fits >= longest:
            tokens = max(longest, min(fits, _AT_ONCE[device]))
            said = (
                "; activations are computed again in the backward pass (checkpointing), to fit" if checkpointing else ""
            )
            tight = free if tokens * memory.of_token(checkpointing) > _TIGHT * free else None
            batching = Batching(tokens, records, tight, _AT_ONCE[device], checkpointing)
            return batching, f"{tokens} tokens at a time{said}" if tokens < _AT_ONCE[device] or checkpointing else None
    need = int(memory.total(longest, asked is None or bool(asked)) / _ROOM)
    raise TrainingError(
        f"a record of {longest} tokens needs {size(need)}, and {size(room)} are free: "
        f"{size(memory.weights)} of weights, {size(memory.trained)} for what trains, "
        f"{size(longest * memory.of_token(asked is None or bool(asked)))} of activations",
        hint="lower max_seq_len, set gradient_checkpointing, lower the rank, or use QLoRA",
    )


def free_memory(hardware: Hardware, accelerator: Accelerator, neighbours: int = 1) -> int:
    """Bytes that a process may plan with: its share of what is free, or what the config says where that is less."""
    free = (hardware.gpus[0].memory if accelerator.device == "gpu" else hardware.available) // neighbours
    return free if accelerator.memory is None else min(free, parse_size(accelerator.memory))


def divided(memory: TrainingMemory, config: TrainingConfig, ranks: int) -> TrainingMemory:
    """What is left for each of several processes: under FSDP its part of the weights, and two blocks gathered."""
    if ranks == 1 or not config.training_args.get("fsdp"):
        return memory
    block = (memory.weights + memory.trained // 4) // memory.layers
    return replace(
        memory,
        weights=memory.weights // ranks,
        mapped=0,
        trained=memory.trained // ranks,
        fixed=memory.fixed + 2 * block,
    )


def training_estimate(
    config: TrainingConfig,
    spec: Spec,
    env: PlanContext,
    memory: TrainingMemory,
    length: int,
    data_name: str,
    *,
    written: int,
) -> Estimate:
    """Memory: see the top; of one process. Time: 4 operations a weight and token, 6 where all weights train. `written`:
    bytes of the result, of which there are two checkpoints with optimizer states meanwhile."""
    device = env.accelerator.device
    rows = rows_of_step(config.training_args)
    at_once = rows if config.batch == "auto" else min(rows, config.batch)
    total = _total_tokens(config, env, data_name, rows * env.ranks, length)
    operations_of_token = (6 if memory.weights == 0 else 4) * spec.parameters
    part = divided(memory, config, env.ranks)
    # What FSDP divides is loaded whole by each process first.
    loaded = 0 if part is memory else memory.weights or 4 * spec.parameters
    memory = part
    tokens = int(min(max(length, min(at_once * length, _AT_ONCE[device])), max(total, length)))
    checkpointing = bool(config.training_args.get("gradient_checkpointing"))
    if not checkpointing and config.training_args.get("gradient_checkpointing") is None:
        room = free_memory(env.hardware, env.accelerator, env.neighbours)
        checkpointing = memory.total(length, False) > room * _ROOM
    needed = memory.total(tokens, checkpointing)
    on_gpu = device == "gpu"
    whole = env.hardware.memory // env.neighbours
    if not on_gpu and memory.held() > whole:
        raise PlanError(
            f"needs {size(memory.held())} before the first token ({size(memory.weights)} of weights, "
            f"{size(memory.trained)} for what trains), and this machine has {size(whole)}",
            hint="use QLoRA, a lower rank, or a smaller model",
        )
    operations = operations_of_token * total * (4 / 3 if checkpointing else 1)
    machines = env.ranks / env.neighbours  # processors or GPUs that work at once
    return Estimate(
        ram=memory.process + max(loaded, 2 * memory.weights if on_gpu else needed - memory.process - memory.mapped),
        vram=needed - memory.process if on_gpu else 0,
        disk=written * 8,
        seconds=5.0 + operations / (_speed(env.hardware, device, config) * machines),
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


def _speed(hardware: Hardware, device: str, config: TrainingConfig) -> float:
    if device == "gpu":
        return _GPU_FLOPS
    return hardware.threads * _FLOPS_PER_THREAD[config.torch_dtype == "bfloat16" and hardware.fast_bf16]


def _total_tokens(config: TrainingConfig, env: PlanContext, data_name: str, rows: int, length: int) -> float:
    arguments = config.training_args
    size = config.eval_dataset_size
    share = 1 - size if isinstance(size, float) and size < 1 else 1.0
    per_epoch = env.data_bytes.get(data_name, 1 << 20) / _BYTES_PER_TOKEN * share
    total = per_epoch * float(arguments.get("num_train_epochs") or 3)
    steps = int(arguments.get("max_steps") or -1)
    if steps > 0:
        total = min(total, float(steps) * rows * length)
    return total
