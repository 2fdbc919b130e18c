"""The writer of the data file: memory, layout, errors, and what it needs to import."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from coldpress.artifacts.arch import Rows
from coldpress.artifacts.arch_config import arch_from_config
from coldpress.artifacts.tensors import TensorInfo, TensorSet, write_safetensors
from coldpress.errors import CheckpointError, DiskFullError
from coldpress.graph import weights
from coldpress.graph.decoder import build_decoder
from coldpress.graph.form import EMBEDDING, Form, Quantization, data_bytes, expert_nodes, products
from coldpress.graph.weights import ALIGNMENT, Cast, DataFile, Matrix, QuantizedMatrix, Transposed


def checkpoint(folder: Path, arrays: dict[str, np.ndarray]) -> TensorSet:
    listed = [
        (TensorInfo.of(name, array.dtype.name, array.shape), lambda array=array: array)
        for name, array in arrays.items()
    ]
    write_safetensors(folder / "model.safetensors", listed)
    return TensorSet.open(folder)


def whole(tensors: TensorSet, *names: str) -> Matrix:
    return Matrix(
        tensors, tuple(Rows(name, 0, tensors.info(name).shape[0]) for name in names), tensors.info(names[0]).shape[1]
    )


def read_back(folder: Path, data: DataFile, places: tuple[Any, ...]) -> list[np.ndarray]:
    content = (folder / data.name).read_bytes()
    return [
        np.frombuffer(content, place.dtype.numpy(), int(np.prod(place.shape)), place.offset).reshape(place.shape)
        for place in places
    ]


def test_stacked_rows_of_different_types_are_cut_anywhere(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    a = rng.standard_normal((7, 4)).astype(np.float32)
    b = rng.standard_normal((9, 4)).astype(ml_dtypes.bfloat16)
    with checkpoint(tmp_path, {"a": a, "b": b}) as tensors:
        matrix = Matrix(tensors, (Rows("a", 2, 5), Rows("b", 1, 6)), 4)
        expected = np.concatenate([a[2:], b[1:7].astype(np.float32)])
        assert matrix.dtype == "float32"
        for start in range(11):
            for stop in range(start + 1, 12):
                np.testing.assert_array_equal(matrix.rows(start, stop), expected[start:stop])


def test_a_source_of_rows_of_its_own_is_transposed_in_pieces(tmp_path: Path) -> None:
    a = np.ones((8, 4), ml_dtypes.bfloat16)
    delta = np.arange(32, dtype=np.float32).reshape(8, 4) / 1024
    with checkpoint(tmp_path, {"a": a}) as tensors:

        class Shifted:
            infos, __contains__ = tensors.infos, tensors.__contains__

            def info(self, name: str) -> TensorInfo:
                return TensorInfo.of(name, "float32", tensors.info(name).shape)

            def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
                shifted: np.ndarray = tensors.read(name, start, stop).astype(np.float32) + delta[start:stop]
                return shifted

        matrix = Matrix(Shifted(), (Rows("a", 0, 8),), 4)
        np.testing.assert_array_equal(matrix.rows(3, 6), 1 + delta[3:6])
        data = DataFile()
        places = data.add(Transposed("w", matrix, ir.DataType.FLOAT))
        data.write(tmp_path, threads=2, budget_bytes=64)
        np.testing.assert_array_equal(read_back(tmp_path, data, places)[0], (1 + delta).T)


@pytest.mark.parametrize("budget", [1, 5000, 1 << 20])
@pytest.mark.parametrize("threads", [1, 3])
def test_bytes_do_not_depend_on_budget_or_threads(tmp_path: Path, budget: int, threads: int) -> None:
    rng = np.random.default_rng(1)
    w = rng.standard_normal((37, 96)).astype(np.float32)
    with checkpoint(tmp_path, {"w": w}) as tensors:
        data, matrix = DataFile(), whole(tensors, "w")
        added = [
            data.add(Cast("cast", matrix, ir.DataType.BFLOAT16)),
            data.add(Transposed("transposed", matrix, ir.DataType.FLOAT)),
            data.add(QuantizedMatrix("q", matrix, 4, 32, False, 5, ir.DataType.FLOAT)),
        ]
        data.write(tmp_path, threads=threads, budget_bytes=budget)
        cast, transposed, codes, scales, zeros = (
            array for places in added for array in read_back(tmp_path, data, places)
        )
    from coldpress.kernels.quantize import quantize

    q = quantize(w, bits=4, block_size=32, symmetric=False, candidates=5)
    np.testing.assert_array_equal(cast, w.astype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(transposed, w.T)
    for got, expected in ((codes, q.codes), (scales, q.scales), (zeros, q.zeros)):
        np.testing.assert_array_equal(got, expected)
    assert all(place.offset % ALIGNMENT == 0 for places in added for place in places)


def test_memory_stays_within_the_budget(tmp_path: Path) -> None:
    info = TensorInfo.of("w", "bfloat16", (1 << 14, 1 << 11))
    write_safetensors(tmp_path / "model.safetensors", [(info, lambda: np.full(info.shape, 0.5, ml_dtypes.bfloat16))])
    budget = 8 << 20
    with TensorSet.open(tmp_path) as tensors:
        data = DataFile()
        for each in (
            QuantizedMatrix("q", whole(tensors, "w"), 4, 32, True, 1, ir.DataType.FLOAT),
            Cast("c", whole(tensors, "w"), ir.DataType.FLOAT),
            Transposed("t", whole(tensors, "w"), ir.DataType.FLOAT),
        ):
            data.add(each)
        QuantizedMatrix("q", whole(tensors, "w"), 4, 32, True, 1, ir.DataType.FLOAT).make(0, 1)  # compile first
        tracemalloc.start()
        try:
            data.write(tmp_path, threads=2, budget_bytes=budget)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < budget  # the matrix is 64 MB as it lies, 128 MB as float32


def test_the_size_that_a_plan_knows_is_the_size_of_the_file(tmp_path: Path) -> None:
    from oracles.decoders import TINY, tiny_model

    for number, name in enumerate(TINY):
        source = tmp_path / str(number)
        tiny_model(name, source)
        arch = arch_from_config(json.loads((source / "config.json").read_text()))
        four = dict.fromkeys((*(each for each, _ in products(arch)), *expert_nodes(arch)), Quantization(4))
        odd = dict.fromkeys(four, Quantization(4, 16, symmetric=False))
        for form in (
            Form("float32"),
            Form("float16", nodes={**odd, EMBEDDING: Quantization(8, 16, symmetric=False)}),
            Form("float32", nodes={**four, EMBEDDING: Quantization(4)}),
            Form("float32", exclude_embeds=True, exclude_lm_head=True),
        ):
            with TensorSet.open(source) as tensors:
                data = DataFile()
                model = build_decoder(arch, form, tensors, data)
            initializers = len(model.graph.initializers)
            assert data_bytes(arch, form) <= data.size <= data_bytes(arch, form) + ALIGNMENT * initializers, (
                name,
                form,
            )


def test_nan_is_named_with_tensor_and_row(tmp_path: Path) -> None:
    w = np.ones((50, 64), np.float32)
    w[41, 3] = np.nan
    with checkpoint(tmp_path, {"model.w": w}) as tensors:
        data = DataFile()
        data.add(QuantizedMatrix("q", whole(tensors, "model.w"), 4, 32, True, 1, ir.DataType.FLOAT))
        with pytest.raises(CheckpointError, match=r"row 41 of model\.w holds NaN"):
            data.write(tmp_path, threads=2, budget_bytes=64 * 16 * 10)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("target", [ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16])
@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_weights_that_are_not_quantized_must_be_finite_too(
    tmp_path: Path, stored: Any, target: ir.DataType, value: float
) -> None:
    w = np.ones((50, 64), stored)
    w[41, 3] = value
    with checkpoint(tmp_path, {"model.w": w, "v": w[:, 3].copy()}) as tensors:
        matrix, vector = whole(tensors, "model.w"), Matrix(tensors, (Rows("v", 0, 50),), 1)
        for weight in (Cast("c", matrix, target), Transposed("t", matrix, target), Cast("v", vector, target, True)):
            data = DataFile()
            data.add(weight)
            with pytest.raises(CheckpointError, match=rf"row 41 of {weight.matrix.name} holds NaN or infinity"):
                data.write(tmp_path, threads=2, budget_bytes=64 * 16 * 10)


def test_values_beyond_float16_are_refused(tmp_path: Path) -> None:
    with checkpoint(tmp_path, {"w": np.full((2, 2), 1e5, np.float32)}) as tensors:
        data = DataFile()
        data.add(Cast("w", whole(tensors, "w"), ir.DataType.FLOAT16))
        with pytest.raises(CheckpointError, match="float16 cannot"):
            data.write(tmp_path, threads=1)


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(weights, "_write_chunk", full)
    with checkpoint(tmp_path, {"w": np.ones((2, 2), np.float32)}) as tensors:
        data = DataFile()
        data.add(Cast("w", whole(tensors, "w"), ir.DataType.FLOAT))
        with pytest.raises(DiskFullError, match=r"takes 16 bytes"):
            data.write(tmp_path, threads=1)


def test_progress_ends_at_the_whole(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    with checkpoint(tmp_path, {"w": np.ones((64, 64), np.float32)}) as tensors:
        data = DataFile()
        data.add(Cast("w", whole(tensors, "w"), ir.DataType.FLOAT))
        data.write(
            tmp_path, threads=2, budget_bytes=64 * 16 * 8, progress=lambda done, total: seen.append((done, total))
        )
    assert len(seen) > 4
    assert seen[-1] == (64 * 64 * 4, data.size)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_building_never_imports_torch() -> None:
    program = (
        "import sys\n"
        "import coldpress.graph.decoder, coldpress.graph.genai, coldpress.passes.model_builder\n"
        "bad = {'torch', 'transformers', 'onnxruntime', 'safetensors'} & set(sys.modules)\n"
        "assert not bad, bad\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
