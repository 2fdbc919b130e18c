"""ModelBuilder: every option shows in what is written, or is refused with its reason."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from coldpress.artifacts.base import AdapterSpec, Artifact, Spec
from coldpress.artifacts.tensors import TensorInfo
from coldpress.errors import CheckpointError, PlanError, UnsupportedModelError
from coldpress.evaluate.runners import OnnxRunner
from coldpress.graph.form import EMBEDDING, HEAD
from coldpress.hardware import detect
from coldpress.passes.base import PlanContext
from coldpress.passes.builder_choice import resolve
from coldpress.passes.builder_extra import translated
from coldpress.passes.model_builder import ModelBuilder, ModelBuilderConfig
from oracles.decoders import Stepper, tiny_model
from oracles.passes import CPU, CUDA, TOKENIZER, build_with_pass, plan_with_pass


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            tiny_model(name, made[name])
            (made[name] / "tokenizer.json").write_text(json.dumps(TOKENIZER))
        return made[name]

    return get


@pytest.fixture
def built(tmp_path: Path, checkpoints: Callable[[str], Path]) -> Callable[..., Path]:
    def make(name: str = "llama-gqa", accelerator: Any = CPU, **options: Any) -> Path:
        output = tmp_path / str(len(list(tmp_path.iterdir())))
        build_with_pass(checkpoints(name), output, accelerator, **{"precision": "int4", **options})
        return output

    return make


def nodes(folder: Path) -> dict[str, ir.Node]:
    return {node.name or "": node for node in ir.load(folder / "model.onnx").graph}


def attribute(node: ir.Node, name: str) -> Any:
    return node.attributes[name].value


def bits(folder: Path) -> dict[str, int]:
    return {name: attribute(node, "bits") for name, node in nodes(folder).items() if "bits" in node.attributes}


def initializer_types(folder: Path) -> set[str]:
    return {value.dtype.name for value in ir.load(folder / "model.onnx").graph.initializers.values() if value.dtype}


def genai(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "genai_config.json").read_text())
    return found


QKV = "/model/layers.0/attn/qkv_proj/MatMul"


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_each_cpu_precision_runs(precision: str, built: Callable[..., Path]) -> None:
    folder = built(precision=precision)
    assert np.isfinite(Stepper(folder)(np.array([[3, 4, 5]]))).all()
    expected = {"fp32": {None}, "int8": {8}, "int4": {4}}[precision]
    found = bits(folder)
    assert {found.get(name) for name in (QKV, HEAD)} == expected
    files = {file.name for file in folder.iterdir()}
    assert {"model.onnx", "model.onnx.data", "genai_config.json", "tokenizer.json", "tokenizer_config.json"} <= files


def test_defaults(built: Callable[..., Path]) -> None:
    folder = built()
    product = nodes(folder)[QKV]
    assert attribute(product, "block_size") == 32
    assert attribute(product, "accuracy_level") == 4
    assert len(product.inputs) == 3  # no zero points
    assert bits(folder)[EMBEDDING] == 8
    metadata = ir.load(folder / "model.onnx").metadata_props
    assert metadata["coldpress.precision"] == "int4"
    assert metadata["coldpress.block_size"] == "32"
    assert metadata["coldpress.minimum_onnxruntime"] == "1.23"
    assert genai(folder)["model"]["decoder"]["session_options"]["intra_op_num_threads"] == detect().cores


def test_int4_block_size(built: Callable[..., Path]) -> None:
    for precision in ("int4", "int8"):
        product = nodes(built(precision=precision, int4_block_size=64))[QKV]
        assert attribute(product, "block_size") == 64
    assert attribute(nodes(built("phi3-partial-16-of-32", precision="int8"))[QKV], "block_size") == 32  # rows of 96


def test_a_block_size_that_does_not_divide_is_said(checkpoints: Callable[[str], Path]) -> None:
    notes = plan_with_pass(checkpoints("llama-gqa"), precision="int4", int4_block_size=128).notes
    assert "rows of 64, 96 weights are filled up to whole blocks of 128" in notes
    assert not any("filled up" in note for note in plan_with_pass(checkpoints("llama-gqa"), precision="int4").notes)


def test_int4_is_symmetric(built: Callable[..., Path]) -> None:
    product = nodes(built(int4_is_symmetric=False))[QKV]
    assert product.inputs[3] is not None
    assert product.inputs[3].dtype == ir.DataType.UINT8


def test_int4_accuracy_level(built: Callable[..., Path]) -> None:
    assert attribute(nodes(built(int4_accuracy_level=1))[QKV], "accuracy_level") == 1


def test_int4_op_types_to_quantize(built: Callable[..., Path]) -> None:
    assert EMBEDDING not in bits(built(int4_op_types_to_quantize=["MatMul"]))
    assert bits(built(int4_op_types_to_quantize=["Gather"])) == {EMBEDDING: 4}
    both = built("llama-mha-tied", int4_op_types_to_quantize=["MatMul", "Gather"])
    assert bits(both)[EMBEDDING] == 4
    found = nodes(both)
    shared = [found[EMBEDDING].inputs[0], found[HEAD].inputs[1]]
    assert len({value.const_value.offset for value in shared if value is not None}) == 1


def test_int4_nodes_to_exclude(built: Callable[..., Path]) -> None:
    folder = built(int4_nodes_to_exclude=[HEAD, "/model/layers.1/mlp/down_proj/MatMul"])
    found = bits(folder)
    assert HEAD not in found
    assert "/model/layers.1/mlp/down_proj/MatMul" not in found
    assert found["/model/layers.0/mlp/down_proj/MatMul"] == 4
    assert np.isfinite(Stepper(folder)(np.array([[3, 4, 5]]))).all()


@pytest.mark.parametrize(
    ("algorithm", "raised"),
    [
        ("default", set()),
        ("rtn", set()),
        ("k_quant", set()),
        ("rtn_last", {HEAD}),
        ("k_quant_last", {HEAD}),
        ("k_quant_down", {HEAD}),
        ("k_quant_mixed", {HEAD}),
        ("hqq", set()),
    ],
)
def test_int4_algo_config(algorithm: str, raised: set[str], built: Callable[..., Path]) -> None:
    folder = built(int4_algo_config=algorithm, int4_op_types_to_quantize=["MatMul"])
    assert {name for name, each in bits(folder).items() if each == 8} == raised
    searched = ir.load(folder / "model.onnx").metadata_props["coldpress.algorithm"] != "rtn"
    assert searched == algorithm.startswith(("k_quant", "hqq"))


def test_k_quant_moves_the_scales(built: Callable[..., Path]) -> None:
    name = "model.layers.0.attn.qkv_proj.MatMul.weight_scales"
    found = []
    for algorithm in ("rtn", "k_quant"):
        folder = built(int4_algo_config=algorithm)
        tensor = ir.load(folder / "model.onnx").graph.initializers[name].const_value
        assert tensor is not None
        found.append(tensor.numpy().copy())
    assert np.mean(found[0] != found[1]) > 0.5


def test_hqq_has_float_zero_points_but_in_the_embedding(built: Callable[..., Path]) -> None:
    folder = built("llama-mha-tied", int4_algo_config="hqq", int4_op_types_to_quantize=["MatMul", "Gather"])
    found = nodes(folder)
    zeros = [found[name].inputs[3] for name in (QKV, HEAD, EMBEDDING)]
    assert [value.dtype.name for value in zeros if value is not None and value.dtype] == ["FLOAT", "FLOAT", "UINT8"]
    assert bits(folder)[EMBEDDING] == 4
    assert np.isfinite(Stepper(folder)(np.array([[3, 4, 5]]))).all()
    assert ir.load(folder / "model.onnx").metadata_props["coldpress.algorithm"] == "hqq"
    shared = nodes(built("llama-mha-tied", int4_algo_config="hqq", shared_embeddings=True))
    one = [shared[EMBEDDING].inputs[3], shared[HEAD].inputs[3]]
    assert [value.dtype.name for value in one if value is not None and value.dtype] == ["UINT8", "UINT8"]


def test_use_qdq(built: Callable[..., Path]) -> None:
    ids = np.array([[3, 4, 5, 6]])
    usual, standard = built(), built(use_qdq=True, int4_accuracy_level=4)
    kinds = {node.op_type for node in nodes(standard).values()}
    assert "MatMulNBits" not in kinds
    assert {"DequantizeLinear", "GatherBlockQuantized"} < kinds
    # Both compute with int8 activations once ONNX Runtime has loaded them.
    assert np.abs(Stepper(standard)(ids) - Stepper(usual)(ids)).max() < 1e-5
    fp32, exact = built(use_qdq=True, int4_accuracy_level=1), built(int4_accuracy_level=1)
    by_level = [OnnxRunner(folder, threads=1).logits(ids)[0] for folder in (standard, fp32, exact)]
    assert np.abs(by_level[1] - by_level[2]).max() < 1e-5
    assert np.abs(by_level[0] - by_level[2]).max() > 1e-4
    session = genai(standard)["model"]["decoder"]["session_options"]
    assert session["session.qdq_matmulnbits_accuracy_level"] == "4"
    assert "session.qdq_matmulnbits_accuracy_level" not in genai(usual)["model"]["decoder"]["session_options"]
    assert "int4" in {value.dtype.name.lower() for value in ir.load(standard / "model.onnx").graph.initializers.values()
                      if value.dtype}  # fmt: skip


def test_include_and_exclude(built: Callable[..., Path]) -> None:
    def ends(folder: Path) -> tuple[str, list[str]]:
        graph = ir.load(folder / "model.onnx").graph
        return graph.inputs[0].name or "", [
            value.name or "" for value in graph.outputs if "present" not in (value.name or "")
        ]

    folder = built(include_hidden_states=True)
    assert ends(folder) == ("input_ids", ["logits", "hidden_states"])
    assert genai(folder)["model"]["decoder"]["outputs"]["hidden_states"] == "hidden_states"
    folder = built(exclude_lm_head=True)
    assert ends(folder) == ("input_ids", ["hidden_states"])
    assert HEAD not in nodes(folder)
    assert "logits" not in genai(folder)["model"]["decoder"]["outputs"]
    folder = built(exclude_embeds=True)
    assert ends(folder) == ("inputs_embeds", ["logits"])
    assert EMBEDDING not in nodes(folder)
    assert genai(folder)["model"]["decoder"]["inputs"]["inputs_embeds"] == "inputs_embeds"
    for option in ("exclude_lm_head", "exclude_embeds"):
        config = ModelBuilderConfig(precision="int4", **{option: True})
        assert ModelBuilder().limits(config, Spec("checkpoint", {})) is None


def test_prune_lm_head_keeps_a_graph_with_all_logits(built: Callable[..., Path]) -> None:
    folder = built(prune_lm_head=True)
    ids = np.array([[3, 4, 5, 6]])
    last = Stepper(folder)(ids)
    metadata = ir.load(folder / "model.onnx").metadata_props
    (folder / "model.onnx").rename(folder / "pruned.onnx")
    (folder / metadata["coldpress.evaluation_graph"]).rename(folder / "model.onnx")
    every = Stepper(folder)(ids)
    assert last.shape[1] == 1
    assert every.shape[1] == 4
    assert np.abs(every[:, -1:] - last).max() < 1e-5
    assert len(list(folder.glob("*.data"))) == 1


def test_fuse_mlp_gate_up_and_disable_qkv_fusion(built: Callable[..., Path]) -> None:
    ids = np.array([[3, 4, 5, 6]])
    usual, fused, apart = built(), built(fuse_mlp_gate_up=True), built(disable_qkv_fusion=True)
    assert "/model/layers.0/mlp/gate_up_proj/MatMul" in bits(fused)
    assert {f"/model/layers.1/attn/{part}_proj/MatMul" for part in "qkv"} < set(bits(apart))
    reference = Stepper(usual)(ids)
    for folder in (fused, apart):
        assert np.abs(Stepper(folder)(ids) - reference).max() < 1e-5


def test_shared_embeddings(built: Callable[..., Path]) -> None:
    found = nodes(built("llama-mha-tied", shared_embeddings=True))
    assert attribute(found[EMBEDDING], "bits") == 4
    shared = [found[EMBEDDING].inputs[0], found[HEAD].inputs[1]]
    assert len({value.const_value.offset for value in shared if value is not None}) == 1


def test_profile(built: Callable[..., Path]) -> None:
    fast, accurate = built("phi4-mini", profile="fast"), built("phi4-mini", profile="accurate")
    found = nodes(fast)
    assert "/model/layers.0/mlp/gate_up_proj/MatMul" in found
    assert attribute(found[QKV], "block_size") == 32  # 96 columns have no whole blocks of 128
    assert attribute(found[EMBEDDING], "bits") == attribute(found[HEAD], "bits") == 4
    assert (fast / "model_all_logits.onnx").is_file()
    assert bits(accurate)[HEAD] == 8
    assert not (accurate / "model_all_logits.onnx").exists()
    plain = built("phi4-mini", profile="fast", fuse_mlp_gate_up=False, prune_lm_head=False, int4_block_size=64)
    assert "/model/layers.0/mlp/gate_up_proj/MatMul" not in nodes(plain)
    assert attribute(nodes(plain)[QKV], "block_size") == 64


def test_allow_spinning(built: Callable[..., Path]) -> None:
    def written(**options: Any) -> Any:
        session = genai(built(**options))["model"]["decoder"]["session_options"]
        return session.get("session.intra_op.allow_spinning")

    assert written() == written(allow_spinning=False) == "0"
    assert written(allow_spinning=True) is written(profile="fast") is None


def test_a_tied_head_that_differs_is_refused(tmp_path: Path, checkpoints: Callable[[str], Path]) -> None:
    import shutil

    source = tmp_path / "hf"
    shutil.copytree(checkpoints("llama-gqa"), source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight and model\.embed_tokens\.weight differ"):
        build_with_pass(source, tmp_path / "out", precision="int4")
    assert not (tmp_path / "out" / "model.onnx.data").exists()


def test_padding_left_has_no_genai_config(built: Callable[..., Path]) -> None:
    folder = built(padding="left")
    assert not (folder / "genai_config.json").exists()
    names = [value.name for value in ir.load(folder / "model.onnx").graph.inputs]
    assert names[:3] == ["input_ids", "attention_mask", "position_ids"]


def test_search(built: Callable[..., Path]) -> None:
    assert genai(built(search={"max_length": 77, "temperature": 0.5}))["search"]["max_length"] == 77


def test_extra_options_win(built: Callable[..., Path]) -> None:
    extra = {"int4_block_size": "64", "is_symmetric": "false", "nodes_to_exclude": f"{HEAD},{QKV}",
             "op_types_to_quantize": "MatMul/Gather"}  # fmt: skip
    folder = built(int4_block_size=16, extra_options=extra)
    found = nodes(folder)
    assert found[QKV].op_type == found[HEAD].op_type == "MatMul"
    up = found["/model/layers.0/mlp/up_proj/MatMul"]
    assert attribute(up, "block_size") == 64
    assert len(up.inputs) == 4
    assert bits(folder)[EMBEDDING] == 4


@pytest.mark.parametrize(
    ("extra", "option", "value"),
    [
        ({"fuse_qkv": "false"}, "disable_qkv_fusion", True),
        ({"fuse_qkv": True}, "disable_qkv_fusion", False),
        ({"matmul_mixed_precision": "last_matmul:int8"}, "int4_algo_config", "k_quant_last"),
        ({"matmul_mixed_precision": "last_matmul:int8", "algo_config": "default"}, "int4_algo_config", "rtn_last"),
        ({"matmul_mixed_precision": "last_matmul:int8,mixed_layers:int8"}, "int4_algo_config", "k_quant_mixed"),
        ({"int4_accuracy_level": "1"}, "int4_accuracy_level", 1),
        ({"prune_lm_head": "true"}, "prune_lm_head", True),
    ],
)
def test_extra_options_have_the_builders_names(extra: dict[str, Any], option: str, value: Any) -> None:
    config, _ = resolve(ModelBuilderConfig(precision="int4", extra_options=extra))
    assert getattr(config, option) == value


def test_every_extra_option_of_the_builder_is_known() -> None:
    """Those that onnxruntime-genai's builder documents: each has an option here, or a reason of its own."""
    source = Path(str(importlib.util.find_spec("onnxruntime_genai").submodule_search_locations[0]))  # type: ignore[union-attr, index]
    text = (source / "models" / "builder.py").read_text(encoding="utf-8")
    text = text[text.index("Key value pairs for various options") : text.index("--builder_config_version")]
    documented = set(re.findall(r"^ {16}([a-z][a-z0-9_]+) = ", text, re.MULTILINE))
    assert {"use_qdq", "moe_quant_type", "paged_block_size", "fuse_qkv"} < documented
    for name in sorted(documented):
        _, problems = translated({name: "x"}, None)
        assert not any(f"extra_options.{name} is not built" in problem for problem in problems), name
    assert "is not built; the nearest is use_qdq" in translated({"use_qqd": "1"}, None)[1][0]  # as an unknown one is


