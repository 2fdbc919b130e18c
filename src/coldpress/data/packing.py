"""Token ids of records to training sequences.

    join            r1 J r2 J r3 J ...  one stream, cut every n tokens; the last, shorter piece is left out
                    |----n----|----n----|--left out
    join-sliding-   windows of n tokens that start s (stride) apart; a window's first n - s tokens were seen before
    window          and carry no loss
    join-random     windows of n tokens that start at a record drawn at random
    line-by-line    one record a sequence
    line-by-line-   records drawn at random, with replacement
    random
    pack            r3 r1 r8|  whole records, as many as fit into n tokens (best fit decreasing); `lengths` says where
                    r2 r5 |    each ends, and attention and positions start anew there

n is max_seq_len, J the joiner's tokens. As in Olive, but for `pack`, and what is left out is counted. Where a sequence
holds whole records, one longer than n keeps its first n tokens when the whole text carries loss, and is left out under
completion-only loss (its answer would be cut off). Labels repeat the ids; -100 marks a token without loss.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from coldpress.data.best_fit import best_fit_decreasing
from coldpress.data.templates import Encoded
from coldpress.errors import DataError

__all__ = ["IGNORED", "Packed", "Strategy", "TokenSequence", "labels_of", "pack"]

IGNORED = -100
"""Label of a token without loss."""

Strategy = Literal["join", "join-random", "join-sliding-window", "line-by-line", "line-by-line-random", "pack"]


@dataclass(frozen=True)
class TokenSequence:
    """What the model is trained on at once; ids and labels have one length."""

    ids: list[int]
    labels: list[int]
    lengths: tuple[int, ...] | None = None
    """Tokens of each record inside, in order; None: one record, or one stream. Attention must not cross a border,
    positions start anew after it, and the first token of each record carries no loss."""
    target: int | None = None
    """Index of the class, in sequence classification."""


@dataclass(frozen=True)
class Packed:
    """Sequences, and what became of the records."""

    sequences: list[TokenSequence]
    rows: int
    cut_rows: int = 0
    """Records longer than a sequence, of which the end was left out."""
    long_rows: int = 0
    """Records left out because they are longer than a sequence."""
    short_rows: int = 0
    """Records left out because they have less than two tokens, or less than a sequence under drop_short_sequences."""
    silent_rows: int = 0
    """Records left out because no token of theirs carries loss."""
    spare_rows: int = 0
    """Records left out because max_samples sequences are full without them."""
    dropped_tokens: int = 0
    """Tokens in no sequence."""
    longest: int = 0
    """Tokens of the longest record."""

    @property
    def tokens(self) -> int:
        return sum(len(one.ids) for one in self.sequences)

    @property
    def records(self) -> int:
        """Records in the sequences; under join, sequences."""
        return sum(1 if one.lengths is None else len(one.lengths) for one in self.sequences)

    @property
    def loss_tokens(self) -> int:
        """Tokens that carry loss. The first of a sequence never does: nothing stands before it."""
        return sum(len(one.labels) - 1 - one.labels[1:].count(IGNORED) for one in self.sequences)

    def notes(self, max_seq_len: int) -> tuple[str, ...]:
        """What was left out, in words."""
        said = []
        longest = f"the longest has {self.longest}"
        if self.cut_rows:
            said.append(
                f"{self.cut_rows} of {self.rows} rows exceed {max_seq_len} tokens ({longest}): their ends are left out"
            )
        if self.long_rows:
            said.append(f"{self.long_rows} of {self.rows} rows do not fit {max_seq_len} tokens ({longest}): left out")
        if self.short_rows:
            said.append(f"{self.short_rows} of {self.rows} rows are too short: left out")
        if self.silent_rows:
            said.append(f"{self.silent_rows} of {self.rows} rows have no token that carries loss: left out")
        if self.spare_rows:
            said.append(f"{self.spare_rows} of {self.rows} rows are beyond max_samples sequences: left out")
        if self.dropped_tokens:
            said.append(f"{self.dropped_tokens} tokens are in no sequence")
        return tuple(said)

    def facts(self, max_seq_len: int) -> tuple[str, ...]:
        """How full packs are, in words."""
        if not self.sequences or self.sequences[0].lengths is None:
            return ()
        count = len(self.sequences)
        said = (
            f"{self.records} records are packed into {count} sequences of up to {max_seq_len} tokens, "
            f"{self.records / count:.1f} in each; {self.tokens / (count * max_seq_len):.1%} full"
        )
        return (said,)


def labels_of(row: Encoded, completion_only: bool) -> list[int]:
    """Labels of one record: its ids where they carry loss. Without a known answer, everything does."""
    if not completion_only or row.spans is None:
        return list(row.ids)
    labels = [IGNORED] * len(row.ids)
    for start, stop in row.spans:
        labels[start:stop] = row.ids[start:stop]
    return labels


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
                hint='set "strategy": "pack" or "line-by-line"',
            )
        packed = _JOINED[strategy](rows, max_seq_len, list(joiner), stride, max_samples, seed, retries)
    elif strategy == "pack":
        if drop_short:
            raise DataError(
                "drop_short_sequences does not go with pack: nearly every pack is a little shorter than max_seq_len",
                hint="leave drop_short_sequences out",
            )
        packed = _packed(rows, max_seq_len, completion_only, max_samples, seed)
    else:
        chosen = (
            _drawn(rows, max_samples, seed, retries, max_seq_len if drop_short else 0) if "random" in strategy else rows
        )
        packed = _line_by_line(chosen, max_seq_len, completion_only, drop_short, max_samples)
    if not packed.sequences:
        raise _nothing_left(rows, packed, strategy, max_seq_len)
    return packed


def _nothing_left(rows: Sequence[Encoded], packed: Packed, strategy: str, max_seq_len: int) -> DataError:
    total = sum(len(row.ids) for row in rows)
    said = f"no sequence comes out of {len(rows)} rows with {total} tokens: "
    if strategy.startswith("join"):
        return DataError(
            said + f"all of them fill less than one sequence of {max_seq_len} tokens",
            hint='lower max_seq_len, or set "strategy": "pack"',
        )
    if packed.silent_rows:
        return DataError(
            said + "; ".join(packed.notes(max_seq_len)),
            hint="is the answer where label_col, the template or the roles say? `coldpress data` shows the loss mask",
        )
    return DataError(
        said + f"none fits into {max_seq_len} tokens",
        hint="raise max_seq_len or shorten the rows",
    )


def _fitted(
    rows: Sequence[Encoded],
    max_seq_len: int,
    completion_only: bool,
    drop_short: bool = False,
    enough: int | None = None,
) -> tuple[list[tuple[list[int], list[int]]], Packed]:
    """(ids, labels) of each record that goes into a sequence whole or cut, and the counts of the others.

    Stops when `enough` are found.
    """
    kept: list[tuple[list[int], list[int]]] = []
    cut = long = short = silent = lost = longest = seen = 0
    for row in rows:
        if enough is not None and len(kept) == enough:
            break
        seen += 1
        size = len(row.ids)
        longest = max(longest, size)
        if size > max_seq_len and completion_only:
            long, lost = long + 1, lost + size
            continue
        labels = labels_of(row, completion_only)[:max_seq_len]
        if size < 2 or max_seq_len < 2 or (drop_short and size < max_seq_len):
            short, lost = short + 1, lost + size
        elif labels[1:].count(IGNORED) == len(labels) - 1:
            silent, lost = silent + 1, lost + size
        else:
            cut, lost = cut + (size > max_seq_len), lost + max(size - max_seq_len, 0)
            kept.append((row.ids[:max_seq_len], labels))
    counts = Packed([], seen, cut, long, short, silent, dropped_tokens=lost, longest=longest)
    return kept, counts


def _line_by_line(
    rows: Sequence[Encoded], max_seq_len: int, completion_only: bool, drop_short: bool, max_samples: int | None
) -> Packed:
    kept, counts = _fitted(rows, max_seq_len, completion_only, drop_short, max_samples)
    return replace(counts, sequences=[TokenSequence(ids, labels) for ids, labels in kept])


def _packed(
    rows: Sequence[Encoded], max_seq_len: int, completion_only: bool, max_samples: int | None, seed: int | None
) -> Packed:
    kept, counts = _fitted(rows, max_seq_len, completion_only)
    bins = best_fit_decreasing([len(ids) for ids, _ in kept], max_seq_len, seed)
    spare = [] if max_samples is None else [one for some in bins[max_samples:] for one in some]
    sequences = []
    for chosen in bins[:max_samples]:
        ids: list[int] = []
        labels: list[int] = []
        for one in chosen:
            ids += kept[one][0]
            labels += [IGNORED, *kept[one][1][1:]]  # or the last token of one record would teach the first of the next
        sequences.append(TokenSequence(ids, labels, tuple(len(kept[one][0]) for one in chosen)))
    lost = counts.dropped_tokens + sum(len(kept[one][0]) for one in spare)
    return replace(counts, sequences=sequences, spare_rows=len(spare), dropped_tokens=lost)


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
