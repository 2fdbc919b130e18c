"""Records from files: every format, splits, and what is said when a file is wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

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