@pytest.mark.parametrize(
    ("options", "float_type"),
    [
        ({"precision": "fp16"}, "FLOAT16"),
        ({"precision": "bf16"}, "BFLOAT16"),
        ({"precision": "int4"}, "FLOAT16"),
        ({"precision": "int4", "use_cuda_bf16": True}, "BFLOAT16"),
        ({"precision": "int8"}, "FLOAT16"),
    ],
)
@pytest.mark.parametrize("name", ["llama-mha-tied", "phi3-longrope", "phi3-longrope-head-8"])
def test_cuda_graphs_are_sound_in_structure(
    name: str, options: dict[str, Any], float_type: str, built: Callable[..., Path]
) -> None:
    folder = built(name, CUDA, **options)
    assert {kind for kind in initializer_types(folder) if "FLOAT" in kind} == {float_type}
    model = onnx.load(folder / "model.onnx")
    for node in model.graph.node:
        # ONNX Runtime keeps this one of its own operators in the standard domain, where the checker does not know it.
        if node.op_type == "SimplifiedLayerNormalization":
            node.domain = "com.microsoft"
    onnx.checker.check_model(model, full_check=True)
    kinds = {value.type.tensor_type.elem_type for value in (*model.graph.output, *model.graph.input[2:])}
    assert kinds == {getattr(onnx.TensorProto, float_type)}
    options_written = genai(folder)["model"]["decoder"]["session_options"]
    assert options_written["provider_options"] == [{"cuda": {"enable_cuda_graph": "0"}}]
    assert "intra_op_num_threads" not in options_written
    attention = next(node for node in model.graph.node if node.op_type == "GroupQueryAttention")
    assert len(attention.input) <= 9  # positions are given by an If over the tables, not to the kernel


