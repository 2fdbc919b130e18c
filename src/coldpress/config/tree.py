"""A config as a tree of nodes, each of which remembers where it stands in the user's file.

Dialect rules move nodes about; line, column and the path in the user's own spelling travel with them, so that a problem
found in today's form is reported at the place the user wrote it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from coldpress.errors import Problem

__all__ = ["Node", "Origin", "Scalar", "drop_comments", "from_plain", "join_path", "plain", "problem_at", "walk_lines"]

Scalar = str | int | float | bool | None
Origin = Literal["file", "override", "way", "rule"]
"""Who wrote a node: the file, a key=value of the command line, the way to such a value, a dialect rule."""


@dataclass(eq=False)
class Node:
    """A value with its place. Lines and columns count from 1; None where the value stands in no file."""

    value: dict[str, Node] | list[Node] | Scalar
    path: str = ""
    """In the user's spelling, with dots."""
    line: int | None = None
    column: int | None = None
    key_line: int | None = None
    key_column: int | None = None
    origin: Origin = "file"
    damaged: bool = False
    """A problem in here is already reported: what seems missing may just be misspelt."""

    @property
    def mapping(self) -> dict[str, Node] | None:
        return self.value if isinstance(self.value, dict) else None

    @property
    def members(self) -> dict[str, Node]:
        """The mapping, where it is known to be one."""
        assert isinstance(self.value, dict)
        return self.value

    @property
    def elements(self) -> list[Node]:
        """The list, where it is known to be one."""
        assert isinstance(self.value, list)
        return self.value

    @property
    def items(self) -> list[Node] | None:
        return self.value if isinstance(self.value, list) else None

    def get(self, *keys: str) -> Node | None:
        """The node below, key by key; None where one is absent."""
        node: Node | None = self
        for key in keys:
            node = node.mapping.get(key) if node is not None and node.mapping is not None else None
        return node

    def text(self, key: str) -> str | None:
        """The text under `key`; None where there is none or it is no text."""
        node = self.get(key)
        return node.value if node is not None and isinstance(node.value, str) else None

    def child(self, key: str, value: Any) -> Node:
        """A new node under `key`, made by a rule; it points at this node's place."""
        return from_plain(value, join_path(self.path, key), self, "rule")


def join_path(path: str, key: str | int) -> str:
    return f"{path}.{key}" if path else str(key)


def from_plain(value: Any, path: str = "", place: Node | None = None, origin: Origin = "rule") -> Node:
    """A tree of a plain value, every node at the same place."""
    content: dict[str, Node] | list[Node] | Scalar
    if isinstance(value, Mapping):
        content = {str(key): from_plain(item, join_path(path, str(key)), place, origin) for key, item in value.items()}
    elif isinstance(value, (list, tuple)):
        content = [from_plain(item, join_path(path, index), place, origin) for index, item in enumerate(value)]
    else:
        content = value
    if place is None:
        return Node(content, path, origin=origin)
    return Node(content, path, place.line, place.column, place.key_line, place.key_column, origin)


def plain(node: Node) -> Any:
    """The value without its places."""
    if isinstance(node.value, dict):
        return {key: plain(item) for key, item in node.value.items()}
    if isinstance(node.value, list):
        return [plain(item) for item in node.value]
    return node.value


def problem_at(
    node: Node, message: str, *, hint: str | None = None, at_key: bool = False, path: str | None = None
) -> Problem:
    """A problem at a node's value, or at its key. The file's name is put in when all problems are together."""
    line, column = node.line, node.column
    if at_key and node.key_line is not None:
        line, column = node.key_line, node.key_column
    file = "command line" if node.origin in ("override", "way") else ""
    return Problem(message, path=node.path if path is None else path, file=file, line=line, column=column, hint=hint)


def drop_comments(node: Node) -> None:
    """Remove keys that only carry remarks: `//...`, `_comment...`, `$comment`."""
    if isinstance(node.value, dict):
        for key in [key for key in node.value if key.startswith(("//", "_comment")) or key == "$comment"]:
            del node.value[key]
        for item in node.value.values():
            drop_comments(item)
    elif isinstance(node.value, list):
        for item in node.value:
            drop_comments(item)


def walk_lines(node: Node, path: str = "") -> Iterator[tuple[str, int]]:
    """Today's path of every node that stands in the file, with its line."""
    line = node.key_line or node.line
    if path and line is not None:
        yield path, line
    if isinstance(node.value, dict):
        for key, item in node.value.items():
            yield from walk_lines(item, join_path(path, key))
    elif isinstance(node.value, list):
        for index, item in enumerate(node.value):
            yield from walk_lines(item, join_path(path, index))
