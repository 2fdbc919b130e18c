"""Graphs with LoRA inputs against PEFT on the same weights: floats, blocks, packed and halved products, any rank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from coldpress.artifacts.adapter import AdapterWeights
from coldpress.artifacts.adapter_inputs import lora_inputs, write_inputs
from coldpress.graph.form import Quantization
from coldpress.kernels.quantize import quantize
from oracles.decoders import Stepper, steps_of_transformers, tiny_model
from oracles.quantization import dequantize_block_by_block

TOLERANCE = 1e-3
"""As in test_parity: float32 sums in another order move logits by 1e-5 or so, a wrong adapter by more than 0.1."""

CASES: list[tuple[str, list[str], dict[str, Any]]] = [
    ("llama-gqa", ["q_proj", "v_proj"], {}),  # two of three rows of a packed product
    ("llama-gqa", ["k_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"], {}),
    ("llama-gqa", ["q_proj", "k_proj"], {"packed_qkv": False}),
    ("llama-gqa", ["gate_proj"], {"fused_gate_up": True}),
    ("llama-biases", ["q_proj", "down_proj"], {}),
    ("llama-head-24", ["q_proj", "k_proj", "v_proj"], {}),
    ("phi3-gqa", ["qkv_proj", "gate_up_proj", "down_proj"], {}),  # one adapter, two products
    ("phi3-gqa", ["gate_up_proj"], {"fused_gate_up": True}),
]


def adapted(base: Path, folder: Path, targets: list[str], rank: int, seed: int, **more: Any) -> tuple[Path, Any]:
    """An adapter with nothing left at zero, and the model that has it on."""
    import peft
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank + 1, target_modules=targets, task_type="CAUSAL_LM", **more)
    wrapped = peft.get_peft_model(model, config).eval()
    for name, value in wrapped.named_parameters():
        if "lora_" in name:
            value.data.normal_(std=0.3)
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    return folder, wrapped


def inputs_of(adapter: Path) -> dict[str, np.ndarray]:
    with AdapterWeights.open(adapter) as weights:
        return lora_inputs(weights)


class AdaptedStepper(Stepper):
    """A graph that is given an adapter with every run."""

    def __init__(self, folder: Path, adapter: dict[str, np.ndarray]) -> None:
        super().__init__(folder)
        run = self.session.run
        self.session = type("Given", (), {
            "get_inputs": self.session.get_inputs, "get_outputs": self.session.get_outputs,
            "run": staticmethod(lambda names, feed: run(names, {**feed, **adapter})),
        })()  # fmt: skip


def distance(step: Stepper, model: Any) -> float:
    ids = np.random.default_rng(0).integers(3, 80, (2, 20)).astype(np.int64)
    found = [step(ids[:, :12])] + [step(ids[:, i : i + 1]) for i in range(12, 20)]
    return float(np.abs(np.concatenate(found, axis=1) - steps_of_transformers(model, ids, 12)).max())


@pytest.mark.parametrize(("name", "targets", "form"), CASES, ids=str)
def test_equals_peft_with_and_without_an_adapter(
    name: str, targets: list[str], form: dict[str, Any], tmp_path: Path, build: Callable[..., Path]
) -> None:
    base = tiny_model(name, tmp_path / "hf")
    folder = build(tmp_path / "hf", lora_modules=frozenset(targets), **form)
    assert distance(Stepper(folder), base) < TOLERANCE
    for seed, rank in ((1, 3), (2, 8)):
        adapter, model = adapted(tmp_path / "hf", tmp_path / f"a{seed}", targets, rank, seed)
        inputs = inputs_of(adapter)
        assert distance(AdaptedStepper(folder, inputs), model) < TOLERANCE
        assert distance(Stepper(folder), model) > 100 * TOLERANCE  # the adapter matters
        # The twin: one number of one input.
        wrong = {key: value.copy() for key, value in inputs.items()}
        wrong[min(key for key in wrong if "layers.1" in key)][3, 1] += 1.0
        assert distance(AdaptedStepper(folder, wrong), model) > TOLERANCE


def test_ranks_may_differ_by_module_and_modules_may_be_left_out(tmp_path: Path, build: Callable[..., Path]) -> None:
    tiny_model("llama-gqa", tmp_path / "hf")
    folder = build(tmp_path / "hf", lora_modules=frozenset(["q_proj", "k_proj", "o_proj", "up_proj"]))
    adapter, model = adapted(
        tmp_path / "hf", tmp_path / "a", ["q_proj", "up_proj"], 4, 1, rank_pattern={"layers.1.mlp.up_proj": 9}
    )
    assert distance(AdaptedStepper(folder, inputs_of(adapter)), model) < TOLERANCE
    one_layer, model = adapted(tmp_path / "hf", tmp_path / "b", ["o_proj"], 4, 2, layers_to_transform=[1])
    assert distance(AdaptedStepper(folder, inputs_of(one_layer)), model) < TOLERANCE


def in_blocks_and_back(base: Path, q: Quantization, adapter: Path) -> Any:
    """The base with every product's weights as its blocks of 4 bits stand for, and the adapter put on."""
    import peft
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            w = module.weight.detach().numpy()
            got = quantize(w, bits=4, block_size=q.block_size, symmetric=q.symmetric, candidates=q.candidates)
            back = dequantize_block_by_block(got.codes, got.scales, got.zeros, 4, w.shape[1])
            module.weight.data.copy_(torch.tensor(back))
    return peft.PeftModel.from_pretrained(model, adapter).eval()


