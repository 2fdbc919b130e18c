"""The form of records: recognised, asked for, or refused; and the messages of one record."""

from __future__ import annotations

import json
from typing import Any

import pytest

from coldpress.config.schema import PreProcess
from coldpress.data.formats import is_blank, messages_of, read_as, tools_of
from coldpress.data.sources import Records
from coldpress.data.templates import answers_only, columns_of, read_format, render, render_all
from coldpress.data.tokenizer import Tokenizer
from coldpress.errors import DataError

SAID = "user: hi<|end|>assistant: yo<|end|>"
OPENAI = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}
SHAREGPT = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]}
ALPACA = {"instruction": "add", "input": "1 2", "output": "3"}
TRL = {"prompt": [{"role": "user", "content": "hi"}], "completion": [{"role": "assistant", "content": "yo"}]}


def records(*rows: dict[str, Any]) -> Records:
    columns = tuple(dict.fromkeys(name for row in rows for name in row))
    return Records(rows, columns, [f"f:{number}" for number in range(1, len(rows) + 1)], "f")


def settings(**values: Any) -> PreProcess:
    return PreProcess(**values)


def bare(tokenizer: Tokenizer) -> Tokenizer:
    """The same without a chat template."""
    return Tokenizer(tokenizer.backend, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)


@pytest.mark.parametrize(
    ("row", "form", "text", "answers"),
    [
        (OPENAI, "messages", SAID, ["yo<|end|>"]),
        (SHAREGPT, "sharegpt", SAID, ["yo<|end|>"]),
        ({"messages": SHAREGPT["conversations"]}, "sharegpt", SAID, ["yo<|end|>"]),
        ({"conversation": OPENAI["messages"]}, "messages", SAID, ["yo<|end|>"]),
        ({"messages": json.dumps(OPENAI["messages"])}, "messages", SAID, ["yo<|end|>"]),
        (ALPACA, "alpaca", "user: add\n\n1 2<|end|>assistant: 3<|end|>", ["3<|end|>"]),
        ({**ALPACA, "input": ""}, "alpaca", "user: add<|end|>assistant: 3<|end|>", ["3<|end|>"]),
        ({"instruction": "a", "response": "b"}, "alpaca", "user: a<|end|>assistant: b<|end|>", ["b<|end|>"]),
        ({"prompt": "a", "completion": 4}, "prompt-completion", "user: a<|end|>assistant: 4<|end|>", ["4<|end|>"]),
        ({"question": "a", "answer": "b"}, "prompt-completion", "user: a<|end|>assistant: b<|end|>", ["b<|end|>"]),
        (TRL, "prompt-completion", SAID, ["yo<|end|>"]),
        ({**TRL, "completion": "yo"}, "prompt-completion", SAID, ["yo<|end|>"]),
        (
            {**ALPACA, "system": "Be.", "history": [["a", "b"]]}, "alpaca",
            "system: Be.<|end|>user: a<|end|>assistant: b<|end|>user: add\n\n1 2<|end|>assistant: 3<|end|>",
            ["b<|end|>", "3<|end|>"],
        ),
    ],
)  # fmt: skip
def test_recognised(tokenizer: Tokenizer, row: dict[str, Any], form: str, text: str, answers: list[str]) -> None:
    pre = settings(strategy="pack")
    data = records({**row, "id": 7})
    reading = read_format(data, pre, tokenizer)
    assert reading.format == form
    assert answers_only(pre, reading)
    (one,) = render_all(data, pre, tokenizer)
    assert one.text == text
    assert one.spans is not None
    assert [one.text[start:end] for start, end in one.spans] == answers


