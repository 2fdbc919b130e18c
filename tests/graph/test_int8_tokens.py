"""Products in int8 with a scale for each token: weights against an oracle, the graph against the dequantized model."""

from __future__ import annotations

import struct
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from coldpress.artifacts.arch import Rows
from coldpress.artifacts.tensors import TensorInfo, TensorSet, write_safetensors
from coldpress.errors import CheckpointError
from coldpress.graph.form import HEAD
from coldpress.graph.int8_tokens import Int8Matrix, Int8Tokens
from coldpress.graph.ops import MICROSOFT, GraphWriter
from coldpress.graph.weights import ALIGNMENT, DataFile, Matrix
from coldpress.kernels.quantize import NonFiniteWeightError, quantize_rows
from oracles.decoders import Stepper, steps_of_transformers, tiny_model
from oracles.quantization import round_to_nearest


def weights(n: int, k: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((n, k)) * rng.uniform(0.01, 2.0, (n, 1))).astype(np.float32)


def matrix(folder: Path, array: np.ndarray) -> Matrix:
    write_safetensors(
        folder / "model.safetensors", [(TensorInfo.of("w", array.dtype.name, array.shape), lambda: array)]
    )
    return Matrix(TensorSet.open(folder), (Rows("w", 0, len(array)),), array.shape[1])


# The kernel


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("k", [1, 96, 1001])
def test_rows_agree_with_the_oracle(k: int, dtype: type) -> None:
    w = weights(7, k).astype(dtype)
    codes, scales = quantize_rows(w)
    expected, expected_scales, _ = round_to_nearest(w.astype(np.float32), 8, k, True)
    assert codes.dtype == np.int8
    np.testing.assert_allclose(scales, expected_scales[:, 0], rtol=1e-6)
    # A value half-way between two codes may fall to either side in float32; none may differ by more.
    difference = np.abs(codes.astype(int) - (expected[:, 0] - 128))
    assert difference.max() <= 1
    assert np.mean(difference != 0) < 2e-3


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.integers(1, 80)),
        elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=False),
    )
)
def test_no_weight_moves_by_more_than_a_step(w: np.ndarray) -> None:
    codes, scales = quantize_rows(w)
    moved = np.abs(codes.astype(np.float64) * scales[:, None].astype(np.float64) - w)
    step = np.abs(scales)[:, None].astype(np.float64)
    # Half a step, but a whole one at the end of the range that the peak is not on. Below 1e-30 all becomes zero.
    opposite = np.sign(w) == np.sign(scales)[:, None]
    assert (moved <= np.where(opposite, 1.0, 0.5) * step * (1 + 1e-5) + 1e-29).all()


def test_a_row_of_zeros_and_a_row_with_nan() -> None:
    w = weights(4, 33)
    w[2] = 0
    codes, scales = quantize_rows(w)
    assert not codes[2].any()
    assert np.isfinite(scales).all()
    w[3, 5] = np.nan
    with pytest.raises(NonFiniteWeightError) as caught:
        quantize_rows(w)
    assert caught.value.row == 3


# The weights in the file


@pytest.mark.parametrize("budget", [1, 5000, 1 << 20])
@pytest.mark.parametrize("threads", [1, 3])
def test_bytes_do_not_depend_on_budget_or_threads(tmp_path: Path, budget: int, threads: int) -> None:
    w = weights(37, 51)
    data = DataFile()
    source = matrix(tmp_path, w)
    before = data.add(Int8Matrix("a", source))
    codes_place, scales_place = data.add(Int8Matrix("w", source))
    data.write(tmp_path, threads=threads, budget_bytes=budget)
    content = (tmp_path / data.name).read_bytes()
    codes, scales = quantize_rows(w)
    for place in (before[0], codes_place):
        assert place.offset % ALIGNMENT == 0
        found = np.frombuffer(content, np.int8, w.size, place.offset).reshape(place.shape)
        np.testing.assert_array_equal(found, codes)
    np.testing.assert_array_equal(np.frombuffer(content, np.float32, 37, scales_place.offset), scales)


