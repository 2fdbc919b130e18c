"""A conversation to text, and the characters of each turn of the assistant.

    <|user|> hi <|end|> <|assistant|> hello <|end|> <|user|> bye <|end|> <|assistant|> ciao <|end|>
                                      |--- turn --|                                    |-- turn --|

A template with `{% generation %}` blocks says itself where the turns are. Otherwise a turn is what the template adds
when the message is added to the messages before it and the generation prompt: from the end of render(messages[:i],
generation prompt) to the end of render(messages[:i+1]), so the token that ends the turn belongs to it. That holds only
where each of these texts is the beginning of the whole; a template that writes earlier turns differently (drops their
thinking, moves the system message) is refused for all turns but the last. What a template writes at the end of every
conversation (Phi-3's EOS) is not taken for a part of an earlier turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from coldpress.data.chat_template import generated_spans, has_generation_blocks, render_template
from coldpress.data.formats import Message
from coldpress.data.tokenizer import Tokenizer
from coldpress.errors import DataError

__all__ = ["Conversation", "conversation", "without_tail"]

Span = tuple[int, int]


@dataclass(frozen=True)
class Conversation:
    """Text of a conversation."""

    text: str
    turns: tuple[Span, ...] = ()
    """Characters (start, end) of the assistant's turns that carry loss, in order."""


def without_tail(messages: Sequence[Message]) -> list[Message]:
    """The messages up to the assistant's last; raises DataError when it says nothing."""
    last = max((place for place, one in enumerate(messages) if one["role"] == "assistant"), default=None)
    if last is None:
        raise DataError(
            f"none of the {len(messages)} messages is the assistant's, so there is no answer to learn",
            hint="add the answer with the role assistant, remove the row, or set completion_only_loss to false",
        )
    return list(messages[: last + 1])


def conversation(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    *,
    template: str | None = None,
    tools: Sequence[Any] | None = None,
    turns: Literal["all", "last", "none"] = "none",
) -> Conversation:
    """Text, and the assistant's turns where they are asked for. Messages then end with the assistant's.

    A turn with `weight: 0` (as in OpenAI's files) carries no loss. Raises DataError.
    """
    writer = _Writer(tokenizer, tokenizer.template(template), tools)
    text = writer.text(messages)
    _check_shown(messages, text, writer)
    if turns == "none":
        return Conversation(text)
    places = [place for place, one in enumerate(messages) if one["role"] == "assistant"]
    spans = writer.blocks(messages, text)
    if spans is None or len(spans) != len(places):
        places = places if turns == "all" else places[-1:]
        spans = [_turn(messages, place, text, writer) for place in places]
    elif turns == "last":
        places, spans = places[-1:], spans[-1:]
    kept = [span for place, span in zip(places, spans, strict=True) if messages[place].get("weight") != 0]
    return Conversation(text, tuple(kept))


@dataclass(frozen=True)
class _Writer:
    """Messages to text, by one template."""

    tokenizer: Tokenizer
    template: str
    tools: Sequence[Any] | None

    def text(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        return self.tokenizer.chat(messages, template=self.template, tools=self.tools, generation_prompt=prompt)

    def blocks(self, messages: Sequence[Message], text: str) -> Sequence[Span] | None:
        """The template's own generation blocks; None where it has none."""
        if not has_generation_blocks(self.template):
            return None
        special = self.tokenizer.special_tokens
        marked = render_template(self.template, messages, tools=self.tools, special_tokens=special, marked=True)
        return generated_spans(marked, text)

    def without_end(self, text: str) -> str:
        """Without the token that some templates write when the conversation ends."""
        special = self.tokenizer.special_tokens or {}
        bare = text.rstrip()
        for name in ("eos_token", "bos_token", "pad_token"):
            if special.get(name) and bare.endswith(special[name]):
                return bare.removesuffix(special[name])
        return text


def _turn(messages: Sequence[Message], place: int, text: str, writer: _Writer) -> Span:
    """One turn, from what the template writes without it."""
    last = place == len(messages) - 1
    content = str(messages[place]["content"]).strip()
    before: str | None = None
    if place:
        before = writer.text(messages[:place], prompt=True)
    elif content and content in text:  # many templates refuse to begin with nothing
        before = text[: text.find(content)]
    after = text if last else writer.text(messages[: place + 1])
    if not text.startswith(after):
        after = writer.without_end(after)
    if before is not None and text.startswith(after) and after.startswith(before) and len(after) > len(before):
        return len(before), len(after)
    if not last:
        raise DataError(
            f"the chat template writes message {place + 1} differently once others follow it, so the place of that "
            "turn is not known",
            hint='set "assistant_turns": "last" to train on the last turn alone, or give a template with '
            "{% generation %} blocks as chat_template",
        )
    start = text.rfind(content) if content else -1
    if start < 0:
        raise DataError(
            "the chat template does not show the last message as it is, so the answer has no place",
            hint="give a template that writes the content unchanged as chat_template",
        )
    return start, len(text)


def _check_shown(messages: Sequence[Message], text: str, writer: _Writer) -> None:
    """Refuse a template that leaves out messages of the system or a tool without a word."""
    for place, message in enumerate(messages):
        content = str(message["content"]).strip()
        if message["role"] in ("user", "assistant") or not content or content in text:
            continue
        rest = [one for number, one in enumerate(messages) if number != place]
        # It may be written in other characters (as JSON): then it is missed where it is taken away.
        try:
            missed = bool(rest) and writer.text(rest) != text
        except DataError:
            missed = True
        if not missed:
            raise DataError(
                f"the chat template leaves out message {place + 1}, of the role {message['role']!r}",
                hint="give a template that writes it as chat_template, or put the text into the user's message",
            )
