"""Strategies against what Olive yields, and the counts of what is left out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldpress.data.packing import IGNORED, TokenSequence, pack
from coldpress.data.templates import Encoded
from coldpress.errors import DataError

ROWS = [Encoded([1, 2, 3]), Encoded([4, 5], 1), Encoded([6, 7, 8, 9], 2)]


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
    assert (whole.cut_rows, whole.dropped_rows, whole.dropped_tokens) == (1, 0, 1)
    answers = pack(ROWS, strategy="line-by-line", max_seq_len=3, completion_only=True)
    assert [one.ids for one in answers.sequences] == [[1, 2, 3], [4, 5]]
    assert (answers.cut_rows, answers.dropped_rows, answers.dropped_tokens) == (0, 1, 4)
    assert answers.notes(3)[0] == "1 of 3 rows do not fit 3 tokens: left out"


def test_short_rows() -> None:
    packed = pack(ROWS, strategy="line-by-line", max_seq_len=3, drop_short=True)
    assert [one.ids for one in packed.sequences] == [[1, 2, 3], [6, 7, 8]]
    assert packed.dropped_rows == 1


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
