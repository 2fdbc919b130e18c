"""Steps cut into micro-batches: every token with loss once, within the limits."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coldpress.data.packing import IGNORED, TokenSequence
from coldpress.nn import imports

imports.load_inference()

import torch  # noqa: E402 - after the imports that hide what it would pull in

from coldpress.nn.batches import ALIKE, ROUNDING, cut_step  # noqa: E402
from coldpress.nn.packed_attention import segments_of  # noqa: E402

LENGTHS = st.lists(st.integers(2, 90), min_size=1, max_size=24)


def rows(lengths: list[int]) -> list[tuple[int, TokenSequence]]:
    """Every token is a number of its own."""
    made, token = [], 1
    for place, length in enumerate(lengths):
        ids = list(range(token, token + length))
        token += length
        made.append((place, TokenSequence(ids, [IGNORED] * (length // 2) + ids[length // 2 :])))
    return made


@settings(deadline=None, max_examples=60)
@given(LENGTHS, st.integers(16, 200), st.none() | st.integers(1, 5), st.none() | st.integers(5, 60))
def test_packed(lengths: list[int], tokens: int, records: int | None, apart: int | None) -> None:
    given_rows = rows(lengths)
    step = cut_step(given_rows, form="packed", tokens=tokens, records=records, apart=apart)
    expected = Counter(
        (ids[place], label)
        for _, one in given_rows
        for ids, labels in [(one.ids, one.labels)]
        for place, label in enumerate(labels[1:])
        if label != IGNORED
    )
    found: Counter[tuple[int, int]] = Counter()
    for micro in step.micro:
        ids = micro.inputs["input_ids"][0]
        found.update(zip(ids[micro.inputs["loss_rows"]].tolist(), micro.inputs["loss_targets"].tolist(), strict=True))
        assert micro.segments is not None
        assert sum(micro.segments.lengths) == len(ids)
        assert len(ids) % ROUNDING == 0
        whole = {one.ids[0]: len(one.ids) for _, one in given_rows}
        real = [whole[first] for _, first in starts(micro.segments.lengths, ids.tolist()) if first]
        assert micro.tokens == sum(real) <= max(tokens, max(real))
        assert records is None or len(real) <= records
        assert apart is None or (max(real) <= apart) == (min(real) <= apart)
    assert found == expected
    assert (step.count, step.rows) == (sum(expected.values()), tuple(range(len(lengths))))


def starts(lengths: tuple[int, ...], ids: list[int]) -> list[tuple[int, int]]:
    """(length, first token) of each record; padding is token 0."""
    found, start = [], 0
    for length in lengths:
        found.append((length, ids[start]))
        start += length
    return found


@settings(deadline=None, max_examples=60)
@given(LENGTHS)
def test_segments_fill_up_and_take_back(lengths: list[int]) -> None:
    ordered = sorted(lengths, reverse=True)
    segments = segments_of(ordered)
    assert segments.positions[0].tolist() == [place for length in ordered for place in range(length)]
    assert segments.borders.tolist()[-1] == sum(ordered)
    start = 0
    for bucket in segments.buckets:
        own = ordered[start : start + bucket.records]
        assert (bucket.tokens, max(own) <= bucket.length) == (sum(own), True)
        if bucket.take is not None:
            assert bucket.back is not None
            assert bucket.take[bucket.back].tolist() == list(range(bucket.tokens))
        start += bucket.records
    assert start == len(ordered)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(9, 90), min_size=1, max_size=24), st.integers(0, 7), st.integers(100, 1000))
def test_what_records_begin_with_stands_once(lengths: list[int], alike: int, tokens: int) -> None:
    """Each loss is asked behind the tokens that it was asked behind, and each token of a row is computed once."""
    beginning = list(range(1000, 1000 + alike))
    given_rows = [
        (place, TokenSequence(beginning + one.ids[alike:], [IGNORED] * 8 + one.ids[8:])) for place, one in rows(lengths)
    ]
    step = cut_step(given_rows, form="packed", tokens=tokens, sharing=True)
    wanted = {(tuple(one.ids[:end]), one.ids[end]) for _, one in given_rows for end in range(8, len(one.ids))}
    found = []
    for micro in step.micro:
        segments, ids = micro.segments, micro.inputs["input_ids"][0]
        assert segments is not None
        several = len(step.micro) == 1 and len(lengths) > 1
        assert segments.shared in ((alike,) if several and alike >= ALIKE else (0, alike))
        asked = dict(zip(micro.inputs["loss_rows"].tolist(), micro.inputs["loss_targets"].tolist(), strict=True))
        computed = []
        for bucket in segments.buckets:
            take = bucket.start + (torch.arange(bucket.tokens) if bucket.take is None else bucket.take)
            own = range(bucket.tokens) if bucket.back is None else bucket.back.tolist()
            computed += [int(take[place]) for place in own]
            for place in own:
                row = int(take[place])
                first = place // bucket.length * bucket.length
                context = tuple(ids[take[first : place + 1]].tolist())
                assert len(context) == int(micro.inputs["position_ids"][0][row]) + 1
                if row in asked:
                    found.append((context, asked[row]))
        assert computed == list(range(len(ids)))
        own = max(segments.lengths) - segments.shared
        assert len(ids) % ROUNDING == 0 or (segments.shared and own * len(segments.lengths) < 4 * ROUNDING)
        assert int(micro.inputs["position_ids"].max()) < max(lengths), "padding counts no further than the records"
    assert len(found) == len(wanted)
    assert set(found) == wanted
    assert step.tokens == sum(lengths)


def test_a_pack_is_its_records() -> None:
    ids = [11, 12, 13, 21, 22, 31, 32, 33, 34]
    pack = TokenSequence(ids, [IGNORED, 12, 13, IGNORED, 22, IGNORED, 32, 33, 34], lengths=(3, 2, 4))
    (micro,) = cut_step([(0, pack)], form="packed", tokens=100).micro
    real = [first for _, first in starts(micro.segments.lengths, micro.inputs["input_ids"][0].tolist()) if first]  # type: ignore[union-attr]
    assert real == [31, 11, 21], "longest first"
    assert sorted(micro.inputs["loss_targets"].tolist()) == [12, 13, 22, 32, 33, 34]


def test_what_no_loss_is_asked_of_is_left_out() -> None:
    """Of a record, what stands behind the last label; padding stands behind the shortest record, and makes none."""
    long = TokenSequence(list(range(1, 31)), [IGNORED] * 20 + list(range(21, 26)) + [IGNORED] * 5)
    short = TokenSequence(list(range(41, 47)), [IGNORED] * 4 + [45, 46])
    (micro,) = cut_step([(0, long), (1, short)], form="packed", tokens=100).micro
    assert micro.segments is not None
    assert micro.segments.lengths == (24, 8), "tokens 1 to 24; 41 to 45 and three of padding"
    assert micro.inputs["input_ids"][0].tolist() == [*range(1, 25), *range(41, 46), 0, 0, 0]
    assert micro.inputs["loss_targets"].tolist() == [21, 22, 23, 24, 25, 45, 46]
    assert micro.tokens == 36, "those of the data"
    (kept,) = cut_step([(0, long)], form="packed", tokens=100, apart=29).micro
    assert kept.segments is not None
    assert sum(kept.segments.lengths) == 32, "a record beyond `apart` stays whole"


def test_a_step_without_loss_still_runs() -> None:
    silent = [(0, TokenSequence([1, 2, 3], [IGNORED] * 3)), (1, TokenSequence([4, 5], [IGNORED] * 2))]
    (micro,) = cut_step(silent, form="packed", tokens=100).micro
    assert micro.count == 0
    assert micro.inputs["loss_rows"].numel() == 0


@pytest.mark.parametrize("side", ["right", "left"])
def test_padded(side: str) -> None:
    step = cut_step(rows([3, 6, 5]), form="padded", tokens=12, pad_id=99, padding_side=side)
    assert [list(one.inputs["input_ids"].shape) for one in step.micro] == [[2, 6], [1, 3]]
    first = step.micro[0].inputs
    assert torch.equal(first["input_ids"] != 99, first["attention_mask"].bool())
    assert (first["labels"][first["attention_mask"] == 0] == IGNORED).all()
    # The first label of a record is never asked for, wherever it stands.
    assert step.count == sum(max(0, length - max(1, length // 2)) for length in (3, 6, 5))


def test_classes() -> None:
    made = [
        (place, TokenSequence([1] * length, [IGNORED] * length, target=place)) for place, length in enumerate([2, 5])
    ]
    (micro,) = cut_step(made, form="classes", tokens=100, pad_id=9).micro
    assert micro.inputs["labels"].tolist() == [1, 0]
    assert micro.count == 2
