"""pytorch_model.bin: equal to what torch reads, and nothing in it is run."""

from __future__ import annotations

import json
import os
import pickle
import re
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coldpress.artifacts.pickled import PickleFile
from coldpress.artifacts.tensors import TensorSet
from coldpress.errors import CheckpointError

BASE = torch.arange(60, dtype=torch.float32).reshape(12, 5)
TENSORS = {
    "plain": BASE,
    "half": BASE.half(),
    "bf16": (BASE / 7).bfloat16(),
    "double": BASE.double(),
    "int32": BASE.int(),
    "int64": BASE.long(),
    "int16": BASE.short(),
    "int8": BASE.to(torch.int8),
    "uint8": BASE.to(torch.uint8),
    "bool": BASE % 2 == 0,
    "window": BASE[3:9, 1:4],
    "transposed": BASE.T,
    "every_second": BASE[::2, ::2],
    "expanded": torch.ones(5).expand(4, 5),
    "cube": torch.arange(24.0).reshape(2, 3, 4).permute(1, 2, 0),
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 4),
    "parameter": torch.nn.Parameter(BASE + 1),
}


def numbers(tensor: torch.Tensor) -> np.ndarray:
    found: np.ndarray = tensor.detach().to(torch.float64).numpy()
    return found


def save(path: Path, value: Any) -> Path:
    torch.save(value, path)
    return path


def test_equals_torch(tmp_path: Path) -> None:
    save(tmp_path / "pytorch_model.bin", OrderedDict(TENSORS))
    expected = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    with PickleFile(tmp_path / "pytorch_model.bin") as file:
        assert {info.name: (info.dtype, info.shape) for info in file.infos()} == {
            name: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for name, tensor in expected.items()
        }
        for name, tensor in expected.items():
            array = file.read(name)
            assert array.dtype.name == file.info(name).dtype
            np.testing.assert_array_equal(array.astype(np.float64), numbers(tensor))
            if tensor.dim():
                for start, stop in ((0, 1), (1, 3), (2, 99)):
                    np.testing.assert_array_equal(
                        file.read(name, start, stop).astype(np.float64), numbers(tensor[start:stop])
                    )


def test_a_state_dict_of_a_module(tmp_path: Path) -> None:
    """It carries metadata as an attribute, and a tied weight is one storage."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    module[1].weight = module[0].weight
    save(tmp_path / "pytorch_model.bin", module.state_dict())
    with TensorSet.open(tmp_path) as tensors:
        for name, tensor in module.state_dict().items():
            np.testing.assert_array_equal(tensors.read(name), tensor.numpy())


def test_arrays_outlive_the_file_and_cannot_be_written(tmp_path: Path) -> None:
    with PickleFile(save(tmp_path / "x.bin", {"a": BASE, "b": BASE.T})) as file:
        arrays = [file.read("a"), file.read("b")]
    np.testing.assert_array_equal(arrays[0], BASE.numpy())
    for array in arrays:
        with pytest.raises(ValueError, match="read-only"):
            array[0, 0] = 1


def test_shards(tmp_path: Path) -> None:
    save(tmp_path / "pytorch_model-00001-of-00002.bin", {"a": BASE})
    save(tmp_path / "pytorch_model-00002-of-00002.bin", {"b": BASE.half()})
    index = {"weight_map": {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with TensorSet.open(tmp_path) as tensors:
        assert sorted(info.name for info in tensors.infos()) == ["a", "b"]
        np.testing.assert_array_equal(tensors.read("b", 2, 4), BASE.half().numpy()[2:4])
    index["weight_map"]["c"] = "pytorch_model-00001-of-00002.bin"
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="1 tensors are not in the file"):
        TensorSet.open(tmp_path)


def test_safetensors_are_preferred(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save(tmp_path / "pytorch_model.bin", {"pickled": BASE})
    save_file({"safe": BASE.numpy()}, tmp_path / "model.safetensors")
    with TensorSet.open(tmp_path) as tensors:
        assert [info.name for info in tensors.infos()] == ["safe"]


def test_reading_takes_no_memory_of_its_own(tmp_path: Path) -> None:
    save(tmp_path / "x.bin", {"big": torch.ones(1 << 14, 1 << 8)})
    tracemalloc.start()
    try:
        with PickleFile(tmp_path / "x.bin") as file:
            total = sum(float(file.read("big", at, at + 256).sum()) for at in range(0, 1 << 14, 256))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert total == 1 << 22
    assert peak < 1 << 20  # of 16 MB


class Runs:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def test_a_malicious_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    save(tmp_path / "x.bin", {"a": BASE, "b": Runs(os.mkdir, str(mark))})
    with pytest.raises(CheckpointError, match=r"asks for (posix|nt)\.mkdir.*not run"):
        PickleFile(tmp_path / "x.bin")
    assert not mark.exists()
    torch.load(tmp_path / "x.bin", weights_only=False)  # the twin: whoever runs it is harmed
    assert mark.exists()


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Runs(eval, "1"), r"__builtin__\.eval"),
        (Runs(getattr, 1, "real"), r"__builtin__\.getattr"),
        (complex(1, 2), "complex"),
    ],
)
def test_no_other_name_is_looked_up(value: Any, name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=name):
        PickleFile(save(tmp_path / "x.bin", {"a": BASE, "b": value}))


def rewritten(source: Path, target: Path, change: dict[str, bytes | None], compression: int = 0) -> Path:
    """The archive with entries replaced, or left out where None."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for entry in old.namelist():
            data = change.get(entry.partition("/")[2], old.read(entry))
            if data is not None:
                new.writestr(entry, data)
    return target