def test_enable_cuda_graph(built: Callable[..., Path]) -> None:
    session = genai(built(accelerator=CUDA, precision="fp16", enable_cuda_graph=True))["model"]["decoder"][
        "session_options"
    ]
    assert session["provider_options"] == [{"cuda": {"enable_cuda_graph": "1"}}]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"precision": "bf16"}, "bf16 does not run on the CPU"),
    ({"precision": "fp16"}, "fp16 is not for the CPU"),
    ({"metadata_only": True}, "metadata_only takes an ONNX model"),
    ({"extra_options": {"config_only": True}}, "metadata_only takes an ONNX model"),
    ({"precision": "fp32", "use_qdq": True}, "use_qdq has no effect at precision fp32"),
    ({"use_qdq": True, "int4_algo_config": "hqq"}, "DequantizeLinear does not take; the nearest is k_quant"),
    ({"int4_algo_config": "hqq", "int4_is_symmetric": True}, "hqq fits zero points"),
    ({"int4_algo_config": "hqq", "precision": "int8"}, "hqq is for int4"),
    ({"use_8bits_moe": True}, "mixtures of experts"),
    ({"use_webgpu_fp32": True}, "use_webgpu_fp32 wants WebGpuExecutionProvider"),
    ({"use_cuda_bf16": True}, "wants CUDAExecutionProvider"),
    ({"enable_cuda_graph": True}, "wants CUDAExecutionProvider"),
    ({"precision": "fp32", "int4_block_size": 32}, "int4_block_size has no effect at precision fp32"),
    ({"int4_algo_config": "k_quant_linear"}, "nearest is k_quant_mixed"),
    ({"int4_op_types_to_quantize": ["Conv"]}, "knows MatMul and Gather, got Conv"),
    ({"int4_nodes_to_exclude": ["/lm_head/Matmul2"]}, "the nearest is /lm_head/MatMul"),
    ({"int4_op_types_to_quantize": ["Gather"], "exclude_embeds": True}, "nothing to quantize"),
    ({"extra_options": {"fuse_qkv": "no"}}, "must be true or false"),
    ({"precision": "int8", "profile": "accurate"}, "no effect at precision int8"),
    ({"int4_algo_config": "k_quant_last", "int4_op_types_to_quantize": ["Gather"]}, "nothing to quantize that it"),
    ({"extra_options": {"disable_qk_fusion": True}}, "the nearest is disable_qkv_fusion"),
    ({"prune_lm_head": True, "exclude_lm_head": True}, "nothing to prune"),
    ({"shared_embeddings": True}, "different matrices"),
    ({"precision": "fp32", "shared_embeddings": True}, "no effect at precision fp32"),
    ({"padding": "left", "prune_lm_head": True}, "leave it out"),
    ({"padding": "left", "search": {"max_length": 9}}, "genai_config.json"),
    ({"extra_options": {"int4_blocksize": 32}}, "the nearest is int4_block_size"),
    ({"extra_options": {"use_paged_attention": "true"}}, "PagedAttention is for onnxruntime-genai's CUDA engine"),
    ({"extra_options": {"matmul_mixed_precision": "linear_attn:int8"}}, "matmul_mixed_precision linear_attn:int8 is"),
    ({"extra_options": {"moe_quant_type": "mxfp4"}}, "moe_quant_type mxfp4 is not built; the nearest is int4"),
    ({"extra_options": {"adapter_path": "x"}}, "set adapter_path of the input model"),
    ({"extra_options": {"block_size": 48}}, "block_size"),
    ({"adapter": "inputs"}, "adapter: inputs needs a model with an adapter, or adapter_modules"),
    (
        {"adapter": "inputs", "adapter_modules": ["q_proj", "embed_tokens", "qkv_proj"]},
        "reach embed_tokens, qkv_proj; adap",
    ),
    ({"adapter_modules": ["q_proj"]}, "adapter_modules is for adapter: inputs"),
    ({"prompt_graph": "int8", "precision": "fp32"}, "prompt_graph has no effect at precision fp32"),
    ({"prompt_graph": "int8", "padding": "left"}, "prompt_graph is for onnxruntime-genai"),
    ({"prompt_graph": "int8", "adapter": "inputs", "adapter_modules": ["q_proj"]}, "prompt_graph is not built"),
    ({"prompt_graph": "int8", "exclude_embeds": True}, "leave exclude_embeds out"),
    ({"prompt_graph": "int8", "int4_op_types_to_quantize": ["Gather"]}, "prompt_graph: the options leave no product"),
]