@pytest.mark.parametrize(
    ("row", "text", "answer"),
    [
        ({"prompt": "a: ", "completion": "b"}, "a: b", "b"),
        ({"question": "a", "answer": "b"}, "Question: a\nAnswer: b", "b"),
        ({"question": "a", "answer": "b", "context": "c"}, "c\n\nQuestion: a\nAnswer: b", "b"),
        ({**ALPACA, "input": None}, "### Instruction:\nadd\n\n### Response:\n3", "3"),
        (ALPACA, "### Instruction:\nadd\n\n### Input:\n1 2\n\n### Response:\n3", "3"),
    ],
)
def test_without_a_chat_template(tokenizer: Tokenizer, row: dict[str, Any], text: str, answer: str) -> None:
    """The text that is used is said as the text_template that makes it."""
    pre, plain = settings(strategy="pack"), bare(tokenizer)
    reading = read_format(records(row), pre, plain)
    one = render(row, pre, plain, reading=reading)
    assert (one.text, one.answer, one.spans) == (text, answer, ((len(text) - len(answer), len(text)),))
    assert reading.note is not None
    said = reading.note.split("by text_template ")[1].split("; not used")[0]
    if not is_blank(row.get("input", "x")):
        again = settings(text_template=json.loads(said), strategy="pack")
        assert render(row, again, plain) == one
    assert render(row, pre, plain, answer="z", reading=reading).text == text[: -len(answer)] + "z"


def test_notes_say_what_was_read(tokenizer: Tokenizer) -> None:
    def note(row: dict[str, Any], **values: Any) -> str | None:
        return read_format(records(row), settings(**values), tokenizer).note

    assert note(SHAREGPT) == "read as ShareGPT conversations (column conversations)"
    said = note({"prompt": "a", "completion": "b", "id": 1})
    assert said == (
        "read as prompt and completion (columns prompt, completion), by the chat template "
        '(text_template "{prompt}{completion|loss}" does without it); not used: id'
    )
    assert note({"text": "a", **OPENAI}) is None, "Olive's default column"


def test_what_the_config_says_wins(tokenizer: Tokenizer) -> None:
    row = {"text": "plain", **OPENAI, **ALPACA}
    for values, text in (
        ({}, "plain"),
        ({"text_field": "input"}, "1 2"),
        ({"text_cols": ("instruction", "output")}, "add 3"),
        ({"text_template": "{output}!"}, "3!"),
        ({"format": "text", "text_template": "{output}!"}, "3!"),
        ({"chat_template": True}, SAID),
        ({"format": "messages"}, SAID),
        ({"format": "alpaca"}, "user: add\n\n1 2<|end|>assistant: 3<|end|>"),
        ({"format": "alpaca", "chat_template": "{{ messages[0].content }}"}, "add\n\n1 2"),
    ):
        assert render_all(records(row), settings(**values), tokenizer)[0].text == text, values


def test_chat_template_true_finds_other_columns(tokenizer: Tokenizer) -> None:
    for row in (SHAREGPT, ALPACA):
        pre = settings(chat_template=True)
        one = render_all(records(row), pre, tokenizer)[0]
        assert one.text.startswith("user: ")
        assert one.spans is None, "loss on all, as in Olive, unless completion_only_loss says otherwise"


def test_loss_by_default(tokenizer: Tokenizer) -> None:
    def only(row: dict[str, Any], **values: Any) -> bool:
        pre = settings(**values)
        return answers_only(pre, read_format(records(row), pre, tokenizer))

    assert only(OPENAI, strategy="line-by-line")
    assert only(OPENAI, strategy="pack", format="messages")
    assert not only(OPENAI, strategy="join")
    assert not only(OPENAI, strategy="pack", completion_only_loss=False)
    assert not only({"text": "a"}, strategy="pack")
    assert not only(OPENAI, strategy="pack", chat_template=True)
    assert not only(ALPACA, strategy="pack", text_template="{instruction}{output}", label_col="output")
    assert only(ALPACA, strategy="pack", text_template="{instruction}{output|loss}")


@pytest.mark.parametrize(
    ("row", "values", "what", "hint"),
    [
        ({"sentence": "a"}, {}, "none is named text", '"text_field": "sentence"'),
        ({"a": "x", "b": "y"}, {}, "f has the columns a, b", "text_template"),
        ({"mesages": []}, {"chat_template": True}, "message_col names 'messages'", "did you mean 'mesages'"),
        (OPENAI, {"format": "alpaca"}, "format alpaca needs the columns 'instruction' and 'output'", "correct format"),
        (ALPACA, {"format": "sharegpt"}, "format sharegpt needs a column 'conversations'", "correct format"),
        (
            ALPACA,
            {"text_template": "{instrution}{output}"},
            r"'instrution' \(did you mean 'instruction'\?\)",
            "correct",
        ),
        (ALPACA, {"text_field": "output", "label_col": "outptu"}, r"'outptu' \(did you mean 'output'", "correct"),
    ],
)
def test_refused(tokenizer: Tokenizer, row: dict[str, Any], values: dict[str, Any], what: str, hint: str) -> None:
    with pytest.raises(DataError, match=what) as error:
        render_all(records(row), settings(**values), tokenizer)
    assert hint in str(error.value.hint)