@pytest.mark.parametrize(("name", "targets"), [("llama-gqa", ["q_proj", "up_proj"]), ("phi3-gqa", ["qkv_proj"])])
def test_on_a_quantized_base_the_adapter_stays_exact(
    name: str, targets: list[str], tmp_path: Path, build: Callable[..., Path]
) -> None:
    """Base in 4 bits plus the adapter in float32: not the 4-bit form of the sum."""
    tiny_model(name, tmp_path / "hf")
    q = Quantization(block_size=16, accuracy_level=1)
    folder = build(tmp_path / "hf", 4, quantization=q, lora_modules=frozenset(targets))
    for seed in (1, 2):
        adapter, unquantized = adapted(tmp_path / "hf", tmp_path / f"a{seed}", targets, 4, seed)
        step = AdaptedStepper(folder, inputs_of(adapter))
        assert distance(step, in_blocks_and_back(tmp_path / "hf", q, adapter)) < TOLERANCE
        assert distance(AdaptedStepper(folder, inputs_of(adapter)), unquantized) > 3 * TOLERANCE


def test_plain_onnx_runtime_takes_the_adapter_file(tmp_path: Path, build: Callable[..., Path]) -> None:
    tiny_model("llama-gqa", tmp_path / "hf")
    folder = build(tmp_path / "hf", lora_modules=frozenset(["q_proj"]))
    adapter, model = adapted(tmp_path / "hf", tmp_path / "a", ["q_proj"], 4, 1)
    file = write_inputs(tmp_path / "made", inputs_of(adapter))
    loaded = onnxruntime.LoraAdapter()
    loaded.Load(str(file))
    options = onnxruntime.RunOptions()
    options.add_active_adapter(loaded)
    step = Stepper(folder)
    run = step.session.run
    step.session = type("Given", (), {
        "get_inputs": step.session.get_inputs, "get_outputs": step.session.get_outputs,
        "run": staticmethod(lambda names, feed: run(names, feed, options)),
    })()  # fmt: skip
    assert distance(step, model) < TOLERANCE


def test_every_adapted_product_has_inputs_of_its_own_and_no_other_changes(
    tmp_path: Path, build: Callable[..., Path]
) -> None:
    tiny_model("llama-gqa", tmp_path / "hf")
    plain, with_inputs = build(tmp_path / "hf", 4), build(tmp_path / "hf", 4, lora_modules=frozenset(["q_proj"]))
    assert (plain / "model.onnx.data").read_bytes() == (with_inputs / "model.onnx.data").read_bytes()
    graph = ir.load(with_inputs / "model.onnx").graph
    names = [value.name or "" for value in graph.inputs if "lora" in (value.name or "")]
    # Query, key and value are one product: an input for each, so that their parts can be stacked.
    assert names == [
        f"model.layers.{layer}.self_attn.{part}_proj.lora_{end}.weight"
        for layer in range(2)
        for part in "qkv"
        for end in "AB"
    ]
    shapes = {value.name: tuple(map(str, value.shape)) for value in graph.inputs if value.shape is not None}
    r = "model.layers.0.self_attn.k_proj.lora_r"
    assert shapes["model.layers.0.self_attn.k_proj.lora_A.weight"] == ("64", r)
    assert shapes["model.layers.0.self_attn.k_proj.lora_B.weight"] == (r, "32")
    assert {node.name for node in graph if "lora" in (node.name or "")} == {
        *(
            f"/model/layers/{layer}/self_attn/{part}_proj/lora_{end}/MatMul"
            for layer in range(2) for part in "qkv" for end in "AB"
        ),
        *(f"/model/layers.{layer}/attn/qkv_proj/lora/{kind}" for layer in range(2) for kind in ("Concat", "Add")),
    }  # fmt: skip