@pytest.mark.parametrize(("options", "words"), REFUSED)
def test_what_is_not_built_is_refused(options: dict[str, Any], words: str, checkpoints: Callable[[str], Path]) -> None:
    with pytest.raises(PlanError, match=words):
        plan_with_pass(checkpoints("llama-gqa"), **{"precision": "int4", **options})


def test_all_reasons_are_given_at_once(checkpoints: Callable[[str], Path]) -> None:
    with pytest.raises(PlanError) as caught:
        plan_with_pass(checkpoints("llama-gqa"), precision="bf16", enable_cuda_graph=True, int4_block_size=32)
    assert all(word in str(caught.value) for word in ("bf16", "enable_cuda_graph", "int4_block_size"))


def test_every_option_is_honoured_or_refused_somewhere() -> None:
    tested = Path(__file__).read_text(encoding="utf-8")
    assert [name for name in ModelBuilderConfig.model_fields if name not in tested] == []


def test_plan_knows_what_it_cannot_take(checkpoints: Callable[[str], Path]) -> None:
    config = ModelBuilderConfig(precision="int4")
    env = PlanContext(detect(), CPU, {}, {})
    spec = Artifact.load(checkpoints("llama-gqa")).describe()

    def plan(**change: Any) -> Any:
        from dataclasses import replace

        return ModelBuilder().plan(config, replace(spec, **change), env)

    with pytest.raises(PlanError, match="kind onnx"):
        plan(kind="onnx")
    adapter = AdapterSpec(8, 16.0, ("q_proj",))
    merged = plan(adapter=adapter)
    assert merged.spec.adapter is None
    assert "the adapter is merged while the weights are streamed, in float32" in merged.notes
    with pytest.raises(UnsupportedModelError, match="'gpt9'"):
        plan(config={**spec.config, "model_type": "gpt9"})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing"):
        plan(tensors=tuple(tensor for tensor in spec.tensors if tensor.name != "lm_head.weight"))
    with pytest.raises(CheckpointError, match="has shape"):
        plan(config={**spec.config, "intermediate_size": 128})
    with pytest.raises(CheckpointError, match="has no place"):
        plan(config={**spec.config, "num_hidden_layers": 1})


