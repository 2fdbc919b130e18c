"""Records from files: every format, splits, and what is said when a file is wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldpress.config.schema import DataConfig, LoadDataset
from coldpress.data.sources import files_of, read_records
from coldpress.errors import DataError

ROWS = [{"phrase": f"phrase {number}", "tone": "joy" if number % 2 else "fear"} for number in range(10)]


def config(**load: Any) -> DataConfig:
    return DataConfig(name="sample", load_dataset_config=LoadDataset(**load))


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    return path


def test_json_lines(lines: Path) -> None:
    records = read_records(config(data_name="json", data_files=str(lines)))
    assert list(records.rows) == ROWS
    assert records.columns == ("phrase", "tone")
    assert records.places[3] == f"{lines}:4"


def test_json_array(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS, indent=1))
    assert list(read_records(config(data_name="json", data_files=str(path))).rows) == ROWS


def test_csv_and_parquet_and_text(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import csv, parquet

    table = pyarrow.Table.from_pylist(ROWS)
    csv.write_csv(table, tmp_path / "rows.csv")
    parquet.write_table(table, tmp_path / "rows.parquet")
    (tmp_path / "rows.txt").write_text("one\n\ntwo\n")
    for kind in ("csv", "parquet"):
        found = read_records(config(data_name=kind, data_files=str(tmp_path / f"rows.{kind}")))
        assert list(found.rows) == ROWS, kind
    found = read_records(config(data_name="text", data_files=str(tmp_path / "rows.txt")))
    assert list(found.rows) == [{"text": "one"}, {"text": "two"}]


def test_compressed_goes_through_datasets_without_a_trace(tmp_path: Path, lines: Path) -> None:
    import gzip

    path = tmp_path / "rows.json.gz"
    path.write_bytes(gzip.compress(lines.read_bytes()))
    before = sorted(tmp_path.iterdir())
    assert list(read_records(config(data_name="json", data_files=str(path))).rows) == ROWS
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", range(10)),
        ("train[:3]", range(3)),
        ("train[-2:]", (8, 9)),
        ("train[:20%]", (0, 1)),
        ("train[50%:]", range(5, 10)),
        ("train[2:4]+train[:1]", (2, 3, 0)),
    ],
)
def test_slices(lines: Path, split: str, expected: Any) -> None:
    rows = read_records(config(data_name="json", data_files=str(lines), split=split)).rows
    assert list(rows) == [ROWS[number] for number in expected]


def test_named_splits_and_globs(tmp_path: Path) -> None:
    for name in ("a1", "a2", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    files = {"train": str(tmp_path / "a*.jsonl"), "test": str(tmp_path / "b.jsonl")}
    found = config(data_name="json", data_files=files, split="train")
    assert [row["text"] for row in read_records(found).rows] == ["a1", "a2"]
    assert sorted(files_of(found)) == ["test/0", "train/0", "train/1"]
    with pytest.raises(DataError, match="no split 'tset'") as error:
        read_records(config(data_name="json", data_files=files, split="tset"))
    assert "did you mean test?" in str(error.value)
    with pytest.raises(DataError, match="several splits"):
        read_records(config(data_name="json", data_files=files))


def test_missing_file_names_its_neighbour(lines: Path) -> None:
    with pytest.raises(DataError, match="does not exist") as error:
        files_of(config(data_name="json", data_files=str(lines.with_name("row.jsonl"))))
    assert "did you mean rows.jsonl?" in str(error.value)


def test_empty_file(tmp_path: Path) -> None:
    for name in ("empty.jsonl", "empty.csv", "empty.txt"):
        path = tmp_path / name
        path.write_text("\n" if name.endswith("txt") else "")
        with pytest.raises(DataError, match="holds no rows"):
            read_records(
                config(data_name={"jsonl": "json", "txt": "text"}.get(path.suffix[1:], "csv"), data_files=str(path))
            )


def test_bad_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n{"text": fine}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:2: not valid JSON"):
        read_records(config(data_name="json", data_files=str(path)))
    path.write_text('{"text": "fine"}\n["a"]\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:2: a row must be a JSON object"):
        read_records(config(data_name="json", data_files=str(path)))


@pytest.mark.parametrize(("name", "hint"), [("csv", "as many fields as the header"), ("parquet", "download complete")])
def test_damaged_tables_have_a_hint(tmp_path: Path, name: str, hint: str) -> None:
    path = tmp_path / f"rows.{name}"
    path.write_text("a,b\n1,2,3\n")
    with pytest.raises(DataError, match=str(path)) as error:
        read_records(config(data_name=name, data_files=str(path)))
    assert hint in (error.value.hint or "")


def test_missing_column_lists_the_real_ones(lines: Path) -> None:
    records = read_records(config(data_name="json", data_files=str(lines)))
    with pytest.raises(DataError, match=r"no column 'phrases' \(did you mean 'phrase'\?\).*it has: phrase, tone"):
        records.require(("phrases",), "text_template")


def test_a_format_without_files() -> None:
    with pytest.raises(DataError, match="data_files must name the files"):
        files_of(config(data_name="json"))


def test_local_json_does_not_import_datasets(lines: Path) -> None:
    import subprocess

    program = (
        "import sys\nfrom coldpress.config.schema import DataConfig, LoadDataset\n"
        "from coldpress.data.sources import read_records\n"
        f"load = LoadDataset(data_name='json', data_files={str(lines)!r})\n"
        "read_records(DataConfig(name='a', load_dataset_config=load))\n"
        "assert not {'datasets', 'pandas', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def rows_of(path: Path, content: bytes, kind: str = "json") -> list[Any]:
    path.write_bytes(content)
    return list(read_records(config(data_name=kind, data_files=str(path))).rows)


@pytest.mark.parametrize(
    ("name", "content", "rows"),
    [
        ("bom.jsonl", b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}\r\n', [{"text": "a"}, {"text": "b"}]),
        ("sep.jsonl", '{"text": "a\u2028\u0085b"}\n{"text": "c"}'.encode(), [{"text": "a\u2028\x85b"}, {"text": "c"}]),
        ("one.json", b'{\n "text": "a"\n}\n', [{"text": "a"}]),
        ("under.json", b'{\n "version": 2,\n "data": [\n {"text": "a"}]}', [{"text": "a"}]),
        ("flat.json", b'{"rows": [{"text": "a"}]}', [{"text": "a"}]),
        ("talk.json", b'{"messages": [{"role": "user"}]}', [{"messages": [{"role": "user"}]}]),
        ("trl.json", b'{"prompt": [{"a": 1}], "b": [{"a": 2}]}', [{"prompt": [{"a": 1}], "b": [{"a": 2}]}]),
        ("nul.jsonl", b'{"text": "a\\u0000b", "n": null}', [{"text": "a\0b", "n": None}]),
        ("array.json", b' [ {"text": "a"} ,\n\n{"text": "b"}\n]\n', [{"text": "a"}, {"text": "b"}]),
    ],
)  # fmt: skip
def test_json_as_it_is_found(tmp_path: Path, name: str, content: bytes, rows: list[Any]) -> None:
    assert rows_of(tmp_path / name, content) == rows


def test_rows_of_an_array_have_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[\n{"a": 1},\n\n{"a":\n 2}, {"a": 3}\n]')
    places = read_records(config(data_name="json", data_files=str(path))).places
    assert list(places) == [f"{path}:{line}" for line in (2, 4, 5)]


@pytest.mark.parametrize(
    ("content", "what", "hint"),
    [
        ('{"text": "a"}\n'.encode("utf-16"), "is not UTF-8 text", "it is UTF-16"),
        (b'{"text": "caf\xe9"}', "is not UTF-8 text: .* at byte 13", "iconv"),
        (b'{"a": ' + b"[" * 100_000, ":1: nested too deeply", "right file"),
        (b"[" * 100_000, ":1: nested too deeply", "right file"),
        (b'[{"a": 1}\n {"a": 2}]', ":2: not valid JSON: a comma", "cut short"),
        (b'[{"a": 1},\n', ":2: not valid JSON", "array"),
        (b'[{"a": 1}]\n{"a": 2}', ":1: text follows", "one array"),
        (b'[{"a": 1}, 3]', ":1: a row must be a JSON object, got int", "column"),
        (b'{\n"a": 1,\n"b" 2}', ":3: not valid JSON: Expecting ':' delimiter, at column 5", "double quotes"),
        (b'{"a": ["x"], "b": ["y"]}', "holds columns", "one object a row"),
    ],
)
def test_json_that_cannot_be_read(tmp_path: Path, content: bytes, what: str, hint: str) -> None:
    with pytest.raises(DataError, match=what) as error:
        rows_of(tmp_path / "rows.json", content)
    assert hint in (error.value.hint or "")


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        (b"\xef\xbb\xbftext,n\r\na,007\r\nb,1.0\r\n,NA\r\n", [("a", "007"), ("b", "1.0"), ("", "NA")]),
        (b"text;n\na,b;2\n", [("a,b", "2")]),
        (b"text\tn\na;b\t2\n", [("a;b", "2")]),
        (b'text,n\n"a\nb",true\n', [("a\nb", "true")]),
        ('text,n\n"é ""q"" 🙂",2020-01-01\n'.encode(), [('é "q" 🙂', "2020-01-01")]),
    ],
)
def test_csv_fields_are_the_text_that_stands_there(tmp_path: Path, content: bytes, rows: list[Any]) -> None:
    found = rows_of(tmp_path / "rows.csv", content, "csv")
    assert [(row["text"], row["n"]) for row in found] == rows


def test_csv_rows_have_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    for text, places in (
        ("a\n1\n2\n", [f"{path}:2", f"{path}:3"]),
        ('a\n"1\n"\n2\n', [f"{path} row 1", f"{path} row 2"]),
    ):
        path.write_text(text)
        assert list(read_records(config(data_name="csv", data_files=str(path))).places) == places


@pytest.mark.parametrize(
    ("content", "what", "hint"),
    [
        (b"a,a\n1,2\n", "several columns called 'a'", "own name"),
        ("text\ncaf\xe9\n".encode("latin-1"), "is not UTF-8 text: .* at byte 8", "iconv"),
        (b"a,b\n1,2\n3\n", "Row #3: Expected 2 columns", "as many fields"),
        (b"a,b\n", "holds no rows", "right file"),
    ],
)
def test_csv_that_cannot_be_read(tmp_path: Path, content: bytes, what: str, hint: str) -> None:
    with pytest.raises(DataError, match=what) as error:
        rows_of(tmp_path / "rows.csv", content, "csv")
    assert hint in (error.value.hint or "")


def test_suffixes_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "train.ndjson").write_text('{"text": "a"}\n')
    (tmp_path / "test.tsv").write_text("text\nb\n")
    for split, text in (("train", "a"), ("test", "b")):
        assert read_records(config(data_name=str(tmp_path), split=split)).rows[0]["text"] == text


PIECES = st.sampled_from(
    ['{"a": 1}', "[", "]", "{", "}", ",", "\n", "\r\n", '"', "\ufeff", "\0", "é", "a", ";", "\t", "1"]
)


@pytest.mark.parametrize("kind", ["json", "csv", "text"])
def test_any_file_gives_rows_or_our_error(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "rows"

    @given(st.lists(PIECES, max_size=12).map(lambda parts: "".join(parts).encode()) | st.binary(max_size=40))
    @hypothesis.settings(max_examples=400, deadline=None)
    def check(content: bytes) -> None:
        try:
            rows = rows_of(path, content, kind)
        except DataError as error:
            rows = [{}] if error.hint else []
        assert rows, "neither a row nor a hint"

    check()
