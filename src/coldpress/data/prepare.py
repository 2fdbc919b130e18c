"""A data config from file to token sequences: sources, templates, splits and packing in one call.

The torch-free half of training: what `LoRA` trains on, what parity compares on and what `coldpress data` shows is
the same function's result.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from coldpress.config.schema import DataConfig, PreProcess
from coldpress.data.classes import check_class_text, class_labels, class_names, class_notes, class_targets, classified
from coldpress.data.formats import Reading, is_blank
from coldpress.data.packing import Packed, pack
from coldpress.data.sources import Records, read_records
from coldpress.data.splits import split_rows
from coldpress.data.templates import (
    Encoded,
    Rendered,
    answers_only,
    columns_of,
    encode,
    last_stop,
    marked_columns,
    prompt_of,
    read_format,
    render_all,
)
from coldpress.data.tokenizer import Tokenizer
from coldpress.errors import DataError

__all__ = ["Prepared", "Texts", "check_masks", "clamp", "prepare", "prepare_rows", "texts_of"]

FEW = 50
"""Training records below which a warning says what to expect."""


@dataclass(frozen=True)
class Prepared:
    """Training sequences, held-out sequences where asked for, and what there is to say about them."""

    train: Packed = field(repr=False)
    held_out: Packed | None = field(repr=False)
    max_seq_len: int
    notes: tuple[str, ...] = ()
    """Worth a warning: what was left out, clamped, found twice, or will not be learned."""
    facts: tuple[str, ...] = ()
    """Worth a line: how the records were read, and how full the packs are."""
    classes: tuple[str, ...] | None = None
    """Names of the classes by their index, in sequence classification."""
    prompt: str = ""
    """The template of what stands before an answer (`templates.prompt_of`)."""
    chat_template: bool | str = False
    """By which template conversations were rendered; true is the tokenizer's own."""


@dataclass(frozen=True)
class Texts:
    """The records of one data config as text, before any token."""

    config: DataConfig
    records: Records = field(repr=False)
    rendered: list[Rendered] = field(repr=False)
    reading: Reading
    completion_only: bool
    """Loss on the answers alone."""
    targets: Sequence[int] | None = field(default=None, repr=False)
    """Class of each record, in sequence classification."""
    classes: tuple[str, ...] | None = None


def clamp(config: PreProcess, context_length: int | None) -> tuple[int, tuple[str, ...]]:
    """The sequence length that is used, and the warning when it is not the one asked for; the default asks nothing."""
    asked = config.max_seq_len
    if context_length is None or asked <= context_length:
        return asked, ()
    if "max_seq_len" not in config.model_fields_set:
        return context_length, ()
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


