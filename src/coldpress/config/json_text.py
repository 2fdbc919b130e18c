"""JSON with places: the standard decoder forgets where a value stood and lets repeated keys pass."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field

from coldpress.config.tree import Node, Scalar, join_path
from coldpress.errors import ConfigError, Problem

__all__ = ["MAX_DEPTH", "MAX_DIGITS", "line_text", "parse_json"]

MAX_DEPTH = 64
MAX_DIGITS = 300

_SPACE = re.compile(r"[ \t\n\r]*")
_STRING = re.compile(r'"(?:[^"\\\x00-\x1f]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*"')
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_WORD = re.compile(r"[A-Za-z_]+")
_WORDS: dict[str, Scalar] = {"true": True, "false": False, "null": None}
_WORD_HINTS = {"True": "true", "False": "false", "None": "null", "TRUE": "true", "FALSE": "false", "NULL": "null"}


def parse_json(text: str) -> tuple[Node, list[Problem]]:
    """The tree of a JSON text and its repeated keys. Raises ConfigError at the first error of syntax."""
    reader = _Reader(text)
    reader.skip_space()
    root = reader.value("", None, 0)
    reader.skip_space()
    if reader.at < len(text):
        raise reader.error("there is more text after the end of the value")
    return root, reader.problems


def line_text(text: str, line: int, limit: int = 100) -> str:
    """One line of a text, trimmed, for a message."""
    lines = text.split("\n")
    shown = lines[line - 1].strip() if 0 < line <= len(lines) else ""
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."


@dataclass
class _Reader:
    text: str
    at: int = 0
    problems: list[Problem] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.starts = [0, *(match.end() for match in re.finditer("\n", self.text))]
        self.line_index = 0

    def place(self, at: int) -> tuple[int, int]:
        while self.line_index > 0 and self.starts[self.line_index] > at:
            self.line_index -= 1
        while self.line_index + 1 < len(self.starts) and self.starts[self.line_index + 1] <= at:
            self.line_index += 1
        return self.line_index + 1, at - self.starts[self.line_index] + 1

    def error(self, message: str, at: int | None = None, hint: str | None = None) -> ConfigError:
        line, column = self.place(self.at if at is None else at)
        shown = line_text(self.text, line)
        message = f"not valid JSON, column {column}: {message}" + (f": {shown}" if shown else "")
        return ConfigError([Problem(message, line=line, column=column, hint=hint)])

    def skip_space(self) -> None:
        match = _SPACE.match(self.text, self.at)
        assert match is not None
        self.at = match.end()
        if self.text.startswith(("//", "/*", "#"), self.at):
            raise self.error(
                "JSON has no comments", hint='write the remark as a key that begins with "//", or use YAML'
            )

    def value(self, path: str, key: tuple[int, int] | None, depth: int) -> Node:
        if depth > MAX_DEPTH:
            raise self.error(f"nested deeper than {MAX_DEPTH} levels")
        line, column = self.place(self.at)
        node = Node(None, path, line, column, *(key or (None, None)))
        first = self.text[self.at : self.at + 1]
        if first == "{":
            node.value = self.members(path, depth)
        elif first == "[":
            node.value = self.elements(path, depth)
        else:
            node.value = self.scalar(first)
        return node

    def members(self, path: str, depth: int) -> dict[str, Node]:
        found: dict[str, Node] = {}
        opened = self.at
        self.at += 1
        self.skip_space()
        if self.take("}"):
            return found
        while True:
            key_at = self.at
            if self.text[self.at : self.at + 1] != '"':
                raise self.error("expected a key in double quotes", hint=self.key_hint())
            key = self.string()
            place = self.place(key_at)
            self.skip_space()
            if not self.take(":"):
                raise self.error(f"expected a colon after the key {json.dumps(key)}")
            self.skip_space()
            node = self.value(join_path(path, key), place, depth + 1)
            if key in found:
                first = found[key].key_line
                message = f"this key stands twice in the same mapping, first on line {first}"
                self.problems.append(Problem(message, path=node.path, line=place[0], column=place[1]))
            found[key] = node
            self.skip_space()
            if self.take("}"):
                return found
            self.next_member("}", opened)

    def elements(self, path: str, depth: int) -> list[Node]:
        found: list[Node] = []
        opened = self.at
        self.at += 1
        self.skip_space()
        if self.take("]"):
            return found
        while True:
            found.append(self.value(join_path(path, len(found)), None, depth + 1))
            self.skip_space()
            if self.take("]"):
                return found
            self.next_member("]", opened)

    def next_member(self, closing: str, opened: int) -> None:
        comma = self.at
        if not self.take(","):
            line, _ = self.place(opened)
            if self.at >= len(self.text):
                raise self.error(f"the text ends before the {closing} of what opens on line {line}")
            raise self.error(f"expected a comma or {closing}")
        self.skip_space()
        if self.text.startswith(closing, self.at):
            raise self.error(f"a comma with nothing after it before {closing}", at=comma)

    def take(self, character: str) -> bool:
        if self.text.startswith(character, self.at):
            self.at += 1
            return True
        return False

    def key_hint(self) -> str | None:
        return "JSON writes text in double quotes" if self.text.startswith("'", self.at) else None

    def string(self) -> str:
        match = _STRING.match(self.text, self.at)
        if match is None:
            raise self.bad_string()
        value = str(json.loads(match.group()))
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise self.error("half of a surrogate pair is not a character")
        self.at = match.end()
        return value

    def bad_string(self) -> ConfigError:
        """Why no string begins here: a raw line end or control character, a wrong escape, or no closing quote."""
        match = re.compile(r'"(?:[^"\\\x00-\x1f]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*').match(self.text, self.at)
        stop = match.end() if match else self.at
        rest = self.text[stop : stop + 2]
        if rest[:1] == "\\":
            return self.error(f"{json.dumps(rest)} is not an escape of JSON", at=stop, hint="write a backslash as \\\\")
        if rest[:1] in ("\n", "\r", ""):
            return self.error("the text has no closing quote on its line")
        return self.error("a control character in a text", at=stop, hint="write a tab as \\t and a line end as \\n")

    def scalar(self, first: str) -> Scalar:
        if first == '"':
            return self.string()
        match = _NUMBER.match(self.text, self.at)
        if match is not None:
            return self.number(match)
        match = _WORD.match(self.text, self.at)
        word = match.group() if match else ""
        if word in _WORDS:
            self.at += len(word)
            return _WORDS[word]
        if word in _WORD_HINTS:
            raise self.error(f"{word} is not JSON", hint=f"write {_WORD_HINTS[word]}")
        if not first:
            raise self.error("the text ends where a value is expected")
        raise self.error("expected a value", hint=self.key_hint())

    def number(self, match: re.Match[str]) -> int | float:
        text = match.group()
        if len(text) > MAX_DIGITS:
            raise self.error(f"a number of more than {MAX_DIGITS} characters")
        following = self.text[match.end() : match.end() + 1]
        if following.isalnum() or following in ("_", "."):
            raise self.error(f"{text}{following}... is not a number")
        value = float(text) if any(mark in text for mark in ".eE") else int(text)
        if isinstance(value, float) and math.isinf(value):
            raise self.error(f"{text} is too large for a number")
        self.at = match.end()
        return value
