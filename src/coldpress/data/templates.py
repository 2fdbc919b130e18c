r"""One record to one text, and from text to token ids with the places that carry loss.

    text     "### Text: {phrase}\n### The tone is:\n{tone}"      template; tone is label_col, or written {tone|loss}
    ids      [BOS] w w w w w w w w w w w w a a [EOS]             w: prompt, a: answer
    loss                                   ^^^^^^^               from the first token that holds some of the answer

An answer at the end of the text goes on to the text's end and the EOS that is added; one marked in the middle ends with
its column; a conversation has one place for each of the assistant's turns. Completion-only loss and the
label-likelihood metric both take the answer's place from here, so they agree. The text is tokenized whole: prompt and
answer never apart. A token that holds the last character of the prompt and the first of the answer counts as answer.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

from coldpress.config.schema import PreProcess
from coldpress.data.conversations import conversation, without_tail
from coldpress.data.formats import Pair, Reading, is_blank, messages_of, read_as, text_of, tools_of, unknown
from coldpress.data.readers import Row
from coldpress.data.sources import Records
from coldpress.data.tokenizer import Tokenizer
from coldpress.errors import DataError

__all__ = [
    "Encoded",
    "Rendered",
    "answers_only",
    "check_chat_template",
    "check_label_in_text",
    "columns_of",
    "encode",
    "last_stop",
    "marked_columns",
    "prompt_of",
    "read_format",
    "render",
    "render_all",
]

_SHOWN = 5
"""Bad records that a message names; the others are counted."""
_MARK = "|loss"

Span = tuple[int, int]
Part = tuple[str, str | None, bool]
"""Of a template: text, the column after it, whether that is marked as an answer."""


@dataclass(frozen=True)
class Rendered:
    """The text of one record."""

    text: str
    answer_start: int | None = None
    """Character at which the answer, or the assistant's last turn, begins; None when there is none."""
    answer: str | None = None
    spans: tuple[Span, ...] | None = None
    """Characters (start, end) that carry completion-only loss; None when no answer is known."""
    is_chat: bool = False
    left_out: int = 0
    """Messages after the assistant's last, where loss is on its turns alone."""


@dataclass(frozen=True)
class Encoded:
    """Token ids of one record."""

    ids: list[int]
    answer_start: int | None = None
    """Index of the answer's first token."""
    spans: tuple[Span, ...] | None = None
    """Tokens (start, end) that carry completion-only loss; None when no answer is known."""


def columns_of(config: PreProcess, reading: Reading | None = None) -> tuple[tuple[str, ...], str]:
    """The columns that a record must have, and the setting that names them."""
    if reading is not None and reading.column is not None:
        return (reading.column,), "message_col"
    if reading is not None and reading.pair is not None:
        return (reading.pair.prompt, reading.pair.completion), "format"
    if config.chat_template:
        return (config.message_col,), "message_col"
    if config.text_template is not None:
        named = tuple(dict.fromkeys(name for _, name, _ in _parse(config.text_template) if name is not None))
        return named, "text_template"
    if config.text_field is not None:
        return (config.text_field,), "text_field"
    if config.text_cols:
        return config.text_cols, "text_cols"
    return ("text",), "the default text_cols"


def marked_columns(config: PreProcess) -> tuple[str, ...]:
    """Columns that text_template marks as answers."""
    if config.text_template is None:
        return ()
    return tuple(name for _, name, marked in _parse(config.text_template) if marked and name is not None)


def prompt_of(config: PreProcess, reading: Reading, *, classes: bool = False) -> str:
    """The template of what stands before an answer, of a classifier's text all of it; empty for conversations.

    Without an answer that is named, the last column counts as one. Columns are in braces, braces doubled.
    """
    if reading.chat:
        return ""
    pair = reading.pair
    parts = _text_parts(config) if pair is None else _parse(_template_of(pair, pair.context is not None))
    end = ""
    if not classes:
        column = _answer_column(parts, config.label_col if pair is None else pair.completion)
        last = max(position for position, (_, name, _) in enumerate(parts) if name == column)
        parts, end = parts[:last], _with_braces_doubled(parts[last][0])
    return (
        "".join(_with_braces_doubled(text) + ("" if name is None else f"{{{name}}}") for text, name, _ in parts) + end
    )