def texts_of(
    config: DataConfig, tokenizer: Tokenizer, *, classes: bool = False, names: tuple[str, ...] | None = None
) -> Texts:
    """Records and their texts, and their `classes` if asked for: by `names`, else by their own. Raises DataError."""
    records = read_records(config)
    pre = config.pre_process_data_config
    if not classes:
        reading = read_format(records, pre, tokenizer)
        rendered = render_all(records, pre, tokenizer, reading)
        return Texts(config, records, rendered, reading, answers_only(pre, reading))
    bare = pre.model_copy(update={"label_col": None, "completion_only_loss": False})
    reading = read_format(records, bare, tokenizer)
    check_class_text(config, reading)
    labels = class_labels(records, pre)
    names = names or class_names(labels, config)
    targets = class_targets(labels, names, records, config)
    return Texts(config, records, render_all(records, bare, tokenizer, reading), reading, False, targets, names)


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

    `classes`: every record is a sequence of its own, with the index of its class (`label_col`) as target and no loss on
    tokens, whatever the strategy. Raises DataError.
    """
    return prepare_rows(
        config, tokenizer, context_length=context_length, held_out=held_out, seed=seed, classes=classes
    )[0]


def prepare_rows(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    context_length: int | None = None,
    held_out: DataConfig | float | int | None = None,
    seed: int = 42,
    classes: bool = False,
) -> tuple[Prepared, Texts, list[Encoded]]:
    """As `prepare`, with the texts of all records and the token ids of those that are trained on."""
    pre = config.pre_process_data_config
    check_masks(pre)
    length, notes = clamp(pre, context_length)
    texts = texts_of(config, tokenizer, classes=classes)
    said = [*notes, *_text_notes(texts)]
    facts = [texts.reading.note] if texts.reading.note else []
    numbers: Sequence[int] = range(len(texts.rendered))
    evaluation: Packed | None = None
    if isinstance(held_out, DataConfig):
        other = texts_of(held_out, tokenizer, classes=classes, names=texts.classes)
        said += _overlap_notes(texts, other)
        eval_length, eval_notes = clamp(held_out.pre_process_data_config, context_length)
        evaluation = _evaluation(other, range(len(other.rendered)), tokenizer, eval_length, held_out.name)
        said += [f"{held_out.name}: {note}" for note in (*eval_notes, *evaluation.notes(eval_length))]
    elif held_out is not None:
        split = split_rows([one.text for one in texts.rendered], held_out, seed)
        if split.moved:
            total = len(texts.rendered)
            said.append(f"{split.moved} of {total} rows are repeats; equal rows were kept on one side of the split")
        evaluation = _evaluation(texts, split.held_out, tokenizer, length, "held-out part", may_be_short=True)
        said += [f"held-out part: {note}" for note in evaluation.notes(length)]
        numbers = split.train
    rows = _encode_all(texts, tokenizer, numbers)
    packed = _pack_rows(texts, rows, tokenizer, length, numbers)
    said += packed.notes(length)
    facts += packed.facts(length)
    if texts.targets is not None:
        assert texts.classes is not None
        chosen = [texts.rendered[number].text for number in numbers]
        said += class_notes([texts.targets[number] for number in numbers], texts.classes, chosen)
    else:
        said += _stop_notes(rows, texts, tokenizer)
        if packed.loss_tokens == 0:
            raise DataError("no token of the training data carries loss", hint="look at it with `coldpress data`")
    if len(numbers) < FEW:
        said.append(f"{len(numbers)} rows to train on: expect a model that knows them by heart and little else")
    prompt = prompt_of(pre, texts.reading, classes=classes)
    chat = texts.reading.chat and (pre.chat_template or True)
    return Prepared(packed, evaluation, length, tuple(said), tuple(facts), texts.classes, prompt, chat), texts, rows


def _evaluation(
    texts: Texts,
    numbers: Sequence[int],
    tokenizer: Tokenizer,
    length: int,
    name: str,
    *,
    may_be_short: bool = False,
) -> Packed:
    """Sequences to evaluate on; raises DataError that names the part of the data."""
    rows = _encode_all(texts, tokenizer, numbers)
    pre = texts.config.pre_process_data_config
    if may_be_short and pre.strategy.startswith("join"):
        # A small held-out part is one shorter sequence rather than none.
        length = min(length, max(sum(len(row.ids) + len(_joiner(pre, tokenizer)) for row in rows), 1))
    try:
        return _pack_rows(texts, rows, tokenizer, length, numbers)
    except DataError as error:
        raise DataError(f"{name}: {error.message}", hint=error.hint) from error


def _encode_all(texts: Texts, tokenizer: Tokenizer, numbers: Sequence[int]) -> list[Encoded]:
    """Token ids of some of the texts."""
    pre = texts.config.pre_process_data_config
    chosen = [texts.rendered[number] for number in numbers]
    rows: list[Encoded] = []
    for start in range(0, len(chosen), pre.processing_batch_size):
        rows += encode(chosen[start : start + pre.processing_batch_size], pre, tokenizer)
    return rows


def _pack_rows(
    texts: Texts, rows: Sequence[Encoded], tokenizer: Tokenizer, length: int, numbers: Sequence[int]
) -> Packed:
    """Sequences of encoded records, as the data config says; `numbers` are the records that they are."""
    pre = texts.config.pre_process_data_config
    if texts.targets is not None:
        return classified(
            rows, [texts.targets[number] for number in numbers], length, tokenizer.eos_id, pre.max_samples
        )
    return pack(
        rows,
        strategy=pre.strategy,
        max_seq_len=length,
        joiner=_joiner(pre, tokenizer),
        stride=None if pre.stride is None else min(pre.stride, length),
        max_samples=pre.max_samples,
        completion_only=texts.completion_only,
        drop_short=pre.drop_short_sequences,
        seed=pre.random_seed,
        retries=pre.random_retries,
    )


def _joiner(pre: PreProcess, tokenizer: Tokenizer) -> list[int]:
    return tokenizer.ids(pre.joiner) if pre.strategy.startswith("join") and pre.joiner else []


# -- what there is to say ---------------------------------------------------------------------------------------------


def _text_notes(texts: Texts) -> list[str]:
    """Blank columns of a template, marks that have no effect, and messages that nothing is learned from."""
    notes = []
    pre = texts.config.pre_process_data_config
    if marked_columns(pre) and pre.strategy.startswith("join") and texts.targets is None:
        notes.append(
            f"text_template marks an answer (|loss), and under {pre.strategy} all of the text carries loss: "
            "set strategy to line-by-line or pack"
        )
    total = len(texts.records)
    if texts.reading.format == "text":
        for column in columns_of(pre)[0]:
            blank = sum(is_blank(row.get(column)) for row in texts.records.rows)
            if blank:
                notes.append(f"the column {column!r} is blank in {blank} of {total} rows")
    tails = sum(one.left_out > 0 for one in texts.rendered)
    if tails:
        notes.append(f"{tails} of {total} rows go on after the assistant's last turn: those messages are left out")
    return notes


def _overlap_notes(texts: Texts, other: Texts) -> list[str]:
    """What it means that evaluation records were trained on; raises DataError when all of them were."""
    mine, its = texts.config.name, other.config.name
    if mine == its:
        return [f"{its} is trained on and evaluated on: its evaluation loss shows what was learned by heart"]
    known = {one.text for one in texts.rendered}
    known_rows = {_row_key(row) for row in texts.records.rows}
    pairs = zip(other.rendered, other.records.rows, strict=True)
    twice = sum(one.text in known or _row_key(row) in known_rows for one, row in pairs)
    total = len(other.rendered)
    if twice == total:
        raise DataError(
            f"all {total} rows of {its} ({other.records.origin}) are in {mine} ({texts.records.origin}) as well: "
            "an evaluation on them measures memory",
            hint=f"evaluate on other rows (eval_dataset_size: 0.1 holds some out), or say eval_data_config: {mine} "
            "if that is what you want",
        )
    if not twice:
        return []
    said = f"{twice} of {total} rows of {its} are in {mine} as well: figures on them show what was learned by heart"
    if twice * 2 > total:
        said = f"MOST OF THE EVALUATION DATA IS TRAINING DATA ({twice / total:.0%}): {said}"
    return [said]


def _row_key(row: object) -> str:
    return json.dumps(row, sort_keys=True, default=str)


def _stop_notes(rows: Sequence[Encoded], texts: Texts, tokenizer: Tokenizer) -> list[str]:
    """Whether the model learns to stop: each record, and each turn, must end with a stop token that carries loss."""
    pre, only = texts.config.pre_process_data_config, texts.completion_only
    untaught = open_turns = 0
    ends: Counter[int] = Counter()
    for row in rows:
        place = last_stop(row.ids, tokenizer)
        spans = row.spans if only and row.spans is not None else ((0, len(row.ids)),)
        untaught += place is None or not any(start <= place < end for start, end in spans)
        if texts.reading.chat and only:
            for start, end in spans[:-1]:
                if tokenizer.stop_ids.isdisjoint(row.ids[start:end]):
                    open_turns += 1
                    ends[_last_word(row.ids[start:end], tokenizer)] += 1
    notes = []
    if untaught:
        stops = ", ".join(repr(tokenizer.token(token)) for token in sorted(tokenizer.stop_ids))
        if not stops:
            why = "neither the tokenizer nor generation_config.json names one: add eos_token to tokenizer_config.json"
        elif not pre.add_special_tokens and tokenizer.eos_id is not None:
            why = 'set "add_special_tokens": true, which adds the EOS token'
        else:
            why = f"end the text with one of {stops}, in the part that carries loss"
        notes.append(
            f"{untaught} of {len(rows)} rows do not teach the model to stop: they end without a stop token that "
            f"carries loss; {why}"
        )
    if open_turns:
        token = ends.most_common(1)[0][0]
        notes.append(
            f"{open_turns} turns of the assistant end with {tokenizer.token(token)!r}, at which the model does not "
            f"stop when it is used: add its id, {token}, to eos_token_id in generation_config.json"
        )
    return notes


def _last_word(ids: Sequence[int], tokenizer: Tokenizer) -> int:
    """The last token that is more than spaces."""
    return next((token for token in reversed(ids) if tokenizer.decode([token]).strip()), ids[-1])
