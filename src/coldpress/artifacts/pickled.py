"""`pytorch_model.bin`: the tensors of a pickled state dict, read without torch and without running what it holds.

    file = zip archive, every entry stored as it is
           ROOT/data.pkl   the state dict; a tensor stands there as (storage, offset, shape, strides)
           ROOT/data/KEY   the bytes of one storage
           ROOT/byteorder  little or big; absent in older files, which are little

The pickle may name the few functions that a state dict consists of; they are replaced by ones of this module that make
plain records. Any other name is refused before it is looked up, so that no code of the file or of a library runs.
Format: torch/serialization.py (`_save`) and torch/_utils.py (`_rebuild_tensor_v2`).
"""

from __future__ import annotations

import collections
import math
import mmap
import os
import pickle
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from coldpress.artifacts.tensors import TensorInfo, numpy_dtype
from coldpress.errors import CheckpointError

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["PickleFile"]

_STORAGES = {
    "BoolStorage": "bool",
    "ByteStorage": "uint8",
    "CharStorage": "int8",
    "ShortStorage": "int16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
}
_LOCAL_HEADER = 30
"""Bytes of a zip entry's own header, before its name and extra field."""
_RESAVE = "load it with torch.load(..., weights_only=True) and save the model with save_pretrained, as safetensors"
_TORN = "the file is damaged or its download was cut short; fetch it again"


@dataclass(frozen=True)
class _StorageType:
    dtype: str


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: str
    elements: int


