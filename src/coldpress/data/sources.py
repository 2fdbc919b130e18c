"""Records of a data config: rows as they lie in files, or in a hub data set.

Local files that are plain text, JSON, CSV or Parquet are read directly (`readers`): importing `datasets` and copying
the rows into its cache takes over a second and leaves a copy behind. Hub data sets and compressed files go through it.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from coldpress.config.schema import AzureMLResource, DataConfig, LoadDataset
from coldpress.data.readers import READERS, Row, head_of
from coldpress.errors import DataError, MissingExtraError
from coldpress.registry import nearest

__all__ = ["BUNDLED_TEXT", "Records", "check_source", "files_of", "first_records", "read_records"]

BUNDLED_TEXT = "coldpress:parity_text.txt"
"""In data_files, the text that comes with Coldpress, wherever that is installed."""
FORMATS = {
    "json": "json", "jsonl": "json", "ndjson": "json",
    "csv": "csv", "tsv": "csv",
    "parquet": "parquet",
    "text": "text",
}  # fmt: skip
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")
_FIRST_ROWS, _FIRST_FILES = 20, 16
"""Looked at for a plan; where there are more files, none of them."""


@dataclass(frozen=True)
class Records:
    """Rows of one split, in file order."""

    rows: Sequence[Row] = field(repr=False)
    columns: tuple[str, ...]
    places: Sequence[str] = field(repr=False)
    """Where each row came from: `file:line`, or `file row n`."""
    origin: str = ""
    """The files or the hub name, for messages."""

    def __len__(self) -> int:
        return len(self.rows)

    def require(self, wanted: Sequence[str], used_by: str) -> None:
        """Raise DataError for every column of `wanted` that is not there."""
        missing = [name for name in wanted if name not in self.columns]
        if not missing:
            return
        close = {name: nearest(name, self.columns) for name in missing}
        said = ", ".join(f"{name!r} (did you mean {close[name]!r}?)" if close[name] else repr(name) for name in missing)
        raise DataError(
            f"{self.origin} has no column {said}, which {used_by} uses; it has: {', '.join(self.columns)}",
            hint="correct the name in the data config",
        )


def files_of(config: DataConfig) -> dict[str, Path]:
    """The local files behind a data config, named `split/position`; empty for a hub data set. Raises DataError."""
    load = config.load_dataset_config
    return {
        f"{split}/{position}": path
        for split, files in _files_by_split(load).items()
        for position, path in enumerate(files)
    }


def check_source(config: DataConfig) -> bool:
    """Raise DataError where a local file or the split is not there; reads no row. False of a hub data set."""
    load = config.load_dataset_config
    files = _files_by_split(load)
    if files:
        _parts_of(load.split, tuple(files), config.name)
    return bool(files)


def read_records(config: DataConfig) -> Records:
    """All rows of the split that the config names; raises DataError."""
    load = config.load_dataset_config
    files = _files_by_split(load)
    if not files or any(path.suffix in _COMPRESSED for paths in files.values() for path in paths):
        return _through_datasets(load, files)
    tables: dict[str, list[tuple[Row, str]]] = {}
    entries: list[tuple[Row, str]] = []
    for name, cut in _parts_of(load.split, tuple(files), config.name):
        if name not in tables:
            tables[name] = [entry for path in files[name] for entry in READERS[_format_of(load, path)](path)]
        entries += tables[name][cut.slice(len(tables[name]))]
    origin = ", ".join(str(path) for name in tables for path in files[name])
    if not entries:
        wanted = f" of the split {load.split!r}" if load.split else ""
        raise DataError(f"{origin} holds no rows{wanted}", hint="is it the right file?")
    return Records(
        rows=[row for row, _ in entries],
        columns=_columns(row for row, _ in entries),
        places=[place for _, place in entries],
        origin=origin,
    )


def first_records(config: DataConfig, enough: Sequence[Sequence[str]]) -> Records | None:
    """The first rows of local files, of which it is to be known whether they have one of these sets of columns.

    Columns that a row further down may have count. None where that is not known without reading everything, and of
    Parquet files that have enough. Raises DataError.
    """
    load = config.load_dataset_config
    files = _files_by_split(load)
    if not files:
        return None
    parts = _parts_of(load.split, tuple(files), config.name)
    paths = list(dict.fromkeys(path for name, _ in parts for path in files[name]))
    if any(cut.start for _, cut in parts) or len(paths) > _FIRST_FILES or any(p.suffix in _COMPRESSED for p in paths):
        return None
    heads = []
    for path in paths:
        head = head_of(path, _format_of(load, path), _FIRST_ROWS, enough)
        if head is None:
            return None
        heads.append(head)
    columns = tuple(dict.fromkeys(name for head in heads for name in head.columns))
    if not any(set(names) <= set(columns) for names in enough):
        wanted = dict.fromkeys(name for names in enough for name in names if name not in columns)
        columns += tuple(name for name in wanted if any(head.may_have(name) for head in heads))
    rows = [entry for head in heads for entry in head.rows]
    return Records([row for row, _ in rows], columns, [place for _, place in rows], ", ".join(map(str, paths)))


def _columns(rows: Iterator[Row]) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for row in rows:
        found.update(dict.fromkeys(row))
    return tuple(found)


def _files_by_split(load: LoadDataset) -> dict[str, list[Path]]:
    files = load.data_files
    if isinstance(files, AzureMLResource):
        raise DataError(
            f"the data lies in Azure ML ({files.type}), which is not reached from here",
            hint="download the file and give its path as data_files",
        )
    if files is None:
        if load.data_name in FORMATS:
            raise DataError(
                f"data_name {load.data_name!r} is a file format, so data_files must name the files",
                hint='add "data_files": "path/to/file"',
            )
        return _folder_files(Path(load.data_name)) if Path(load.data_name).is_absolute() else {}
    if load.data_name not in FORMATS and not Path(load.data_name).is_absolute():
        return {}  # files inside a hub data set
    by_split = files if isinstance(files, Mapping) else {"train": files}
    return {
        str(split): [path for one in ([given] if isinstance(given, str) else given) for path in _expand(one)]
        for split, given in by_split.items()
    }


def _folder_files(folder: Path) -> dict[str, list[Path]]:
    """Files of a data folder: `train.jsonl`, `test.jsonl` ... are splits; with other names all are `train`."""
    if folder.is_file():
        return {"train": [folder]}
    found = sorted(path for path in folder.glob("*") if path.suffix.lstrip(".") in {*FORMATS, "txt"})
    if not found:
        raise DataError(f"{folder} has no json, jsonl, csv, parquet or txt file", hint="check data_name")
    splits: dict[str, list[Path]] = {}
    for path in found:
        known = re.match(r"(train|validation|valid|val|dev|test)\b", path.stem)
        splits.setdefault(known.group(1) if known else "train", []).append(path)
    return splits


def _expand(name: str) -> list[Path]:
    """A path, or the files that a glob pattern matches."""
    path = Path(name)
    if path.is_file():
        return [path]
    if any(sign in name for sign in "*?["):
        matches = glob.glob(name)  # noqa: PTH207 - absolute patterns, which Path.glob does not take
        found = sorted(Path(match) for match in matches if Path(match).is_file())
        if found:
            return found
        raise DataError(f"no file matches {name}", hint="relative paths start at the config file's folder")
    if path.is_dir():
        raise DataError(f"{name} is a folder; data_files names files", hint=f"use {name}/*.json, or data_name: {name}")
    neighbours = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
    close = nearest(path.name, neighbours)
    raise DataError(
        f"the data file {name} does not exist",
        hint=f"did you mean {close}?" if close else "relative paths start at the config file's folder",
    )


def _format_of(load: LoadDataset, path: Path) -> str:
    if load.data_name in FORMATS:
        return FORMATS[load.data_name]
    return FORMATS.get(path.suffix.lstrip("."), "text")


# -- splits -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cut:
    """A slice of a split, as `datasets` writes it: `[10:20]`, `[:10%]`, `[-100:]`."""

    start: str = ""
    stop: str = ""

    def slice(self, length: int) -> slice:
        return slice(_bound(self.start, length), _bound(self.stop, length))


def _bound(text: str, length: int) -> int | None:
    if not text:
        return None
    if text.endswith("%"):
        return round(length * int(text[:-1]) / 100)
    return int(text)


_SPLIT = re.compile(r"(?P<name>[\w.\-]+)(?:\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")


def _parts_of(split: str | None, known: Sequence[str], config: str) -> list[tuple[str, _Cut]]:
    if split is None:
        if len(known) == 1:
            return [(known[0], _Cut())]
        raise DataError(
            f"the data config {config} has several splits ({', '.join(known)}) and does not say which",
            hint='add "split" to load_dataset_config',
        )
    parts = []
    for text in split.split("+"):
        match = _SPLIT.fullmatch(text.strip())
        if match is None:
            raise DataError(
                f"{text.strip()!r} is not a split of the data config {config}",
                hint="write train, train[:10%], train[100:200] or train+test",
            )
        name = match["name"]
        if name not in known:
            close = nearest(name, known)
            raise DataError(
                f"the data config {config} has no split {name!r}; it has: {', '.join(known)}",
                hint=f"did you mean {close}?" if close else "local files without split names are the split 'train'",
            )
        parts.append((name, _Cut(match["start"] or "", match["stop"] or "")))
    return parts


# -- the datasets library ---------------------------------------------------------------------------------------------


def _through_datasets(load: LoadDataset, files: Mapping[str, Sequence[Path]]) -> Records:
    """Hub data sets and compressed files. Downloads go to the hub's own cache; rows of local files stay out of it."""
    import tempfile

    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError(
            f"the data set {load.data_name} needs the package datasets", hint="pip install 'coldpress[cpu]'"
        ) from error
    datasets.disable_progress_bars()
    origin = load.data_name if not files else ", ".join(str(path) for paths in files.values() for path in paths)
    local = {name: [str(path) for path in paths] for name, paths in files.items()}
    builder = FORMATS.get(load.data_name, load.data_name)
    with tempfile.TemporaryDirectory(prefix="coldpress-data-") as scratch:
        try:
            found = datasets.load_dataset(
                builder if builder in READERS or not files else "json",
                name=load.subset,
                data_dir=load.data_dir,
                data_files=local or load.data_files,
                split=load.split,
                revision=load.revision,
                cache_dir=scratch if files else None,
                keep_in_memory=bool(files) or None,
            )
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise DataError(
                f"the data set {origin} cannot be loaded: {error}",
                hint="check data_name, subset, split and data_files of load_dataset_config",
            ) from error
        if isinstance(found, dict):
            if len(found) > 1:
                raise DataError(
                    f"the data set {origin} has several splits ({', '.join(found)}) and the config does not say which",
                    hint='add "split" to load_dataset_config',
                )
            found = next(iter(found.values()))
        rows = found.to_list()
    if not rows:
        raise DataError(f"the data set {origin} holds no rows", hint="check split, or the file")
    return Records(
        rows=rows,
        columns=tuple(found.column_names),
        places=[f"{origin} row {number}" for number in range(len(rows))],
        origin=origin,
    )