def test_what_older_checkpoints_carry_besides_is_passed_over(checkpoints: Callable[[str], Path]) -> None:
    from dataclasses import replace

    env, config = PlanContext(detect(), CPU, {}, {}), ModelBuilderConfig(precision="int4")
    spec = Artifact.load(checkpoints("gpt-neox")).describe()

    def plan(name: str) -> Any:
        extra = TensorInfo.of(name, "bool", (1, 1, 128, 128))
        return ModelBuilder().plan(config, replace(spec, tensors=(*spec.tensors, extra)), env)

    plan("gpt_neox.layers.0.attention.bias")
    plan("gpt_neox.layers.0.attention.rotary_emb.inv_freq")
    with pytest.raises(CheckpointError, match="has no place"):
        plan("gpt_neox.layers.0.attention.other")


def test_plan_is_light(checkpoints: Callable[[str], Path]) -> None:
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from coldpress.artifacts.base import Artifact\n"
        "from coldpress.config.schema import Accelerator\n"
        "from coldpress.hardware import detect\n"
        "from coldpress.passes.base import PlanContext\n"
        "from coldpress.passes.model_builder import ModelBuilder, ModelBuilderConfig\n"
        f"spec = Artifact.load(Path({str(checkpoints('llama-gqa'))!r})).describe()\n"
        "env = PlanContext(detect(), Accelerator(), {}, {})\n"
        "ModelBuilder().plan(ModelBuilderConfig(precision='int4'), spec, env)\n"
        "bad = {'torch', 'onnx_ir', 'numba', 'numpy'} & set(sys.modules)\n"
        "assert not bad, bad\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_run_never_imports_torch(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from coldpress.artifacts.base import Artifact\n"
        "from coldpress.config.schema import Accelerator\n"
        "from coldpress.hardware import detect\n"
        "from coldpress.passes.base import Context\n"
        "from coldpress.passes.model_builder import ModelBuilder, ModelBuilderConfig\n"
        f"source, output = Path({str(checkpoints('phi3-longrope'))!r}), Path({str(tmp_path)!r})\n"
        "context = Context('b', output, output, detect(), Accelerator(), {}, lambda event: None)\n"
        "ModelBuilder().run(ModelBuilderConfig(precision='int4'), Artifact.load(source), context)\n"
        "bad = {'torch', 'transformers', 'onnxruntime'} & set(sys.modules)\n"
        "assert not bad, bad\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_missing_tokenizer_is_said(tmp_path: Path) -> None:
    tiny_model("llama-gqa", tmp_path / "hf")
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        build_with_pass(tmp_path / "hf", tmp_path / "out", precision="int4")
