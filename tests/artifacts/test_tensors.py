"""Safetensors: what is read, what is written, and every kind of damage."""

from __future__ import annotations

import json
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from coldpress.artifacts.tensors import TensorFile, TensorInfo, TensorSet, numpy_dtype, write_safetensors
from coldpress.errors import CheckpointError

ARRAYS: dict[str, np.ndarray] = {
    "a.weight": np.arange(60, dtype=np.float32).reshape(12, 5),
    "b.bias": np.arange(7, dtype=np.float16),
    "c": np.arange(24, dtype=np.int64).reshape(2, 3, 4),
    "scalar": np.array(3.5, np.float64),
    "empty": np.zeros((0, 4), np.float32),
}


def raw_file(path: Path, header: Any, data: bytes, *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(begin: int = 0, end: int = 16, shape: tuple[int, ...] = (4,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_reads_what_the_reference_library_wrote(tmp_path: Path) -> None:
    save_file(ARRAYS, tmp_path / "x.safetensors", {"format": "pt"})
    with TensorFile(tmp_path / "x.safetensors") as file:
        assert file.metadata == {"format": "pt"}
        assert {info.name: (info.dtype, info.shape, info.nbytes) for info in file.infos()} == {
            name: (array.dtype.name, array.shape, array.nbytes) for name, array in ARRAYS.items()
        }
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(file.read(name), array)


def test_reads_rows(tmp_path: Path) -> None:
    save_file(ARRAYS, tmp_path / "x.safetensors")
    with TensorFile(tmp_path / "x.safetensors") as file:
        for start, stop in ((0, 3), (3, 12), (11, 12), (5, 5), (10, 99)):
            np.testing.assert_array_equal(file.read("a.weight", start, stop), ARRAYS["a.weight"][start:stop])
        np.testing.assert_array_equal(file.read("c", 1), ARRAYS["c"][1:])


def test_arrays_outlive_the_file_and_cannot_be_written(tmp_path: Path) -> None:
    save_file(ARRAYS, tmp_path / "x.safetensors")
    with TensorFile(tmp_path / "x.safetensors") as file:
        array = file.read("a.weight")
    np.testing.assert_array_equal(array, ARRAYS["a.weight"])
    with pytest.raises(ValueError, match="read-only"):
        array[0, 0] = 1


def test_reading_takes_no_memory_of_its_own(tmp_path: Path) -> None:
    info = TensorInfo.of("big", "float32", (1 << 22,))
    write_safetensors(tmp_path / "x.safetensors", [(info, lambda: np.ones(1 << 22, np.float32))])
    tracemalloc.start()
    try:
        with TensorFile(tmp_path / "x.safetensors") as file:
            total = sum(float(file.read("big", at, at + 65536).sum()) for at in range(0, 1 << 22, 65536))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert total == 1 << 22
    assert peak < 1 << 20  # of 16 MB


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_types_that_numpy_lacks(tmp_path: Path, dtype: str) -> None:
    array = np.linspace(-2, 2, 12).reshape(3, 4).astype(getattr(ml_dtypes, dtype))
    write_safetensors(tmp_path / "x.safetensors", [(TensorInfo.of("w", dtype, (3, 4)), lambda: array)])
    with TensorSet.open(tmp_path / "x.safetensors") as tensors:
        assert tensors.info("w").dtype == dtype
        np.testing.assert_array_equal(tensors.read("w"), array)


def test_the_reference_library_reads_what_is_written(tmp_path: Path) -> None:
    listed = [(TensorInfo.of(name, a.dtype.name, a.shape), lambda a=a: a) for name, a in ARRAYS.items()]
    write_safetensors(tmp_path / "x.safetensors", listed, {"made by": "test"})
    loaded = load_file(tmp_path / "x.safetensors")
    assert list(loaded.keys() ^ ARRAYS.keys()) == []
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(loaded[name], array)
    (length,) = struct.unpack("<Q", (tmp_path / "x.safetensors").read_bytes()[:8])
    assert length % 8 == 0


def test_the_writer_asks_for_one_tensor_at_a_time(tmp_path: Path) -> None:
    tracemalloc.start()
    try:
        infos = [TensorInfo.of(f"t{i}", "float32", (1 << 19,)) for i in range(8)]
        write_safetensors(tmp_path / "x.safetensors", [(info, lambda: np.ones(1 << 19, np.float32)) for info in infos])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2.5 * (1 << 21)  # one tensor is 2 MB, all are 16


def test_a_producer_must_keep_its_word_and_leaves_nothing_behind(tmp_path: Path) -> None:
    info = TensorInfo.of("w", "float32", (3,))
    for wrong in (np.zeros(4, np.float32), np.zeros(3, np.float64)):
        with pytest.raises(ValueError, match="announced as float32"):
            write_safetensors(tmp_path / "x.safetensors", [(info, lambda wrong=wrong: wrong)])
    with pytest.raises(ValueError, match="two tensors"):
        write_safetensors(tmp_path / "x.safetensors", [(info, lambda: np.zeros(3, np.float32))] * 2)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="no dtype"):
        TensorInfo.of("w", "float4", (3,))


DAMAGE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "empty file": (lambda p: raw_file(p, b"", b"", length=0).with_name(_cut(p, 3)), "8 bytes"),
    "header beyond the file": (lambda p: raw_file(p, {"w": entry()}, bytes(16), length=1 << 40), "header should take"),
    "header not JSON": (lambda p: raw_file(p, b"{not json", bytes(16)), "not JSON"),
    "header a list": (lambda p: raw_file(p, [1], b""), "JSON object"),
    "metadata a list": (lambda p: raw_file(p, {"__metadata__": ["pt"], "w": entry()}, bytes(16)), "__metadata__ in"),
    "truncated data": (lambda p: raw_file(p, {"w": entry()}, bytes(15)), "the file at byte"),
    "bytes after the end": (lambda p: raw_file(p, {"w": entry()}, bytes(20)), "the tensors end at"),
    "gap": (lambda p: raw_file(p, {"a": entry(), "b": entry(20, 36)}, bytes(36)), "gap after 'a'"),
    "overlap": (lambda p: raw_file(p, {"a": entry(), "b": entry(8, 24)}, bytes(24)), "overlaps 'a'"),
    "wrong size": (lambda p: raw_file(p, {"w": entry(0, 12)}, bytes(12)), "takes 16 bytes"),
    "unknown dtype": (lambda p: raw_file(p, {"w": entry(dtype="F4")}, bytes(16)), "dtype 'F4'"),
    "negative shape": (lambda p: raw_file(p, {"w": entry(shape=(-4,))}, bytes(16)), "whole numbers"),
    "no offsets": (lambda p: raw_file(p, {"w": {"dtype": "F32", "shape": [4]}}, bytes(16)), "malformed"),
}


def _cut(path: Path, size: int) -> str:
    path.write_bytes(path.read_bytes()[:size])
    return path.name


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_at_once_and_named(tmp_path: Path, damage: str) -> None:
    make, words = DAMAGE[damage]
    path = make(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=words) as caught:
        TensorSet.open(tmp_path)
    assert str(path) in str(caught.value)


def shards(folder: Path, weight_map: dict[str, str]) -> None:
    save_file({"a": np.ones(2, np.float32)}, folder / "one.safetensors")
    save_file({"b": np.ones(3, np.float32)}, folder / "two.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards_read_as_one(tmp_path: Path) -> None:
    shards(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    with TensorSet.open(tmp_path) as tensors:
        assert [info.name for info in tensors.infos()] == ["a", "b"]
        assert "b" in tensors
        assert "c" not in tensors
        assert tensors.read("b").shape == (3,)
        with pytest.raises(CheckpointError, match="no tensor 'c'"):
            tensors.read("c")


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        ({"a": "one.safetensors", "b": "gone.safetensors"}, "gone.safetensors"),
        ({"a": "one.safetensors", "b": "one.safetensors"}, "'b' in one.safetensors"),
        ({"a": "../one.safetensors"}, "outside its own folder"),
        ({"a": "/one.safetensors"}, "outside its own folder"),
    ],
)
def test_an_index_must_be_true(tmp_path: Path, weight_map: dict[str, str], words: str) -> None:
    shards(tmp_path, weight_map)
    with pytest.raises(CheckpointError, match=words):
        TensorSet.open(tmp_path)


def test_the_single_file_goes_before_the_index_as_in_transformers(tmp_path: Path) -> None:
    shards(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    save_file({"a": np.full(2, 5, np.float32)}, tmp_path / "model.safetensors")
    with TensorSet.open(tmp_path) as tensors:
        assert [info.name for info in tensors.infos()] == ["a"]
        assert tensors.read("a").tolist() == [5, 5]


def test_the_pickled_single_file_goes_before_its_index(tmp_path: Path) -> None:
    torch.save({"a": torch.full((2,), 5.0)}, tmp_path / "pytorch_model.bin")
    torch.save({"a": torch.ones(2)}, tmp_path / "one.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "one.bin"}}))
    with TensorSet.open(tmp_path) as tensors:
        assert tensors.read("a").tolist() == [5, 5]


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has none of model\.safetensors, model\.safetensors\.index\.json"):
        TensorSet.open(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no file of torch\.save"):
        TensorSet.open(tmp_path)


def test_dtype_names() -> None:
    assert numpy_dtype("bfloat16") == np.dtype(ml_dtypes.bfloat16)
    assert numpy_dtype("int64") == np.int64
