"""What a plan says of columns, from the first rows of files; never of what would run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coldpress.config.schema import DataConfig, LoadDataset, PreProcess
from coldpress.data.columns import wrong_columns

PHRASES = [{"phrase": "hello", "tone": "joy"}, {"phrase": "oh", "tone": "fear"}]
CHAT = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
SHAREGPT = [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}]
ALPACA = [{"instruction": "a", "input": "", "output": "b"}]


def json_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def table(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow
    from pyarrow import csv, parquet

    made = pyarrow.Table.from_pylist(rows)
    (csv.write_csv if path.suffix == ".csv" else parquet.write_table)(made, path)


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], Any]] = {
    "jsonl": json_lines,
    "json": lambda path, rows: path.write_text(json.dumps(rows)),
    "csv": table,
    "parquet": table,
    "tsv": lambda path, rows: path.write_text(
        "\n".join("\t".join(row) for row in [list(rows[0]), *[[str(value) for value in row.values()] for row in rows]])
    ),
}


@pytest.fixture
def said(tmp_path: Path) -> Callable[..., list[tuple[str, str, str | None]]]:
    """What is wrong with rows in a file: key, message without the file's name, hint."""

    def ask(
        rows: list[dict[str, Any]] | str,
        kind: str = "jsonl",
        *,
        split: str | None = None,
        classes: bool | None = False,
        has_template: bool = True,
        **pre: Any,
    ) -> list[tuple[str, str, str | None]]:
        path = tmp_path / f"rows.{kind}"
        if isinstance(rows, str):
            path.write_text(rows)
        else:
            WRITERS[kind](path, rows)
        name = {"jsonl": "json", "tsv": "csv", "txt": "text"}.get(kind, kind)
        load = LoadDataset(data_name=name, data_files=str(path), split=split)
        config = DataConfig(name="train", load_dataset_config=load, pre_process_data_config=PreProcess(**pre))
        wrong = wrong_columns(config, classes=classes, has_template=has_template)
        return [
            (key.removeprefix("pre_process_data_config").removeprefix("."), error.message.replace(str(path), "FILE"),
             error.hint)
            for key, error in wrong
        ]  # fmt: skip

    return ask


