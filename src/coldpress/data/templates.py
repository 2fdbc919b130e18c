"""One record to one text, and from text to token ids with the place where the answer begins.

    text     "### Text: {phrase}\n### The tone is:\n{tone}"      template
    ids      [BOS] w w w w w w w w w w w w a a [EOS]             w: prompt, a: answer
    answer                                 ^                     first token that holds a character of the answer

Completion-only loss and the label-likelihood metric both take the answer's place from here, so they agree. The text
is tokenized whole: prompt and answer never apart. A token that holds the last character of the prompt and the first
of the answer counts as answer.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coldpress.config.schema import PreProcess
from coldpress.data.sources import Records
from coldpress.data.tokenizer import Tokenizer
from coldpress.errors import DataError

__all__ = ["Encoded", "Rendered", "columns_of", "encode", "render", "render_all"]


_MESSAGES_HINT = 'write [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'


@dataclass(frozen=True)
class Rendered:
    """The text of one record."""

    text: str
    answer_start: int | None = None
    """Character at which the answer begins; None when the config names no answer."""
    answer: str | None = None


@dataclass(frozen=True)
class Encoded:
    """Token ids of one record."""

    ids: list[int]
    answer_start: int | None = None
    """Index of the answer's first token."""


def columns_of(config: PreProcess) -> tuple[tuple[str, ...], str]:
    """The columns that a record must have, and the setting that names them."""
    if config.chat_template:
        return (config.message_col,), "message_col"
    if config.text_template is not None:
        named = tuple(dict.fromkeys(name for _, name in _parse(config.text_template) if name is not None))
        return named, "text_template"
    if config.text_field is not None:
        return (config.text_field,), "text_field"
    if config.text_cols:
        return config.text_cols, "text_cols"
    return ("text",), "the default text_cols"


def render_all(records: Records, config: PreProcess, tokenizer: Tokenizer | None = None) -> list[Rendered]:
    """Text of every record; raises DataError that names the record."""
    wanted, used_by = columns_of(config)
    records.require(wanted, used_by)
    if config.label_col is not None:
        records.require((config.label_col,), "label_col")
    if config.completion_only_loss and config.label_col is None and not config.chat_template:
        raise DataError("completion_only_loss needs to know the answer", hint='add "label_col": the answer\'s column')
    rendered = []
    for row, place in zip(records.rows, records.places, strict=True):
        try:
            rendered.append(render(row, config, tokenizer))
        except DataError as error:  # noqa: PERF203 - the place must be named
            raise DataError(f"{place}: {error.message}", hint=error.hint) from error
    return rendered


def render(
    row: Mapping[str, Any], config: PreProcess, tokenizer: Tokenizer | None = None, *, answer: str | None = None
) -> Rendered:
    """Text of one record; `answer` stands in for the record's own. Raises DataError."""
    if config.chat_template:
        return _render_chat(row, config, tokenizer, answer)
    if config.text_template is not None:
        parts = _parse(config.text_template)
    elif config.text_field is not None:
        parts = [("", config.text_field)]
    else:
        columns = config.text_cols or ("text",)
        parts = [(" " if position else "", name) for position, name in enumerate(columns)]
    label = config.label_col
    if label is not None and label not in (name for _, name in parts):
        raise DataError(
            f"the answer column {label!r} is not part of the text",
            hint=f"put {{{label}}} into text_template, at its end",
        )
    values = {name: _value(row, name) for _, name in parts if name is not None}
    if label is not None and answer is not None:
        values[label] = answer
    last = max((position for position, (_, name) in enumerate(parts) if name == label), default=None)
    text, start = "", None
    for position, (literal, name) in enumerate(parts):
        text += literal
        if label is not None and position == last:
            start = len(text)
        text += values[name] if name is not None else ""
    return Rendered(text, start, values[label] if label is not None else None)


def _value(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if value is None:
        raise DataError(f"the column {name!r} is empty", hint="fill it in, or remove the row")
    text = str(value)
    if not text.strip():
        raise DataError(f"the column {name!r} is blank", hint="fill it in, or remove the row")
    return text


def _parse(template: str) -> list[tuple[str, str | None]]:
    """(text, column after it) pairs. Braces are doubled to stand for themselves; column names may hold spaces."""
    parts: list[tuple[str, str | None]] = []
    try:
        for literal, name, spec, conversion in string.Formatter().parse(template):
            if name is None:
                parts.append((literal, None))
                continue
            column = name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            if not column:
                raise ValueError("{} names no column")
            parts.append((literal, column))
    except ValueError as error:
        raise DataError(
            f"text_template is malformed: {error}", hint="write {column}, and {{ or }} for a brace itself"
        ) from error
    return parts


def _render_chat(
    row: Mapping[str, Any], config: PreProcess, tokenizer: Tokenizer | None, answer: str | None
) -> Rendered:
    if tokenizer is None:
        raise DataError("a chat template needs the model's tokenizer")
    messages = row.get(config.message_col)
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise DataError(
            f"{config.message_col!r} must be a list of messages, got {type(messages).__name__}", hint=_MESSAGES_HINT
        )
    if not messages:
        raise DataError(f"{config.message_col!r} is an empty list of messages", hint="fill it in, or remove the row")
    for message in messages:
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise DataError(f"a message must have role and content, got {message!r}", hint=_MESSAGES_HINT)
    template = config.chat_template if isinstance(config.chat_template, str) else None
    last = messages[-1]
    if last["role"] != "assistant":
        if config.completion_only_loss:
            raise DataError(
                f"the last message must be the assistant's for completion_only_loss, it is of {last['role']!r}",
                hint="end the row with the answer, or set completion_only_loss to false",
            )
        return Rendered(tokenizer.chat(messages, template=template))
    if answer is not None:
        messages = [*messages[:-1], {**last, "content": answer}]
    text = tokenizer.chat(messages, template=template)
    prompt = tokenizer.chat(messages[:-1], template=template, generation_prompt=True)
    if not text.startswith(prompt):
        content = str(messages[-1]["content"])
        place = text.rfind(content)
        if place < 0:
            raise DataError(
                "the chat template does not show the last message as it is, so the answer has no place",
                hint="give a template that writes the content unchanged as chat_template",
            )
        return Rendered(text, place, content)
    return Rendered(text, len(prompt), str(messages[-1]["content"]))


def encode(texts: Sequence[Rendered], config: PreProcess, tokenizer: Tokenizer) -> list[Encoded]:
    """Token ids of each text. BOS and EOS are added as ids, unless the text already has them."""
    encoded = []
    for rendered, encoding in zip(texts, tokenizer.encode([one.text for one in texts]), strict=True):
        ids = list(encoding.ids)
        start = None
        if rendered.answer_start is not None:
            first = rendered.answer_start
            start = next((place for place, (_, end) in enumerate(encoding.offsets) if end > first), len(ids))
        if config.add_special_tokens:
            if tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
                ids.insert(0, tokenizer.bos_id)
                start = None if start is None else start + 1
            if tokenizer.eos_id is not None and ids[-1:] != [tokenizer.eos_id]:
                ids.append(tokenizer.eos_id)
        encoded.append(Encoded(ids, start))
    return encoded
