"""In which form records are: text, conversations, or prompt and completion; told from the config and the columns.

    text                text_template, text_field or text_cols; column `text` when the config says nothing
    messages            [{"role": "user", "content": "..."}, {"role": "assistant", ...}]     as OpenAI's
    sharegpt            [{"from": "human", "value": "..."}, {"from": "gpt", ...}]
    alpaca              columns instruction, input (may be blank), output
    prompt-completion   columns prompt and completion, question and answer ...; texts, or lists of messages as TRL's

What the config names is used; the columns are looked at only where it is silent. All but text become messages with the
roles system, user, assistant and tool; how these become text is `conversations`' matter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from coldpress.config.schema import PreProcess
from coldpress.data.readers import Row
from coldpress.data.sources import Records
from coldpress.errors import DataError
from coldpress.registry import nearest

__all__ = [
    "Format",
    "Message",
    "Pair",
    "Reading",
    "forms",
    "is_blank",
    "messages_of",
    "read_as",
    "text_of",
    "tools_of",
    "unknown",
]

Message = Mapping[str, Any]
"""`role`, `content` and what else the chat template may want (tool_calls, name ...)."""

Format = Literal["text", "messages", "sharegpt", "alpaca", "prompt-completion"]

_MESSAGES_HINT = 'write [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'


@dataclass(frozen=True)
class Pair:
    """Columns of a prompt and its answer, and the text they make where the tokenizer has no chat template."""

    format: Literal["alpaca", "prompt-completion"]
    prompt: str
    completion: str
    context: str | None = None
    """Further text of the prompt, which may be blank."""
    plain: str = "{prompt}{completion|loss}"
    """The text, with the parts' names in place of the columns'."""
    with_context: str = ""

    def template(self, with_context: bool) -> str:
        """The same as `text_template` says it in a config."""
        text = self.with_context if with_context else self.plain
        for part in ("prompt", "completion", "context"):
            text = re.sub(rf"\{{{part}\b", "{" + str(getattr(self, part)), text)
        return text


_ALPACA = (
    "### Instruction:\n{prompt}\n\n### Response:\n{completion|loss}",
    "### Instruction:\n{prompt}\n\n### Input:\n{context}\n\n### Response:\n{completion|loss}",
)
_QUESTION = (
    "Question: {prompt}\nAnswer: {completion|loss}",
    "{context}\n\nQuestion: {prompt}\nAnswer: {completion|loss}",
)
_PAIRS = (
    Pair("alpaca", "instruction", "output", "input", *_ALPACA),
    Pair("alpaca", "instruction", "response", "context", *_ALPACA),
    Pair("prompt-completion", "prompt", "completion"),
    Pair("prompt-completion", "prompt", "response"),
    Pair("prompt-completion", "question", "answer", "context", *_QUESTION),
)
"""Tried in order."""

_CONVERSATIONS = ("messages", "conversations", "conversation")
_ROLES = {
    "system": "system", "developer": "developer",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool",
}  # fmt: skip
"""Names of roles as data sets write them, to the ones that chat templates know."""

_TITLES: Mapping[Format, str] = {
    "text": "text",
    "messages": "messages",
    "sharegpt": "ShareGPT conversations",
    "alpaca": "Alpaca records",
    "prompt-completion": "prompt and completion",
}


@dataclass(frozen=True)
class Reading:
    """How the records of one data set are read."""

    format: Format
    column: str | None = None
    """Of the messages."""
    pair: Pair | None = None
    chat: bool = False
    """Rendered with a chat template."""
    answers: bool = False
    """The format itself says what the answers are: nothing else was named."""
    note: str | None = None
    """What was recognised, in words."""


def read_as(columns: Sequence[str], rows: Sequence[Row], config: PreProcess, *, has_template: bool) -> Reading | None:
    """The form of the records, by the config, the columns and the first rows; None where it is none that is known."""
    named = config.text_template is not None or config.text_field is not None or bool(config.text_cols)
    if config.format == "text" or (config.format == "auto" and named and not config.chat_template):
        return Reading("text")
    if config.format == "auto" and not config.chat_template and "text" in columns:
        return Reading("text")
    answers = config.format != "auto" or not config.chat_template
    found = _conversation(columns, rows, config) or _pair(columns, rows, config, has_template)
    return None if found is None else replace(found, answers=answers, note=_note(found, columns))


def forms(config: PreProcess) -> list[tuple[str, ...]]:
    """Columns of each form that may be recognised."""
    conversations = dict.fromkeys((config.message_col, *_CONVERSATIONS))
    return [("text",), *((name,) for name in conversations), *((pair.prompt, pair.completion) for pair in _PAIRS)]


def _conversation(columns: Sequence[str], rows: Sequence[Row], config: PreProcess) -> Reading | None:
    if config.format in ("alpaca", "prompt-completion"):
        return None
    for name in dict.fromkeys((config.message_col, *_CONVERSATIONS)):
        if name not in columns:
            continue
        kind = _kind_of(next((row[name] for row in rows if not is_blank(row.get(name))), None))
        asked = config.format != "auto" or (name == config.message_col and bool(config.chat_template))
        if kind is not None or asked:
            return Reading(kind or "messages", column=name, chat=True)
    return None


def _kind_of(value: Any) -> Literal["messages", "sharegpt"] | None:
    """Of the first item of a list of messages."""
    items = _listed(value)
    first = items[0] if items else None
    if not isinstance(first, Mapping):
        return None
    if "role" in first:
        return "messages"
    return "sharegpt" if "from" in first and "value" in first else None


def _pair(columns: Sequence[str], rows: Sequence[Row], config: PreProcess, has_template: bool) -> Reading | None:
    for pair in _PAIRS:
        if config.format in ("auto", pair.format) and pair.prompt in columns and pair.completion in columns:
            context = pair.context if pair.context in columns else None
            listed = any(isinstance(row.get(pair.prompt), list | tuple) for row in rows[:1])
            chat = has_template or bool(config.chat_template) or listed
            return Reading(pair.format, pair=replace(pair, context=context), chat=chat)
    return None


def unknown(records: Records, config: PreProcess) -> DataError:
    """The error for records of which `read_as` knows nothing."""
    has = f"{records.origin} has the columns {', '.join(records.columns)}"
    if config.format != "auto":
        wanted = {
            "messages": f"a column {config.message_col!r} of messages",
            "sharegpt": "a column 'conversations' of messages",
            "alpaca": "the columns 'instruction' and 'output'",
        }.get(config.format, "the columns 'prompt' and 'completion', or 'question' and 'answer'")
        return DataError(
            f"format {config.format} needs {wanted}; {has}", hint="correct format, or leave it out: it is recognised"
        )
    if config.chat_template:
        close = nearest(config.message_col, records.columns)
        return DataError(
            f"message_col names {config.message_col!r}; {has}",
            hint=f"did you mean {close!r}?" if close else "name the column of the messages in message_col",
        )
    only = records.columns[0] if len(records.columns) == 1 else None
    return DataError(
        f"{has}: none is named text, and they are no form that is recognised (messages, conversations, "
        "instruction and output, prompt and completion, question and answer)",
        hint=f'add "text_field": "{only}"' if only else "say what the text is: text_template, text_field or text_cols",
    )


def _note(reading: Reading, columns: Sequence[str]) -> str:
    pair = reading.pair
    if pair is None:
        return f"read as {_TITLES[reading.format]} (column {reading.column})"
    used = [name for name in (pair.prompt, pair.context, pair.completion) if name is not None]
    raw = json.dumps(pair.template(pair.context is not None), ensure_ascii=False)
    how = f"by the chat template (text_template {raw} does without it)" if reading.chat else f"by text_template {raw}"
    known = {*used, "system", "history", "tools"} if reading.chat else {*used}
    left = [name for name in columns if name not in known]
    unused = f"; not used: {', '.join(left)}" if left else ""
    return f"read as {_TITLES[reading.format]} (columns {', '.join(used)}), {how}{unused}"


# -- one record -------------------------------------------------------------------------------------------------------


def is_blank(value: Any) -> bool:
    """Nothing: null, NaN (a table's null), a blank text, an empty list."""
    if isinstance(value, str):
        return not value or value.isspace()
    return value is None or (isinstance(value, float) and value != value) or value in ([], (), {})


def messages_of(row: Row, reading: Reading) -> list[Message]:
    """The conversation of one record; raises DataError."""
    if reading.column is not None:
        messages = _messages(row.get(reading.column), reading.column)
    else:
        assert reading.pair is not None
        messages = _pair_messages(row, reading.pair)
    system = row.get("system")
    if reading.format != "messages" and isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return messages


def tools_of(row: Row) -> list[Any] | None:
    """What stands in the column `tools`: the functions that the assistant may call."""
    return _listed(row.get("tools")) or None


def _pair_messages(row: Row, pair: Pair) -> list[Message]:
    prompt, completion = row.get(pair.prompt), row.get(pair.completion)
    if isinstance(prompt, list | tuple) or isinstance(completion, list | tuple):
        return [*_turns(prompt, "user", pair.prompt), *_turns(completion, "assistant", pair.completion)]
    messages: list[Message] = []
    for asked, answered in _history(row.get("history")):
        messages += [*_turns(asked, "user", "history"), *_turns(answered, "assistant", "history")]
    user = _turns(prompt, "user", pair.prompt)
    context = None if pair.context is None else row.get(pair.context)
    if not is_blank(context):
        more = _turns(context, "user", str(pair.context))[0]["content"]
        user = [{"role": "user", "content": f"{user[0]['content']}\n\n{more}"}]
    return [*messages, *user, *_turns(completion, "assistant", pair.completion)]


def _turns(value: Any, role: str, column: str) -> list[Message]:
    """A list of messages as it is, or one message of a text."""
    if isinstance(value, list | tuple) and value:
        return _messages(value, column)
    return [{"role": role, "content": text_of(value, column)}]


def text_of(value: Any, column: str) -> str:
    """The text of one column; raises DataError for a blank one, and for what is no text."""
    if isinstance(value, str) and not is_blank(value):
        return value
    if is_blank(value):
        raise DataError(
            f"the column {column!r} is {'blank' if isinstance(value, str) else 'empty'}",
            hint="fill it in, or remove the row",
        )
    if isinstance(value, Mapping | list | tuple | bytes):
        kind = {"dict": "an object", "list": "a list", "tuple": "a list"}.get(type(value).__name__, "bytes")
        raise DataError(
            f"the column {column!r} holds {kind}, not text: {value!r:.60}",
            hint="name a column of text, or write the text you want into the data file",
        )
    return str(value)


def _history(value: Any) -> list[tuple[Any, Any]]:
    """Earlier turns of an Alpaca record: [[question, answer], ...]."""
    if is_blank(value):
        return []
    turns = _listed(value)
    if turns is None or not all(isinstance(turn, Sequence) and len(turn) == 2 for turn in turns):
        raise DataError("the column 'history' is not a list of [question, answer]", hint="correct it, or remove it")
    return [(turn[0], turn[1]) for turn in turns]


def _said(role: str, value: Any, name: str) -> Message:
    if isinstance(value, str | int | float):
        return {"role": role, "content": str(value)}
    raise DataError(
        f"the column {name!r} holds a {type(value).__name__}, not text", hint="write a text, or a list of messages"
    )


def _listed(value: Any) -> list[Any] | None:
    """A list, also where a table holds it as JSON text."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return list(value) if isinstance(value, list | tuple) else None


def _messages(value: Any, column: str) -> list[Message]:
    items = _listed(value)
    if items is None:
        raise DataError(f"{column!r} must be a list of messages, got {type(value).__name__}", hint=_MESSAGES_HINT)
    if not items:
        raise DataError(f"{column!r} is an empty list of messages", hint="fill it in, or remove the row")
    return [_message(item, number) for number, item in enumerate(items, start=1)]


def _message(item: Any, number: int) -> Message:
    if not isinstance(item, Mapping):
        raise DataError(f"message {number} must have role and content, got {item!r:.80}", hint=_MESSAGES_HINT)
    if "from" in item and "value" in item and "role" not in item:
        item = {**{key: value for key, value in item.items() if key not in ("from", "value")},
                "role": item["from"], "content": item["value"]}  # fmt: skip
    if "role" not in item or ("content" not in item and not item.get("tool_calls")):
        raise DataError(f"message {number} must have role and content, got {dict(item)!r:.80}", hint=_MESSAGES_HINT)
    role = _ROLES.get(str(item["role"]).strip().lower())
    if role is None:
        raise DataError(
            f"message {number} is of the role {item['role']!r}; known: {', '.join(_ROLES)}",
            hint="rename it to system, user, assistant or tool",
        )
    # A table writes null for every key that only other messages have.
    kept = {key: value for key, value in item.items() if value is not None}
    calls = kept.get("tool_calls")
    if isinstance(calls, list):
        kept["tool_calls"] = [_call(call) for call in calls]
    reasoning = next((kept[key] for key in ("reasoning_content", "thinking", "reasoning") if key in kept), None)
    if reasoning is not None:
        kept["reasoning_content"] = reasoning
    may_be_blank = role == "tool" or bool(calls) or "function_call" in kept
    return {**kept, "role": role, "content": _content(item.get("content"), number, role, may_be_blank)}


def _call(call: Any) -> Any:
    """A tool call with its arguments as an object: templates write them as JSON, and OpenAI's files have JSON text."""
    function = call.get("function") if isinstance(call, Mapping) else None
    arguments = function.get("arguments") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(arguments, str):
        return call
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": parsed}} if isinstance(parsed, dict) else call


def _content(value: Any, number: int, role: str, may_be_blank: bool) -> str:
    if isinstance(value, list | tuple):
        value = "".join(_part(part, number) for part in value)
    if is_blank(value):
        if may_be_blank:
            return ""
        raise DataError(f"message {number}, of the {role}, is empty", hint="fill it in, or remove the row")
    if isinstance(value, Mapping | bytes):
        raise DataError(
            f"message {number} has a {type(value).__name__} as content, not text: {value!r:.60}",
            hint='write a text as content, or [{"type": "text", "text": "..."}]',
        )
    return str(value)


def _part(part: Any, number: int) -> str:
    """The text of one part of a content that is a list."""
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise DataError(
        f"message {number} has content of type {kind!r}; only text can be trained on",
        hint="remove what is not text, or remove the row",
    )
