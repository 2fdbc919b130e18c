"""What `coldpress data` has to show: texts of tokens, packs, and statistics that can be checked by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coldpress.config.schema import DataConfig, LoadDataset, PreProcess
from coldpress.data.preview import Distribution, preview, token_texts
from coldpress.data.tokenizer import Tokenizer


def config(path: Path, texts: list[str], **pre: Any) -> DataConfig:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return DataConfig(
        name=path.stem,
        load_dataset_config=LoadDataset(data_name="json", data_files=str(path)),
        pre_process_data_config=PreProcess(**pre),
    )


def test_distribution() -> None:
    of = Distribution.of(range(1, 101))
    assert (of.shortest, of.median, of.percentile_95, of.longest, of.mean) == (1, 51, 95, 100, 50.5)
    assert of.histogram == ((1, 13, 13), (14, 26, 13), (27, 39, 13), (40, 52, 13), (53, 65, 13), (66, 78, 13),
                            (79, 91, 13), (92, 100, 9))  # fmt: skip
    assert Distribution.of([7]) == Distribution(7, 7, 7.0, 7, 7, ((7, 7, 1),))
    assert Distribution.of([1, 2, 2]).histogram == ((1, 1, 1), (2, 2, 2))


def test_a_pack(tmp_path: Path, tokenizer: Tokenizer) -> None:
    seen = preview(config(tmp_path / "d.jsonl", ["aaa", "b", "b"], strategy="pack", max_seq_len=11), tokenizer)
    assert (seen.rows, seen.sequences, seen.repeats) == (3, 1, 1)
    (sample,) = seen.samples
    assert sample.lengths == (5, 3, 3)
    assert "".join(text for text, _, _ in sample.tokens) == "<s>aaa</s><s>b</s><s>b</s>"
    assert [loss for _, _, loss in sample.tokens] == [False, *[True] * 4, False, True, True, False, True, True]
    assert sample.loss_tokens == seen.loss_tokens == 8
    assert (seen.records.shortest, seen.records.longest, seen.lengths.longest) == (3, 5, 11)


def test_loss_share(tmp_path: Path, tokenizer: Tokenizer) -> None:
    asked = config(tmp_path / "d.jsonl", ["a", "bbbb"], text_template="12:{text|loss}", strategy="line-by-line")
    seen = preview(asked, tokenizer, samples=0)
    assert seen.samples == ()
    assert seen.loss_share == pytest.approx((2 / 6, 5 / 9, 5 / 9))
    plain = config(tmp_path / "d.jsonl", ["a", "bbbb"], strategy="line-by-line")
    assert preview(plain, tokenizer).loss_share is None


@pytest.mark.parametrize("model", ["phi3-7m", "stories260K-hd16", "stories1M-char361"])
def test_texts_of_tokens_make_the_text(shared: Path, model: str) -> None:
    tokenizer = Tokenizer.load(shared / "models" / model)
    for text in ("Once upon a time,\n there was", "日本 🙂🙂 é", "<s>x</s>"):
        ids = tokenizer.ids(text)
        texts = token_texts(ids, tokenizer)
        assert len(texts) == len(ids)
        assert "".join(texts) == tokenizer.decode(ids)
        assert not any("\ufffd" in one for one in texts)


def test_half_a_character_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.ids("aé")
    assert token_texts(ids, tokenizer) == ["a", "", "é"]
    assert token_texts(ids[:2], tokenizer) == ["a", "\ufffd"]
