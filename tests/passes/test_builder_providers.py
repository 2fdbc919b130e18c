"""Graphs for providers that cannot be run here, held to what their kernels take.

The table of operators is `builder_providers.FLOAT_OPERATORS`; its sources stand at the head of that module. Operators
on whole numbers only may run on the CPU under any provider, so those that touch floats are what must be there.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest

from coldpress.config.schema import Accelerator
from coldpress.errors import PlanError
from coldpress.graph.form import EMBEDDING, HEAD
from coldpress.passes.builder_providers import FLOAT_OPERATORS, PROVIDERS
from oracles.decoders import Stepper, tiny_model
from oracles.passes import CPU, TOKENIZER, build_with_pass, plan_with_pass

FLOATS = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}


def accelerator(name: str) -> Accelerator:
    return Accelerator(device="gpu", execution_providers=(f"{name}ExecutionProvider",))


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
    def make(name: str, provider: str, **options: Any) -> Path:
        output = tmp_path / str(len(list(tmp_path.iterdir())))
        target = CPU if provider == "CPU" else accelerator(provider)
        build_with_pass(checkpoints(name), output, target, **{"precision": "int4", **options})
        return output

    return make


def checked(folder: Path) -> onnx.ModelProto:
    """The graph with every tensor's type, checked; ONNX keeps one of ONNX Runtime's operators in its own domain."""
    model = onnx.load(folder / "model.onnx")
    for node in model.graph.node:
        if node.op_type == "SimplifiedLayerNormalization":
            node.domain = "com.microsoft"
    onnx.checker.check_model(model, full_check=True)
    return model


def float_nodes(folder: Path) -> list[ir.Node]:
    """Nodes that read or write floats. A type that inference does not know comes from our own inputs."""
    known: dict[str, bool] = {}
    model = ir.load(folder / "model.onnx")
    graph = model.graph
    for value in (*graph.inputs, *graph.initializers.values()):
        known[value.name or ""] = value.dtype is not None and value.dtype.name in ("FLOAT", "FLOAT16", "BFLOAT16")
    whole = {"Shape", "Greater"}  # their outputs are whole numbers whatever goes in
    found = []
    for node in graph:
        inputs = any(known.get(value.name or "", False) for value in node.inputs if value is not None)
        if node.op_type == "Cast":
            outputs = node.attributes["to"].as_int() in FLOATS
        elif node.op_type == "If":
            outputs = True
        else:
            outputs = inputs and node.op_type not in whole
        if (inputs and node.op_type not in whole) or outputs:
            found.append(node)
        for value in node.outputs:
            known[value.name or ""] = outputs
    return found


def against(folder: Path, key: str) -> list[str]:
    """What of a graph the provider's kernels do not take."""
    found = []
    for node in float_nodes(folder):
        if node.op_type not in FLOAT_OPERATORS[key]:
            found.append(f"{node.name}: no {node.op_type}")
        attributes, inputs = node.attributes, list(node.inputs)
        if node.op_type == "GroupQueryAttention":
            if key == "dml" and (attributes["do_rotary"].as_int() or any(value is None for value in inputs[:3])):
                found.append(f"{node.name}: rotary or packed inputs")
            if key in ("cuda", "webgpu") and any(value is not None for value in inputs[9:11]):
                found.append(f"{node.name}: positions or a bias, which the kernel does not read")
            if key in ("dml", "webgpu") and attributes["softcap"].as_float() != 0.0:
                found.append(f"{node.name}: a cap")
        if node.op_type == "MatMulNBits":
            if key == "dml" and len(inputs) != 4:
                found.append(f"{node.name}: {len(inputs)} inputs")
            packed = [value for value in inputs[1:2] + inputs[3:4] if value is not None]
            if any(value.dtype != ir.DataType.UINT8 for value in packed):
                found.append(f"{node.name}: codes or zero points that are not uint8")
    return found


NAMES = [
    "llama-mha-tied", "llama-head-24", "phi3-longrope", "phi3-longrope-head-8", "phi3-partial-24-of-32", "qwen2",
    "qwen3", "gemma", "gemma3", "smollm3", "olmo2", "granite", "starcoder2", "stablelm", "phi-2", "gpt-neox",
]  # fmt: skip
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("CUDA", {}),
    ("CUDA", {"precision": "bf16"}),
    ("CUDA", {"int4_op_types_to_quantize": ["MatMul", "Gather"], "prune_lm_head": True}),
    ("CUDA", {"use_qdq": True}),
    ("Dml", {}),
    ("Dml", {"use_qdq": True}),
    ("Dml", {"precision": "fp16", "prune_lm_head": True}),
    ("Dml", {"int4_algo_config": "k_quant_mixed"}),
    ("WebGpu", {}),
    ("WebGpu", {"precision": "fp16", "prune_lm_head": True}),
    ("WebGpu", {"use_webgpu_fp32": True, "int4_op_types_to_quantize": ["MatMul", "Gather"]}),
]


