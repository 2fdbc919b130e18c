"""Codes of quantized checkpoints in MatMulNBits: every one of them, and what the kernel makes of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.torch import load_file, save_file

from coldpress.artifacts.arch import Rows
from coldpress.artifacts.quantized import Checkpoint, agreed_packing, open_checkpoint
from coldpress.artifacts.stored import Packing
from coldpress.errors import CheckpointError
from coldpress.graph.ops import MICROSOFT, GraphWriter
from coldpress.graph.taken import ColumnOrder, TakenMatrix
from coldpress.graph.weights import DataFile
from oracles.stored import CASES, Case, Grid, as_torch, store

TAKEN = [name for name in CASES if not name.startswith(("fp8", "nf4"))]
K = 192
SIZES = {"q": 64, "k": 32, "v": 32}


def opened(folder: Path, case: Case, seed: int = 0) -> tuple[Checkpoint, dict[str, Grid]]:
    """q, k and v that read one input, as one tool quantized them."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(K) // (K if case.group == -1 else case.group)
    tensors: dict[str, np.ndarray] = {}
    grids = {}
    for name, n in SIZES.items():
        stored, grids[name] = store(case, name, rng.normal(0, 1, (n, K)).astype(np.float32), order)
        tensors |= stored
    save_file({name: as_torch(array) for name, array in tensors.items()}, folder / "model.safetensors")
    return open_checkpoint(folder, {"quantization_config": case.settings()}), grids


def taken(source: Checkpoint, parts: tuple[Rows, ...], io: ir.DataType = ir.DataType.FLOAT) -> TakenMatrix:
    packing = agreed_packing(source.packings, [part.tensor for part in parts])
    assert isinstance(packing, Packing), packing
    return TakenMatrix("qkv", source, parts, K, packing, io)


def whole() -> tuple[Rows, ...]:
    return tuple(Rows(f"{name}.weight", 0, n) for name, n in SIZES.items())