def test_a_record_cannot_be_changed_after_it_was_made(tmp_path: Path) -> None:
    """BUILD sets attributes of what was made: here a storage that is longer than its bytes."""
    save(tmp_path / "x.bin", {"a": BASE})
    with zipfile.ZipFile(tmp_path / "x.bin") as archive:
        (name,) = [entry for entry in archive.namelist() if entry.endswith("data.pkl")]
        data = archive.read(name)
    place = data.rindex(b"R") + 1
    state = pickle.dumps({"offset": 1 << 40}, protocol=2)[2:-1]
    broken = rewritten(tmp_path / "x.bin", tmp_path / "y.bin", {"data.pkl": data[:place] + state + b"b" + data[place:]})
    with pytest.raises(CheckpointError, match="ends at element"):
        PickleFile(broken)


def test_damage(tmp_path: Path) -> None:
    good = save(tmp_path / "x.bin", {"a": BASE, "b": BASE.half()})
    data = good.read_bytes()
    cases = {
        "cut": (data[: len(data) // 2], "no file of torch.save"),
        "empty": (b"", "no file of torch.save"),
        "text": (b"version https://git-lfs.github.com/spec/v1\n", "no file of torch.save"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / f"{name}.bin").write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            PickleFile(tmp_path / f"{name}.bin")
    changes: list[tuple[dict[str, bytes | None], str]] = [
        ({"data/0": None}, "lacks the storage 0"),
        ({"data/0": b"short"}, "storage 0 should take 240 bytes"),
        ({"byteorder": b"big"}, "big-endian"),
        ({"data.pkl": b"\x80\x02}."}, "holds no state dict"),
        ({"data.pkl": b"\x80\x02garbage"}, "no file of torch.save"),
        ({"data.pkl": pickle.dumps({"model": {"a": 1}}, 2)}, "holds no state dict"),
    ]
    for number, (change, message) in enumerate(changes):
        with pytest.raises(CheckpointError, match=message):
            PickleFile(rewritten(good, tmp_path / f"changed{number}.bin", change))
    with pytest.raises(CheckpointError, match="compressed"):
        PickleFile(rewritten(good, tmp_path / "small.bin", {}, zipfile.ZIP_DEFLATED))


def test_the_old_format_is_refused_with_the_way_out(tmp_path: Path) -> None:
    torch.save({"a": BASE}, tmp_path / "x.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=re.escape("before 1.6")) as caught:
        PickleFile(tmp_path / "x.bin")
    assert "save_pretrained" in (caught.value.hint or "")
