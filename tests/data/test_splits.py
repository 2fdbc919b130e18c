"""Held-out rows: the right number, the same every time, and no row on both sides."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldpress.data.splits import split_rows, split_seed
from coldpress.errors import DataError


def test_share_and_count() -> None:
    keys = [str(number) for number in range(100)]
    assert len(split_rows(keys, 0.3, 42).held_out) == 30
    assert len(split_rows(keys, 7, 42).held_out) == 7
    assert split_rows(keys, 0.3, 42) == split_rows(keys, 0.3, 42)
    assert split_rows(keys, 0.3, 42) != split_rows(keys, 0.3, 43)
    assert split_rows(keys, 0.3, 42).moved == 0


@given(st.lists(st.integers(0, 20), min_size=4, max_size=200), st.integers(0, 5))
def test_equal_rows_stay_together(keys: list[int], seed: int) -> None:
    try:
        split = split_rows(keys, 0.25, seed)
    except DataError:
        return
    assert sorted(split.train + split.held_out) == list(range(len(keys)))
    assert not {keys[row] for row in split.train} & {keys[row] for row in split.held_out}
    assert len(split.held_out) <= max(round(len(keys) * 0.25), 1)
    assert split.moved == len(keys) - len(set(keys))


@pytest.mark.parametrize(("rows", "size"), [(10, 10), (10, 50), (10, 0.99999), (1, 0.1), (1, 1)])
def test_an_empty_side(rows: int, size: float) -> None:
    with pytest.raises(DataError, match="both sides need at least one row"):
        split_rows(list(range(rows)), size, 0)


def test_a_share_of_few_rows_is_one_row() -> None:
    assert [len(split_rows(list(range(rows)), 0.1, 0).held_out) for rows in (2, 3, 4, 10, 16)] == [1, 1, 1, 1, 2]


def test_one_text_only() -> None:
    with pytest.raises(DataError, match="only 1 different texts"):
        split_rows(["a"] * 10, 3, 0)


def test_split_seed() -> None:
    assert split_seed({"data_seed": 0, "seed": 5}) == 0
    assert split_seed({"data_seed": None, "seed": 5}) == 5
    assert split_seed({}) == 42