@pytest.mark.parametrize("kind", WRITERS)
def test_every_column_that_is_not_there(said: Callable[..., Any], kind: str) -> None:
    has = "uses; it has: phrase, tone"
    near = "FILE has no column 'phrse' (did you mean 'phrase'?), which"
    assert [one[:2] for one in said(PHRASES, kind, text_template="{phrse} {tone}")] == [
        ("text_template", f"{near} text_template {has}")
    ]
    assert [one[:2] for one in said(PHRASES, kind, text_field="phrse", label_col="x")] == [
        ("text_field", f"{near} text_field {has}"),
        ("label_col", f"FILE has no column 'x', which label_col {has}"),
    ]
    assert [one[0] for one in said(PHRASES, kind, text_cols=("tone", "phrse"))] == ["text_cols"]
    assert said(PHRASES, kind, chat_template=True, message_col="mesages")[0][:2] == (
        "message_col",
        "message_col names 'mesages'; FILE has the columns phrase, tone",
    )
    ((key, message, hint),) = said(PHRASES, kind)
    assert (key, "none is named text" in message, hint) == (
        "", True, "say what the text is: text_template, text_field or text_cols",
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize(
    ("rows", "pre"),
    [
        (PHRASES, {"text_template": "{phrase} {tone|loss}"}),
        (PHRASES, {"text_template": "{phrase} {tone}", "label_col": "tone"}),
        (PHRASES, {"text_cols": ("phrase", "tone")}),
        ([{"text": "a"}], {}),
        (CHAT, {}),
        (CHAT, {"chat_template": True}),
        (SHAREGPT, {}),
        (SHAREGPT, {"chat_template": True}),
        ([{"chat": CHAT[0]["messages"]}], {"chat_template": True, "message_col": "chat"}),
        (ALPACA, {}),
        (ALPACA, {"format": "alpaca"}),
        ([{"question": "a", "answer": "b", "context": "c"}], {}),
    ],
)
def test_nothing_is_said_of_what_runs(
    said: Callable[..., Any], kind: str, rows: list[dict[str, Any]], pre: dict[str, Any]
) -> None:
    assert said(rows, kind, **pre) == []


def test_rows_may_differ(said: Callable[..., Any]) -> None:
    template = {"text_template": "{context} {question} {answer}"}
    rows = [{"question": "a", "answer": "b"}] * 3
    assert said([*rows, {**rows[0], "context": "c"}], **template) == []
    # Further down than is read, which the file itself is asked for.
    long = [{"question": "a" * 5000, "answer": "b"}] * 200
    assert said([*long, {**rows[0], "context": "c"}], **template) == []
    assert said([*long, {**rows[0], "contxt": "c"}], **template)[0][0] == "text_template"


def test_large_files_are_read_no_further_than_their_first_rows(said: Callable[..., Any]) -> None:
    rows = [{"question": "ä" * 900, "answer": "b"}] * 400
    for kind in ("jsonl", "json", "csv"):
        assert [one[0] for one in said(rows, kind, text_field="qestion")] == ["text_field"], kind
        assert said(rows, kind, text_field="question") == [], kind
    minified = json.dumps(rows, separators=(",", ":"))
    assert [one[0] for one in said(minified, "json", text_field="qestion")] == ["text_field"]
    for one_object in (json.dumps({"rows": rows}), json.dumps({"rows": rows}, indent=1)):
        assert said(one_object, "json", text_field="qestion") == []  # its rows are known when all of it is


def test_text_and_splits(said: Callable[..., Any]) -> None:
    assert said("one\ntwo\n", "txt") == []
    assert [one[0] for one in said("one\ntwo\n", "txt", text_field="note")] == ["text_field"]
    assert [one[0] for one in said(PHRASES, text_field="note", split="train[:1]")] == ["text_field"]
    assert said(PHRASES, text_field="note", split="train[1:]") == []
    assert said(PHRASES, text_field="phrase", split="tran")[0][:2] == (
        "load_dataset_config", "the data config train has no split 'tran'; it has: train",
    )  # fmt: skip


def test_what_cannot_be_read_is_told_too(said: Callable[..., Any]) -> None:
    assert said('{"text": "a"}\n{"text" "b"}\n')[0][:2] == (
        "load_dataset_config", "FILE:2: not valid JSON: Expecting ':' delimiter, at column 9",
    )  # fmt: skip
    assert "not UTF-8" not in str(said("é" * 300_000, "txt"))


def test_the_label_and_the_text(said: Callable[..., Any]) -> None:
    outside = {"text_field": "phrase", "label_col": "tone"}
    assert said(PHRASES, **outside)[0][:2] == ("label_col", "the answer column 'tone' is not part of the text")
    assert said(PHRASES, classes=True, **outside) == []
    assert said(PHRASES, classes=None, **outside) == []
    inside = {"text_template": "{phrase} {tone}", "label_col": "tone"}
    assert said(PHRASES, classes=True, **inside)[0][0] == "label_col"
    typo = {"text_template": "{phrase} {tonne}", "label_col": "tone"}
    assert [one[0] for one in said(PHRASES, **typo)] == ["text_template"]


def test_conversations_want_a_template(said: Callable[..., Any]) -> None:
    assert "no chat template" in said(CHAT, has_template=False)[0][1]
    assert said(CHAT, has_template=False, chat_template="{{ messages }}") == []
    assert said(ALPACA, has_template=False) == []


def test_parquet_of_which_the_footer_has_the_names_imports_nothing(tmp_path: Path) -> None:
    table(tmp_path / "rows.parquet", PHRASES)
    code = (
        "import sys\n"
        "from coldpress.config.schema import DataConfig, LoadDataset, PreProcess\n"
        "from coldpress.data.columns import wrong_columns\n"
        f"load = LoadDataset(data_name='parquet', data_files={str(tmp_path / 'rows.parquet')!r})\n"
        "pre = PreProcess(text_template='{phrase} {tone}')\n"
        "config = DataConfig(name='a', load_dataset_config=load, pre_process_data_config=pre)\n"
        "assert wrong_columns(config, classes=False, has_template=True) == []\n"
        "print(*{'pyarrow', 'torch', 'transformers', 'numpy', 'tokenizers', 'jinja2'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
