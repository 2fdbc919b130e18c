"""From a data config to sequences, and its preview."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coldpress.config.schema import DataConfig, LoadDataset, PreProcess
from coldpress.data.packing import IGNORED
from coldpress.data.prepare import prepare
from coldpress.data.preview import preview
from coldpress.data.tokenizer import Tokenizer
from coldpress.errors import DataError

TEMPLATE = "say: {phrase}\ntone: {tone}"
ROWS = [{"phrase": f"p{number:03}", "tone": ("joy", "fear")[number % 2]} for number in range(40)]


def config(path: Path, rows: list[dict[str, str]] = ROWS, **pre: Any) -> DataConfig:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(
        name=path.stem,
        load_dataset_config=LoadDataset(data_name="json", data_files=str(path)),
        pre_process_data_config=PreProcess(text_template=TEMPLATE, **pre),
    )


def test_join(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prepared = prepare(config(tmp_path / "d.jsonl", max_seq_len=64), tokenizer, held_out=0.25, seed=1)
    assert prepared.held_out is not None
    assert {len(one.ids) for one in prepared.train.sequences + prepared.held_out.sequences} == {64}
    assert (prepared.train.rows, prepared.held_out.rows) == (30, 10)
    stream = prepared.train.sequences[0].ids
    assert stream[0] == 256
    assert stream[stream.index(257) + 1 :][:2] == tokenizer.ids("\n\n"), "the joiner stands between records"


def test_clamped_to_the_context(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prepared = prepare(config(tmp_path / "d.jsonl", max_seq_len=2048), tokenizer, context_length=128)
    assert prepared.max_seq_len == 128
    assert "max_seq_len 2048 is beyond the model's context of 128" in prepared.notes[0]


def test_completion_only(tmp_path: Path, tokenizer: Tokenizer) -> None:
    asked = config(
        tmp_path / "d.jsonl", strategy="line-by-line", label_col="tone", completion_only_loss=True, max_seq_len=64
    )
    one = prepare(asked, tokenizer).train.sequences[0]
    carried = [token for token, label in zip(one.ids, one.labels, strict=True) if label != IGNORED]
    assert carried == [*tokenizer.ids("joy"), 257], "the answer and EOS, nothing of the prompt"


def test_repeats_stay_on_one_side(tmp_path: Path, tokenizer: Tokenizer) -> None:
    asked = config(tmp_path / "d.jsonl", ROWS * 2, strategy="line-by-line", max_seq_len=64)
    prepared = prepare(asked, tokenizer, held_out=0.25)
    assert prepared.held_out is not None
    train, held = ({tuple(one.ids) for one in part.sequences} for part in (prepared.train, prepared.held_out))
    assert not train & held
    assert "40 of 80 rows are repeats" in prepared.notes[0]


def test_a_separate_evaluation_set_that_repeats(tmp_path: Path, tokenizer: Tokenizer) -> None:
    train = config(tmp_path / "a.jsonl", strategy="line-by-line", max_seq_len=64)
    other = config(tmp_path / "b.jsonl", [*ROWS[:3], {"phrase": "new", "tone": "joy"}], max_seq_len=32)
    prepared = prepare(train, tokenizer, held_out=other)
    assert "3 of 4 rows of b are in a as well" in prepared.notes[0]


def test_padding_on_the_left_without_a_mask(tmp_path: Path, tokenizer: Tokenizer) -> None:
    asked = config(tmp_path / "d.jsonl", strategy="line-by-line", padding_side="left", use_attention_mask=False)
    with pytest.raises(DataError, match="attend to padding"):
        prepare(asked, tokenizer)


def test_preview(tmp_path: Path, tokenizer: Tokenizer) -> None:
    asked = config(
        tmp_path / "d.jsonl", strategy="line-by-line", label_col="tone", completion_only_loss=True, max_seq_len=64
    )
    shown = preview(asked, tokenizer, context_length=128, samples=2)
    assert (shown.rows, shown.sequences, shown.columns) == (40, 40, ("phrase", "tone"))
    assert shown.loss_tokens == 20 * 4 + 20 * 5
    assert shown.lengths.longest == shown.lengths.shortest + 1 == len(shown.samples[1].tokens)
    assert shown.samples[0].text == "<s>say: p000\ntone: joy</s>"
    assert [text for text, _, loss in shown.samples[0].tokens if loss] == ["j", "o", "y", "</s>"]


def test_a_small_held_out_part_under_join_is_kept(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prepared = prepare(config(tmp_path / "d.jsonl", max_seq_len=128), tokenizer, held_out=2)
    assert prepared.held_out is not None
    rows = [f"say: p{number:03}\ntone: {tone}" for number, tone in ((0, "joy"), (1, "fear"))]
    assert len(prepared.held_out.sequences) == 1
    assert 2 * len(rows[0]) + 8 <= prepared.held_out.tokens <= 2 * len(rows[1]) + 8, "BOS, EOS and joiner: 4 a record"
