"""The options of ModelBuilder, and what each profile makes of those that are left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import Field

from coldpress.config.candidates import Candidates
from coldpress.config.schema import Frozen

__all__ = ["PROFILES", "ModelBuilderConfig", "Profile"]

Precision = Literal["fp32", "fp16", "bf16", "int8", "int4"]
Algorithm = Literal[
    "default", "rtn", "rtn_last", "k_quant", "k_quant_last", "k_quant_down", "k_quant_mixed", "k_quant_linear", "hqq"
]
ProfileName = Literal["fast", "balanced", "accurate"]


_OF_CODES = ("precision", ("int4", "int8"))
_DECIDED = ("profile", "extra_options")
"""What is said by these is not searched by default."""


class ModelBuilderConfig(Frozen):
    """Parameters of ModelBuilder."""

    searchable: ClassVar[Mapping[str, Candidates]] = {
        "precision": Candidates(("int4", "int8")),
        "profile": Candidates(("fast", "balanced")),
        "int4_block_size": Candidates((32, 64, 128), by_default=True, only_with=_OF_CODES, unless=_DECIDED),
        "int4_is_symmetric": Candidates(
            (True, False),
            by_default=True,
            only_with=_OF_CODES,
            unless=_DECIDED,
            not_for=("DmlExecutionProvider",),  # its kernels want zero points
        ),
        # Olive has "default" beside "rtn", which are one here; k_quant stands in its place.
        "int4_algo_config": Candidates(
            ("rtn", "k_quant", "k_quant_mixed", "k_quant_last"),
            by_default=True,
            only_with=_OF_CODES,
            unless=_DECIDED,
        ),
        "int4_accuracy_level": Candidates((1, 4), only_with=_OF_CODES),
    }
    precision: Precision
    """Of the weights: int8, int4, and on the CPU fp32, on CUDA fp16 or bf16, on DirectML and WebGPU fp32 or fp16. int8
    and int4 compute in fp32 on the CPU and in fp16 elsewhere."""
    profile: ProfileName = "balanced"
    """What options that are left out come to, on the CPU. fast: int4 blocks of 128, one int4 matrix for embedding and
    head where the model ties them, gate and up in one product, and logits for the last token only; balanced: blocks of
    32 and the embedding at 8 bits; accurate: as balanced, with zero points, and with the head and a third of the
    projections at 8 bits. docs/profiles.md has what each costs and gains."""
    metadata_only: bool = False
    """Write only the GenAI files for an ONNX model that is there already. Not built."""
    search: Mapping[str, Any] | None = None
    """Laid over the `search` section of genai_config.json (max_length, temperature ...)."""
    int4_accuracy_level: Literal[0, 1, 2, 3, 4] | None = None
    """What quantized products compute in: 1 fp32, 2 fp16, 3 bf16, 4 int8, 0 the kernel's choice; null: 4 on the CPU, 0
    elsewhere. For int8 weights too."""
    int4_block_size: Literal[16, 32, 64, 128, 256] | None = None
    """Weights that share a scale, for int4 and int8; null: 32 for int4, 128 for int8 (32 where rows do not divide)."""
    int4_is_symmetric: bool | None = None
    """False stores a zero point for each block; null: true, but for hqq and DirectML, which want zero points."""
    int4_op_types_to_quantize: tuple[str, ...] | None = None
    """MatMul, Gather or both; null: MatMul, and on the CPU the embedding at 8 bits. Gather quantizes the embedding at
    the bits of `precision`; a head that is tied to it then shares its bytes."""
    int4_nodes_to_exclude: tuple[str, ...] | None = None
    """Nodes to keep in floating point: `/lm_head/MatMul`, `/model/layers.0/attn/qkv_proj/MatMul` ..."""
    int4_algo_config: Algorithm | None = None
    """default and rtn take each block's scale from its greatest weight; k_quant tries five scales and takes the one
    with the least squared error. `_last` keeps the head at 8 bits; `_down` also every third down projection and those
    of the first and last layers; `_mixed` these, and query, key and value of the same layers. hqq (int4 only) fits zero
    points that are floats, which run slowly on the CPU; a quantized embedding stays k_quant. null is k_quant for int4,
    rtn for int8."""
    shared_embeddings: bool | None = None
    """Embedding and head as one quantized matrix, where the model ties them; null: as the profile says."""
    prune_lm_head: bool | None = None
    """Logits for the last token of each row only, [batch, 1, vocabulary]: a prompt then pays for one row of the head. A
    second graph over the same data file keeps all logits, for evaluation. null: as the profile says."""
    fuse_mlp_gate_up: bool | None = None
    """Gate and up projection in one product; null: as the profile says."""
    disable_qkv_fusion: bool = False
    """Query, key and value in three products instead of one."""
    allow_spinning: bool | None = None
    """Whether ONNX Runtime's threads wait for work by spinning. On two cores it decodes 7 % faster on a quiet machine
    and takes twice the time beside other work; null: in the profile fast. It is a line in genai_config.json."""
    prompt_graph: Literal["int8"] | None = None
    """int8: prompts go through a second graph, whose products but the head are in int8, with a scale for each output of
    the weights and for each token of the activations; the first graph generates from the cache it leaves. About a byte
    more for each weight, on disk and in memory; for x86 CPUs with VNNI or AMX. Batches and beams generate with the
    second graph as well, and onnxruntime-genai cannot rewind."""
    padding: Literal["right", "left"] = "right"
    """left: a graph for plain ONNX Runtime with `position_ids` as an input, right for rows padded on either side;
    onnxruntime-genai does not run it, so it comes without genai_config.json."""
    use_qdq: bool = False
    """DequantizeLinear + MatMul, standard operators, instead of MatMulNBits, with the same codes; ONNX Runtime makes
    MatMulNBits of them on the CPU. The embedding stays with GatherBlockQuantized."""
    use_8bits_moe: bool = False
    """Experts of a mixture at 8 bits, whatever the other products have."""
    use_webgpu_fp32: bool = False
    """WebGPU with int4 or int8 weights: activations in fp32 instead of fp16."""
    use_cuda_bf16: bool = False
    """CUDA with int4 or int8 weights: activations in bf16 instead of fp16."""
    include_hidden_states: bool = False
    """Give out the hidden states besides the logits."""
    exclude_embeds: bool = False
    """Leave the embedding out: the input is `inputs_embeds`."""
    exclude_lm_head: bool = False
    """Leave the head out: the output is `hidden_states`."""
    enable_cuda_graph: bool | None = None
    """CUDA: let genai_config.json ask for CUDA graphs."""
    adapter: Literal["merge", "inputs"] = "merge"
    """What becomes of LoRA adapters. merge adds the model's to its weights while they are streamed. inputs leaves the
    base as it is and lets the graph take A and B as inputs, so that adapters can be switched at run time;
    ExtractAdapters after it, or `coldpress convert-adapters`, writes the files that ONNX Runtime loads."""
    adapter_modules: tuple[str, ...] | None = None
    """With adapter: inputs, the linear layers that adapters may change (q_proj, v_proj ...); null: those that the
    model's own adapter changes."""
    extra_options: Mapping[str, Any] = Field(default_factory=dict)
    """The same options under the names of onnxruntime-genai's builder; they win over the ones above."""


@dataclass(frozen=True)
class Profile:
    """Defaults of the options that decide over speed."""

    block_size: int = 32
    algorithm: Algorithm = "k_quant"
    shared: bool = False
    pruned: bool = False
    fused: bool = False
    spinning: bool = False
    symmetric: bool = True
    """Of int4."""
    measured: str = ""
    """What it was seen to trade, for a plan; benchmarks/RESULTS.md and docs/profiles.md."""


PROFILES: Mapping[ProfileName, Profile] = {
    "fast": Profile(
        128,
        shared=True,
        pruned=True,
        fused=True,
        spinning=True,
        measured="prompts at 1.8 and new tokens at 1.3 times the speed of balanced, KL 1.5 times as large",
    ),
    "balanced": Profile(),
    "accurate": Profile(
        algorithm="k_quant_mixed",
        symmetric=False,
        measured="KL 0.5 to 0.7 of balanced, new tokens at 0.9 of its speed",
    ),
}
