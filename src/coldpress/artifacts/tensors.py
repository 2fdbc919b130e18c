"""Safetensors files, read and written one tensor at a time.

    file = 8 bytes   little-endian length L of the header
           L bytes   JSON: name -> {dtype, shape, data_offsets: [begin, end]}; "__metadata__" holds strings
           rest      the data; offsets count from here and cover it without gap or overlap

A read maps only the bytes asked for and the map dies with the array, so resident memory is bounded by what the caller
holds, on every system. No torch: bf16 and fp8 arrays have the types of ml_dtypes. NaN is not looked for here.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Protocol

from coldpress.errors import CheckpointError, DiskFullError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["TensorFile", "TensorInfo", "TensorSet", "TensorSource", "numpy_dtype", "write_safetensors"]

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
PICKLED_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
MAX_HEADER = 100 << 20
"""The limit of the reference implementation."""

# code in the file -> (name of the dtype, bytes of an element)
_DTYPES: dict[str, tuple[str, int]] = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "U16": ("uint16", 2),
    "I16": ("int16", 2),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "U32": ("uint32", 4),
    "I32": ("int32", 4),
    "F32": ("float32", 4),
    "U64": ("uint64", 8),
    "I64": ("int64", 8),
    "F64": ("float64", 8),
}
_CODES = {name: (code, size) for code, (name, size) in _DTYPES.items()}
_TORN = "the file is damaged or its download was cut short; fetch it again"


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor."""

    name: str
    dtype: str
    """float32, bfloat16, float8_e4m3fn, int64 ..."""
    shape: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, name: str, dtype: str, shape: Iterable[int]) -> TensorInfo:
        """With `nbytes` computed; raises ValueError for a dtype that the format lacks."""
        shape = tuple(shape)
        if dtype not in _CODES:
            raise ValueError(f"safetensors has no dtype {dtype!r}; it has: {', '.join(_CODES)}")
        return cls(name, dtype, shape, math.prod(shape) * _CODES[dtype][1])