def test_conversations_need_a_chat_template(tokenizer: Tokenizer) -> None:
    for row in (OPENAI, SHAREGPT, TRL):
        with pytest.raises(DataError, match="no chat template") as error:
            render_all(records(row), settings(), bare(tokenizer))
        assert "Jinja" in str(error.value.hint)


@pytest.mark.parametrize(
    ("messages", "what"),
    [
        ("hi", "must be a list of messages, got str"),
        (None, "must be a list of messages, got NoneType"),
        ({"role": "user"}, "must be a list of messages, got dict"),
        ([], "is an empty list"),
        (["hi"], "message 1 must have role and content"),
        ([{"role": "user"}], "message 1 must have role and content"),
        ([{"role": "user", "content": "a"}, {"role": "robot", "content": "b"}], "message 2 is of the role 'robot'"),
        ([{"role": "user", "content": " "}], "message 1, of the user, is empty"),
        ([{"role": "assistant", "content": None}], "message 1, of the assistant, is empty"),
        ([{"role": "user", "content": {"a": 1}}], "message 1 has a dict as content, not text"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "content of type 'image_url'"),
        ([{"role": "user", "content": [3]}], "content of type 'int'"),
    ],
)
def test_bad_messages(tokenizer: Tokenizer, messages: Any, what: str) -> None:
    data = records(OPENAI, {"messages": messages})
    with pytest.raises(DataError, match=what) as error:
        render_all(data, settings(strategy="pack"), tokenizer)
    assert error.value.message.startswith("f:2: ")
    assert error.value.hint


def test_messages_as_files_have_them() -> None:
    reading = read_as(("messages",), [OPENAI], settings(), has_template=True)
    assert reading is not None
    call = {"id": "1", "type": "function", "function": {"name": "now", "arguments": '{"zone": "UTC"}'}}
    row = {
        "messages": [
            {"role": "developer", "content": "d", "name": None},
            {"role": "human", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": None, "tool_calls": [call], "reasoning": "hm"},
            {"role": "function", "content": "", "tool_call_id": "1"},
            {"role": "GPT", "content": 5},
        ]
    }
    first, second, third, fourth, fifth = messages_of(row, reading)
    assert first == {"role": "developer", "content": "d"}, "a table's nulls are no keys"
    assert second == {"role": "user", "content": "ab"}
    assert third["tool_calls"][0]["function"]["arguments"] == {"zone": "UTC"}
    assert (third["content"], third["reasoning_content"]) == ("", "hm")
    assert fourth == {"role": "tool", "content": "", "tool_call_id": "1"}
    assert fifth == {"role": "assistant", "content": "5"}


def test_tools() -> None:
    assert tools_of({"tools": [{"name": "a"}]}) == [{"name": "a"}]
    assert tools_of({"tools": '[{"name": "a"}]'}) == [{"name": "a"}]
    assert tools_of({"tools": None}) is tools_of({}) is tools_of({"tools": []}) is None


def test_blank() -> None:
    for value in (None, "", " \n", "\u3000", float("nan"), [], {}, ()):
        assert is_blank(value), value
    for value in (0, False, 0.0, "0", [0], "\u200b"):
        assert not is_blank(value), value


def test_a_prompt_that_looks_like_a_list_is_text(tokenizer: Tokenizer) -> None:
    row = {"prompt": "[1, 2, 3]", "completion": "[3, 2, 1]"}
    assert (
        render_all(records(row), settings(), tokenizer)[0].text == "user: [1, 2, 3]<|end|>assistant: [3, 2, 1]<|end|>"
    )


def test_columns_by_form(tokenizer: Tokenizer) -> None:
    reading = read_format(records(ALPACA), settings(), tokenizer)
    assert columns_of(settings(), reading) == (("instruction", "output"), "format")
    reading = read_format(records(SHAREGPT), settings(), tokenizer)
    assert columns_of(settings(), reading) == (("conversations",), "message_col")
