"""Quantized graphs against Transformers with the weights that ought to run: a packing bug cannot hide in "it is lossy".

Products compute in float32 here (accuracy level 1), so the graph must equal the dequantized model like a float32 one.
With int8 activations (level 4) each product adds about 0.4 % of noise, and the comparison is by correlation.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from coldpress.graph.form import HEAD, Quantization, products
from coldpress.kernels.hqq import quantize_half_quadratic
from coldpress.kernels.quantize import dequantize, quantize
from oracles.decoders import Stepper, steps_of_transformers, tiny_model
from oracles.quantization import dequantize_block_by_block

TOLERANCE = 1e-3


@torch.no_grad()
def dequantized(
    model: Any, bits: int, q: Quantization, *, head: bool = True, embedding_bits: int | None = None
) -> None:
    """Give every matrix of a model the values that its quantized form stands for."""

    def there_and_back(weight: torch.Tensor, bits: int) -> torch.Tensor:
        w = weight.float().numpy()
        candidates = q.candidates if bits == 4 else 1
        got = quantize(w, bits=bits, block_size=q.block_size, symmetric=q.symmetric, candidates=candidates)
        back = dequantize_block_by_block(got.codes, got.scales, got.zeros, bits, w.shape[1])
        return torch.tensor(back, dtype=torch.float32)

    if model.config.tie_word_embeddings:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and (head or name != "lm_head"):
            module.weight.copy_(there_and_back(module.weight, bits))
        if isinstance(getattr(module, "gate_up_proj", None), torch.nn.Parameter):  # all experts of a layer
            for stacked in (module.gate_up_proj, module.down_proj):
                for expert in stacked:
                    turned = model.config.model_type == "gpt_oss"  # inputs first
                    expert.copy_(there_and_back(expert.T, bits).T if turned else there_and_back(expert, bits))
    if embedding_bits is not None:
        table = model.get_input_embeddings().weight
        table.copy_(there_and_back(table, embedding_bits))


def compare(folder: Path, model: Any, seed: int = 0) -> float:
    ids = np.random.default_rng(seed).integers(3, 80, (1, 20)).astype(np.int64)
    step = Stepper(folder)
    found = [step(ids[:, :12])] + [step(ids[:, i : i + 1]) for i in range(12, 20)]
    return float(np.abs(np.concatenate(found, axis=1) - steps_of_transformers(model, ids, 12)).max())


CASES = [
    # model, bits, block, symmetric, candidates, embedding bits
    ("llama-gqa", 4, 32, True, 1, None),
    ("llama-gqa", 4, 16, False, 1, None),
    ("llama-gqa", 8, 32, True, 1, 8),
    ("llama-biases", 4, 16, True, 5, None),
    ("llama-ragged", 4, 32, True, 5, 4),  # tied: one set of bytes, rows padded to a block
    ("llama-ragged", 4, 32, False, 5, 4),
    ("llama-ragged", 8, 64, False, 1, 8),
    ("llama-ragged", 4, 16, True, 1, 8),  # tied, but other bits: two sets
    ("phi3-gqa", 4, 32, False, 5, 4),
    ("phi3-gqa", 8, 128, True, 1, 8),
    ("phi3-longrope", 4, 256, True, 1, 8),
    ("qwen3-moe", 4, 16, True, 5, 8),
    ("qwen3-moe", 4, 32, False, 1, None),  # experts of 48 columns: no whole blocks
    ("qwen3-moe-some-layers", 4, 16, True, 1, 4),
    ("mixtral", 4, 32, True, 1, None),
    ("mixtral", 4, 32, False, 5, None),
    ("mixtral-window", 8, 32, False, 1, None),  # no whole blocks: then experts at 8 bits compute in float32
    ("mixtral-window", 8, 64, True, 1, 8),
    ("gpt-oss", 4, 32, True, 5, None),
    ("gpt-oss", 4, 64, False, 1, 8),
    ("gpt-oss", 8, 128, True, 1, None),
]


@pytest.mark.parametrize(("name", "bits", "block", "symmetric", "candidates", "embedding"), CASES)
def test_graph_equals_the_dequantized_model(
    name: str, bits: int, block: int, symmetric: bool, candidates: int, embedding: int | None,
    tmp_path: Path, build: Callable[..., Path],
) -> None:  # fmt: skip
    model = tiny_model(name, tmp_path / "hf", dtype=torch.bfloat16)
    q = Quantization(block_size=block, symmetric=symmetric, accuracy_level=1, candidates=candidates)
    folder = build(tmp_path / "hf", bits, embedding, quantization=q)
    lossless = compare(folder, model)
    dequantized(model, bits, q, embedding_bits=embedding)
    assert compare(folder, model) < TOLERANCE
    assert lossless > 3 * TOLERANCE  # the weights did change


def test_int8_activations_come_close(tmp_path: Path, build: Callable[..., Path]) -> None:
    model = tiny_model("phi3-gqa", tmp_path / "hf")
    q = Quantization(accuracy_level=4)
    folder = build(tmp_path / "hf", 4, None, quantization=q)
    dequantized(model, 4, q)
    ids = np.random.default_rng(0).integers(3, 80, (1, 24)).astype(np.int64)
    a, b = Stepper(folder)(ids).ravel(), steps_of_transformers(model, ids, 24).ravel()
    assert np.corrcoef(a, b)[0, 1] > 0.995


def test_bits_can_be_chosen_by_node(tmp_path: Path, build: Callable[..., Path]) -> None:
    import json

    from coldpress.artifacts.arch_config import arch_from_config

    model = tiny_model("llama-gqa", tmp_path / "hf")
    arch = arch_from_config(json.loads((tmp_path / "hf" / "config.json").read_text()))
    q = Quantization(accuracy_level=1)
    folder = build(tmp_path / "hf", bits={name: 4 for name, _ in products(arch) if name != HEAD}, quantization=q)
    dequantized(model, 4, q, head=False)
    assert compare(folder, model) < TOLERANCE
    kinds = {node.name: node.op_type for node in ir.load(folder / "model.onnx").graph}
    assert kinds[HEAD] == "MatMul"
    assert kinds["/model/layers.0/mlp/up_proj/MatMul"] == "MatMulNBits"


@torch.no_grad()
@pytest.mark.parametrize(("name", "block"), [("llama-gqa", 32), ("llama-ragged", 16), ("phi3-gqa", 128)])
def test_float_zero_points_run_as_they_are_fitted(
    name: str, block: int, tmp_path: Path, build: Callable[..., Path]
) -> None:
    model = tiny_model(name, tmp_path / "hf", dtype=torch.bfloat16)
    q = Quantization(block_size=block, symmetric=False, accuracy_level=1, half_quadratic=True)
    folder = build(tmp_path / "hf", 4, None, quantization=q)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            w = module.weight.float().numpy()
            fitted = quantize_half_quadratic(w, bits=4, block_size=block)
            module.weight.copy_(torch.tensor(dequantize(fitted, bits=4, k=w.shape[1])))
    assert compare(folder, model) < TOLERANCE
    dequantized(model, 4, Quantization(block_size=block, symmetric=False))  # rounded zero points are another model
    assert compare(folder, model) > 3 * TOLERANCE


@pytest.mark.parametrize("part", ["scales", "Q4"])
def test_one_corrupt_scale_or_code_is_found(part: str, tmp_path: Path, build: Callable[..., Path]) -> None:
    model = tiny_model("llama-gqa", tmp_path / "hf")
    q = Quantization(accuracy_level=1)
    folder = build(tmp_path / "hf", 4, None, quantization=q)
    dequantized(model, 4, q)
    assert compare(folder, model) < TOLERANCE
    name = f"model.layers.1.mlp.down_proj.MatMul.weight_{part}"
    tensor = ir.load(folder / "model.onnx").graph.initializers[name].const_value
    with (folder / "model.onnx.data").open("r+b") as file:
        file.seek(tensor.offset + (20 if part == "scales" else 21))
        old = file.read(4)
        file.seek(-4, 1)
        file.write(struct.pack("<f", 1.3 * struct.unpack("<f", old)[0]) if part == "scales" else bytes([old[0] ^ 0x70]))
    assert compare(folder, model) > TOLERANCE


def test_shared_embedding_is_stored_once(tmp_path: Path, build: Callable[..., Path]) -> None:
    tiny_model("llama-mha-tied", tmp_path / "hf")
    for bits in (None, 4):
        graph = ir.load(build(tmp_path / "hf", bits, bits) / "model.onnx").graph
        gather = next(node for node in graph if node.name == "/model/embed_tokens/Gather")
        head = next(node for node in graph if node.name == HEAD)
        assert gather.inputs[0].const_value.offset == head.inputs[1].const_value.offset