def test_memory_stays_within_the_budget(tmp_path: Path) -> None:
    source = matrix(tmp_path, np.full((1 << 12, 1 << 11), 0.5, ml_dtypes.bfloat16))
    quantize_rows(np.zeros((1, 1), ml_dtypes.bfloat16))  # compile first
    data = DataFile()
    data.add(Int8Matrix("w", source))
    tracemalloc.start()
    try:
        data.write(tmp_path, threads=2, budget_bytes=2 << 20)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 << 20  # the matrix is 16 MB as it lies, 8 MB in int8


def test_nan_is_named_with_tensor_and_row(tmp_path: Path) -> None:
    w = weights(9, 8)
    w[6, 1] = np.inf
    data = DataFile()
    data.add(Int8Matrix("w", matrix(tmp_path, w)))
    with pytest.raises(CheckpointError, match="row 6 of w holds NaN or infinity"):
        data.write(tmp_path, threads=1, budget_bytes=4 * 8 * 4 * 2)


# The product


def product(folder: Path, w: np.ndarray, *, by_token: bool = True) -> Callable[[np.ndarray], np.ndarray]:
    """x -> x W^T in ONNX Runtime, with a scale for each token or with one for all."""
    folder.mkdir()
    data = DataFile()
    graph = GraphWriter(data)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(("batch", "tokens", w.shape[1])))
    weight = Int8Matrix("w", matrix(folder, w))
    if by_token:
        y = Int8Tokens(graph).product("/MatMul", x, weight)
    else:
        codes, scales = graph.weight(weight)
        transposed = graph.op("Transpose", [codes], name="/Transpose", perm=[1, 0])
        y = graph.op("DynamicQuantizeMatMul", [x, transposed, scales], name="/MatMul", domain=MICROSOFT)
    y.type = ir.TensorType(ir.DataType.FLOAT)
    model = graph.model([x], [y], producer=("test", ""), metadata={})
    data.write(folder, threads=1)
    ir.save(model, folder / "model.onnx")
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])

    def run(values: np.ndarray) -> np.ndarray:
        (found,) = session.run(None, {"x": values.astype(np.float32)})
        return np.asarray(found)

    return run


