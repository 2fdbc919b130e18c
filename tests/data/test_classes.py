"""Sequence classification: names and indices of classes, and texts without them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coldpress.config.schema import DataConfig, LoadDataset, PreProcess
from coldpress.data.packing import IGNORED, TokenSequence
from coldpress.data.prepare import prepare
from coldpress.data.preview import preview
from coldpress.data.tokenizer import Tokenizer
from coldpress.errors import DataError

ROWS = [{"phrase": f"p{number:03}", "tone": ("joy", "fear", "anger")[number % 3]} for number in range(60)]


def config(path: Path, rows: list[dict[str, Any]], **pre: Any) -> DataConfig:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(
        name=path.stem,
        load_dataset_config=LoadDataset(data_name="json", data_files=str(path)),
        pre_process_data_config=PreProcess(**{"text_field": "phrase", "label_col": "tone", "max_seq_len": 64, **pre}),
    )


def test_targets_and_names(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prepared = prepare(config(tmp_path / "d.jsonl", ROWS), tokenizer, classes=True)
    assert prepared.classes == ("anger", "fear", "joy")
    assert prepared.notes == ()
    assert [one.target for one in prepared.train.sequences[:4]] == [2, 1, 0, 2]
    first = [256, *tokenizer.ids("p000"), 257]
    assert prepared.train.sequences[0] == TokenSequence(first, [IGNORED] * len(first), target=2)
    with pytest.raises(DataError, match=r"^the answer column 'tone' is not part of the text"):
        prepare(config(tmp_path / "d.jsonl", ROWS), tokenizer)


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ((10, 9, 2), ("2", "9", "10")),
        (("10", "9", "2"), ("2", "9", "10")),
        ((1.0, 0.0, -1), ("-1", "0", "1")),
        ((True, False, True), ("False", "True")),
        ((" b ", "a", "B"), ("B", "a", "b")),
        ((1, "x", "1"), ("1", "x")),
    ],
)
def test_order_of_names(tmp_path: Path, tokenizer: Tokenizer, values: tuple[Any, ...], names: tuple[str, ...]) -> None:
    rows = [{"phrase": f"p{number}", "tone": value} for number, value in enumerate(values)]
    assert prepare(config(tmp_path / "d.jsonl", rows), tokenizer, classes=True).classes == names


def test_csv_labels_stay_as_they_are_written(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "d.csv"
    path.write_text("text,label\na,007\nb,08\n")
    asked = DataConfig(
        name="d",
        load_dataset_config=LoadDataset(data_name="csv", data_files=str(path)),
        pre_process_data_config=PreProcess(label_col="label"),
    )
    assert prepare(asked, tokenizer, classes=True).classes == ("007", "08")


def test_held_out_share_and_set(tmp_path: Path, tokenizer: Tokenizer) -> None:
    train = config(tmp_path / "a.jsonl", ROWS)
    split = prepare(train, tokenizer, held_out=0.25, classes=True)
    assert split.held_out is not None
    assert len(split.held_out.sequences) == 15
    by_text = {
        tokenizer.decode(one.ids[1:-1]): one.target for part in (split.train, split.held_out) for one in part.sequences
    }
    assert all(by_text[row["phrase"]] == ("anger", "fear", "joy").index(row["tone"]) for row in ROWS)

    other = config(tmp_path / "b.jsonl", [{"phrase": "new", "tone": "fear"}])
    held = prepare(train, tokenizer, held_out=other, classes=True).held_out
    assert held is not None
    assert [one.target for one in held.sequences] == [1], "the index is the training data's"


def test_a_class_that_training_does_not_have(tmp_path: Path, tokenizer: Tokenizer) -> None:
    train = config(tmp_path / "a.jsonl", ROWS)
    other = config(tmp_path / "b.jsonl", [{"phrase": "x", "tone": "joy"}, {"phrase": "y", "tone": "jjoy"}])
    with pytest.raises(DataError, match=r"b has classes that .* does not have: 'jjoy' \(.*b\.jsonl:2\)") as error:
        prepare(train, tokenizer, held_out=other, classes=True)
    assert error.value.hint == "did you mean 'joy'?"


def test_only_held_out_records_of_a_class(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [*ROWS, {"phrase": "rare", "tone": "awe"}]
    for seed in range(200):
        prepared = prepare(config(tmp_path / "d.jsonl", rows), tokenizer, held_out=0.3, seed=seed, classes=True)
        assert prepared.classes == ("anger", "awe", "fear", "joy")
        if 1 not in {one.target for one in prepared.train.sequences}:
            assert "only held-out records have the class 'awe': it cannot be learned" in prepared.notes
            return
    raise AssertionError("no split held the one record out")


@pytest.mark.parametrize(
    ("rows", "pre", "what"),
    [
        (ROWS, {"label_col": None}, "does not say which column holds the class"),
        (ROWS, {"label_col": "tome"}, r"has no column 'tome' \(did you mean 'tone'\?\)"),
        (ROWS, {"text_field": None, "text_template": "{phrase} {tone}"}, "'tone', stands in the text"),
        (ROWS, {"text_field": None, "text_cols": ("phrase", "tone")}, "'tone', stands in the text"),
        (ROWS, {"text_field": "tone"}, "'tone', stands in the text"),
        (ROWS[:1], {}, "all 1 records of d are of the class 'joy'"),
        ([{"phrase": "a", "tone": "x"}] * 3, {}, "all 3 records of d are of the class 'x'"),
        ([*ROWS, {"phrase": "a", "tone": None}], {}, r"1 of 61 records have no class .*'tone'\n  .*d\.jsonl:61"),
        ([*ROWS, {"phrase": "a", "tone": " "}], {}, "the class is empty"),
        ([*ROWS, {"phrase": "a", "tone": ["joy"]}], {}, r"the class is \['joy'\], neither text nor a whole number"),
        ([*ROWS, {"phrase": "a", "tone": 0.5}], {}, "the class is 0.5, neither"),
        ([{"question": "a", "answer": "b"}] * 2, {"text_field": None, "label_col": "answer"}, "'answer', stands"),
    ],
)  # fmt: skip
def test_refused(tmp_path: Path, tokenizer: Tokenizer, rows: list[Any], pre: dict[str, Any], what: str) -> None:
    with pytest.raises(DataError, match=what) as error:
        prepare(config(tmp_path / "d.jsonl", rows, **pre), tokenizer, classes=True)
    assert error.value.hint


def test_long_texts_are_cut_and_keep_their_eos(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [*ROWS, {"phrase": "x" * 100, "tone": "joy"}]
    prepared = prepare(config(tmp_path / "d.jsonl", rows, max_seq_len=10), tokenizer, classes=True)
    longest = prepared.train.sequences[-1]
    assert longest.ids == [256, *tokenizer.ids("x" * 8), 257]
    assert (prepared.train.cut_rows, prepared.train.dropped_tokens, prepared.train.longest) == (1, 92, 102)
    assert "1 of 61 rows exceed 10 tokens (the longest has 102): their ends are left out" in prepared.notes
    bare = config(tmp_path / "d.jsonl", rows, max_seq_len=10, add_special_tokens=False)
    assert prepare(bare, tokenizer, classes=True).train.sequences[-1].ids == tokenizer.ids("x" * 10)


def test_max_samples(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prepared = prepare(config(tmp_path / "d.jsonl", ROWS, max_samples=5), tokenizer, classes=True)
    assert [one.target for one in prepared.train.sequences] == [2, 1, 0, 2, 1]


def test_odd_classes_are_noted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    torn = [*ROWS, {"phrase": "p000", "tone": "fear"}]
    notes = prepare(config(tmp_path / "d.jsonl", torn), tokenizer, classes=True).notes
    assert "1 records have the text of another one and a different class" in notes
    many = [{"phrase": f"p{number}", "tone": f"id{number}"} for number in range(60)]
    notes = prepare(config(tmp_path / "d.jsonl", many), tokenizer, classes=True).notes
    assert "60 classes for 60 records: is label_col the right column?" in notes


def test_preview(tmp_path: Path, tokenizer: Tokenizer) -> None:
    shown = preview(config(tmp_path / "d.jsonl", ROWS), tokenizer, samples=2, classes=True)
    assert shown.classes == (("anger", 20), ("fear", 20), ("joy", 20))
    assert [sample.target for sample in shown.samples] == ["joy", "fear"]
    assert shown.loss_share is None
    assert not any(loss for _, _, loss in shown.samples[0].tokens)