def _with_braces_doubled(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def read_format(records: Records, config: PreProcess, tokenizer: Tokenizer | None) -> Reading:
    """In which form the records are; raises DataError where they lack the columns that it needs."""
    has_template = tokenizer is not None and tokenizer.chat_template is not None
    reading = read_as(records.columns, records.rows[:100], config, has_template=has_template)
    if reading is None:
        raise unknown(records, config)
    records.require(*columns_of(config, reading))
    if config.label_col is not None:
        records.require((config.label_col,), "label_col")
    check_chat_template(records, config, reading, has_template=has_template)
    return reading


def check_chat_template(records: Records, config: PreProcess, reading: Reading, *, has_template: bool) -> None:
    """Raise DataError for conversations that no template makes a text of."""
    if not reading.chat or has_template or isinstance(config.chat_template, str):
        return
    what = reading.column or (reading.pair.prompt if reading.pair else "")
    raise DataError(
        f"{records.origin} holds conversations (column {what}), and the model's tokenizer has no chat template",
        hint="give the Jinja template itself as chat_template, or use text_template",
    )


def answers_only(config: PreProcess, reading: Reading) -> bool:
    """Whether loss is on the answers alone."""
    if config.completion_only_loss is not None:
        return config.completion_only_loss
    known = reading.answers or bool(marked_columns(config))
    return known and not config.strategy.startswith("join")


def render_all(
    records: Records, config: PreProcess, tokenizer: Tokenizer | None = None, reading: Reading | None = None
) -> list[Rendered]:
    """Text of every record; raises DataError that names the records that have none."""
    reading = reading or read_format(records, config, tokenizer)
    names_answer = reading.format != "text" or config.label_col is not None or marked_columns(config)
    if config.completion_only_loss and not names_answer:
        raise DataError(
            "completion_only_loss needs to know the answer",
            hint='add "label_col": the answer\'s column, or mark it in text_template: {answer|loss}',
        )
    check_label_in_text(config, reading)
    rendered = []
    problems: list[tuple[str, DataError]] = []
    for row, place in zip(records.rows, records.places, strict=True):
        try:
            rendered.append(render(row, config, tokenizer, reading=reading))
        except DataError as error:  # noqa: PERF203 - the place must be named
            problems.append((place, error))
    if problems:
        raise _refused(problems, len(records))
    return rendered


def check_label_in_text(config: PreProcess, reading: Reading) -> None:
    """Raise DataError for an answer whose column the text lacks."""
    if reading.format == "text" and config.label_col not in (None, *columns_of(config, reading)[0]):
        raise _label_outside(config.label_col)


def _label_outside(label: str | None) -> DataError:
    return DataError(
        f"the answer column {label!r} is not part of the text", hint=f"put {{{label}}} into text_template, at its end"
    )


def _refused(problems: Sequence[tuple[str, DataError]], rows: int) -> DataError:
    """One error for all records that cannot be used."""
    first = problems[0][1]
    if len(problems) == 1:
        return DataError(f"{problems[0][0]}: {first.message}", hint=first.hint)
    lines = [f"{place}: {error.message}" for place, error in problems[:_SHOWN]]
    if len(problems) > _SHOWN:
        lines.append(f"and {len(problems) - _SHOWN} more")
    return DataError(f"{len(problems)} of {rows} records cannot be used\n  " + "\n  ".join(lines), hint=first.hint)


def render(
    row: Row,
    config: PreProcess,
    tokenizer: Tokenizer | None = None,
    *,
    answer: str | None = None,
    reading: Reading | None = None,
) -> Rendered:
    """Text of one record; `answer` stands in for the record's own. Raises DataError."""
    if reading is None:
        has_template = tokenizer is not None and tokenizer.chat_template is not None
        reading = read_as(tuple(row), [row], config, has_template=has_template) or Reading("text")
    if reading.chat:
        rendered = _render_chat(row, config, reading, tokenizer, answer)
    elif reading.pair is not None:
        context = reading.pair.context is not None and not is_blank(row.get(reading.pair.context))
        parts = _parse(_template_of(reading.pair, context))
        rendered = _filled(row, parts, reading.pair.completion, answer)
    else:
        rendered = _render_text(row, config, answer)
    if not rendered.text.isascii():
        try:
            rendered.text.encode()
        except UnicodeEncodeError as error:
            half = rendered.text[error.start]
            raise DataError(
                f"the text is not Unicode: character {error.start + 1} is half of a pair, {half!r}",
                hint="the file was cut inside a character (an emoji): correct it, or remove the row",
            ) from error
    return rendered


def _render_text(row: Row, config: PreProcess, answer: str | None) -> Rendered:
    parts = _text_parts(config)
    label = config.label_col
    if label is not None and label not in (name for _, name, _ in parts):
        raise _label_outside(label)
    return _filled(row, parts, label, answer)


def _text_parts(config: PreProcess) -> tuple[Part, ...]:
    if config.text_template is not None:
        return _parse(config.text_template)
    columns = (config.text_field,) if config.text_field is not None else config.text_cols or ("text",)
    return tuple((" " if position else "", name, False) for position, name in enumerate(columns))


def _answer_column(parts: Sequence[Part], label: str | None) -> str:
    """The label, else the last column that is marked as an answer, else the last one."""
    named = [name for _, name, _ in parts if name is not None]
    marked = [name for _, name, mark in parts if mark and name is not None]
    return label or (marked or named)[-1]


def _filled(row: Row, parts: Sequence[Part], label: str | None, answer: str | None) -> Rendered:
    """The parts of a template with a record's values. Loss is where the template marks it, else from the label on.

    The answer may not be blank, nor a text's last column where no answer is named; other columns may (not every
    question has a context).
    """
    named = [name for _, name, _ in parts if name is not None]
    marked = [name for _, name, mark in parts if mark and name is not None]
    if label is None and marked:
        label = marked[-1]
    needed = {*marked, label if label is not None else named[-1]}
    last = max((position for position, (_, name, _) in enumerate(parts) if name == label), default=None)
    values: dict[str, str] = {}
    for column in named:
        value = row.get(column)
        values[column] = "" if is_blank(value) and column not in needed else text_of(value, column)
    if label is not None and answer is not None:
        values[label] = answer
    text = ""
    start: int | None = None
    spans: list[Span] = []
    for position, (literal, name, mark) in enumerate(parts):
        text += literal
        begin = len(text)
        text += values[name] if name is not None else ""
        if label is not None and position == last:
            start = begin
        if mark:
            spans.append((begin, len(text)))
    if not text.strip():
        raise DataError("the text is blank", hint="fill it in, or remove the row")
    if spans:
        spans[-1] = (spans[-1][0], len(text))
    elif start is not None:
        spans = [(start, len(text))]
    return Rendered(text, start, values[label] if label is not None else None, tuple(spans) if spans else None)


@lru_cache(maxsize=256)
def _parse(template: str) -> tuple[Part, ...]:
    """Parts of a template. Braces are doubled to stand for themselves; column names may hold spaces."""
    parts: list[Part] = []
    try:
        for literal, name, spec, conversion in string.Formatter().parse(template):
            if name is None:
                parts.append((literal, None, False))
                continue
            column = name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            marked = column.endswith(_MARK)
            column = column.removesuffix(_MARK)
            if not column:
                raise ValueError("{} names no column")
            parts.append((literal, column, marked))
        if all(name is None for _, name, _ in parts):
            raise ValueError("it names no column")
    except ValueError as error:
        raise DataError(
            f"text_template is malformed: {error}", hint="write {column}, and {{ or }} for a brace itself"
        ) from error
    return tuple(parts)


@lru_cache(maxsize=32)
def _template_of(pair: Pair, with_context: bool) -> str:
    return pair.template(with_context)


def _render_chat(
    row: Row, config: PreProcess, reading: Reading, tokenizer: Tokenizer | None, answer: str | None
) -> Rendered:
    if tokenizer is None:
        raise DataError("a chat template needs the model's tokenizer")
    messages = messages_of(row, reading)
    total, only = len(messages), answers_only(config, reading)
    if only:
        messages = without_tail(messages)
    ends_with_answer = messages[-1]["role"] == "assistant"
    if answer is not None and ends_with_answer:
        messages = [*messages[:-1], {**messages[-1], "content": answer}]
    turns: Literal["all", "last", "none"] = "none"  # without need, no template is asked where its turns are
    if only and answer is None:
        turns = config.assistant_turns
    elif answer is not None and ends_with_answer:
        turns = "last"
    template = config.chat_template if isinstance(config.chat_template, str) else None
    told = conversation(messages, tokenizer, template=template, tools=tools_of(row), turns=turns)
    start = told.turns[-1][0] if told.turns and messages[-1].get("weight") != 0 else None
    said = str(messages[-1]["content"]) if ends_with_answer else None
    spans = told.turns if turns != "none" else None
    return Rendered(told.text, start, said, spans, is_chat=True, left_out=total - len(messages))


def encode(texts: Sequence[Rendered], config: PreProcess, tokenizer: Tokenizer) -> list[Encoded]:
    """Token ids of each text. BOS and EOS are added as ids, unless the text already has them.

    A conversation gets BOS only where the tokenizer writes one when the model is used, and no EOS after a token that
    the model stops at.
    """
    if any(one.spans or one.answer_start is not None for one in texts):
        encodings = tokenizer.encode([one.text for one in texts])
        encoded = [_placed(one, encoding) for one, encoding in zip(texts, encodings, strict=True)]
    else:
        ids = tokenizer.encode_ids([one.text for one in texts])
        encoded = [Encoded(one, spans=text.spans) for text, one in zip(texts, ids, strict=True)]
    if config.add_special_tokens:
        encoded = [_with_borders(one, row, tokenizer) for one, row in zip(texts, encoded, strict=True)]
    return [_with_ends(row, tokenizer.stop_ids) for row in encoded]


def _placed(rendered: Rendered, encoding: Any) -> Encoded:
    """Token ids, and places in characters as places in tokens."""
    ids = list(encoding.ids)
    length = len(rendered.text)

    def token_at(character: int) -> int:
        """The first token that holds this character or a later one."""
        while character < length:
            found = encoding.char_to_token(character)
            if found is not None:
                return int(found)
            character += 1
        return len(ids)

    def token_from(character: int) -> int:
        """The first token that begins at this character or later."""
        place = token_at(character)
        while place < len(ids) and encoding.token_to_chars(place)[0] < character:
            place += 1
        return place

    start = None if rendered.answer_start is None else token_at(rendered.answer_start)
    if rendered.spans is None:
        return Encoded(ids, start)
    return Encoded(ids, start, tuple((token_at(begin), token_from(end)) for begin, end in rendered.spans))


def _with_borders(rendered: Rendered, row: Encoded, tokenizer: Tokenizer) -> Encoded:
    """BOS and EOS where they are missing; what reaches the end of the text takes the EOS in."""
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    before: list[int] = []
    after: list[int] = []
    if bos is not None and row.ids[:1] != [bos] and (tokenizer.begins_with_bos or not rendered.is_chat):
        before = [bos]
    if (
        eos is not None
        and row.ids[-1:] != [eos]
        and not (rendered.is_chat and last_stop(row.ids, tokenizer) is not None)
    ):
        after = [eos]
    if not before and not after:
        return row
    moved, size = len(before), len(row.ids)
    spans = row.spans
    if spans is not None:
        spans = tuple((start + moved, end + moved + (len(after) if end == size else 0)) for start, end in spans)
    return Encoded([*before, *row.ids, *after], None if row.answer_start is None else row.answer_start + moved, spans)


def _with_ends(row: Encoded, stops: frozenset[int]) -> Encoded:
    """A token that ends a text belongs to the answer before it, so that the model learns to stop."""
    if not row.spans:
        return row
    spans = tuple((start, end + 1 if end < len(row.ids) and row.ids[end] in stops else end) for start, end in row.spans)
    return row if spans == row.spans else replace(row, spans=spans)


def last_stop(ids: Sequence[int], tokenizer: Tokenizer) -> int | None:
    """Where the record ends with a token that the model stops at; only spaces may follow. None where it does not."""
    stops = tokenizer.stop_ids
    place = next((place for place in range(len(ids) - 1, max(len(ids) - 4, -1), -1) if ids[place] in stops), None)
    if place is None or place == len(ids) - 1 or not tokenizer.decode(ids[place + 1 :]).strip():
        return place
    return None