@pytest.mark.parametrize(("provider", "options"), OPTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_kernels_take_every_node(name: str, provider: str, options: dict[str, Any], built: Callable[..., Path]) -> None:
    folder = built(name, provider, **options)
    key = PROVIDERS[f"{provider}ExecutionProvider"].key
    assert against(folder, key) == []
    model = checked(folder)
    wanted = (
        "float" if options.get("use_webgpu_fp32") else "bfloat16" if options.get("precision") == "bf16" else "float16"
    )
    kinds = {value.type.tensor_type.elem_type for value in model.graph.output}
    assert kinds == {getattr(onnx.TensorProto, wanted.upper())}
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata["coldpress.execution_provider"] == key
    assert metadata["coldpress.checked"] == "in structure; graphs for this provider were not run"


@pytest.mark.parametrize(("name", "provider"), [("mixtral", "CUDA"), ("mixtral", "WebGpu"), ("gpt-oss", "CUDA")])
def test_kernels_take_experts(name: str, provider: str, built: Callable[..., Path]) -> None:
    folder = built(name, provider, int4_block_size=16 if provider == "WebGpu" else 32)
    assert against(folder, PROVIDERS[f"{provider}ExecutionProvider"].key) == []
    assert "QMoE" in {node.op_type for node in float_nodes(folder)}


def test_gemma2_runs_on_cuda_only_of_the_gpus(built: Callable[..., Path], checkpoints: Callable[[str], Path]) -> None:
    folder = built("gemma2", "CUDA")
    assert against(folder, "cuda") == []
    checked(folder)
    for provider, full_name in (("Dml", "DirectML"), ("WebGpu", "WebGPU")):
        with pytest.raises(PlanError, match=f"caps its attention scores at 50, which {full_name}'s"):
            plan_with_pass(checkpoints("gemma2"), accelerator(provider), precision="int4")


def test_a_graph_for_another_provider_is_seen_to_be_wrong(built: Callable[..., Path]) -> None:
    """The twin of the check above: each rule must find what it is for."""
    cpu = built("llama-mha-tied", "CPU")
    assert any("no GatherBlockQuantized" in line for line in against(cpu, "dml"))
    assert any("rotary or packed" in line for line in against(cpu, "dml"))
    assert any("3 inputs" in line for line in against(cpu, "dml"))
    assert any("a cap" in line for line in against(built("gemma2", "CPU"), "webgpu"))
    assert any("positions" in line for line in against(built("phi3-longrope", "CPU"), "cuda"))
    assert any(
        "no FusedMatMul" in line for line in against(built("llama-mha-tied", "CUDA", precision="fp16"), "webgpu")
    )
    assert any("not uint8" in line for line in against(built("llama-mha-tied", "CPU", int4_algo_config="hqq"), "dml"))


@pytest.mark.parametrize("name", ["llama-gqa", "phi3-longrope", "smollm3", "qwen3", "llama-mha-tied"])
def test_the_form_for_directml_is_the_same_model(name: str, built: Callable[..., Path]) -> None:
    """In fp32 the CPU runs it too: rotary nodes and positions as an input change nothing."""
    import numpy as np
    import onnxruntime

    usual, other = built(name, "CPU", precision="fp32"), built(name, "Dml", precision="fp32")
    ids = (
        np.random.default_rng(0).integers(3, 80, (1, 40)).astype(np.int64)
    )  # longer than phi3-longrope's short context
    session = onnxruntime.InferenceSession(other / "model.onnx", providers=["CPUExecutionProvider"])
    feeds: dict[str, Any] = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(40)[None]}
    for one in session.get_inputs():
        if one.name.startswith("past"):
            feeds[one.name] = np.zeros((1, one.shape[1], 0, one.shape[3]), np.float32)
    assert np.abs(session.run(["logits"], feeds)[0] - Stepper(usual)(ids)).max() < 1e-4
    genai = json.loads((other / "genai_config.json").read_text())["model"]["decoder"]
    assert genai["inputs"]["position_ids"] == "position_ids"


@pytest.mark.parametrize(
    ("provider", "options"),
    [
        ("CUDA", {"cuda": {"enable_cuda_graph": "0"}}),
        ("Dml", {"dml": {"enable_graph_capture": "0"}}),
        ("WebGpu", {"webgpu": {"enableGraphCapture": "0", "validationMode": "basic"}}),
    ],
)
def test_genai_config_names_the_provider(provider: str, options: dict[str, Any], built: Callable[..., Path]) -> None:
    folder = built("llama-gqa", provider)
    session = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]["session_options"]
    assert session["provider_options"] == [options]
    assert "intra_op_num_threads" not in session


