"""From a record to a text, and to token ids with the answer's place."""

from __future__ import annotations

from typing import Any

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldpress.config.schema import PreProcess
from coldpress.data.formats import Reading, read_as
from coldpress.data.sources import Records
from coldpress.data.templates import Rendered, columns_of, encode, marked_columns, prompt_of, render, render_all
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


def test_two_answers_in_a_template() -> None:
    pre = settings(text_template="{phrase|loss}: {tone|loss}!")
    one = render(ROW, pre)
    assert one.spans is not None
    assert [one.text[start:end] for start, end in one.spans] == ["so {nice}", "joy!"]
    assert (one.answer, one.text[one.answer_start :]) == ("joy", "joy!")
    assert render(ROW, pre, answer="fear").text == "so {nice}: fear!"
    assert marked_columns(pre) == ("phrase", "tone")
    assert columns_of(pre) == (("phrase", "tone"), "text_template")
    labelled = render(ROW, settings(text_template="{phrase|loss}: {tone}", label_col="tone"))
    assert labelled.answer == "joy"
    assert labelled.spans == ((0, len(labelled.text)),), "marks say where loss is, label_col what is scored"


def test_values_that_are_not_text() -> None:
    for value, kind in ((["a"], "a list"), ({"a": 1}, "an object"), (b"a", "bytes")):
        with pytest.raises(DataError, match=f"'text' holds {kind}, not text") as error:
            render({"text": value}, settings())
        assert "column of text" in str(error.value.hint)
    assert render({"text": 0}, settings()).text == "0"
    assert render({"text": True}, settings()).text == "True", "as Python writes it, and Olive"


def test_a_stop_token_after_an_answer_belongs_to_it(tokenizer: Tokenizer) -> None:
    pre = settings(text_template="{q}:{a|loss}</s>{b}:{c|loss}<|end|>", add_special_tokens=False)
    text = render({"q": "q", "a": "xy", "b": "b", "c": "z"}, pre)
    (one,) = encode([text], pre, tokenizer)
    assert one.spans is not None
    assert ["".join(map(tokenizer.token, one.ids[start:end])) for start, end in one.spans] == ["xy</s>", "z<|end|>"]


@pytest.mark.parametrize("model", ["phi3-7m", "stories260K-hd16", "stories1M-char361"])
def test_places_in_characters_are_places_in_tokens(shared: Any, model: str) -> None:
    """Against the offsets of all tokens, on texts of every kind."""
    tokenizer = Tokenizer.load(shared / "models" / model)

    @given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40), st.data())
    @hypothesis.settings(max_examples=300, deadline=None)
    def check(text: str, data: st.DataObject) -> None:
        begin = data.draw(st.integers(0, len(text)))
        end = data.draw(st.integers(begin, len(text)))
        (one,) = encode([Rendered(text, begin, None, ((begin, end),))], settings(add_special_tokens=False), tokenizer)
        (encoding,) = tokenizer.encode([text])
        size = len(encoding.ids)
        first = next((place for place, (_, stop) in enumerate(encoding.offsets) if stop > begin), size)
        after = next((place for place, (start, _) in enumerate(encoding.offsets) if start >= end), size)
        assert one.answer_start == first
        assert one.spans is not None
        assert one.spans[0][0] == first
        assert one.spans[0][1] in (after, after + 1), "and the token that ends the text, if it comes next"

    check()


@pytest.mark.parametrize(
    ("given", "prompt"),
    [
        ({"text_template": "{phrase} {{x}} {tone}: {tone}!", "label_col": "tone"}, "{phrase} {{x}} {tone}: "),
        ({"text_template": "Q: {the text}\nA: {tone|loss}!"}, "Q: {the text}\nA: "),
        ({"text_template": "{phrase} is {tone}"}, "{phrase} is "),
        ({"text_cols": ("phrase", "tone")}, "{phrase} "),
        ({"text_field": "phrase"}, ""),
    ],
)
def test_the_template_before_an_answer(given: dict[str, Any], prompt: str) -> None:
    assert prompt_of(settings(**given), Reading("text")) == prompt


def test_the_template_before_an_answer_of_other_forms() -> None:
    plain = settings(text_template="{phrase}: {tone}!")
    assert prompt_of(plain, Reading("text"), classes=True) == "{phrase}: {tone}!"
    row = {"question": "a", "answer": "b"}
    for chat, prompt in ((False, "Question: {question}\nAnswer: "), (True, "")):
        reading = read_as(tuple(row), [row], settings(), has_template=chat)
        assert reading is not None
        assert prompt_of(settings(), reading) == prompt