@dataclass(frozen=True)
class _Tensor:
    """A view of a storage; offset and strides count elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _RefusedError(Exception):
    """The pickle asks for something that a state dict does not need."""


def _check(path: Path, name: str, tensor: _Tensor) -> None:
    """After the whole pickle was read: nothing in it can change a record any more."""
    storage = tensor.storage
    try:
        numbers = (tensor.offset, *tensor.shape, *tensor.strides, storage.elements)
        sound = (
            isinstance(storage, _Storage)
            and type(storage.key) is str
            and storage.dtype in _STORAGES.values()
            and all(type(number) is int and number >= 0 for number in numbers)
            and len(tensor.shape) == len(tensor.strides)
        )
    except (AttributeError, TypeError):
        sound = False
    if not sound:
        raise CheckpointError(f"{path}: {name!r} is malformed: {tensor!r}", hint=_TORN)
    last = _last(tensor, 0, tensor.shape[0] if tensor.shape else 1)
    if math.prod(tensor.shape) and last >= storage.elements:
        raise CheckpointError(
            f"{path}: {name!r} of shape {list(tensor.shape)} ends at element {last} of a storage of {storage.elements}",
            hint=_TORN,
        )


def _last(tensor: _Tensor, start: int, stop: int) -> int:
    """The element of the storage that comes last among rows `start` to `stop`."""
    if not tensor.shape:
        return tensor.offset
    inner = zip(tensor.shape[1:], tensor.strides[1:], strict=True)
    return tensor.offset + (stop - 1) * tensor.strides[0] + sum((size - 1) * stride for size, stride in inner)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch" and name in _STORAGES:
            return _StorageType(_STORAGES[name])
        # New functions for each file: a pickle could set attributes on them.
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, strides, *_: _Tensor(storage, offset, shape, strides)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        raise _RefusedError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage, key, _, elements = pid
        if kind != "storage" or not isinstance(storage, _StorageType):
            raise ValueError(f"a reference to {pid!r}")
        return _Storage(key, storage.dtype, elements)


_UNPICKLING = (
    pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, LookupError, ImportError, ArithmeticError,
    MemoryError, RecursionError,
)  # fmt: skip
"""What the unpickler raises on bytes that are no pickle."""


class PickleFile:
    """One file of pickled weights, open for reading, like `TensorFile`. Reads may come from several threads."""

    def __init__(self, path: Path) -> None:
        """Read the pickle and find each storage; raises CheckpointError."""
        self.path = path
        try:
            self._file: IO[bytes] = path.open("rb")
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be opened: {error.strerror}", hint="is the model complete?"
            ) from error
        try:
            self._tensors, self._starts = self._parse()
        except BaseException:
            self._file.close()
            raise

    def _parse(self) -> tuple[dict[str, _Tensor], dict[str, int]]:
        size, head = os.fstat(self._file.fileno()).st_size, self._file.read(4)
        if head[:1] == b"\x80":
            raise CheckpointError(
                f"{self.path} is in the format that torch wrote before 1.6, one pickle after the other; it is not read",
                hint=_RESAVE,
            )
        try:
            with zipfile.ZipFile(self._file) as archive:
                entries = {entry.filename: entry for entry in archive.infolist()}
                (pickled,) = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
                root = pickled.removesuffix("data.pkl")
                order = archive.read(f"{root}byteorder") if f"{root}byteorder" in entries else b"little"
                with archive.open(pickled) as stream:
                    found = _Unpickler(stream).load()
        except _RefusedError as error:
            raise CheckpointError(
                f"{self.path} asks for {error}, which no state dict needs; it was not run",
                hint="a pickle can run any code: take this model from elsewhere, as safetensors",
            ) from error
        except (zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError, struct.error, *_UNPICKLING) as error:
            raise CheckpointError(f"{self.path} is no file of torch.save: {error}", hint=_TORN) from error
        if order != b"little":
            raise CheckpointError(f"{self.path} holds {order.decode(errors='replace')}-endian numbers", hint=_RESAVE)
        tensors = {str(name): value for name, value in _items(found) if isinstance(value, _Tensor)}
        if not tensors:
            raise CheckpointError(
                f"{self.path} holds no state dict: its top level is a {type(found).__name__} without tensors",
                hint="a checkpoint of a training run has the weights one level deeper; save the model alone",
            )
        starts = {}
        for name, tensor in tensors.items():
            _check(self.path, name, tensor)
            key = tensor.storage.key
            # Views of one storage may name it with different types: each is measured.
            starts[key] = self._start(entries.get(f"{root}data/{key}"), tensor.storage, size)
        return tensors, starts

    def _start(self, entry: zipfile.ZipInfo | None, storage: _Storage, size: int) -> int:
        """Byte of the file where a storage starts."""
        if entry is None:
            raise CheckpointError(f"{self.path} lacks the storage {storage.key}", hint=_TORN)
        if entry.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(f"{self.path} is compressed, so rows cannot be read from it", hint=_RESAVE)
        self._file.seek(entry.header_offset)
        header = self._file.read(_LOCAL_HEADER)
        if len(header) < _LOCAL_HEADER or header[:4] != b"PK\x03\x04":
            raise CheckpointError(f"{self.path}: there is no entry at byte {entry.header_offset}", hint=_TORN)
        name, extra = struct.unpack("<HH", header[26:30])
        start: int = entry.header_offset + _LOCAL_HEADER + name + extra
        wanted = storage.elements * numpy_dtype(storage.dtype).itemsize
        if entry.file_size < wanted or start + wanted > size:
            raise CheckpointError(
                f"{self.path}: storage {storage.key} should take {wanted} bytes, there are "
                f"{min(entry.file_size, size - start)}",
                hint=_TORN,
            )
        return start

    def __enter__(self) -> PickleFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Arrays already read stay valid."""
        self._file.close()

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def infos(self) -> Iterator[TensorInfo]:
        return (TensorInfo.of(name, tensor.storage.dtype, tensor.shape) for name, tensor in self._tensors.items())

    def info(self, name: str) -> TensorInfo:
        tensor = self._find(name)
        return TensorInfo.of(name, tensor.storage.dtype, tensor.shape)

    def _find(self, name: str) -> _Tensor:
        if name not in self._tensors:
            raise CheckpointError(f"{self.path} has no tensor {name!r}")
        return self._tensors[name]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
        """A tensor, or rows `start` to `stop` of its first axis, as a read-only view of its own memory map.

        A transposed tensor comes as it lies: a view with its strides.
        """
        import numpy as np
        from numpy.lib.stride_tricks import as_strided

        tensor = self._find(name)
        dtype, shape, first = numpy_dtype(tensor.storage.dtype), tensor.shape, tensor.offset
        if shape:
            stop = shape[0] if stop is None else min(stop, shape[0])
            shape = (max(stop - start, 0), *shape[1:])
            first += start * tensor.strides[0]
        if math.prod(shape) == 0:
            return np.empty(shape, dtype)
        count = _last(tensor, start, stop or 1) + 1 - first
        offset = self._starts[tensor.storage.key] + first * dtype.itemsize
        skip = offset % mmap.ALLOCATIONGRANULARITY
        window = mmap.mmap(
            self._file.fileno(), skip + count * dtype.itemsize, access=mmap.ACCESS_READ, offset=offset - skip
        )
        flat = np.frombuffer(window, dtype, count, skip)
        return as_strided(flat, shape, [stride * dtype.itemsize for stride in tensor.strides], writeable=False)


def _items(found: Any) -> list[tuple[Any, Any]]:
    return list(found.items()) if isinstance(found, dict) else []
