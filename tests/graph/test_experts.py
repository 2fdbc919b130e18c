"""Experts code by code, what one wrong number does, MXFP4 checkpoints, and ModelBuilder's options for experts.

That the graphs compute what Transformers does is held by test_parity.py and test_quantized_parity.py.
"""

from __future__ import annotations

import json
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file

from coldpress.artifacts.arch_config import arch_from_config
from coldpress.artifacts.quantized import open_checkpoint
from coldpress.artifacts.tensors import TensorSet
from coldpress.errors import CheckpointError, PlanError, UnsupportedModelError
from coldpress.graph.experts import NamedExperts, QuantizedExperts, TurnedExperts
from coldpress.graph.form import Quantization, expert_nodes
from coldpress.graph.weights import DataFile, QuantizedMatrix
from coldpress.kernels.mxfp4 import E2M1, dequantize_mxfp4
from coldpress.kernels.quantize import quantize
from coldpress.passes.builder_choice import choose
from coldpress.passes.builder_config import ModelBuilderConfig
from oracles.decoders import TINY, Stepper, steps_of_transformers, tiny_model
from oracles.experts import e2m1, store_mxfp4
from oracles.passes import CUDA, TOKENIZER, build_with_pass, plan_with_pass
from oracles.stored import CASES, quantize_folder

TOLERANCE = 1e-3


def config(name: str, **changes: Any) -> dict[str, Any]:
    return {**TINY[name], **changes}


def initializer(folder: Path, name: str) -> np.ndarray:
    value = ir.load(folder / "model.onnx").graph.initializers[name].const_value
    assert value is not None
    return value.numpy()


def error(folder: Path, model: Any) -> float:
    ids = np.random.default_rng(0).integers(3, 80, (1, 24)).astype(np.int64)
    step = Stepper(folder)
    found = [step(ids[:, :16])] + [step(ids[:, i : i + 1]) for i in range(16, 24)]
    return float(np.abs(np.concatenate(found, axis=1) - steps_of_transformers(model, ids, 16)).max())


