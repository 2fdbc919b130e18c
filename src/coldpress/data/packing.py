"""Token ids of records to training sequences.

    join            r1 J r2 J r3 J ...  one stream, cut every n tokens; the last, shorter piece is left out
                    |----n----|----n----|--left out
    join-sliding-   windows of n tokens that start s (stride) apart; a window's first n - s tokens were seen before
    window          and carry no loss
    join-random     windows of n tokens that start at a record drawn at random
    line-by-line    one record a sequence
    line-by-line-   records drawn at random, with replacement
    random

n is max_seq_len, J the joiner's tokens. As in Olive; but what is left out is counted. Line by line, a record longer
than n keeps its first n tokens when the whole text carries loss, and is left out under completion-only loss (its answer
would be cut off). Labels repeat the ids; -100 marks a token without loss.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from coldpress.data.templates import Encoded
from coldpress.errors import DataError

__all__ = ["IGNORED", "Packed", "Strategy", "TokenSequence", "pack"]

IGNORED = -100
"""Label of a token without loss."""

Strategy = Literal["join", "join-random", "join-sliding-window", "line-by-line", "line-by-line-random"]


@dataclass(frozen=True)
class TokenSequence:
    """What the model is trained on at once; ids and labels have one length."""

    ids: list[int]
    labels: list[int]
    target: int | None = None
    """Class of the sequence, in sequence classification."""


@dataclass(frozen=True)
class Packed:
    """Sequences, and what became of the records."""

    sequences: list[TokenSequence]
    rows: int
    cut_rows: int = 0
    """Records longer than a sequence, of which the end was left out."""
    dropped_rows: int = 0
    """Records left out whole."""
    dropped_tokens: int = 0
    """Tokens in no sequence."""

    @property
    def tokens(self) -> int:
        return sum(len(one.ids) for one in self.sequences)

    @property
    def loss_tokens(self) -> int:
        """Tokens that carry loss. The first of a sequence never does: nothing stands before it."""
        return sum(label != IGNORED for one in self.sequences for label in one.labels[1:])

    def notes(self, max_seq_len: int) -> tuple[str, ...]:
        """What was left out, in words."""
        said = []
        if self.cut_rows:
            said.append(f"{self.cut_rows} of {self.rows} rows exceed {max_seq_len} tokens: their ends are left out")
        if self.dropped_rows:
            said.append(f"{self.dropped_rows} of {self.rows} rows do not fit {max_seq_len} tokens: left out")
        if self.dropped_tokens:
            said.append(f"{self.dropped_tokens} tokens are in no sequence")
        return tuple(said)


def pack(
    rows: Sequence[Encoded],
    *,
    strategy: Strategy,
    max_seq_len: int,
    joiner: Sequence[int] = (),
    stride: int | None = None,
    max_samples: int | None = None,
    completion_only: bool = False,
    drop_short: bool = False,
    seed: int | None = None,
    retries: int = 10,
) -> Packed:
    """Sequences of at most `max_seq_len` tokens; raises DataError where none comes out."""
    if strategy.startswith("join"):
        if completion_only:
            raise DataError(
                f"completion_only_loss does not go with {strategy}: a record's prompt may stand in another sequence",
                hint='set "strategy": "line-by-line"',
            )
        packed = _JOINED[strategy](rows, max_seq_len, list(joiner), stride, max_samples, seed, retries)
    else:
        chosen = (
            _drawn(rows, max_samples, seed, retries, max_seq_len if drop_short else 0) if "random" in strategy else rows
        )
        packed = _line_by_line(chosen, max_seq_len, completion_only, drop_short, max_samples)
    if not packed.sequences:
        total = sum(len(row.ids) for row in rows)
        raise DataError(
            f"no training sequence comes out of {len(rows)} rows with {total} tokens: "
            + ("all of them fill less than one sequence of" if strategy.startswith("join") else "none fits into")
            + f" {max_seq_len} tokens",
            hint="lower max_seq_len" if strategy.startswith("join") else "raise max_seq_len or shorten the rows",
        )
    return packed


def _line_by_line(
    rows: Sequence[Encoded], max_seq_len: int, completion_only: bool, drop_short: bool, max_samples: int | None
) -> Packed:
    sequences: list[TokenSequence] = []
    cut = dropped = lost = seen = 0
    for row in rows:
        if max_samples is not None and len(sequences) == max_samples:
            break
        seen += 1
        ids = row.ids
        if len(ids) > max_seq_len:
            if completion_only:
                dropped, lost = dropped + 1, lost + len(ids)
                continue
            cut, lost = cut + 1, lost + len(ids) - max_seq_len
            ids = ids[:max_seq_len]
        if len(ids) < 2 or (drop_short and len(ids) < max_seq_len):
            dropped, lost = dropped + 1, lost + len(ids)
            continue
        start = row.answer_start if completion_only and row.answer_start is not None else 0
        sequences.append(TokenSequence(list(ids), [IGNORED] * start + list(ids[start:])))
    return Packed(sequences, seen, cut, dropped, lost)


def _drawn(
    rows: Sequence[Encoded], max_samples: int | None, seed: int | None, retries: int, shortest: int
) -> list[Encoded]:
    """Records drawn with replacement; up to `retries` tries for one of at least `shortest` tokens."""
    if max_samples is None:
        raise DataError("line-by-line-random needs max_samples", hint="say how many sequences to draw")
    draw = random.Random(seed)
    chosen = []
    for _ in range(max_samples):
        row = rows[draw.randrange(len(rows))]
        for _ in range(retries):
            if len(row.ids) >= shortest:
                break
            row = rows[draw.randrange(len(rows))]
        chosen.append(row)
    return chosen


def _join(
    rows: Sequence[Encoded],
    max_seq_len: int,
    joiner: list[int],
    stride: int | None,
    max_samples: int | None,
    seed: int | None,
    retries: int,
) -> Packed:
    stream = _stream(rows, joiner)
    whole = len(stream) // max_seq_len
    kept = whole if max_samples is None else min(whole, max_samples)
    cuts = (stream[place * max_seq_len : (place + 1) * max_seq_len] for place in range(kept))
    return Packed(
        [TokenSequence(ids, list(ids)) for ids in cuts], len(rows), dropped_tokens=len(stream) - kept * max_seq_len
    )


def _sliding(
    rows: Sequence[Encoded],
    max_seq_len: int,
    joiner: list[int],
    stride: int | None,
    max_samples: int | None,
    seed: int | None,
    retries: int,
) -> Packed:
    if stride is None or stride > max_seq_len:
        raise DataError(
            f"join-sliding-window needs a stride of at most max_seq_len ({max_seq_len}), got {stride}",
            hint="half of max_seq_len is usual",
        )
    stream = _stream(rows, joiner)
    sequences: list[TokenSequence] = []
    end = 0
    for begin in range(0, len(stream) - max_seq_len + 1, stride):
        if max_samples is not None and len(sequences) == max_samples:
            break
        ids = stream[begin : begin + max_seq_len]
        seen = max_seq_len - stride if sequences else 0
        sequences.append(TokenSequence(ids, [IGNORED] * seen + ids[seen:]))
        end = begin + max_seq_len
    return Packed(sequences, len(rows), dropped_tokens=len(stream) - end)


def _join_random(
    rows: Sequence[Encoded],
    max_seq_len: int,
    joiner: list[int],
    stride: int | None,
    max_samples: int | None,
    seed: int | None,
    retries: int,
) -> Packed:
    if max_samples is None:
        raise DataError("join-random needs max_samples", hint="say how many sequences to draw")
    draw = random.Random(seed)
    sequences: list[TokenSequence] = []
    for _ in range(max_samples):
        for _ in range(retries + 1):
            ids: list[int] = []
            for row in rows[draw.randrange(len(rows)) :]:
                ids += [*row.ids, *joiner]
                if len(ids) >= max_seq_len:
                    break
            if len(ids) >= max_seq_len:
                sequences.append(TokenSequence(ids[:max_seq_len], ids[:max_seq_len]))
                break
    return Packed(sequences, len(rows))


def _stream(rows: Sequence[Encoded], joiner: list[int]) -> list[int]:
    stream: list[int] = []
    for row in rows:
        stream += row.ids
        stream += joiner
    return stream


_JOINED: dict[str, Callable[..., Packed]] = {
    "join": _join,
    "join-sliding-window": _sliding,
    "join-random": _join_random,
}