def token_errors(run: Callable[[np.ndarray], np.ndarray], x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Relative error of each token, against float64 and the weights that run."""
    codes, scales = quantize_rows(w)
    expected = x.astype(np.float64) @ (codes.astype(np.float64) * scales[:, None]).T
    return np.asarray(np.linalg.norm(run(x) - expected, axis=-1) / np.linalg.norm(expected, axis=-1))


# Rounding moves an activation by a step / sqrt(12) on average, a step being 1/127 of the token's greatest (about 3.5
# standard deviations): 0.8 % of the result.
ROUNDING = 0.012


@pytest.mark.parametrize("tokens", [1, 5, 40])  # 32 rows and more take another kernel on AMX
def test_the_product_is_that_of_the_weights(tokens: int, tmp_path: Path) -> None:
    w = weights(96, 256)
    x = np.random.default_rng(1).standard_normal((2, tokens, 256)) * np.array([[[1.0]], [[1e-3]]])
    run = product(tmp_path / "a", w)
    assert token_errors(run, x, w).max() < ROUNDING
    # By hand: 255 codes around 128, so that no token's depend on another's.
    peak = np.abs(x).max(axis=-1, keepdims=True).astype(np.float32)
    codes, scales = quantize_rows(w)
    by_hand = (np.rint(x.astype(np.float32) / peak * 127) @ codes.T.astype(np.float64)) * scales * peak / 127
    np.testing.assert_allclose(run(x), by_hand, atol=2e-3 * np.abs(by_hand).max())  # a rounding may fall either way
    for token in range(tokens):
        np.testing.assert_array_equal(run(x)[:, token], run(x[:, token : token + 1])[:, 0])


def test_a_token_with_outliers_costs_the_others_nothing(tmp_path: Path) -> None:
    w = weights(96, 256)
    x = np.random.default_rng(1).standard_normal((1, 40, 256))
    x[0, 3] *= 50
    assert token_errors(product(tmp_path / "a", w), x, w).max() < ROUNDING
    # What the scales are for: ONNX Runtime's own operator has one for all tokens.
    assert np.median(token_errors(product(tmp_path / "b", w, by_token=False), x, w)) > 10 * ROUNDING


def test_a_token_of_zeros_stays_zero(tmp_path: Path) -> None:
    w = weights(96, 256)
    x = np.random.default_rng(1).standard_normal((1, 4, 256))
    x[0, 1] = 0
    found = product(tmp_path / "a", w)(x)
    assert not found[0, 1].any()
    assert token_errors(lambda _: found[:, 2:], x[:, 2:], w).max() < ROUNDING


# The graph


@torch.no_grad()
def with_int8_weights(model: Any) -> None:
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            codes, scales = quantize_rows(module.weight.numpy())
            module.weight.copy_(torch.tensor(codes * scales[:, None]))


def apart(folder: Path, model: Any) -> float:
    """Root mean square of the differences over the spread of the logits, in a prompt and eight steps after it."""
    ids = np.random.default_rng(0).integers(3, 80, (1, 32)).astype(np.int64)
    step = Stepper(folder)
    found = [step(ids[:, :24])] + [step(ids[:, i : i + 1]) for i in range(24, 32)]
    expected = steps_of_transformers(model, ids, 24)
    return float(np.sqrt(np.mean((np.concatenate(found, axis=1) - expected) ** 2)) / expected.std())


# Each of a dozen products adds about 1 % (`ROUNDING`); measured 0.008 to 0.027.
NOISE = 0.05


@pytest.mark.parametrize("name", ["llama-gqa", "llama-biases", "phi3-gqa", "qwen3", "gemma2", "gpt-neox"])
def test_the_graph_is_that_of_the_weights(name: str, tmp_path: Path, build: Callable[..., Path]) -> None:
    model = tiny_model(name, tmp_path / "hf")
    names = {node.name: 4 for node in ir.load(build(tmp_path / "hf") / "model.onnx").graph if node.op_type == "MatMul"}
    names.pop(HEAD, None)
    folder = build(tmp_path / "hf", names, int8_tokens=True)
    kinds = Counter(node.op_type for node in ir.load(folder / "model.onnx").graph)
    assert (kinds["QGemm"], kinds["MatMulNBits"]) == (len(names), 0)
    with_int8_weights(model)
    assert apart(folder, model) < NOISE


def test_one_corrupt_scale_is_found(tmp_path: Path, build: Callable[..., Path]) -> None:
    # The twin of the test above.
    model = tiny_model("llama-gqa", tmp_path / "hf")
    names = {node.name: 4 for node in ir.load(build(tmp_path / "hf") / "model.onnx").graph if node.op_type == "MatMul"}
    names.pop(HEAD)
    folder = build(tmp_path / "hf", names, int8_tokens=True)
    with_int8_weights(model)
    assert apart(folder, model) < NOISE
    scales = ir.load(folder / "model.onnx").graph.initializers["model.layers.1.mlp.down_proj.MatMul.weight_int8_scales"]
    with (folder / "model.onnx.data").open("r+b") as file:
        file.seek(scales.const_value.offset + 20)
        (old,) = struct.unpack("<f", file.read(4))
        file.seek(-4, 1)
        file.write(struct.pack("<f", 5 * old))
    assert apart(folder, model) > NOISE


def test_products_of_the_same_activations_share_their_scales(tmp_path: Path, build: Callable[..., Path]) -> None:
    tiny_model("llama-gqa", tmp_path / "hf")
    layer = ("attn/qkv", "attn/o", "mlp/gate", "mlp/up", "mlp/down")
    names = {f"/model/layers.0/{part}_proj/MatMul": 4 for part in layer}
    graph = ir.load(build(tmp_path / "hf", names, int8_tokens=True) / "model.onnx").graph
    kinds = Counter(node.op_type for node in graph)
    assert (kinds["QGemm"], kinds["QuantizeLinear"]) == (5, 4)  # gate and up read one norm
    assert "/model/layers.1/mlp/up_proj/MatMul" in {node.name for node in graph if node.op_type == "MatMul"}