def code_of(data: np.ndarray, place: int, bits: int) -> int:
    """One code of a row of bytes."""
    if bits == 8:
        return int(data[place])
    return (int(data[place // 2]) >> (4 * (place % 2))) & 15


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize("step", [13, 128])
def test_every_code_scale_and_zero_point(name: str, step: int, tmp_path: Path) -> None:
    case = CASES[name]
    source, grids = opened(tmp_path, case)
    with source:
        weight = taken(source, whole())
        bits, size = weight.packing.bits, weight.packing.block_size
        pieces = [weight.make(start, min(start + step, weight.rows)) for start in range(0, weight.rows, step)]
        made = [np.concatenate(arrays) for arrays in zip(*pieces, strict=True)]
        for place, array in zip(weight.places, made, strict=True):
            assert array.shape == place.shape
            assert array.dtype == place.dtype.numpy()
        orders = {part: source.order(f"{part}.weight") for part in SIZES}
    codes, scales = made[0].reshape(128, -1), made[1]
    compared, row = 0, 0
    for part, grid in grids.items():
        order = orders[part]
        columns = np.arange(K) if order is None else order
        if case.act_order:
            assert list(grid.group_of[columns]) == sorted(grid.group_of)
        for own in range(len(grid.codes)):
            for place in range(K):
                column, block = columns[place], place // size
                group = grid.group_of[column]
                assert code_of(codes[row], place, bits) == grid.codes[own, column]
                assert scales[row, block] == np.float32(grid.scales[own, group])
                zero = code_of(made[2][row], block, bits) if len(made) == 3 else 1 << (bits - 1)
                assert zero == grid.zeros[own, group]
                compared += 1
            row += 1
    assert compared == 128 * K
    assert (len(made) == 2) == case.symmetric


def run(weight: TakenMatrix, folder: Path, x: np.ndarray) -> np.ndarray:
    """y = x W^T in ONNX Runtime, in float32."""
    import onnxruntime

    data = DataFile()
    graph = GraphWriter(data)
    value = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(("rows", K)))
    fed = value
    if weight.packing.order:
        (order,) = graph.weight(ColumnOrder(weight.tensors, weight.parts[0].tensor, weight.packing.order, K))
        fed = graph.op("Gather", [value, order], name="gather", axis=-1)
    y = graph.op(
        "MatMulNBits", [fed, *graph.weight(weight)], name="product", domain=MICROSOFT, K=K, N=weight.n,
        bits=weight.packing.bits, block_size=weight.packing.block_size, accuracy_level=1,
    )  # fmt: skip
    y.type, y.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(("rows", weight.n))
    data.write(folder, threads=1, budget_bytes=1 << 17)
    ir.save(graph.model([value], [y], producer=("test", ""), metadata={}), folder / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(None, {"x": x})[0]
    return found


@pytest.mark.parametrize("name", TAKEN)
def test_the_kernel_multiplies_with_the_dequantized_matrix(name: str, tmp_path: Path) -> None:
    x = np.random.default_rng(5).normal(0, 1, (3, K)).astype(np.float32)
    source, grids = opened(tmp_path, CASES[name])
    with source:
        y = run(taken(source, whole()), tmp_path, x)
    expected = x.astype(np.float64) @ np.concatenate([grid.values() for grid in grids.values()]).T
    # Sums of 192 products of about 1 in float32.
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("tensor", ["k.qweight", "k.qzeros", "k.scales", "k.g_idx"])
def test_one_changed_number_is_found(tensor: str, tmp_path: Path) -> None:
    """The twin: whatever is stored changes the product."""
    case = CASES["gptq-4-order-asymmetric"]
    source, grids = opened(tmp_path, case)
    source.close()
    tensors = load_file(tmp_path / "model.safetensors")
    if tensor == "k.g_idx":
        other = int((tensors[tensor] != tensors[tensor][0]).nonzero()[0])
        tensors[tensor][[0, other]] = tensors[tensor][[other, 0]]
    else:
        tensors[tensor][1, 2] = tensors[tensor][1, 2] ^ 0x300 if tensor != "k.scales" else tensors[tensor][1, 2] * 2
    save_file(tensors, tmp_path / "model.safetensors")
    x = np.random.default_rng(5).normal(0, 1, (3, K)).astype(np.float32)
    with open_checkpoint(tmp_path, {"quantization_config": case.settings()}) as changed:
        if tensor == "k.g_idx":  # another order than that of q and v
            assert "packed differently" in str(agreed_packing(changed.packings, ["q.weight", "k.weight"]))
            return
        y = run(taken(changed, whole()), tmp_path, x)
    expected = x.astype(np.float64) @ np.concatenate([grid.values() for grid in grids.values()]).T
    assert np.abs(y - expected).max() > 1e-2


def test_windows_of_a_stored_matrix(tmp_path: Path) -> None:
    """Gate and up of Phi-3, query, key and value of others are rows of one tensor."""
    source, _ = opened(tmp_path, CASES["awq"])
    with source:
        all_rows = taken(source, whole()).make(0, 128)
        some = taken(source, (Rows("q.weight", 5, 20), Rows("v.weight", 3, 7)))
        assert some.n == 27
        for start, stop in ((0, 27), (0, 20), (18, 23), (26, 27)):
            rows = [*range(5, 25), *range(99, 106)][start:stop]
            for found, expected in zip(some.make(start, stop), all_rows, strict=True):
                np.testing.assert_array_equal(found, expected[rows])


def test_scales_in_float16_are_those_of_the_file(tmp_path: Path) -> None:
    source, grids = opened(tmp_path, CASES["gptq-4"])
    with source:
        scales = taken(source, whole(), ir.DataType.FLOAT16).make(0, 128)[1]
    np.testing.assert_array_equal(scales, np.concatenate([grid.scales for grid in grids.values()]))
    assert scales.dtype == np.float16


@pytest.mark.parametrize("value", [np.inf, np.nan, 1e30])
def test_a_scale_that_is_not_finite_is_named(value: float, tmp_path: Path) -> None:
    case = CASES["packed-8"]
    source, _ = opened(tmp_path, case)
    source.close()
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["k.weight_scale"][7, 2] = value
    save_file(tensors, tmp_path / "model.safetensors")
    with (
        open_checkpoint(tmp_path, {"quantization_config": case.settings()}) as changed,
        pytest.raises(CheckpointError, match=r"row 7 of k\.weight has a scale that is not finite in float16"),
    ):
        taken(changed, whole(), ir.DataType.FLOAT16).make(60, 128)
