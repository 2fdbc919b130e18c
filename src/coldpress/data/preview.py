"""What `coldpress data` shows: prepared sequences token by token, and what the records are like in numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from coldpress.config.schema import DataConfig
from coldpress.data.packing import IGNORED, TokenSequence, labels_of
from coldpress.data.prepare import prepare_rows
from coldpress.data.tokenizer import Tokenizer

__all__ = ["Distribution", "Preview", "PreviewSample", "preview", "token_texts"]

BARS = 8
"""Of the histogram."""


@dataclass(frozen=True)
class Distribution:
    """Sizes of many things, in tokens."""

    shortest: int
    median: int
    mean: float
    percentile_95: int
    longest: int
    histogram: tuple[tuple[int, int, int], ...] = ()
    """(from, to, how many), both ends included."""

    @classmethod
    def of(cls, values: Sequence[int]) -> Distribution:
        ranked = sorted(values)
        low, high = ranked[0], ranked[-1]
        width = -(-(high - low + 1) // BARS)
        counts = [0] * BARS
        for value in ranked:
            counts[(value - low) // width] += 1
        bars = [(low + bar * width, min(low + (bar + 1) * width - 1, high), count) for bar, count in enumerate(counts)]
        return cls(
            low,
            ranked[len(ranked) // 2],
            sum(ranked) / len(ranked),
            ranked[-(-len(ranked) * 95 // 100) - 1],
            high,
            tuple(bar for bar in bars if bar[0] <= high),
        )


@dataclass(frozen=True)
class PreviewSample:
    """One prepared sequence, token by token: (text of the token, id, whether it carries loss)."""

    text: str
    tokens: tuple[tuple[str, int, bool], ...]
    lengths: tuple[int, ...]
    """Tokens of each record inside."""
    target: str | None = None
    """The class, in sequence classification."""

    @property
    def loss_tokens(self) -> int:
        return sum(loss for _, _, loss in self.tokens)


@dataclass(frozen=True)
class Preview:
    """The records of a data config, and its first sequences."""

    origin: str
    rows: int
    columns: tuple[str, ...]
    records: Distribution
    """Lengths of the records, before anything is cut or packed."""
    loss_share: tuple[float, float, float] | None
    """Lowest, median and highest share of a record's tokens that carry loss; None where all do."""
    repeats: int
    """Records with the text of another one before."""
    sequences: int
    tokens: int
    loss_tokens: int
    lengths: Distribution
    """Of the sequences."""
    max_seq_len: int
    samples: tuple[PreviewSample, ...]
    notes: tuple[str, ...]
    facts: tuple[str, ...]
    classes: tuple[tuple[str, int], ...] = ()
    """Names of the classes, and how many records each has."""


def preview(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    context_length: int | None = None,
    samples: int = 3,
    classes: bool = False,
) -> Preview:
    """The first prepared sequences of a data config, with counts; raises DataError."""
    prepared, texts, rows = prepare_rows(config, tokenizer, context_length=context_length, classes=classes)
    packed = prepared.train
    shares = sorted(
        1 - labels_of(row, True).count(IGNORED) / len(row.ids) for row in rows if texts.completion_only and row.ids
    )
    names = prepared.classes or ()
    counts = Counter(texts.targets or ())
    return Preview(
        origin=texts.records.origin,
        rows=len(texts.records),
        columns=texts.records.columns,
        records=Distribution.of([len(row.ids) for row in rows]),
        loss_share=(shares[0], shares[len(shares) // 2], shares[-1]) if shares else None,
        repeats=len(rows) - len({one.text for one in texts.rendered}),
        sequences=len(packed.sequences),
        tokens=packed.tokens,
        loss_tokens=packed.loss_tokens,
        lengths=Distribution.of([len(one.ids) for one in packed.sequences]),
        max_seq_len=prepared.max_seq_len,
        samples=tuple(_sample(one, tokenizer, names) for one in packed.sequences[:samples]),
        notes=prepared.notes,
        facts=prepared.facts,
        classes=tuple((name, counts[number]) for number, name in enumerate(names)),
    )


def _sample(sequence: TokenSequence, tokenizer: Tokenizer, names: Sequence[str]) -> PreviewSample:
    texts = token_texts(sequence.ids, tokenizer)
    rows = zip(texts, sequence.ids, sequence.labels, strict=True)
    return PreviewSample(
        text=tokenizer.decode(sequence.ids),
        tokens=tuple((text, i, place > 0 and label != IGNORED) for place, (text, i, label) in enumerate(rows)),
        lengths=sequence.lengths or (len(sequence.ids),),
        target=None if sequence.target is None else names[sequence.target],
    )


def token_texts(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """The text that each token adds. Of a character in several tokens, the last one has the whole."""
    texts: list[str] = []
    before = first = 0  # tokens of the character before, and of this one: how a token reads depends on what precedes it
    for place in range(len(ids)):
        now = tokenizer.decode(ids[before : place + 1])
        if now.endswith("\ufffd") and place + 1 < len(ids) and place - first < 4:
            texts.append("")  # a part of a character
            continue
        texts.append(now[len(tokenizer.decode(ids[before:first])) :])
        before, first = first, place + 1
    return texts
