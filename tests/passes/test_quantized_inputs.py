"""From a quantized checkpoint on disk to logits in ONNX Runtime, for every format; and what the plan says of it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file

from coldpress.artifacts.adapter import AdapterWeights
from coldpress.artifacts.adapter_inputs import lora_inputs
from coldpress.artifacts.base import Artifact, Spec
from coldpress.errors import CheckpointError
from coldpress.evaluate.runners import open_runner
from coldpress.hardware import detect
from coldpress.kernels.quantize import dequantize, quantize
from coldpress.passes.base import Context, PlanContext
from coldpress.passes.model_builder import ModelBuilder, ModelBuilderConfig
from oracles.decoders import Stepper, steps_of_transformers, tiny_model
from oracles.passes import CPU, CUDA, TOKENIZER, build_with_pass, plan_with_pass
from oracles.stored import CASES, Case, quantize_folder

TOLERANCE = 1e-3
TAKEN = [name for name in CASES if not name.startswith(("fp8", "nf4"))]
HEAD = "/lm_head/MatMul"
ONLY_LAYERS = {"int4_op_types_to_quantize": ["MatMul"], "int4_nodes_to_exclude": [HEAD], "int4_accuracy_level": 1}


def quantized(folder: Path, case: Case, model: str = "llama-gqa") -> tuple[Path, Any]:
    """The checkpoint, and Transformers' model with the float32 values that its codes stand for."""
    reference = tiny_model(model, folder / "plain")
    (folder / "plain" / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    values = quantize_folder(folder / "plain", folder / "stored", case)
    assert len(values) >= 8
    set_weights(reference, values)
    return folder / "stored", reference


def set_weights(model: Any, values: dict[str, np.ndarray]) -> None:
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, array in values.items():
            parameters[name].copy_(torch.from_numpy(array.astype(np.float32)))


def described(folder: Path) -> Spec:
    return Artifact.load(folder).describe()


def distance(folder: Path, model: Any) -> float:
    ids = np.random.default_rng(0).integers(3, 80, (1, 20)).astype(np.int64)
    step = Stepper(folder)
    found = [step(ids[:, :12])] + [step(ids[:, i : i + 1]) for i in range(12, 20)]
    return float(np.abs(np.concatenate(found, axis=1) - steps_of_transformers(model, ids, 12)).max())


def notes(folder: Path, **options: Any) -> str:
    return "\n".join(plan_with_pass(folder, CPU, **options).notes)


@pytest.mark.parametrize("name", TAKEN)
def test_taken_over_equals_the_dequantized_model(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    stored, reference = quantized(tmp_path, case)
    options = {"precision": f"int{case.bits}", **ONLY_LAYERS}
    # qkv, o, gate, up and down of two layers.
    text = notes(stored, **options)
    assert f"taken over bit for bit: {8 if case.group == -1 else 10} matrices ({case.method} int{case.bits}, " in text
    assert ("order of the columns" in text) == case.act_order
    assert "again" not in text
    build_with_pass(stored, tmp_path / "out", CPU, **options)
    assert distance(tmp_path / "out", reference) < TOLERANCE
    graph = ir.load(tmp_path / "out" / "model.onnx")
    product = next(node for node in graph.graph if node.name == "/model/layers.1/mlp/down_proj/MatMul")
    assert product.attributes["bits"].value == case.bits
    assert product.attributes["block_size"].value == (32 if case.group == -1 else case.group)
    assert graph.metadata_props["coldpress.algorithm"] == f"{case.method}, as stored"
    assert graph.metadata_props["coldpress.taken_over"] == "10 of 10 quantized matrices"
    plain = tiny_model("llama-gqa", tmp_path / "again")
    assert distance(tmp_path / "out", plain) > 3 * TOLERANCE  # the twin: the weights did change


@pytest.mark.parametrize("name", [*CASES])
def test_dequantized_equals_the_dequantized_model(name: str, tmp_path: Path) -> None:
    stored, reference = quantized(tmp_path, CASES[name])
    assert "dequantized: 10 matrices" in notes(stored, precision="fp32")
    build_with_pass(stored, tmp_path / "out", CPU, precision="fp32")
    assert distance(tmp_path / "out", reference) < TOLERANCE


@pytest.mark.parametrize(("name", "why"), [
    ("nf4-nested", "nf4 values are no integer codes"), ("fp8-blocks", "fp8 values are no integer codes"),
    ("gptq-8", "they are stored at 8 bits and wanted at 4"),
])  # fmt: skip
def test_quantized_again_equals_what_that_gives(name: str, why: str, tmp_path: Path) -> None:
    stored, reference = quantized(tmp_path, CASES[name])
    options = {"precision": "int4", "int4_algo_config": "rtn", **ONLY_LAYERS}
    assert f"dequantized and quantized again: 10 matrices, as {why}" in notes(stored, **options)
    build_with_pass(stored, tmp_path / "out", CPU, **options)
    again = {}
    for key, parameter in reference.named_parameters():
        if "_proj" in key:
            w = parameter.detach().numpy()
            again[key] = dequantize(quantize(w, bits=4, block_size=32), bits=4, k=w.shape[1])
    set_weights(reference, again)
    assert distance(tmp_path / "out", reference) < TOLERANCE


def test_what_the_user_asks_for_counts(tmp_path: Path) -> None:
    stored, reference = quantized(tmp_path, CASES["gptq-4"])
    text = notes(stored, precision="int4", int4_block_size=16)
    assert "again: 10 matrices, as they are stored in blocks of 32 and wanted in blocks of 16" in text
    text = notes(stored, precision="int4", int4_is_symmetric=False)
    assert "again: 10 matrices, as they are stored without zero points and wanted with" in text
    assert "taken over bit for bit: 10" in notes(stored, precision="int8")  # exact, and smaller than asked
    text = notes(stored, precision="int4", int4_nodes_to_exclude=["/model/layers.0/mlp/up_proj/MatMul"])
    assert "taken over bit for bit: 9" in text
    assert "dequantized: 1 matrices" in text
    build_with_pass(stored, tmp_path / "out", CPU, precision="int8", **ONLY_LAYERS)
    assert distance(tmp_path / "out", reference) < TOLERANCE


def test_parts_that_differ_are_quantized_again(tmp_path: Path) -> None:
    """q was left at 8 bits: the stacked product of q, k and v cannot be taken over."""
    stored, _ = quantized(tmp_path, CASES["gptq-4"])
    _, _ = quantized(tmp_path / "wide", CASES["gptq-8"])
    tensors = load_file(stored / "model.safetensors")
    wide = load_file(tmp_path / "wide" / "stored" / "model.safetensors")
    layer = "model.layers.0.self_attn.q_proj"
    tensors |= {name: wide[name] for name in tensors if name.startswith(layer)}
    save_file(tensors, stored / "model.safetensors", {"format": "pt"})
    text = notes(stored, precision="int8")
    assert "taken over bit for bit: 9 matrices" in text
    assert "again: 1 matrices, as parts of one product are packed differently" in text
    build_with_pass(stored, tmp_path / "out", CPU, precision="int8")


def test_half_precision_scales_on_cuda(tmp_path: Path) -> None:
    stored, _ = quantized(tmp_path, CASES["packed-4"])
    text = "\n".join(plan_with_pass(stored, CUDA, precision="int4").notes)
    assert "scales rounded from bfloat16 to float16" in text
    build_with_pass(stored, tmp_path / "out", CUDA, precision="int4")
    graph = ir.load(tmp_path / "out" / "model.onnx").graph
    scales = graph.initializers["model.layers.0.mlp.down_proj.MatMul.weight_scales"]
    assert scales.dtype == ir.DataType.FLOAT16


def test_the_plan_knows_the_size(tmp_path: Path) -> None:
    stored, _ = quantized(tmp_path, CASES["awq"])
    planned = plan_with_pass(stored, CPU, precision="int4")
    build_with_pass(stored, tmp_path / "out", CPU, precision="int4")
    size = (tmp_path / "out" / "model.onnx.data").stat().st_size
    assert size <= planned.estimate.disk < size + (2 << 20)


def test_spec_is_logical(tmp_path: Path) -> None:
    stored, _ = quantized(tmp_path, CASES["awq"])
    plain, found = described(tmp_path / "plain"), described(stored)
    assert {info.name: info.shape for info in found.tensors} == {info.name: info.shape for info in plain.tensors}
    assert found.parameters == plain.parameters
    assert len(found.packings) == 14
    assert found.linear_layers() == plain.linear_layers()


@pytest.mark.parametrize("blocks", ["always", "if too large"])
@pytest.mark.parametrize("name", ["gptq-4-order", "awq", "packed-4-asymmetric", "int8-row", "fp8-blocks", "nf4-nested"])
def test_the_reference_of_parity_needs_no_other_library(
    name: str, blocks: Literal["always", "if too large"], tmp_path: Path
) -> None:
    stored, reference = quantized(tmp_path, CASES[name])
    ids = [3, 4, 5, 6, 7, 40, 41]
    with open_runner(Artifact.load(stored), blocks=blocks) as runner, torch.no_grad():
        (found,) = runner.logits([ids])
        expected = reference(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_pickled_checkpoint(tmp_path: Path) -> None:
    reference = tiny_model("llama-gqa", tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    torch.save(load_file(tmp_path / "hf" / "model.safetensors"), tmp_path / "hf" / "pytorch_model.bin")
    (tmp_path / "hf" / "model.safetensors").unlink()
    build_with_pass(tmp_path / "hf", tmp_path / "out", CPU, precision="fp32")
    assert distance(tmp_path / "out", reference) < TOLERANCE
    with open_runner(Artifact.load(tmp_path / "hf")) as runner, torch.no_grad():
        (found,) = runner.logits([[3, 4, 5]])
        np.testing.assert_allclose(found, reference(torch.tensor([[3, 4, 5]])).logits[0].numpy(), atol=1e-4)


def with_adapter(stored: Path, folder: Path) -> tuple[Artifact, dict[str, np.ndarray]]:
    """A LoRA adapter on q and down, and what it adds to the weights."""
    rng = np.random.default_rng(3)
    tensors, added = {}, {}
    for layer in (0, 1):
        for module, n, k in (("self_attn.q_proj", 64, 64), ("mlp.down_proj", 64, 96)):
            name = f"model.layers.{layer}.{module}"
            a, b = rng.normal(0, 0.2, (4, k)).astype(np.float32), rng.normal(0, 0.2, (n, 4)).astype(np.float32)
            tensors[f"base_model.model.{name}.lora_A.weight"] = torch.from_numpy(a)
            tensors[f"base_model.model.{name}.lora_B.weight"] = torch.from_numpy(b)
            added[f"{name}.weight"] = 2.0 * b.astype(np.float64) @ a.astype(np.float64)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    record = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps({**record, "base_model_name_or_path": str(stored)}))
    return Artifact(folder, "checkpoint", stored, adapter=folder), added


def run_pass(model: Artifact, output: Path, **options: Any) -> str:
    """Build from an artifact; returns the plan's notes."""
    config = ModelBuilderConfig(**options)
    planned = ModelBuilder().plan(config, model.describe(), PlanContext(detect(), CPU, {}, {}))
    output.mkdir()
    ModelBuilder().run(config, model, Context("build", output, output, detect(), CPU, {}, lambda event: None))
    return "\n".join(planned.notes)


def test_an_adapter_is_merged_into_the_dequantized_weights(tmp_path: Path) -> None:
    stored, reference = quantized(tmp_path, CASES["gptq-4"])
    model, added = with_adapter(stored, tmp_path / "adapter")
    parameters = dict(reference.named_parameters())
    set_weights(reference, {name: parameters[name].detach().numpy() + delta for name, delta in added.items()})
    run_pass(model, tmp_path / "fp32", precision="fp32")
    assert distance(tmp_path / "fp32", reference) < TOLERANCE
    text = run_pass(model, tmp_path / "int4", precision="int4", **ONLY_LAYERS)
    assert "taken over" not in text
    assert "again: 10 matrices, as an adapter is added to them" in text
    graph = ir.load(tmp_path / "int4" / "model.onnx")
    assert "coldpress.taken_over" not in graph.metadata_props


def test_adapters_as_inputs_of_codes_taken_over(tmp_path: Path) -> None:
    """Also where the codes want their inputs in another order: the adapter reads them in their own."""
    stored, reference = quantized(tmp_path, CASES["gptq-4-order"])
    model, added = with_adapter(stored, tmp_path / "adapter")
    text = run_pass(model, tmp_path / "out", precision="int4", adapter="inputs", **ONLY_LAYERS)
    assert "taken over bit for bit: 10 matrices" in text
    assert distance(tmp_path / "out", reference) < TOLERANCE  # without an adapter it is the base
    parameters = dict(reference.named_parameters())
    set_weights(reference, {name: parameters[name].detach().numpy() + delta for name, delta in added.items()})
    assert distance(tmp_path / "out", reference) > 3 * TOLERANCE
    with AdapterWeights.open(tmp_path / "adapter") as weights:
        given = lora_inputs(weights)
    ids = np.arange(3, 15, dtype=np.int64)[None]
    step = Stepper(tmp_path / "out")
    run = step.session.run
    step.session = SimpleNamespace(
        get_inputs=step.session.get_inputs,
        get_outputs=step.session.get_outputs,
        run=lambda names, feed: run(names, {**feed, **given}),
    )
    np.testing.assert_allclose(step(ids), steps_of_transformers(reference, ids, 12), rtol=0, atol=TOLERANCE)


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    stored, _ = quantized(tmp_path, CASES["gptq-4"])
    tensors = load_file(stored / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.qzeros"]
    save_file(tensors, stored / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"no tensor 'model\.layers\.1\.mlp\.up_proj\.qzeros'"):
        described(stored)