@dataclass(frozen=True)
class _Place:
    info: TensorInfo
    offset: int
    """Bytes from the start of the file."""


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy type (for bf16 and fp8 that of ml_dtypes) of a dtype name."""
    import numpy as np

    if name.startswith(("bfloat", "float8")):
        import ml_dtypes

        found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
        return found
    return np.dtype(name)


class TensorFile:
    """One safetensors file, open for reading. Reads may come from several threads."""

    def __init__(self, path: Path) -> None:
        """Parse and check the header; raises CheckpointError."""
        self.path = path
        self.metadata: Mapping[str, str] = {}
        try:
            self._file: IO[bytes] = path.open("rb")
        except OSError as error:
            pickled = path.with_suffix(".bin")
            if isinstance(error, FileNotFoundError) and pickled.is_file():
                raise CheckpointError(
                    f"{path} is missing, and {pickled.name} beside it, which is pickled, is not read in its place",
                    hint="load it where it was made and save it with save_pretrained(..., safe_serialization=True)",
                ) from error
            raise CheckpointError(
                f"{path} cannot be opened: {error.strerror}", hint="is the model complete?"
            ) from error
        try:
            self._places = self._parse()
        except BaseException:
            self._file.close()
            raise

    def _parse(self) -> dict[str, _Place]:
        size = os.fstat(self._file.fileno()).st_size
        if size < 8:
            raise CheckpointError(
                f"{self.path}: a safetensors file starts with 8 bytes, this one has {size}", hint=_TORN
            )
        (length,) = struct.unpack("<Q", self._file.read(8))
        if length > MAX_HEADER or length + 8 > size:
            raise CheckpointError(
                f"{self.path}: the header should take {length} bytes, the file has {size}", hint=_TORN
            )
        try:
            header = json.loads(self._file.read(length))
        except ValueError as error:
            raise CheckpointError(f"{self.path}: the header is not JSON: {error}", hint=_TORN) from error
        if not isinstance(header, dict):
            raise CheckpointError(f"{self.path}: the header must be a JSON object, got {type(header).__name__}")
        metadata = header.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict):
            raise CheckpointError(
                f"{self.path}: __metadata__ in the header must be a JSON object, got {metadata!r:.60}"
            )
        self.metadata = {str(key): str(value) for key, value in metadata.items()}
        start = 8 + length
        places = {name: self._place(str(name), entry, start) for name, entry in header.items()}
        _check_cover(self.path, places.values(), start, size)
        return places

    def _place(self, name: str, entry: Any, start: int) -> _Place:
        try:
            code, shape = str(entry["dtype"]), tuple(entry["shape"])
            begin, end = entry["data_offsets"]
            sound = all(type(value) is int and value >= 0 for value in (*shape, begin, end))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self.path}: the header's entry for {name!r} is malformed: {entry!r}") from error
        if not sound:
            raise CheckpointError(f"{self.path}: shape and offsets of {name!r} must be whole numbers >= 0: {entry!r}")
        if code not in _DTYPES:
            raise CheckpointError(
                f"{self.path}: {name!r} has dtype {code!r}; known are {', '.join(_DTYPES)}",
                hint="convert the checkpoint to one of these first",
            )
        dtype, width = _DTYPES[code]
        if end - begin != math.prod(shape) * width:
            raise CheckpointError(
                f"{self.path}: {name!r} of shape {list(shape)}, dtype {code}, takes {math.prod(shape) * width} bytes, "
                f"its offsets {begin}..{end} span {end - begin}",
                hint=_TORN,
            )
        return _Place(TensorInfo(name, dtype, shape, end - begin), start + begin)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Arrays already read stay valid."""
        self._file.close()

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def infos(self) -> Iterator[TensorInfo]:
        return (place.info for place in self._places.values())

    def info(self, name: str) -> TensorInfo:
        return self._find(name).info

    def _find(self, name: str) -> _Place:
        if name not in self._places:
            raise CheckpointError(f"{self.path} has no tensor {name!r}")
        return self._places[name]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
        """A tensor, or rows `start` to `stop` of its first axis, as a read-only array over its own memory map."""
        import numpy as np

        place = self._find(name)
        dtype, shape, offset = numpy_dtype(place.info.dtype), place.info.shape, place.offset
        if shape:
            stop = shape[0] if stop is None else min(stop, shape[0])
            row = math.prod(shape[1:]) * dtype.itemsize
            offset, shape = offset + start * row, (max(stop - start, 0), *shape[1:])
        count = math.prod(shape)
        if count == 0:
            return np.empty(shape, dtype)
        skip = offset % mmap.ALLOCATIONGRANULARITY
        window = mmap.mmap(
            self._file.fileno(), skip + count * dtype.itemsize, access=mmap.ACCESS_READ, offset=offset - skip
        )
        return np.frombuffer(window, dtype, count, skip).reshape(shape)


def _check_cover(path: Path, places: Iterable[_Place], start: int, size: int) -> None:
    """Tensors must cover the data from start to end, without gap or overlap."""
    position, before = start, "the header"
    for place in sorted(places, key=lambda place: (place.offset, place.info.nbytes)):
        name, end = place.info.name, place.offset + place.info.nbytes
        if end > size:
            raise CheckpointError(f"{path}: {name!r} ends at byte {end}, the file at byte {size}", hint=_TORN)
        if place.offset != position:
            fault = "overlaps" if place.offset < position else "leaves a gap after"
            raise CheckpointError(
                f"{path}: {name!r} starts at byte {place.offset} and {fault} {before}, which ends at {position}",
                hint=_TORN,
            )
        position, before = end, repr(name)
    if position != size:
        raise CheckpointError(f"{path}: the tensors end at byte {position}, the file at byte {size}", hint=_TORN)


class TensorSource(Protocol):
    """Tensors by name, wherever they come from: files, dequantized codes, a base with an adapter added."""

    def __contains__(self, name: object) -> bool: ...

    def infos(self) -> Iterator[TensorInfo]: ...

    def info(self, name: str) -> TensorInfo:
        """Raises CheckpointError for a name that is not there."""
        ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
        """The tensor, or rows `start` to `stop` of its first axis, in the dtype that `info` says. From any thread."""
        ...


class _File(TensorSource, Protocol):
    """A file of tensors: safetensors, or pickled."""

    @property
    def path(self) -> Path: ...

    def close(self) -> None: ...


