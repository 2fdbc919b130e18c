"""Strategies against what Olive yields, and the counts of what is left out."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldpress.config.schema import PreProcess
from coldpress.data.best_fit import best_fit_decreasing
from coldpress.data.packing import IGNORED, Strategy, TokenSequence, pack
from coldpress.data.templates import Encoded
from coldpress.errors import DataError

ROWS = [Encoded([1, 2, 3]), Encoded([4, 5], 1, ((1, 2),)), Encoded([6, 7, 8, 9], 2, ((2, 4),))]


def test_join_cuts_one_stream() -> None:
    packed = pack(ROWS, strategy="join", max_seq_len=5, joiner=[0])
    assert packed.sequences == [
        TokenSequence([1, 2, 3, 0, 4], [1, 2, 3, 0, 4]),
        TokenSequence([5, 0, 6, 7, 8], [5, 0, 6, 7, 8]),
    ]
    assert (packed.dropped_tokens, packed.tokens, packed.loss_tokens) == (2, 10, 8)
    assert packed.notes(5) == ("2 tokens are in no sequence",)
    assert len(pack(ROWS, strategy="join", max_seq_len=5, joiner=[0], max_samples=1).sequences) == 1


def test_sliding_window_counts_each_token_once() -> None:
    packed = pack(ROWS, strategy="join-sliding-window", max_seq_len=4, stride=2)
    assert [one.ids for one in packed.sequences] == [[1, 2, 3, 4], [3, 4, 5, 6], [5, 6, 7, 8]]
    assert [one.labels for one in packed.sequences] == [
        [1, 2, 3, 4],
        [IGNORED, IGNORED, 5, 6],
        [IGNORED, IGNORED, 7, 8],
    ]
    assert packed.dropped_tokens == 1
    with pytest.raises(DataError, match="needs a stride"):
        pack(ROWS, strategy="join-sliding-window", max_seq_len=4)


def test_line_by_line_and_the_answer() -> None:
    packed = pack(ROWS, strategy="line-by-line", max_seq_len=4, completion_only=True)
    assert [one.labels for one in packed.sequences] == [[1, 2, 3], [IGNORED, 5], [IGNORED, IGNORED, 8, 9]]
    assert packed.loss_tokens == 2 + 1 + 2


def test_long_rows_are_cut_or_left_out_and_counted() -> None:
    whole = pack(ROWS, strategy="line-by-line", max_seq_len=3)
    assert [one.ids for one in whole.sequences] == [[1, 2, 3], [4, 5], [6, 7, 8]]
    assert (whole.cut_rows, whole.long_rows, whole.dropped_tokens) == (1, 0, 1)
    assert whole.notes(3)[0] == "1 of 3 rows exceed 3 tokens (the longest has 4): their ends are left out"
    answers = pack(ROWS, strategy="line-by-line", max_seq_len=3, completion_only=True)
    assert [one.ids for one in answers.sequences] == [[1, 2, 3], [4, 5]]
    assert (answers.cut_rows, answers.long_rows, answers.dropped_tokens) == (0, 1, 4)
    assert answers.notes(3)[0] == "1 of 3 rows do not fit 3 tokens (the longest has 4): left out"


def test_short_rows() -> None:
    packed = pack(ROWS, strategy="line-by-line", max_seq_len=3, drop_short=True)
    assert [one.ids for one in packed.sequences] == [[1, 2, 3], [6, 7, 8]]
    assert packed.short_rows == 1
    assert packed.notes(3)[1:] == ("1 of 3 rows are too short: left out", "3 tokens are in no sequence")


def test_rows_without_loss_are_left_out() -> None:
    rows = [*ROWS, Encoded([1, 2, 3], 3, ((3, 3),)), Encoded([4, 5], 0, ((0, 1),))]
    for strategy in ("line-by-line", "pack"):
        packed = pack(rows, strategy=strategy, max_seq_len=9, completion_only=True)  # type: ignore[arg-type]
        assert (packed.silent_rows, packed.dropped_tokens, packed.records) == (2, 5, 3)
        assert "2 of 5 rows have no token that carries loss: left out" in packed.notes(9)
    with pytest.raises(DataError, match="2 of 2 rows have no token that carries loss") as error:
        pack(rows[3:], strategy="pack", max_seq_len=9, completion_only=True)
    assert "loss mask" in (error.value.hint or "")


def test_pack_keeps_records_whole() -> None:
    packed = pack(ROWS, strategy="pack", max_seq_len=6)
    assert packed.sequences == [
        TokenSequence([1, 2, 3], [IGNORED, 2, 3], (3,)),
        TokenSequence([4, 5, 6, 7, 8, 9], [IGNORED, 5, IGNORED, 7, 8, 9], (2, 4)),
    ]
    assert (packed.records, packed.tokens, packed.loss_tokens) == (3, 9, 2 + 1 + 3)
    assert packed.notes(6) == ()
    assert packed.facts(6) == ("3 records are packed into 2 sequences of up to 6 tokens, 1.5 in each; 75.0% full",)


def test_pack_with_answers() -> None:
    packed = pack(ROWS, strategy="pack", max_seq_len=6, completion_only=True)
    assert packed.sequences[1] == TokenSequence([4, 5, 6, 7, 8, 9], [IGNORED, 5, IGNORED, IGNORED, 8, 9], (2, 4))
    assert packed.loss_tokens == pack(ROWS, strategy="line-by-line", max_seq_len=6, completion_only=True).loss_tokens


def test_pack_says_what_is_left_out() -> None:
    cut = pack(ROWS, strategy="pack", max_seq_len=3)
    assert (cut.cut_rows, cut.dropped_tokens, cut.longest) == (1, 1, 4)
    assert [one.ids for one in cut.sequences] == [[1, 2, 3], [4, 5], [6, 7, 8]]
    answers = pack(ROWS, strategy="pack", max_seq_len=3, completion_only=True)
    assert (answers.long_rows, answers.dropped_tokens) == (1, 4)
    first = pack(ROWS, strategy="pack", max_seq_len=6, max_samples=1)
    assert (first.spare_rows, first.dropped_tokens, len(first.sequences)) == (2, 6, 1)
    assert "2 of 3 rows are beyond max_samples sequences: left out" in first.notes(6)
    with pytest.raises(DataError, match="drop_short_sequences does not go with pack"):
        pack(ROWS, strategy="pack", max_seq_len=6, drop_short=True)


def test_a_seed_shuffles_equal_records_only() -> None:
    rows = [Encoded([number, 1]) for number in range(40)]
    one, again, other = (pack(rows, strategy="pack", max_seq_len=4, seed=seed).sequences for seed in (1, 1, 2))
    assert one == again
    assert one != other
    assert {lengths for sequence in one if (lengths := sequence.lengths)} == {(2, 2)}


def test_best_fit_takes_the_fullest_bin_that_has_room() -> None:
    assert best_fit_decreasing([5, 7, 3, 2, 1], 9) == [[0, 2, 4], [1, 3]]
    assert best_fit_decreasing([4] * 5, 8) == [[0, 1], [2, 3], [4]]
    with pytest.raises(ValueError, match="item 1 has length 4, not 1 to 3"):
        best_fit_decreasing([1, 4], 3)


@given(st.lists(st.integers(1, 64), max_size=200), st.none() | st.integers(0, 3))
def test_best_fit_leaves_no_two_bins_that_could_be_one(lengths: list[int], seed: int | None) -> None:
    bins = best_fit_decreasing(lengths, 64, seed)
    assert sorted(item for one in bins for item in one) == list(range(len(lengths)))
    assert all(sum(lengths[item] for item in one) <= 64 for one in bins)
    assert bins == sorted(bins)
    # The first item of the later bin had no room in the other one.
    filled = sorted(sum(lengths[item] for item in one) for one in bins)
    assert len(filled) < 2 or filled[0] + filled[1] > 64


@given(
    st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=12), min_size=1, max_size=30),
    st.integers(2, 20),
    st.booleans(),
    st.data(),
)
def test_every_token_of_a_kept_record_is_packed_once(
    records: list[list[int]], length: int, completion_only: bool, data: st.DataObject
) -> None:
    rows = []
    for number, ids in enumerate(records):
        begin = data.draw(st.integers(0, len(ids)))
        rows.append(Encoded([100 * number + token for token in ids], begin, ((begin, len(ids)),)))
    try:
        packed = pack(rows, strategy="pack", max_seq_len=length, completion_only=completion_only)
    except DataError:
        return
    seen: list[list[int]] = []
    for one in packed.sequences:
        assert one.lengths is not None
        assert sum(one.lengths) == len(one.ids) == len(one.labels) <= length
        start = 0
        for size in one.lengths:
            ids, labels = one.ids[start : start + size], one.labels[start : start + size]
            seen.append(ids)
            assert labels[0] == IGNORED
            assert all(label in (IGNORED, token) for label, token in zip(labels, ids, strict=True))
            start += size
    lines = pack(rows, strategy="line-by-line", max_seq_len=length, completion_only=completion_only)
    assert sorted(seen) == sorted(one.ids for one in lines.sequences)
    assert packed.loss_tokens == lines.loss_tokens
    assert packed.tokens + packed.dropped_tokens == sum(map(len, records))


def test_random_strategies_repeat_with_their_seed() -> None:
    for strategy in ("join-random", "line-by-line-random"):
        first, again, other = (
            pack(ROWS * 20, strategy=strategy, max_seq_len=4, max_samples=12, seed=seed)  # type: ignore[arg-type]
            for seed in (1, 1, 2)
        )
        assert first == again
        assert first.sequences != other.sequences
        assert len(first.sequences) == 12
        with pytest.raises(DataError, match="needs max_samples"):
            pack(ROWS, strategy=strategy, max_seq_len=4)  # type: ignore[arg-type]


def test_the_strategies_are_those_of_the_config() -> None:
    assert get_args(Strategy) == get_args(PreProcess.model_fields["strategy"].annotation)


def test_nothing_comes_out() -> None:
    with pytest.raises(DataError, match="3 rows with 9 tokens: all of them fill less than one sequence of 100"):
        pack(ROWS, strategy="join", max_seq_len=100)
    with pytest.raises(DataError, match="none fits into 2 tokens"):
        pack([Encoded([1, 2, 3], 1)], strategy="line-by-line", max_seq_len=2, completion_only=True)
    with pytest.raises(DataError, match="does not go with join"):
        pack(ROWS, strategy="join", max_seq_len=2, completion_only=True)


@given(
    st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=12), min_size=1, max_size=12),
    st.integers(2, 7),
    st.sampled_from(["join", "line-by-line"]),
)
def test_no_token_is_lost_silently(rows: list[list[int]], length: int, strategy: str) -> None:
    total = sum(map(len, rows))
    try:
        packed = pack([Encoded(ids) for ids in rows], strategy=strategy, max_seq_len=length)  # type: ignore[arg-type]
    except DataError:
        return
    assert packed.tokens + packed.dropped_tokens == total
    assert all(len(one.ids) == len(one.labels) <= length for one in packed.sequences)
