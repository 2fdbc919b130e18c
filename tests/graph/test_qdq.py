"""The form with DequantizeLinear + MatMul: the codes of the MatMulNBits form, number for number, and what becomes of
them when ONNX Runtime loads the graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from coldpress.artifacts.arch import Rows
from coldpress.artifacts.stored import Packing
from coldpress.artifacts.tensors import TensorInfo, TensorSet, write_safetensors
from coldpress.graph import qdq
from coldpress.graph.form import HEAD, Quantization
from coldpress.graph.qdq import BlocksTransposed
from coldpress.graph.taken import TakenMatrix
from coldpress.graph.weights import DataFile, Matrix, Place, QuantizedMatrix
from coldpress.kernels.quantize import unpack
from oracles.decoders import Stepper, tiny_model

FLOAT = ir.DataType.FLOAT


def checkpoint(folder: Path, w: np.ndarray) -> TensorSet:
    write_safetensors(folder / "model.safetensors", [(TensorInfo.of("w", w.dtype.name, w.shape), lambda: w)])
    return TensorSet.open(folder)


def whole(tensors: TensorSet) -> Matrix:
    n, k = tensors.info("w").shape
    return Matrix(tensors, (Rows("w", 0, n),), k)


def read_back(folder: Path, data: DataFile, places: tuple[Place, ...]) -> list[np.ndarray]:
    content = (folder / data.name).read_bytes()
    return [
        np.frombuffer(content, place.dtype.numpy(), int(np.prod(place.shape)), place.offset).reshape(place.shape)
        for place in places
    ]


def as_unsigned(tensor: ir.TensorProtocol, bits: int) -> np.ndarray:
    """Codes as MatMulNBits has them."""
    signed = tensor.dtype in (ir.DataType.INT4, ir.DataType.INT8)
    return tensor.numpy().astype(np.int64) + (1 << (bits - 1) if signed else 0)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("n", "k", "size"), [(24, 96, 32), (23, 100, 32), (7, 40, 16), (5, 300, 128), (6, 16, 16)])
@pytest.mark.parametrize("budget", [1, 1 << 20])
def test_numbers_are_those_of_the_other_layout(
    bits: int, symmetric: bool, n: int, k: int, size: int, budget: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qdq, "_STRIPE", 4 * k)  # four rows at a time
    w = np.random.default_rng(0).standard_normal((n, k)).astype(np.float32)
    with checkpoint(tmp_path, w) as tensors:
        matrix = QuantizedMatrix("w", whole(tensors), bits, size, symmetric, 5 if bits == 4 else 1, FLOAT)
        data, blocks = DataFile(), BlocksTransposed(matrix, size)
        plain, transposed = data.add(matrix), data.add(blocks)
        data.write(tmp_path, threads=2, budget_bytes=budget)
    found = [place.tensor(data.name) for place in blocks.typed(transposed)]
    for tensor in found:
        tensor.base_dir = str(tmp_path)
    assert found[0].shape.numpy() == (k, n)
    codes, scales, *zeros = read_back(tmp_path, data, plain)
    expected = unpack(codes, bits).reshape(n, -1)[:, :k].T
    np.testing.assert_array_equal(as_unsigned(found[0], bits), expected)
    np.testing.assert_array_equal(found[1].numpy(), scales.T)
    assert len(found) == (2 if symmetric else 3)
    for one, packed in zip(found[2:], zeros, strict=True):
        np.testing.assert_array_equal(as_unsigned(one, bits), unpack(packed, bits)[:, : scales.shape[1]].T)


def test_a_row_is_a_block_and_the_budget_counts_it(tmp_path: Path) -> None:
    with checkpoint(tmp_path, np.ones((64, 96), np.float32)) as tensors:
        blocks = BlocksTransposed(QuantizedMatrix("w", whole(tensors), 4, 32, True, 1, FLOAT), 32)
        assert blocks.rows == 3
        # Codes of a block of every row, a byte each, and packed: under the 16 bytes that an element is counted as.
        assert sum(array.nbytes for array in blocks.make(0, 1)) < blocks.row_elements * 16
        assert blocks.row_elements * 16 >= 2 * 64 * 32


CASES = [
    # model, bits, block, symmetric, candidates
    ("llama-gqa", 4, 32, True, 5),
    ("llama-gqa", 4, 16, False, 1),
    ("llama-ragged", 4, 32, True, 1),  # rows are filled up to whole blocks; tied, the head is a copy
    ("llama-ragged", 8, 16, False, 1),
    ("llama-gqa", 8, 32, True, 1),
    ("phi3-gqa", 4, 128, False, 5),  # one block, longer than a row
]


def optimized(folder: Path, level: int) -> tuple[onnxruntime.InferenceSession, onnx.ModelProto]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(level))
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    return session, onnx.load(folder / "optimized.onnx", load_external_data=False)


@pytest.mark.parametrize(("name", "bits", "block", "symmetric", "candidates"), CASES)
def test_both_forms_yield_the_same_logits(
    name: str, bits: int, block: int, symmetric: bool, candidates: int, tmp_path: Path, build: Callable[..., Path]
) -> None:
    tiny_model(name, tmp_path / "hf", dtype=torch.bfloat16)
    q = Quantization(block_size=block, symmetric=symmetric, accuracy_level=1, candidates=candidates)
    usual = build(tmp_path / "hf", bits, 8, quantization=q)
    standard = build(tmp_path / "hf", bits, 8, quantization=q, qdq=True)
    model = onnx.load(standard / "model.onnx")
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds["MatMulNBits"] == 0
    assert kinds["DequantizeLinear"] == kinds["MatMul"] > 0
    for node in model.graph.node:
        # ONNX Runtime keeps this one of its own operators in the standard domain, where the checker does not know it.
        if node.op_type == "SimplifiedLayerNormalization":
            node.domain = "com.microsoft"
    onnx.checker.check_model(model, full_check=True)
    _, loaded = optimized(standard, 1)
    after = Counter(node.op_type for node in loaded.graph.node)
    assert after["MatMulNBits"] == kinds["MatMul"]
    assert after["DequantizeLinear"] == 0
    levels = {a.i for node in loaded.graph.node for a in node.attribute if a.name == "accuracy_level"}
    assert levels == {1}
    ids = np.random.default_rng(1).integers(3, 80, (1, 12)).astype(np.int64)
    # The CPU's products by 8 bits are made in another order where both are MatMulNBits: float32 noise only. `Stepper`
    # lets ONNX Runtime choose int8 activations (level 4) for the standard form, so both forms are run by hand.
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    logits = []
    for folder in (usual, standard):
        session, _ = optimized(folder, 1)
        past = {
            one.name: np.zeros((1, one.shape[1], 0, one.shape[3]), np.float32)
            for one in session.get_inputs()
            if one.name.startswith("past")
        }
        logits.append(session.run(["logits"], {**feeds, **past})[0])
    assert np.abs(logits[0] - logits[1]).max() < 1e-5


def test_a_changed_code_is_seen(tmp_path: Path, build: Callable[..., Path]) -> None:
    tiny_model("llama-gqa", tmp_path / "hf", dtype=torch.bfloat16)
    q = Quantization(accuracy_level=1)
    folder = build(tmp_path / "hf", 4, None, quantization=q, qdq=True)
    ids = np.array([[3, 4, 5, 6]])
    before = Stepper(folder)(ids)
    tensor = ir.load(folder / "model.onnx").graph.initializers["model.layers.1.mlp.down_proj.MatMul.weight_DQ4"]
    assert tensor.const_value is not None
    with (folder / "model.onnx.data").open("r+b") as file:
        file.seek(tensor.const_value.offset + 21)
        old = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([old[0] ^ 0x70]))
    assert np.abs(Stepper(folder)(ids) - before).max() > 1e-4


def test_tied_weights_lie_twice(tmp_path: Path, build: Callable[..., Path]) -> None:
    tiny_model("llama-mha-tied", tmp_path / "hf")
    graph = ir.load(build(tmp_path / "hf", 4, 4, qdq=True) / "model.onnx").graph
    gather = next(node for node in graph if node.op_type == "GatherBlockQuantized")
    assert gather.inputs[0] is not None
    assert gather.inputs[0].const_value is not None
    head = next(node for node in graph if node.name == HEAD)
    assert head.inputs[1] is not None
    dequantize = head.inputs[1].producer()
    assert dequantize is not None
    assert dequantize.op_type == "DequantizeLinear"
    assert dequantize.inputs[0] is not None
    assert dequantize.inputs[0].const_value is not None
    assert gather.inputs[0].const_value.offset != dequantize.inputs[0].const_value.offset


def test_taken_codes_lie_transposed_too(tmp_path: Path) -> None:
    """A quantized checkpoint's codes go the same way; see tests/graph/test_taken.py for their own layout."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (6, 3, 16)).astype(np.uint8)
    scales = rng.standard_normal((6, 3)).astype(np.float32)
    zeros = rng.integers(0, 256, (6, 2)).astype(np.uint8)

    class Made(TakenMatrix):
        def make(self, start: int, stop: int) -> tuple[np.ndarray, ...]:
            return codes[start:stop], scales[start:stop], zeros[start:stop]

    packing = Packing(method="gptq", bits=4, group=32, block_size=32, symmetric=False, scale_dtype="float32")
    made = Made("w", TensorSet, (Rows("w", 0, 6),), 96, packing, FLOAT)  # type: ignore[arg-type]
    for first, last in ((0, 3), (1, 2), (2, 3)):
        found = BlocksTransposed(made, 32).make(first, last)
        whole_codes = unpack(codes, 4)[:, first:last].transpose(1, 2, 0)
        np.testing.assert_array_equal(unpack(found[0], 4).reshape(whole_codes.shape), whole_codes)
        np.testing.assert_array_equal(found[1], scales[:, first:last].T)
        np.testing.assert_array_equal(unpack(found[2], 4), unpack(zeros, 4)[:, first:last].T)
