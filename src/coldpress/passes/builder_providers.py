"""What each execution provider of ONNX Runtime makes of a decoder graph: the form that it needs, and what it lacks.

Sources in onnxruntime: docs/OperatorKernels.md (commit 001d12d) for CUDA and DirectML; contrib_ops/webgpu (01671d9) and
core/providers/webgpu (003f772, GatherND from a later one) for WebGPU; the files named at each line. Graphs for the CPU
are run by the tests; those for the others are held to `FLOAT_OPERATORS` in structure, and were not run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from coldpress.artifacts.arch import Arch
from coldpress.graph.form import FloatType, Form, Quantization
from coldpress.registry import nearest

__all__ = ["FLOAT_OPERATORS", "PROVIDERS", "Provider", "against_embedding", "limited", "missing", "provider_of"]


@dataclass(frozen=True)
class Provider:
    """A row of the table; options are those of ModelBuilder."""

    key: str
    """onnxruntime-genai's name."""
    full_name: str
    quantized_io: FloatType
    """What int4 and int8 models compute in, where the config does not say."""
    floats: tuple[FloatType, ...]
    """What its attention kernel computes in."""
    options: Mapping[str, str]
    """Provider options for genai_config.json: those that onnxruntime-genai's builder writes (builders/base.py)."""
    rotates: bool = True
    """Whether its attention kernel rotates queries and keys, and takes them in one product."""
    switches_by_position: bool = False
    """Whether longrope's tables are chosen by positions; otherwise by an If node."""
    transposed_products: bool = True
    """FusedMatMul."""
    gathers_blocks: bool = True
    """GatherBlockQuantized."""
    symmetric: bool = True
    """Whether MatMulNBits runs without zero points."""
    float_zeros: bool = True
    """Whether MatMulNBits takes zero points that are floats."""
    dequantizes: tuple[FloatType, ...] = ("float32", "float16")
    """What DequantizeLinear makes of blocks of 4 bits."""
    pads_zeros: bool = True
    """Whether GatherBlockQuantized reads 4-bit zero points whose rows are filled up to whole bytes."""
    windows: bool = True
    """Whether its attention kernel knows sliding windows."""
    caps: bool = True
    """Whether its attention kernel knows caps of the scores."""
    head_multiple: int = 1
    """Head sizes must be multiples of it."""

    def form(self, form: Form) -> Form:
        """The graph that it needs."""
        return replace(
            form,
            packed_qkv=form.packed_qkv and self.rotates,
            rotary="attention" if self.rotates else "node",
            rope_switch="position_ids" if self.switches_by_position else "if",
            transposed_products=self.transposed_products,
        )


PROVIDERS: Mapping[str, Provider] = {
    "CPUExecutionProvider": Provider(
        "cpu", "the CPU", "float32", ("float32", "float16"), {}, switches_by_position=True
    ),
    "CUDAExecutionProvider": Provider(
        "cuda", "CUDA", "float16", ("float16", "bfloat16"), {},
        # contrib_ops/cuda/bert: flash attention and memory efficient attention both want multiples of 8.
        head_multiple=8,
    ),
    "DmlExecutionProvider": Provider(
        "dml", "DirectML", "float16", ("float32", "float16"), {"enable_graph_capture": "0"},
        # core/providers/dml/DmlExecutionProvider/src/Operators/DmlOperatorGroupQueryAttention.cpp: query, key and value
        # each of three dims, no rotary, no local_window_size, no softcap.
        rotates=False, switches_by_position=True, windows=False, caps=False,
        # DmlOperatorMatMulNBits.cpp: exactly four inputs, zero points of the codes' type.
        symmetric=False, float_zeros=False, gathers_blocks=False,
    ),
    "WebGpuExecutionProvider": Provider(
        "webgpu", "WebGPU", "float16", ("float32", "float16"), {"enableGraphCapture": "0", "validationMode": "basic"},
        # contrib_ops/webgpu/bert/attention.cc applies the window and no cap; webgpu_contrib_kernels.cc has no
        # FusedMatMul, webgpu_execution_provider.cc no DequantizeLinear of 4 bits; quantization/matmul_nbits.cc takes
        # uint8 zero points, quantization/gather_block_quantized.cc counts those of 4 bits without padding.
        caps=False, transposed_products=False, dequantizes=(), float_zeros=False, pads_zeros=False,
    ),
}  # fmt: skip

