"""Chat templates as Transformers renders them, and the characters that their `{% generation %}` blocks wrote.

Jinja is compiled once for each template. A block is found by two characters that Unicode never assigns, written around
it; a template whose other text changes by that (it measures or trims what it has rendered) has no known blocks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from coldpress.errors import DataError, MissingExtraError

__all__ = ["generated_spans", "has_generation_blocks", "render_template"]

_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_BLOCK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


def render_template(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    generation_prompt: bool = False,
    tools: Sequence[Any] | None = None,
    special_tokens: Mapping[str, str] | None = None,
    marked: bool = False,
) -> str:
    """Text of a conversation; `marked` writes a sign before and after each generation block. Raises DataError."""
    template = _compiled(source, marked)
    from jinja2 import TemplateError

    try:
        return str(
            template.render(
                messages=list(messages),
                tools=None if tools is None else list(tools),
                documents=None,
                add_generation_prompt=generation_prompt,
                **(special_tokens or {}),
            )
        )
    except TemplateError as error:
        raise DataError(
            f"the chat template cannot render these messages: {error}",
            hint="do the roles follow the order that the template wants (user, assistant, user ...)?",
        ) from error
    except TypeError as error:
        raise DataError(
            f"the chat template cannot render these messages: {error}",
            hint="does every message have the fields that the template reads, and texts as content?",
        ) from error


def has_generation_blocks(source: str) -> bool:
    """Whether a template says itself what the assistant writes."""
    return _BLOCK.search(source) is not None


def generated_spans(marked: str, text: str) -> tuple[tuple[int, int], ...] | None:
    """Characters (start, end) of each generation block in `text`; None where the marks changed the text."""
    spans: list[tuple[int, int]] = []
    plain: list[str] = []
    length = 0
    start: int | None = None
    for piece in re.split(f"([{_OPEN}{_CLOSE}])", marked):
        if piece == _OPEN:
            start = length
        elif piece == _CLOSE:
            if start is None:
                return None
            spans.append((start, length))
            start = None
        else:
            plain.append(piece)
            length += len(piece)
    return tuple(spans) if start is None and "".join(plain) == text else None


@lru_cache(maxsize=32)
def _compiled(source: str, marked: bool) -> Any:
    """A Jinja template; raises DataError, MissingExtraError."""
    try:
        import jinja2
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise MissingExtraError("chat templates need the package jinja2", hint="pip install jinja2") from error

    class Generation(Extension):
        """`{% generation %} ... {% endgeneration %}`: what the assistant writes."""

        tags = {"generation"}  # noqa: RUF012 - jinja2 wants a plain set here

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_write"), [], [], body).set_lineno(line)

        def _write(self, caller: Any) -> str:
            return f"{_OPEN}{caller()}{_CLOSE}" if marked else caller()

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    # The same environment as in Transformers, so that a template renders the same.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.globals["raise_exception"] = raise_exception
    environment.filters["tojson"] = to_json
    if "strftime_now is defined" not in source:
        # A template that can do without the date does: training data that changes every day is never found again.
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise DataError(
            f"the chat template is not valid Jinja: {error}", hint="correct chat_template, or the tokenizer's template"
        ) from error