def experts_of(model: Any, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """gate_up [E, 2I, H] with gate and up rows in turn, and down [E, H, I], as the node reads them."""
    experts = model.model.layers[layer].mlp.experts
    gate_up, down = (each.detach().numpy() for each in (experts.gate_up_proj, experts.down_proj))
    if model.config.model_type == "gpt_oss":
        return gate_up.transpose(0, 2, 1), down.transpose(0, 2, 1)
    turns = [row for i in range(gate_up.shape[1] // 2) for row in (i, i + gate_up.shape[1] // 2)]
    return gate_up[:, turns], down


@pytest.mark.parametrize(("name", "layer"), [("qwen3-moe", 1), ("mixtral-window", 0), ("gpt-oss", 2)])
@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, False)])
def test_every_code_is_the_kernels(
    name: str, layer: int, bits: int, symmetric: bool, tmp_path: Path, build: Callable[..., Path]
) -> None:
    model = tiny_model(name, tmp_path / "hf")
    folder = build(tmp_path / "hf", bits, quantization=Quantization(block_size=16, symmetric=symmetric))
    for part, weights in zip(("gate_up", "down"), experts_of(model, layer), strict=True):
        base = f"model.layers.{layer}.moe.experts.{part}_proj.weight"
        found = [initializer(folder, f"{base}_{kind}") for kind in (f"Q{bits}", "scales")]
        k = weights.shape[2]
        assert found[0].shape == (4, weights.shape[1], k * bits // 8)  # the last block is not filled up
        for expert in range(4):
            want = quantize(np.ascontiguousarray(weights[expert]), bits=bits, block_size=16, symmetric=symmetric)
            rows = want.codes.reshape(len(want.codes), -1)
            assert np.array_equal(found[0][expert], rows[:, : k * bits // 8])
            assert np.array_equal(found[1][expert], want.scales)
            if want.zeros is not None:
                assert np.array_equal(initializer(folder, f"{base}_zero_points")[expert], want.zeros)


def test_rows_of_experts_may_be_cut_anywhere(tmp_path: Path) -> None:
    model = tiny_model("qwen3-moe", tmp_path / "named")
    turned = tiny_model("gpt-oss", tmp_path / "one")
    prefix = "model.layers.1.mlp.experts."
    with TensorSet.open(tmp_path / "named") as named, TensorSet.open(tmp_path / "one") as one:
        for source, whole in (
            (NamedExperts(named, tuple(f"{prefix}{{}}.{part}_proj.weight" for part in ("gate", "up")), 4, 48, 64),
             experts_of(model, 1)[0]),
            (NamedExperts(named, (f"{prefix}{{}}.down_proj.weight",), 4, 64, 48), experts_of(model, 1)[1]),
            (TurnedExperts(one, f"{prefix}gate_up_proj", 4, 192, 64), experts_of(turned, 1)[0]),
        ):  # fmt: skip
            flat = whole.reshape(-1, whole.shape[2])
            assert source.n == len(flat)
            for start, stop in ((0, source.n), (1, 2), (95, 98), (90, 300 - source.k), (source.n - 1, source.n)):
                assert np.array_equal(source.rows(start, stop), flat[start:stop])


def test_memory_is_bounded_by_the_budget(tmp_path: Path) -> None:
    weights = {f"m.{i}.{part}": torch.randn(512, 1024) for i in range(16) for part in ("gate", "up")}
    save_file(weights, tmp_path / "model.safetensors")
    budget = 8 << 20
    with TensorSet.open(tmp_path) as tensors:
        rows = NamedExperts(tensors, ("m.{}.gate", "m.{}.up"), 16, 512, 1024)
        experts = QuantizedExperts(QuantizedMatrix("q", rows, 4, 32, True, 1, ir.DataType.FLOAT))
        experts.make(0, 1)  # compile first
        data = DataFile()
        data.add(experts)
        tracemalloc.start()
        try:
            data.write(tmp_path, threads=2, budget_bytes=budget)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < budget  # the experts are 64 MB


def corrupt(folder: Path, name: str, place: int, change: Callable[[bytes], bytes]) -> None:
    tensor = ir.load(folder / "model.onnx").graph.initializers[name].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    with (folder / "model.onnx.data").open("r+b") as file:
        file.seek((tensor.offset or 0) + place)
        old = file.read(4)
        file.seek(-4, 1)
        file.write(change(old))


def plus(value: float) -> Callable[[bytes], bytes]:
    return lambda old: struct.pack("<f", struct.unpack("<f", old)[0] + value)


@pytest.mark.parametrize(
    ("name", "tensor", "place"),
    [
        ("qwen3-moe", "model.layers.1.moe.experts.gate_up_proj.weight", 4 * (2 * 96 * 64 + 5)),  # of expert 2
        ("mixtral", "model.layers.0.moe.experts.down_proj.weight", 4 * 17),
        ("mixtral", "model.layers.0.moe.router.MatMul.weight", 4 * 6),
        ("gpt-oss", "model.layers.1.moe.experts.down_proj.bias", 4 * 64),
        ("gpt-oss", "model.layers.1.moe.router.Add.bias", 4),
        ("gpt-oss", "model.layers.0.self_attn.sinks", 4),
    ],
)
def test_one_wrong_number_is_found(
    name: str, tensor: str, place: int, tmp_path: Path, build: Callable[..., Path]
) -> None:
    model = tiny_model(name, tmp_path / "hf")
    folder = build(tmp_path / "hf")
    assert error(folder, model) < TOLERANCE
    corrupt(folder, tensor, place, plus(1.0))
    assert error(folder, model) > TOLERANCE


@pytest.mark.parametrize("part", ["scales", "Q4"])
def test_one_wrong_scale_or_code_is_found(part: str, tmp_path: Path, build: Callable[..., Path]) -> None:
    tiny_model("mixtral", tmp_path / "hf")
    q = Quantization(accuracy_level=1)
    whole, folder = build(tmp_path / "hf", 4, quantization=q), build(tmp_path / "hf", 4, quantization=q)
    ids = np.random.default_rng(0).integers(3, 80, (1, 24)).astype(np.int64)
    assert np.array_equal(Stepper(whole)(ids), Stepper(folder)(ids))
    change = plus(0.1) if part == "scales" else lambda old: bytes([old[0] ^ 0x70, *old[1:]])
    corrupt(folder, f"model.layers.1.moe.experts.gate_up_proj.weight_{part}", 64, change)
    assert np.abs(Stepper(whole)(ids) - Stepper(folder)(ids)).max() > TOLERANCE


@pytest.mark.parametrize("bits", [4, 8])
def test_int8_activations_come_close(bits: int, tmp_path: Path, build: Callable[..., Path]) -> None:
    # Whole blocks: at 8 bits the kernel then rounds activations to int8 whatever the accuracy level.
    tiny_model("mixtral", tmp_path / "hf")
    exact = build(tmp_path / "hf", bits, quantization=Quantization(block_size=128, accuracy_level=1))
    ids = np.random.default_rng(0).integers(3, 80, (1, 24)).astype(np.int64)
    fine = build(tmp_path / "hf", 8, quantization=Quantization(block_size=16, accuracy_level=4))
    if bits == 8:
        assert np.corrcoef(Stepper(fine)(ids).ravel(), Stepper(exact)(ids).ravel())[0, 1] > 0.995
    else:
        rough = build(tmp_path / "hf", 4, quantization=Quantization(block_size=16, accuracy_level=4))
        same = build(tmp_path / "hf", 4, quantization=Quantization(block_size=16, accuracy_level=1))
        assert np.corrcoef(Stepper(rough)(ids).ravel(), Stepper(same)(ids).ravel())[0, 1] > 0.995


# MXFP4


def test_e2m1_and_its_powers() -> None:
    assert [e2m1(code) for code in range(16)] == list(E2M1)
    rng = np.random.default_rng(0)
    codes, scales = rng.integers(0, 256, (3, 4, 16)).astype(np.uint8), rng.integers(0, 255, (3, 4)).astype(np.uint8)
    found = dequantize_mxfp4(codes, scales)
    for row, column in np.ndindex(3, 128):
        block, place = divmod(column, 32)
        code = int(codes[row, block, place // 2]) >> 4 * (place % 2) & 15
        assert found[row, column] == np.float32(e2m1(code) * 2.0 ** (int(scales[row, block]) - 127))
    scales[1, 2] = 255
    assert np.isnan(dequantize_mxfp4(codes, scales)[1, 64:96]).any()


def test_mxfp4_experts_read_as_transformers_makes_them(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    tiny_model("gpt-oss", tmp_path)
    model = store_mxfp4(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    name = "model.layers.2.mlp.experts.down_proj"
    theirs = convert_moe_packed_tensors(stored[f"{name}_blocks"], stored[f"{name}_scales"], dtype=torch.float32)
    with open_checkpoint(tmp_path, json.loads((tmp_path / "config.json").read_text())) as tensors:
        found = tensors.read(name)
        assert np.array_equal(found, theirs.numpy())
        assert np.array_equal(found, model.model.layers[2].mlp.experts.down_proj.detach().numpy())
        assert np.array_equal(tensors.read(name, 1, 3), found[1:3])
        arch = arch_from_config(json.loads((tmp_path / "config.json").read_text()))
        assert dict(arch.expected()) == {info.name: info.shape for info in tensors.infos()}


def test_a_graph_from_mxfp4_experts(tmp_path: Path) -> None:
    tiny_model("gpt-oss", tmp_path / "hf")
    model = store_mxfp4(tmp_path / "hf")
    model.save_pretrained(tmp_path / "plain")
    for source in ("hf", "plain"):
        (tmp_path / source / "tokenizer.json").write_text("{}")
    build_with_pass(tmp_path / "hf", tmp_path / "fp32", precision="fp32")
    assert error(tmp_path / "fp32", model) < TOLERANCE
    for source in ("hf", "plain"):
        build_with_pass(tmp_path / source, tmp_path / f"{source}-int4", precision="int4")
    stored, plain = ((tmp_path / f"{source}-int4" / "model.onnx.data").read_bytes() for source in ("hf", "plain"))
    assert stored == plain
    notes = plan_with_pass(tmp_path / "hf", precision="int4").notes
    assert any("6 matrices, as mxfp4 values are no integer codes" in note for note in notes)


@pytest.mark.parametrize("case", ["gptq-4-order", "packed-4-asymmetric"])
def test_experts_stored_as_integer_codes_are_quantized_again(case: str, tmp_path: Path) -> None:
    model = tiny_model("qwen3-moe", tmp_path / "plain")
    values = quantize_folder(tmp_path / "plain", tmp_path / "hf", CASES[case])
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    tensors |= {name: torch.tensor(value, dtype=torch.float32) for name, value in values.items()}
    save_file(tensors, tmp_path / "plain" / "model.safetensors", {"format": "pt"})
    model = type(model).from_pretrained(tmp_path / "plain", dtype=torch.float32, attn_implementation="eager").eval()
    build_with_pass(tmp_path / "hf", tmp_path / "out", precision="fp32")
    assert error(tmp_path / "out", model) < TOLERANCE
    notes = plan_with_pass(tmp_path / "hf", precision="int4").notes
    assert any("matrices, as experts are put together in another order" in note for note in notes)


@pytest.mark.parametrize("fault", ["no scales", "shape"])
def test_damaged_mxfp4_is_named(fault: str, tmp_path: Path) -> None:
    tiny_model("gpt-oss", tmp_path)
    store_mxfp4(tmp_path)
    stored, name = load_file(tmp_path / "model.safetensors"), "model.layers.1.mlp.experts.down_proj_scales"
    scales = stored.pop(name)
    if fault == "shape":
        stored[name] = scales[:, 1:].contiguous()
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=name):
        open_checkpoint(tmp_path, json.loads((tmp_path / "config.json").read_text()))


# Options and refusals


def test_experts_can_have_8_bits_or_floats(tmp_path: Path) -> None:
    tiny_model("mixtral", tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    options = {"use_8bits_moe": "1", "int4_nodes_to_exclude": "/model/layers.1/moe/QMoE"}
    build_with_pass(tmp_path / "hf", tmp_path / "out", precision="int4", extra_options=options)
    nodes = {node.name: node for node in ir.load(tmp_path / "out" / "model.onnx").graph}
    assert nodes["/model/layers.0/moe/QMoE"].attributes["expert_weight_bits"].as_int() == 8
    assert nodes["/model/layers.0/attn/o_proj/MatMul"].attributes["bits"].as_int() == 4
    assert nodes["/model/layers.1/moe/MoE"].op_type == "MoE"
    assert nodes["/model/layers.0/moe/router/MatMul"].op_type == "MatMul"


def test_cuda_gets_rows_as_they_are_in_half_precision(tmp_path: Path) -> None:
    # In structure only: nothing here runs it.
    tiny_model("mixtral", tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    for precision, kind in (("int4", "QMoE"), ("fp16", "MoE")):
        build_with_pass(tmp_path / "hf", tmp_path / precision, CUDA, precision=precision)
        graph = ir.load(tmp_path / precision / "model.onnx").graph
        node = next(node for node in graph if node.name == f"/model/layers.1/moe/{kind}")
        scales_or_weights = node.inputs[3 if kind == "QMoE" else 2]
        assert scales_or_weights is not None
        assert scales_or_weights.dtype == ir.DataType.FLOAT16
        assert kind == "MoE" or node.attributes["weights_prepacked"].as_int() == 0


@pytest.mark.parametrize("name", ["qwen3-moe-some-layers", "mixtral", "gpt-oss"])
def test_genai_runs_quantized_experts(name: str, tmp_path: Path) -> None:
    og = pytest.importorskip("onnxruntime_genai")
    tiny_model(name, tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "eos_token_id": 79}))
    (tmp_path / "hf" / "generation_config.json").unlink(missing_ok=True)
    build_with_pass(tmp_path / "hf", tmp_path / "out", precision="int4", int4_accuracy_level=1)
    model = og.Model(str(tmp_path / "out"))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=20, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.array([5, 9, 33, 7, 61], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    found = [int(token) for token in generator.get_sequence(0)]
    step, expected = Stepper(tmp_path / "out"), [5, 9, 33, 7, 61]
    logits = step(np.array([expected]))
    while len(expected) < len(found):
        expected.append(int(logits[0, -1].argmax()))
        logits = step(np.array([expected[-1:]]))
    assert found == expected
    assert len(found) > 5


@pytest.mark.parametrize(
    ("name", "provider", "options", "words"),
    [
        ("llama-gqa", "CPU", {"precision": "int4", "use_8bits_moe": True}, "llama is none"),
        ("mixtral", "CPU", {"precision": "fp32", "use_8bits_moe": True}, "use_8bits_moe has an effect at"),
        ("mixtral", "CPU", {"precision": "int4", "int4_nodes_to_exclude": ("/model/layers.9/moe/QMoE",)},
         r"nearest is /model/layers\.\d/moe/QMoE"),
        ("mixtral", "Dml", {"precision": "int4"}, "DirectML has no MoE"),
        ("mixtral", "WebGpu", {"precision": "fp32"}, "use int4 or int8"),
        ("mixtral", "WebGpu", {"precision": "int4", "int4_is_symmetric": False}, "no zero points"),
        ("qwen3-moe-some-layers", "WebGpu", {"precision": "int4"}, "softmax over all"),
        ("qwen3-moe", "CUDA", {"precision": "int4"}, "no whole blocks of 32"),
        ("mixtral", "CUDA", {"precision": "int4", "int4_block_size": 16}, "32, 64 or 128"),
    ],
)  # fmt: skip
def test_what_experts_do_not_have_is_refused(name: str, provider: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        choose(ModelBuilderConfig.model_validate(options), config(name), f"{provider}ExecutionProvider")


@pytest.mark.parametrize(
    ("options", "words"), [({"use_qdq": True}, "stay with QMoE"), ({"int4_algo_config": "hqq"}, "whole zero points")]
)
def test_a_plan_says_what_experts_keep(options: dict[str, Any], words: str) -> None:
    for name in ("mixtral", "llama-gqa"):
        choice = choose(ModelBuilderConfig(precision="int4", **options), config(name), "CPUExecutionProvider")
        assert any(words in note for note in choice.notes) == (name == "mixtral")
        assert not any(choice.form.nodes[node].half_quadratic for node in expert_nodes(choice.arch))


def test_a_plan_speaks_of_blocks_that_do_not_divide() -> None:
    notes = [choose(ModelBuilderConfig(precision="int4", int4_block_size=size), config("qwen3-moe"),
                    "CPUExecutionProvider").notes for size in (16, 32)]  # fmt: skip
    assert [any("no whole blocks" in note for note in found) for found in notes] == [False, True]
    assert all(any("2 of 4 experts" in note for note in found) for found in notes)


@pytest.mark.parametrize(
    ("name", "change", "kind", "words"),
    [
        ("mixtral", {"num_experts_per_tok": 5}, CheckpointError, "5 of 4 experts"),
        ("mixtral", {"num_local_experts": 0}, CheckpointError, "num_local_experts is 0"),
        ("mixtral", {"hidden_act": "gelu"}, UnsupportedModelError, "silu only"),
        ("qwen3-moe", {"mlp_only_layers": ["1"]}, CheckpointError, "mlp_only_layers"),
        ("qwen3-moe", {"norm_topk_prob": 1}, CheckpointError, "norm_topk_prob is 1"),
        ("gpt-oss", {"swiglu_limit": -7.0}, CheckpointError, "swiglu_limit"),
    ],
)
def test_a_config_that_contradicts_itself(name: str, change: dict[str, Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        arch_from_config(config(name, **change))


def test_gpt_oss_rope_of_both_ages_and_none() -> None:
    new = config("gpt-oss")
    old = {key: value for key, value in new.items() if key != "rope_parameters"}
    parameters = dict(new["rope_parameters"])
    theta = parameters.pop("rope_theta")
    assert arch_from_config({**old, "rope_theta": theta, "rope_scaling": parameters}) == arch_from_config(new)
    alone = arch_from_config(old).rope
    assert (alone.kind, alone.theta, alone.parameters["factor"], alone.parameters["truncate"]) == (
        "yarn", 150000.0, 32.0, False,
    )  # fmt: skip
    plain = {"rope_type": "default", "rope_theta": 5000.0}
    assert arch_from_config({**old, "rope_parameters": plain}).rope.kind == "default"