_ELSEWHERE: Mapping[str, str] = {
    "JsExecutionProvider": "WebGpuExecutionProvider",
    "NvTensorRTRTXExecutionProvider": "CUDAExecutionProvider",
    "TensorrtExecutionProvider": "CUDAExecutionProvider",
    "MIGraphXExecutionProvider": "DmlExecutionProvider",
    "ROCMExecutionProvider": "DmlExecutionProvider",
    "OpenVINOExecutionProvider": "CPUExecutionProvider",
    "QNNExecutionProvider": "CPUExecutionProvider with use_qdq, whose products are standard operators",
    "VitisAIExecutionProvider": "CPUExecutionProvider with use_qdq, whose products are standard operators",
}

FLOAT_OPERATORS: Mapping[str, frozenset[str]] = {
    key: frozenset(names.split())
    for key, names in {
        # Every operator of our graphs that reads or writes floats; those on whole numbers only (lengths, positions)
        # run on the CPU wherever the provider lacks them. MatMulNBits and what stands below it are com.microsoft's.
        "cuda": """
            Add Cast Concat DequantizeLinear Div Expand Gather GatherND Identity If LayerNormalization MatMul Mul
            Reshape Sigmoid SimplifiedLayerNormalization Slice Softmax Split Sub Tanh Unsqueeze
            MatMulNBits FastGelu FusedMatMul GatherBlockQuantized Gelu GroupQueryAttention MoE QMoE RotaryEmbedding
            SkipLayerNormalization SkipSimplifiedLayerNormalization""",
        "dml": """
            Add Cast Concat DequantizeLinear Div Expand Gather GatherND Identity If LayerNormalization MatMul Mul
            Reshape Sigmoid SimplifiedLayerNormalization Slice Split Sub Tanh Unsqueeze
            MatMulNBits FastGelu FusedMatMul Gelu GroupQueryAttention RotaryEmbedding SkipLayerNormalization
            SkipSimplifiedLayerNormalization""",
        "webgpu": """
            Add Cast Concat Div Expand Gather GatherND Identity If LayerNormalization MatMul Mul Reshape Sigmoid
            SimplifiedLayerNormalization Slice Split Sub Tanh Unsqueeze
            MatMulNBits FastGelu GatherBlockQuantized Gelu GroupQueryAttention QMoE RotaryEmbedding
            SkipLayerNormalization SkipSimplifiedLayerNormalization""",
    }.items()
}


def provider_of(name: str) -> Provider | str:
    """The provider of this name, or why there is none."""
    if name in PROVIDERS:
        return PROVIDERS[name]
    near = _ELSEWHERE.get(name) or nearest(name, PROVIDERS)
    return f"{name} is not built; " + (f"the nearest is {near}" if near else f"the builder has: {', '.join(PROVIDERS)}")


def missing(provider: Provider, arch: Arch, form: Form) -> list[str]:
    """What the graph wants and the provider's kernels do not have."""
    name, found = provider.full_name, []
    if form.io not in provider.floats:
        usable = " or ".join({"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}[one] for one in provider.floats)
        found.append(f"{name}'s GroupQueryAttention does not compute in {form.io}: use {usable}, or int4 or int8")
    if not provider.caps and arch.scales.attention_cap is not None:
        found.append(
            f"{arch.family.model_type} caps its attention scores at {arch.scales.attention_cap:g}, which {name}'s "
            f"GroupQueryAttention leaves out; use CPUExecutionProvider or CUDAExecutionProvider"
        )
    if arch.head_dim % provider.head_multiple:
        found.append(
            f"{name}'s GroupQueryAttention wants head sizes that are multiples of {provider.head_multiple}, this model "
            f"has {arch.head_dim}; use CPUExecutionProvider"
        )
    return found


def against_embedding(provider: Provider, q: Quantization, hidden: int) -> str | None:
    """What speaks against gathering rows of `hidden` numbers from blocks."""
    name = provider.full_name
    if not provider.gathers_blocks:
        return (
            f"{name} has no GatherBlockQuantized: leave Gather and shared_embeddings out, and the embedding stays in "
            f"floating point"
        )
    filled_up = q.bits == 4 and not q.symmetric and -(-hidden // q.block_size) % 2 == 1
    if filled_up and not provider.pads_zeros:
        return (
            f"{name} misreads 4-bit zero points of an embedding with an odd count of blocks, here of {q.block_size} in "
            f"{hidden}: leave Gather and shared_embeddings out"
        )
    return None


def limited(provider: Provider, arch: Arch) -> tuple[Arch, tuple[str, ...]]:
    """The decoder as far as the provider can run it, and what was cut."""
    windows = [window for window in arch.windows if window is not None]
    if provider.windows or not windows or min(windows) >= arch.context_length:
        return arch, ()
    note = (
        f"context of {min(windows)} tokens, the sliding window: {provider.full_name}'s attention kernel has no windows "
        f"and would look further back than the model does"
    )
    return replace(arch, context_length=min(windows)), (note,)
