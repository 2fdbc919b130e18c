"""Records of a data config: rows as they lie in files, or in a hub data set.

Local files that are plain text, JSON, CSV or Parquet are read directly (JSON by the standard library, so that a bad
line is named; CSV and Parquet by pyarrow, which is what `datasets` itself uses): importing `datasets` and copying the
rows into its cache takes over a second and leaves a copy behind. Hub data sets and compressed files go through it.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coldpress.config.schema import AzureMLResource, DataConfig, LoadDataset
from coldpress.errors import DataError, MissingExtraError
from coldpress.registry import nearest

__all__ = ["BUNDLED_TEXT", "Records", "files_of", "read_records"]

BUNDLED_TEXT = "coldpress:parity_text.txt"
"""In data_files, the text that comes with Coldpress, wherever that is installed."""
FORMATS = {
    "json": "json", "jsonl": "json", "ndjson": "json",
    "csv": "csv", "tsv": "csv",
    "parquet": "parquet",
    "text": "text",
}  # fmt: skip
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")

Row = Mapping[str, Any]


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
            tables[name] = [entry for path in files[name] for entry in _READERS[_format_of(load, path)](path)]
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


# -- formats ----------------------------------------------------------------------------------------------------------


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", hint="check its permissions") from error


def _not_utf8(path: Path, error: UnicodeDecodeError) -> DataError:
    with path.open("rb") as stream:
        wide = stream.read(2) in (b"\xff\xfe", b"\xfe\xff")
    return DataError(
        f"{path} is not UTF-8 text: {error.reason} at byte {error.start}",
        hint="it is UTF-16: save it as UTF-8" if wide else "save it as UTF-8, for example with iconv",
    )


def _read_json(path: Path) -> Iterator[tuple[Row, str]]:
    """JSON lines, one JSON array of objects, or one object that holds such an array."""
    text = _read_text(path)
    start = len(text) - len(text.lstrip())
    if text[start : start + 1] == "[":
        yield from _array_rows(text, start, path)
        return
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if len(lines) == 1 or (lines and lines[0][1].strip() == "{"):  # else no file of rows begins with a lone brace
        yield from _whole_file(text, path)
        return
    for number, line in lines:
        place = f"{path}:{number}"
        yield _object(_parsed(line, path, number), place), place


def _parsed(text: str, path: Path, line: int) -> Any:
    """The value of a JSON text that begins at a line of a file."""
    try:
        return json.loads(text)
    except ValueError as error:
        line += getattr(error, "lineno", 1) - 1
        said = f"{getattr(error, 'msg', error)}, at column {getattr(error, 'colno', 1)}"
        hint = "each line must be one JSON object, with double quotes"
        raise DataError(f"{path}:{line}: not valid JSON: {said}", hint=hint) from error
    except RecursionError as error:
        raise DataError(f"{path}:{line}: nested too deeply to be read", hint="is it the right file?") from error


def _whole_file(text: str, path: Path) -> Iterator[tuple[Row, str]]:
    """One JSON object: a single row, or what holds the rows under its one key with a list of objects."""
    whole = _object(_parsed(text, path, 1), f"{path}:1")
    lists = {key: value for key, value in whole.items() if isinstance(value, list) and value}
    rows = {key: value for key, value in lists.items() if all(isinstance(item, dict) for item in value)}
    if len(lists) == 1 and len(rows) == 1:
        key, items = next(iter(rows.items()))
        if not items[0].keys() & {"role", "from"}:  # a conversation is one row
            for number, item in enumerate(items):
                yield item, f"{path} {key}[{number}]"
            return
    if len(lists) > 1 and lists == whole and not rows:
        raise DataError(
            f"{path} holds columns ({', '.join(lists)}), not rows",
            hint='write one object a row: {"column": value, ...}',
        )
    yield whole, f"{path}:1"


def _array_rows(text: str, start: int, path: Path) -> Iterator[tuple[Row, str]]:
    """Elements of a JSON array, each with the line that it starts at."""
    decoder = json.JSONDecoder()
    space = re.compile(r"[ \t\r\n]*")

    def skip(place: int) -> int:
        found = space.match(text, place)
        return found.end() if found else place

    place, line, counted = skip(start + 1), 1, 0
    while text[place : place + 1] != "]":
        line, counted = line + text.count("\n", counted, place), place
        where = f"{path}:{line}"
        try:
            row, place = decoder.raw_decode(text, place)
        except ValueError as error:
            at = getattr(error, "lineno", line)
            raise DataError(f"{path}:{at}: not valid JSON: {error}", hint="the file starts as a JSON array") from error
        except RecursionError as error:
            raise DataError(f"{where}: nested too deeply to be read", hint="is it the right file?") from error
        yield _object(row, where), where
        place = skip(place)
        if text[place : place + 1] == ",":
            place = skip(place + 1)
        elif text[place : place + 1] != "]":
            at = line + text.count("\n", counted, place)
            raise DataError(
                f"{path}:{at}: not valid JSON: a comma or the end of the array is missing",
                hint="the file starts as a JSON array; was it cut short?",
            )
    if text[skip(place + 1) :]:
        at = line + text.count("\n", counted, place + 1)
        raise DataError(f"{path}:{at}: text follows the end of the array", hint="write one array, or one object a line")


def _object(row: Any, place: str) -> Row:
    if not isinstance(row, dict):
        raise DataError(
            f"{place}: a row must be a JSON object, got {type(row).__name__}", hint='write {"column": value, ...}'
        )
    return row


def _read_csv(path: Path) -> Iterator[tuple[Row, str]]:
    """Every field as the text that stands there: a table's guess would make 7 of 007."""
    from pyarrow import ArrowInvalid, csv, string

    names, delimiter, lines = _csv_header(path)
    if not names:
        return
    try:
        table = csv.read_csv(
            path,
            read_options=csv.ReadOptions(use_threads=False),  # so that an error names its row
            parse_options=csv.ParseOptions(newlines_in_values=True, delimiter=delimiter),
            convert_options=csv.ConvertOptions(column_types=dict.fromkeys(names, string())),
        )
    except ArrowInvalid as error:
        raise DataError(
            f"{path} is not valid CSV: {error}",
            hint="every row needs as many fields as the header; quote fields that hold commas or line breaks",
        ) from error
    rows = table.to_pylist()
    one_each = lines == len(rows) + 1
    for number, row in enumerate(rows):
        yield row, f"{path}:{number + 2}" if one_each else f"{path} row {number + 1}"


