"""Where the assistant's turns are, on templates built like the ones that models come with."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldpress.data.chat_template import generated_spans, render_template
from coldpress.data.conversations import conversation, without_tail
from coldpress.data.tokenizer import Tokenizer
from coldpress.errors import DataError

CHATML = (
    "{% for m in messages %}{{ '<im>' + m.role + '\\n' + m.content + '<end>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<im>assistant\\n' }}{% endif %}"
)
EOS_AT_THE_END = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
EOS_AFTER_EACH_ANSWER = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[I] ' + m.content + ' [/I]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported') }}{% endif %}{% endfor %}"
)
SYSTEM_IN_THE_LAST_QUESTION = (
    "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}[I]"
    "{% if loop.index0 >= messages|length - 3 and messages[0].role == 'system' %}{{ messages[0].content }} {% endif %}"
    "{{ m.content }}[/I]{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)
THINKING_DROPPED = (
    "{% for m in messages %}<im>{{ m.role }}\n"
    "{% if m.role == 'assistant' and '</think>' in m.content and not loop.last %}"
    "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<im>assistant\n{% endif %}"
)
PROMPT_UNLIKE_THE_TURN = (
    "{% for m in messages %}<im>{{ m.role }}\n{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<im>assistant\n<think>\n{% endif %}"
)
BLOCKS = (
    "{% for m in messages %}<im>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<end>{% endgeneration %}\n{% else %}{{ m.content }}<end>\n{% endif %}{% endfor %}"
    "{%- if add_generation_prompt %}<im>assistant\n{% endif %}"
)
DEAF_TO_SYSTEM = "{% for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content }}\n{% endfor %}"

CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "ciao"},
]
SYSTEM = {"role": "system", "content": "Be brief."}


def turns(tokenizer: Tokenizer, template: str, messages: Any = CHAT, which: Any = "all", **more: Any) -> list[str]:
    told = conversation(messages, tokenizer, template=template, turns=which, **more)
    assert told.text == tokenizer.chat(messages, template=template, tools=more.get("tools"))
    return [told.text[start:end] for start, end in told.turns]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, ["hello<end>\n", "ciao<end>\n"]),
        (EOS_AT_THE_END, ["hello<|end|>\n", "ciao<|end|>\n</s>"]),
        (EOS_AFTER_EACH_ANSWER, [" hello</s>", " ciao</s>"]),
        (BLOCKS, ["hello<end>", "ciao<end>"]),
        (DEAF_TO_SYSTEM, ["assistant: hello\n", "assistant: ciao\n"]),
    ],
    ids=["chatml", "eos at the end", "eos after each answer", "blocks", "no generation prompt"],
)
def test_every_turn_with_what_ends_it(tokenizer: Tokenizer, template: str, expected: list[str]) -> None:
    assert turns(tokenizer, template) == expected
    assert turns(tokenizer, template, which="last") == expected[-1:]
    assert turns(tokenizer, template, which="none") == []


@pytest.mark.parametrize("template", [SYSTEM_IN_THE_LAST_QUESTION, THINKING_DROPPED])
def test_a_template_that_rewrites_earlier_turns(tokenizer: Tokenizer, template: str) -> None:
    messages = [SYSTEM, *CHAT] if "system" in template else [
        {**one, "content": f"<think>hm</think>{one['content']}"} if one["role"] == "assistant" else one for one in CHAT
    ]  # fmt: skip
    with pytest.raises(DataError, match=r"writes message [23] differently once others follow") as error:
        turns(tokenizer, template, messages)
    assert '"assistant_turns": "last"' in str(error.value.hint)
    (last,) = turns(tokenizer, template, messages, "last")
    assert "ciao" in last
    assert "bye" not in last
    assert len(turns(tokenizer, template, messages[-2:])) == 1, "one turn is the last"


def test_a_prompt_that_the_turn_does_not_have(tokenizer: Tokenizer) -> None:
    assert turns(tokenizer, PROMPT_UNLIKE_THE_TURN, CHAT, "last") == ["ciao<end>\n"]
    with pytest.raises(DataError, match="writes message 2 differently"):
        turns(tokenizer, PROMPT_UNLIKE_THE_TURN)


def test_an_answer_that_begins_the_conversation(tokenizer: Tokenizer) -> None:
    assert turns(tokenizer, CHATML, [{"role": "assistant", "content": "welcome"}, *CHAT[:2]]) == [
        "welcome<end>\n",
        "hello<end>\n",
    ]


def test_answers_that_repeat_and_follow_each_other(tokenizer: Tokenizer) -> None:
    same = [CHAT[0], CHAT[1], CHAT[1], {"role": "user", "content": "hello"}, CHAT[1]]
    told = conversation(same, tokenizer, template=CHATML, turns="all")
    starts = [start for start, _ in told.turns]
    assert [told.text[start:end] for start, end in told.turns] == ["hello<end>\n"] * 3
    assert starts == sorted(set(starts))
    assert told.text.rfind("<im>user") < starts[-1]


def test_weights_of_openai(tokenizer: Tokenizer) -> None:
    messages = [CHAT[0], {**CHAT[1], "weight": 0}, CHAT[2], {**CHAT[3], "weight": 1}]
    for template, expected in ((CHATML, "ciao<end>\n"), (BLOCKS, "ciao<end>")):
        assert turns(tokenizer, template, messages) == [expected]


def test_a_message_that_the_template_leaves_out(tokenizer: Tokenizer) -> None:
    assert turns(tokenizer, CHATML, [SYSTEM, *CHAT]) == turns(tokenizer, CHATML)
    with pytest.raises(DataError, match="leaves out message 1, of the role 'system'"):
        turns(tokenizer, DEAF_TO_SYSTEM, [SYSTEM, *CHAT])
    with pytest.raises(DataError, match="Only user and assistant roles are supported"):
        turns(tokenizer, EOS_AFTER_EACH_ANSWER, [SYSTEM, *CHAT])
    escaped = (
        "{% for m in messages %}{{ m.role }}:{{ m.content|tojson if m.role == 'tool' else m.content }}\n{% endfor %}"
    )
    tool = {"role": "tool", "content": '{"t": 3}'}
    assert turns(tokenizer, escaped, [*CHAT[:3], tool, CHAT[3]])[-1] == "assistant:ciao\n"


def test_tools_reach_the_template(tokenizer: Tokenizer) -> None:
    template = "{% if tools %}{{ tools[0].name }}|{% endif %}" + CHATML
    told = conversation(CHAT[:2], tokenizer, template=template, tools=[{"name": "clock"}], turns="all")
    assert told.text.startswith("clock|<im>user")
    assert told.text[told.turns[0][0] :] == "hello<end>\n"


def test_what_follows_the_last_answer() -> None:
    assert without_tail([*CHAT, CHAT[0]]) == CHAT
    with pytest.raises(DataError, match="none of the 2 messages is the assistant's"):
        without_tail([SYSTEM, CHAT[0]])


def test_blocks_in_a_template_that_measures_its_text(tokenizer: Tokenizer) -> None:
    """The marks would be counted: such blocks are not used, the prefixes are."""
    measured = (
        "{% for m in messages %}{% set said %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endset %}"
        "<im>{{ m.role }}\n{{ said|length }}:{{ said }}<end>\n{% endfor %}"
        "{% if add_generation_prompt %}<im>assistant\n{% endif %}"
    )
    assert turns(tokenizer, measured) == ["5:hello<end>\n", "4:ciao<end>\n"]


def test_spans_of_marks() -> None:
    assert generated_spans("ab\ufdd0cd\ufdd1e\ufdd0f\ufdd1", "abcdef") == ((2, 4), (5, 6))
    assert generated_spans("ab\ufdd0cd", "abcd") is None
    assert generated_spans("a\ufdd1", "a") is None
    assert generated_spans("a \ufdd0\ufdd1", "a") is None


@pytest.mark.parametrize("template", [CHATML, EOS_AT_THE_END, EOS_AFTER_EACH_ANSWER, BLOCKS, THINKING_DROPPED])
def test_rendered_as_transformers_renders_it(tokenizer: Tokenizer, template: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    special = dict(tokenizer.special_tokens or {})
    blocks = "{% generation" in template
    for prompt in (False, True):
        (expected,), spans = render_jinja_template(
            [CHAT],
            chat_template=template,
            add_generation_prompt=prompt,
            return_assistant_tokens_mask=blocks,
            **special,
        )
        assert render_template(template, CHAT, generation_prompt=prompt, special_tokens=special) == expected
        if blocks and not prompt:
            told = conversation(CHAT, tokenizer, template=template, turns="all")
            assert list(told.turns) == [tuple(span) for span in spans[0]]


def test_json_and_dates_as_in_transformers() -> None:
    text = render_template("{{ messages|tojson }}", [{"role": "user", "content": "é <b>"}])
    assert text == '[{"role": "user", "content": "é <b>"}]'
    dated = "{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% else %}some day{% endif %}"
    assert render_template(dated, []) == "some day", "the same text every day where the template allows it"
    assert render_template("{{ strftime_now('%Y') }}", []).startswith("20")


@pytest.mark.parametrize(
    ("template", "what"),
    [
        ("{% if %}", "not valid Jinja"),
        ("{{ messages[7].content.strip() }}", "cannot render"),
        ("{{ messages[0].content + 1 }}", "cannot render"),
        ("{{ ''.__class__.__mro__ }}", "cannot render"),
    ],
)
def test_templates_that_do_not_render(template: str, what: str) -> None:
    with pytest.raises(DataError, match=what):
        render_template(template, CHAT)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["user", "assistant", "system"]), st.text(min_size=1).filter(lambda t: bool(t.strip()))
        ),
        min_size=1,
        max_size=6,
    )
)
def test_turns_are_exact_for_any_text(spoken: list[tuple[str, str]]) -> None:
    bare = Tokenizer(backend=None, bos_id=None, eos_id=None, pad_id=0)
    messages = [{"role": role, "content": text} for role, text in spoken]
    answers = [text for role, text in spoken if role == "assistant"]
    if not answers:
        return
    messages = without_tail(messages)
    told = conversation(messages, bare, template=CHATML, turns="all")
    if messages[0]["role"] != "assistant":  # there the answer is looked for in the text
        assert [told.text[start:end] for start, end in told.turns] == [f"{text}<end>\n" for text in answers]
    assert told.text == "".join(f"<im>{one['role']}\n{one['content']}<end>\n" for one in messages)
