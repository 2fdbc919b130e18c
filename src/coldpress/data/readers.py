"""Files to rows, format by format: text, JSON, CSV and Parquet; each row with its place, `file:line` or `file row n`.
And the beginning of a file, for a plan, which reads no more.

JSON is read by the standard library, so that a bad line is named; CSV and Parquet by pyarrow, which is what `datasets`
itself uses.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import io
import json
import mmap
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from coldpress.errors import DataError

__all__ = ["READERS", "Head", "Row", "head_of"]

Row = Mapping[str, Any]


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
    yield from _json_rows(_read_text(path), path)


def _json_rows(text: str, path: Path) -> Iterator[tuple[Row, str]]:
    start = len(text) - len(text.lstrip())
    if text[start : start + 1] == "[":
        yield from _array_rows(text, start, path)
        return
    lines = _numbered(text)
    if _one_object(lines):
        yield from _whole_file(text, path)
        return
    for number, line in lines:
        place = f"{path}:{number}"
        yield _object(_parsed(line, path, number), place), place


def _numbered(text: str) -> list[tuple[int, str]]:
    """Lines that are not blank, with their numbers."""
    return [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]


def _one_object(lines: Sequence[tuple[int, str]]) -> bool:
    """Whether a JSON text is one object: no file of rows begins with a lone brace."""
    return len(lines) == 1 or (bool(lines) and lines[0][1].strip() == "{")


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
    from pyarrow import ArrowInvalid, string
    from pyarrow import csv as tables

    text = _read_text(path)
    names, delimiter = _csv_header(text, path)
    if not names:
        return
    try:
        table = tables.read_csv(
            path,
            read_options=tables.ReadOptions(use_threads=False),  # so that an error names its row
            parse_options=tables.ParseOptions(newlines_in_values=True, delimiter=delimiter),
            convert_options=tables.ConvertOptions(column_types=dict.fromkeys(names, string())),
        )
    except ArrowInvalid as error:
        raise DataError(
            f"{path} is not valid CSV: {error}",
            hint="every row needs as many fields as the header; quote fields that hold commas or line breaks",
        ) from error
    rows = table.to_pylist()
    one_each = sum(1 for line in text.split("\n") if line.strip()) == len(rows) + 1
    for number, row in enumerate(rows):
        yield row, f"{path}:{number + 2}" if one_each else f"{path} row {number + 1}"


def _csv_header(text: str, path: Path) -> tuple[list[str], str]:
    """Column names, and the character between fields."""
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
    return names, delimiter


def _read_parquet(path: Path) -> Iterator[tuple[Row, str]]:
    from pyarrow import ArrowInvalid, parquet

    try:
        table = parquet.read_table(path)
    except (ArrowInvalid, OSError) as error:
        raise _no_parquet(path, error) from error
    yield from _table_rows(table, path)


def _no_parquet(path: Path, error: Exception) -> DataError:
    return DataError(
        f"{path} is not a valid Parquet file: {error}", hint="is the download complete, and data_name right?"
    )


def _table_rows(table: Any, path: Path) -> Iterator[tuple[Row, str]]:
    for number, row in enumerate(table.to_pylist()):
        yield row, f"{path} row {number}"


def _read_lines(path: Path) -> Iterator[tuple[Row, str]]:
    """One row a line, column `text`; blank lines are no rows."""
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if line.strip():
            yield {"text": line.rstrip("\r")}, f"{path}:{number}"


READERS = {"json": _read_json, "csv": _read_csv, "parquet": _read_parquet, "text": _read_lines}


# -- the beginning of a file ------------------------------------------------------------------------------------------

_HEAD_BYTES = 1 << 18
"""Read of a file for its first rows."""


@dataclass(frozen=True)
class Head:
    """The first rows of a file, and its columns as far as these show them."""

    rows: Sequence[tuple[Row, str]] = field(repr=False)
    columns: tuple[str, ...]
    ragged: Path | None = None
    """The file, where rows further down may have other columns."""

    def may_have(self, column: str) -> bool:
        """Whether a row may have this column: for one that the first rows lack, its name is looked for in the file."""
        if column in self.columns or self.ragged is None:
            return column in self.columns
        with self.ragged.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            spelled = (json.dumps(column, ensure_ascii=ascii_only).encode() for ascii_only in (True, False))
            return any(content.find(one) >= 0 for one in spelled)


def head_of(path: Path, form: str, most: int, enough: Sequence[Sequence[str]]) -> Head | None:
    """At most so many rows of a file; None where they are not known without reading all of it.

    Parquet's are not read where its footer has every name of a set of columns that is `enough`: pyarrow takes a third
    of a second to import. Raises DataError as the reading of the file does.
    """
    if form == "parquet":
        footer = _footer(path)
        known = any(all(name.encode() in footer for name in names) for names in enough)
        return None if known else _parquet_head(path, most)
    text, whole = _beginning(path)
    if form == "csv":
        names, delimiter = _csv_header(text, path)
        if not names:
            return None
        lines = csv.DictReader(io.StringIO(text), delimiter=delimiter)
        rows: list[tuple[Row, str]] = []
        with contextlib.suppress(csv.Error):
            rows += [(row, f"{path} row {number}") for number, row in enumerate(islice(lines, most), start=1)]
        return Head(rows, tuple(names))
    if form == "text":
        return Head([({"text": line}, f"{path}:{number}") for number, line in _numbered(text)[:most]], ("text",))
    rows = list(islice(_json_rows(text, path) if whole else _json_beginning(text, path), most))
    return Head(rows, tuple(dict.fromkeys(name for row, _ in rows for name in row)), path) if rows else None


def _beginning(path: Path) -> tuple[str, bool]:
    """The first part of a file as text, which may end anywhere, and whether that is all of it."""
    try:
        with path.open("rb") as stream:
            content = stream.read(_HEAD_BYTES + 1)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", hint="check its permissions") from error
    whole = len(content) <= _HEAD_BYTES
    try:
        return codecs.getincrementaldecoder("utf-8-sig")().decode(content, final=whole), whole
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from error


def _json_beginning(text: str, path: Path) -> Iterator[tuple[Row, str]]:
    """Whole rows of a JSON text that was cut off; none of one object, which ends further down."""
    start = len(text) - len(text.lstrip())
    if text[start : start + 1] == "[":
        with contextlib.suppress(DataError):  # where the text was cut, if not before
            yield from _array_rows(text, start, path)
        return
    lines = _numbered(text[: text.rfind("\n") + 1])
    if not _one_object(lines):
        for number, line in lines:
            place = f"{path}:{number}"
            yield _object(_parsed(line, path, number), place), place


def _footer(path: Path) -> bytes:
    """Of a Parquet file: it names the columns."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        stream.seek(max(size - 8, 0))
        stream.seek(max(size - 8 - int.from_bytes(stream.read(4), "little"), 0))
        return stream.read()


def _parquet_head(path: Path, most: int) -> Head:
    from pyarrow import ArrowInvalid, parquet

    try:
        with parquet.ParquetFile(path, pre_buffer=False) as file:
            names = tuple(file.schema_arrow.names)
            rows: list[Row] = next((batch.to_pylist() for batch in file.iter_batches(batch_size=most)), [])
    except (ArrowInvalid, OSError) as error:
        raise _no_parquet(path, error) from error
    return Head([(row, f"{path} row {number}") for number, row in enumerate(rows)], names)