def _csv_header(path: Path) -> tuple[list[str], str, int]:
    """Column names, the character between fields, and the number of lines."""
    import csv
    import io

    text = _read_text(path)
    first = text.split("\n", 1)[0]
    delimiter = next((sign for sign in ",;\t" if sign in first), ",")
    if path.suffix == ".tsv":
        delimiter = "\t"
    try:
        names = next(csv.reader(io.StringIO(text), delimiter=delimiter), [])
    except csv.Error as error:
        raise DataError(f"{path}:1: not a header of columns: {error}", hint="is it a CSV file?") from error
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(
            f"{path} has several columns called {', '.join(map(repr, twice))}", hint="give each column its own name"
        )
    return names, delimiter, sum(1 for line in text.split("\n") if line.strip())


def _read_parquet(path: Path) -> Iterator[tuple[Row, str]]:
    from pyarrow import ArrowInvalid, parquet

    try:
        table = parquet.read_table(path)
    except (ArrowInvalid, OSError) as error:
        raise DataError(
            f"{path} is not a valid Parquet file: {error}", hint="is the download complete, and data_name right?"
        ) from error
    yield from _table_rows(table, path)


def _table_rows(table: Any, path: Path) -> Iterator[tuple[Row, str]]:
    for number, row in enumerate(table.to_pylist()):
        yield row, f"{path} row {number}"


def _read_lines(path: Path) -> Iterator[tuple[Row, str]]:
    """One row a line, column `text`; blank lines are no rows."""
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if line.strip():
            yield {"text": line.rstrip("\r")}, f"{path}:{number}"


_READERS = {"json": _read_json, "csv": _read_csv, "parquet": _read_parquet, "text": _read_lines}


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
                builder if builder in _READERS or not files else "json",
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