class TensorSet:
    """The weights of a model: one file of safetensors or pickled weights, or several named by an index."""

    def __init__(self, files: Mapping[str, _File]) -> None:
        """`files`: the file of each tensor, by tensor name."""
        self._files = dict(files)

    @classmethod
    def open(cls, path: Path) -> TensorSet:
        """Open a file, an index, or a folder with either; raises CheckpointError.

        Of several in a folder it is the one that Transformers loads: safetensors first, the single file before the
        index (`_get_resolved_checkpoint_files` in modeling_utils.py).
        """
        if path.is_dir():
            names = (SINGLE_FILE, INDEX_FILE, *PICKLED_FILES)
            found = [path / name for name in names if (path / name).is_file()]
            if not found:
                raise CheckpointError(f"{path} has none of {', '.join(names)}", hint="is the download complete?")
            path = found[0]
        if path.suffix != ".json":
            file = _open_file(path)
            return cls({info.name: file for info in file.infos()})
        return cls(_open_shards(path))

    def __enter__(self) -> TensorSet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        for file in {id(file): file for file in self._files.values()}.values():
            file.close()

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def infos(self) -> Iterator[TensorInfo]:
        return (file.info(name) for name, file in self._files.items())

    def _file_of(self, name: str) -> _File:
        if name not in self._files:
            places = sorted({str(file.path) for file in self._files.values()})
            raise CheckpointError(f"no tensor {name!r} in {', '.join(places)}")
        return self._files[name]

    def info(self, name: str) -> TensorInfo:
        return self._file_of(name).info(name)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
        """See `TensorFile.read`."""
        return self._file_of(name).read(name, start, stop)


def _open_file(path: Path) -> _File:
    if path.suffix == ".bin":
        from coldpress.artifacts.pickled import PickleFile

        return PickleFile(path)
    return TensorFile(path)


def _open_shards(index: Path) -> dict[str, _File]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        wanted = {str(name): str(shard) for name, shard in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not an index with a weight_map: {error}", hint=_TORN) from error
    names = sorted(set(wanted.values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise CheckpointError(f"{index} names files outside its own folder: {', '.join(outside)}")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{index} names {len(names)} files, of which {len(missing)} are missing: {', '.join(missing)}",
            hint="is the download complete?",
        )
    shards: dict[str, _File] = {}
    try:
        for name in names:
            shards[name] = _open_file(index.parent / name)
        absent = [name for name, shard in wanted.items() if name not in shards[shard]]
        if absent:
            raise CheckpointError(
                f"{index}: {len(absent)} tensors are not in the file that the index names, "
                f"the first: {absent[0]!r} in {wanted[absent[0]]}",
                hint="index and files belong to different versions of the model",
            )
    except BaseException:
        for shard in shards.values():
            shard.close()
        raise
    return {name: shards[shard] for name, shard in wanted.items()}


def write_safetensors(
    path: Path,
    tensors: Iterable[tuple[TensorInfo, Callable[[], npt.NDArray[Any]]]],
    metadata: dict[str, str] | None = None,
) -> None:
    """Write a file tensor by tensor: each producer is called once, in order, and its array dropped after writing.

    The file appears under its name when it is complete and synced. Peak memory is one tensor. Raises ValueError when a
    producer yields another dtype or shape than announced, DiskFullError when space runs out.
    """
    listed = list(tensors)
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for info, _ in listed:
        if info.name in header:
            raise ValueError(f"two tensors are called {info.name!r}")
        begin, end = end, end + info.nbytes
        header[info.name] = {"dtype": _CODES[info.dtype][0], "shape": list(info.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for info, produce in listed:
                _write_array(file, info, produce())
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DiskFullError(f"no space left for {path}: it takes {8 + len(text) + end} bytes") from error
        raise
    finally:
        with suppress(OSError):
            part.unlink()


def _write_array(file: IO[bytes], info: TensorInfo, array: npt.NDArray[Any]) -> None:
    import numpy as np

    if array.dtype != numpy_dtype(info.dtype) or array.shape != info.shape:
        raise ValueError(
            f"{info.name!r} was announced as {info.dtype} {list(info.shape)}, "
            f"produced as {array.dtype} {list(array.shape)}"
        )
    if array.nbytes:
        file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