def test_directml_context_ends_with_the_window(built: Callable[..., Path], checkpoints: Callable[[str], Path]) -> None:
    planned = plan_with_pass(checkpoints("phi3-window"), accelerator("Dml"), precision="int4")
    assert any(note.startswith("context of 9 tokens, the sliding window") for note in planned.notes)
    genai = json.loads((built("phi3-window", "Dml") / "genai_config.json").read_text())
    assert genai["model"]["context_length"] == 9
    assert json.loads((built("phi3-window", "WebGpu") / "genai_config.json").read_text())["model"][
        "context_length"
    ] == 128  # fmt: skip


def test_webgpu_keeps_a_head_of_floats_of_its_own(built: Callable[..., Path]) -> None:
    nodes = {
        node.name: node for node in ir.load(built("llama-mha-tied", "WebGpu", precision="fp16") / "model.onnx").graph
    }
    assert nodes[HEAD].op_type == "MatMul"
    assert nodes[EMBEDDING].op_type == "Gather"


def test_plan_says_that_it_was_not_run(checkpoints: Callable[[str], Path]) -> None:
    for provider, name in (("CUDA", "CUDA"), ("Dml", "DirectML"), ("WebGpu", "WebGPU")):
        notes = plan_with_pass(checkpoints("llama-gqa"), accelerator(provider), precision="int4").notes
        assert f"built for {name}: such graphs are tested in structure, and were not run" in notes


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("CUDA", {"precision": "fp32"}, "does not compute in float32: use fp16 or bf16"),
    ("Dml", {"precision": "bf16"}, "does not compute in bfloat16: use fp32 or fp16"),
    ("WebGpu", {"precision": "bf16"}, "WebGPU's GroupQueryAttention does not compute in bfloat16"),
    ("Dml", {"int4_is_symmetric": True}, "wants zero points: leave int4_is_symmetric out"),
    ("Dml", {"int4_op_types_to_quantize": ["Gather", "MatMul"]}, "DirectML has no GatherBlockQuantized"),
    ("Dml", {"int4_algo_config": "hqq"}, "DirectML's MatMulNBits does not take; the nearest is k_quant"),
    ("WebGpu", {"int4_algo_config": "hqq"}, "WebGPU's MatMulNBits does not take"),
    ("WebGpu", {"use_qdq": True}, "WebGPU does not dequantize blocks of 4 bits to float16"),
    ("CUDA", {"use_qdq": True, "use_cuda_bf16": True}, "CUDA does not dequantize blocks of 4 bits to bfloat16"),
    (
        "WebGpu",
        {"int4_op_types_to_quantize": ["Gather"], "int4_is_symmetric": False, "int4_block_size": 64},
        "an odd count of blocks, here of 64 in 64",
    ),
    ("WebGpu", {"use_cuda_bf16": True}, "use_cuda_bf16 wants CUDAExecutionProvider"),
    ("Dml", {"enable_cuda_graph": True}, "enable_cuda_graph wants CUDAExecutionProvider"),
    ("CUDA", {"use_webgpu_fp32": True}, "use_webgpu_fp32 wants WebGpuExecutionProvider"),
    ("WebGpu", {"precision": "fp32", "use_webgpu_fp32": True}, "say precision: fp32"),
    ("Dml", {"padding": "left"}, "padding: left is built for the CPU only"),
    ("Dml", {"profile": "fast"}, "profile fast is measured on the CPU only"),
    ("Js", {}, "the nearest is WebGpuExecutionProvider"),
    ("NvTensorRTRTX", {}, "NvTensorRTRTXExecutionProvider is not built; the nearest is CUDAExecutionProvider"),
    ("QNN", {}, "the nearest is CPUExecutionProvider with use_qdq"),
    ("Quux", {}, "QuuxExecutionProvider is not built; the nearest is"),
]


@pytest.mark.parametrize(("provider", "options", "words"), REFUSED)
def test_what_a_provider_lacks_is_refused(
    provider: str, options: dict[str, Any], words: str, checkpoints: Callable[[str], Path]
) -> None:
    with pytest.raises(PlanError, match=words):
        plan_with_pass(checkpoints("llama-gqa"), accelerator(provider), **{"precision": "int4", **options})


def test_cuda_wants_head_sizes_of_8(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    config = json.loads((checkpoints("llama-gqa") / "config.json").read_text())
    from coldpress.passes.builder_choice import choose
    from coldpress.passes.builder_config import ModelBuilderConfig

    with pytest.raises(PlanError, match="multiples of 8, this model has 12"):
        choose(ModelBuilderConfig(precision="int4"), {**config, "head_dim": 12}, "CUDAExecutionProvider")
