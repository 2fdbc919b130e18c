"""From a record to a text, and to token ids with the answer's place."""

from __future__ import annotations

from typing import Any

import pytest

from coldpress.config.schema import PreProcess
from coldpress.data.sources import Records
from coldpress.data.templates import Rendered, columns_of, encode, render, render_all
from coldpress.data.tokenizer import Tokenizer
from coldpress.errors import DataError

ROW = {"phrase": "so {nice}", "tone": "joy", "the text": "hm", "n": 3}


def settings(**values: Any) -> PreProcess:
    return PreProcess(**values)


def test_template_columns_braces_and_spaces() -> None:
    one = render(ROW, settings(text_template="{phrase} {{x}} {the text} {n}: {tone}."))
    assert one == Rendered("so {nice} {x} hm 3: joy.")
    assert columns_of(settings(text_template="{a} {b c} {a}")) == (("a", "b c"), "text_template")


def test_text_field_and_columns() -> None:
    assert render(ROW, settings(text_field="phrase")).text == "so {nice}"
    assert render(ROW, settings(text_cols=("phrase", "tone"))).text == "so {nice} joy"
    assert render({"text": "a"}, settings()).text == "a"


def test_the_template_wins_over_the_columns() -> None:
    assert render(ROW, settings(text_cols=("phrase", "tone"), text_template="{tone}")).text == "joy"


def test_answer_place() -> None:
    one = render(ROW, settings(text_template="{phrase} {tone}: {tone}!", label_col="tone"))
    assert one.text[one.answer_start :] == "joy!"
    assert one.answer == "joy"
    other = render(ROW, settings(text_template="{phrase}: {tone}", label_col="tone"), answer="fear")
    assert other.text == "so {nice}: fear"
    assert render(ROW, settings(text_cols=("phrase", "tone"), label_col="tone")).answer_start == len("so {nice} ")


def test_errors() -> None:
    with pytest.raises(DataError, match="malformed"):
        render(ROW, settings(text_template="{phrase"))
    with pytest.raises(DataError, match="not part of the text"):
        render(ROW, settings(text_template="{phrase}", label_col="tone"))
    with pytest.raises(DataError, match="'tone' is empty"):
        render({"phrase": "a", "tone": None}, settings(text_cols=("phrase", "tone")))
    with pytest.raises(DataError, match="'tone' is blank"):
        render({"phrase": "a", "tone": " "}, settings(text_cols=("phrase", "tone")))
    records = Records([ROW, {"phrase": "a"}], ("phrase", "tone"), ["f:1", "f:2"], "f")
    with pytest.raises(DataError, match="f:2: the column 'tone' is empty"):
        render_all(records, settings(text_template="{phrase}{tone}"))
    with pytest.raises(DataError, match="f has no column 'tome'"):
        render_all(records, settings(text_template="{phrase}{tome}"))
    with pytest.raises(DataError, match="needs to know the answer"):
        render_all(records, settings(text_field="phrase", completion_only_loss=True))


def test_chat(tokenizer: Tokenizer) -> None:
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}
    assert render(row, settings(chat_template=True), tokenizer).spans is None, "the whole text carries loss"
    one = render(row, settings(chat_template=True, completion_only_loss=True), tokenizer)
    assert one.text == "user: hi<|end|>assistant: yo<|end|>"
    assert one.text[one.answer_start :] == "yo<|end|>"
    assert render(row, settings(chat_template=True), tokenizer, answer="no").text.endswith("assistant: no<|end|>")
    with pytest.raises(DataError, match="must be a list of messages"):
        render({"messages": "hi"}, settings(chat_template=True), tokenizer)
    with pytest.raises(DataError, match="'messages' is an empty list of messages") as error:
        render({"messages": []}, settings(chat_template=True), tokenizer)
    assert error.value.hint == "fill it in, or remove the row"


def test_special_tokens_as_ids(tokenizer: Tokenizer) -> None:
    texts = [Rendered("ab", 1), Rendered("<s>ab</s>", 4)]
    plain, doubled = encode(texts, settings(), tokenizer)
    a, b = tokenizer.ids("ab")
    assert plain.ids == [256, a, b, 257]
    assert plain.answer_start == 2
    assert doubled.ids == [256, a, b, 257], "the text has them already"
    assert doubled.answer_start == 2
    bare = encode(texts, settings(add_special_tokens=False), tokenizer)[0]
    assert (bare.ids, bare.answer_start) == ([a, b], 1)


def test_a_token_across_the_border_is_answer(shared: Any) -> None:
    tokenizer = Tokenizer.load(shared / "models" / "phi3-7m")
    text = "The tone is joyful"
    for start in range(len(text)):
        (one,) = encode([Rendered(text, start)], settings(add_special_tokens=False), tokenizer)
        (encoding,) = tokenizer.encode([text])
        assert one.answer_start is not None
        first, last = encoding.offsets[one.answer_start]
        assert first <= start < last or text[start] == " "
