"""A data config from file to token sequences: sources, templates, splits and packing in one call, and the preview.

The torch-free half of training: what `LoRA` trains on, what parity compares on and what `coldpress data` shows is
the same function's result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from coldpress.config.schema import DataConfig, PreProcess
from coldpress.data.packing import IGNORED, Packed, TokenSequence, pack
from coldpress.data.sources import Records, read_records
from coldpress.data.splits import overlap, split_rows
from coldpress.data.templates import Encoded, Rendered, encode, render_all
from coldpress.data.tokenizer import Tokenizer
from coldpress.errors import DataError

__all__ = [
    "LengthStatistics",
    "Prepared",
    "Preview",
    "PreviewSample",
    "check_masks",
    "clamp",
    "prepare",
    "preview",
    "texts_of",
]


@dataclass(frozen=True)
class Prepared:
    """Training sequences, held-out sequences where asked for, and what there is to say about them."""

    train: Packed = field(repr=False)
    held_out: Packed | None = field(repr=False)
    max_seq_len: int
    notes: tuple[str, ...] = ()
    """Worth a warning: what was left out, clamped or found twice."""
    facts: tuple[str, ...] = ()
    """Worth a line."""
    classes: tuple[str, ...] | None = None
    """Names of the classes by their index, in sequence classification."""


def clamp(config: PreProcess, context_length: int | None) -> tuple[int, tuple[str, ...]]:
    """The sequence length that is used, and the warning when it is not the one asked for."""
    asked = config.max_seq_len
    if context_length is None or asked <= context_length:
        return asked, ()
    return context_length, (
        f"max_seq_len {asked} is beyond the model's context of {context_length}, which is used instead",
    )


def check_masks(config: PreProcess) -> None:
    """Refuse what would let the model attend to padding; raises DataError."""
    if not config.use_attention_mask and config.padding_side == "left" and not config.strategy.startswith("join"):
        raise DataError(
            "use_attention_mask: false with padding_side: left would let the model attend to padding",
            hint="pad on the right (a causal model never looks there), or use the mask",
        )


def texts_of(config: DataConfig, tokenizer: Tokenizer) -> tuple[Records, list[Rendered]]:
    """Records and their texts; raises DataError."""
    records = read_records(config)
    return records, render_all(records, config.pre_process_data_config, tokenizer)


def prepare(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    context_length: int | None = None,
    held_out: DataConfig | float | int | None = None,
    seed: int = 42,
    classes: bool = False,
) -> Prepared:
    """Sequences of a data config. `held_out` is a share or count of its rows, or a data config of its own.

    `classes`: every record is a sequence of its own, with the index of its class (`label_col`) as target.
    """
    pre = config.pre_process_data_config
    check_masks(pre)
    length, notes = clamp(pre, context_length)
    if classes:
        return _classified(config, tokenizer, length, held_out, seed)
    _, texts = texts_of(config, tokenizer)
    keys = [one.text for one in texts]
    evaluation: Packed | None = None
    said = list(notes)
    if isinstance(held_out, DataConfig):
        _, other = texts_of(held_out, tokenizer)
        twice = overlap(keys, [one.text for one in other])
        if twice:
            said.append(
                f"{twice} of {len(other)} rows of {held_out.name} are in {config.name} as well: "
                "figures on them show what was learned by heart"
            )
        eval_length, eval_notes = clamp(held_out.pre_process_data_config, context_length)
        evaluation = _packed(other, held_out.pre_process_data_config, tokenizer, eval_length)
        said += [f"{held_out.name}: {note}" for note in (*eval_notes, *evaluation.notes(eval_length))]
    elif held_out is not None:
        split = split_rows(keys, held_out, seed)
        if split.moved:
            said.append(f"{split.moved} of {len(keys)} rows are repeats; equal rows were kept on one side of the split")
        evaluation = _packed([texts[row] for row in split.held_out], pre, tokenizer, length, held_out=True)
        texts = [texts[row] for row in split.train]
    packed = _packed(texts, pre, tokenizer, length)
    said += packed.notes(length)
    if packed.loss_tokens == 0:
        raise DataError("no token of the training data carries loss", hint="look at it with `coldpress data`")
    return Prepared(packed, evaluation, length, tuple(said))


def _classified(
    config: DataConfig, tokenizer: Tokenizer, length: int, held_out: DataConfig | float | int | None, seed: int
) -> Prepared:
    column = config.pre_process_data_config.label_col
    pre = config.pre_process_data_config.model_copy(update={"label_col": None, "completion_only_loss": False})
    records, texts = texts_of(config.model_copy(update={"pre_process_data_config": pre}), tokenizer)
    labels = [str(row[column]) for row in records.rows]  # type: ignore[index]
    names = tuple(sorted(set(labels)))
    if len(names) < 2:
        raise DataError(f"all {len(labels)} records of {config.name} are of the class {names[0]!r}")
    sequences = [
        TokenSequence(row.ids[:length], [IGNORED] * len(row.ids[:length]), names.index(label))
        for row, label in zip(encode(texts, pre, tokenizer), labels, strict=True)
    ]
    if held_out is None or isinstance(held_out, DataConfig):
        return Prepared(Packed(sequences, len(sequences)), None, length, classes=names)
    split = split_rows([one.text for one in texts], held_out, seed)
    train, other = ([sequences[row] for row in rows] for rows in (split.train, split.held_out))
    return Prepared(Packed(train, len(train)), Packed(other, len(other)), length, classes=names)


def _packed(
    texts: Sequence[Rendered], pre: PreProcess, tokenizer: Tokenizer, length: int, *, held_out: bool = False
) -> Packed:
    rows: list[Encoded] = []
    for start in range(0, len(texts), pre.processing_batch_size):
        rows += encode(texts[start : start + pre.processing_batch_size], pre, tokenizer)
    joiner = tokenizer.ids(pre.joiner) if pre.strategy.startswith("join") and pre.joiner else ()
    total = sum(len(row.ids) + len(joiner) for row in rows)
    if held_out and pre.strategy.startswith("join") and total < length:
        length = max(total, 1)  # a small held-out part is one shorter sequence rather than none
    return pack(
        rows,
        strategy=pre.strategy,
        max_seq_len=length,
        joiner=joiner,
        stride=None if pre.stride is None else min(pre.stride, length),
        max_samples=pre.max_samples,
        completion_only=pre.completion_only_loss,
        drop_short=pre.drop_short_sequences,
        seed=pre.random_seed,
        retries=pre.random_retries,
    )


@dataclass(frozen=True)
class LengthStatistics:
    """Tokens in a sequence."""

    shortest: int
    median: int
    percentile_95: int
    longest: int


@dataclass(frozen=True)
class PreviewSample:
    """One prepared sequence, token by token: (text of the token, id, whether it carries loss)."""

    text: str
    tokens: tuple[tuple[str, int, bool], ...]


@dataclass(frozen=True)
class Preview:
    """What `coldpress data` shows."""

    origin: str
    rows: int
    columns: tuple[str, ...]
    sequences: int
    tokens: int
    loss_tokens: int
    lengths: LengthStatistics
    max_seq_len: int
    samples: tuple[PreviewSample, ...]
    notes: tuple[str, ...]


def preview(
    config: DataConfig, tokenizer: Tokenizer, *, context_length: int | None = None, samples: int = 3
) -> Preview:
    """The first prepared sequences of a data config, with counts; raises DataError."""
    records = read_records(config)
    prepared = prepare(config, tokenizer, context_length=context_length)
    packed = prepared.train
    lengths = sorted(len(one.ids) for one in packed.sequences)
    return Preview(
        origin=records.origin,
        rows=len(records),
        columns=records.columns,
        sequences=len(packed.sequences),
        tokens=packed.tokens,
        loss_tokens=packed.loss_tokens,
        lengths=LengthStatistics(
            lengths[0], lengths[len(lengths) // 2], lengths[(len(lengths) - 1) * 95 // 100], lengths[-1]
        ),
        max_seq_len=prepared.max_seq_len,
        samples=tuple(_sample(one, tokenizer) for one in packed.sequences[:samples]),
        notes=prepared.notes,
    )


def _sample(sequence: TokenSequence, tokenizer: Tokenizer) -> PreviewSample:
    pairs = enumerate(zip(sequence.ids, sequence.labels, strict=True))
    return PreviewSample(
        text=tokenizer.decode(sequence.ids),
        tokens=tuple((tokenizer.token(i), i, place > 0 and label != IGNORED) for place, (i, label) in pairs),
    )
