"""YAML 1.2 with places: `on`, `no` and `yes` are texts, only `true` and `false` are not."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Any

from coldpress.config.json_text import MAX_DEPTH, MAX_DIGITS, line_text
from coldpress.config.tree import Node, Scalar, join_path
from coldpress.errors import ConfigError, Problem

__all__ = ["parse_yaml"]

MAX_NODES = 100_000
"""Aliases are copied out; a file that grows beyond this is refused."""

_TAG = "tag:yaml.org,2002:"


def parse_yaml(text: str) -> tuple[Node, list[Problem]]:
    """The tree of a YAML text and its repeated keys. Raises ConfigError at the first error of syntax."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an anchor that is set twice is right YAML
            root: Any = YAML(typ="safe", pure=True).compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark is not None else None
        column = mark.column + 1 if mark is not None else None
        shown = line_text(text, line) if line else ""
        what = " ".join(str(error.problem or error.context or "cannot be read").split())
        message = f"not valid YAML, column {column}: {what}" + (f": {shown}" if shown else "")
        hint = "YAML is indented with spaces, not tabs" if "\\t" in what else None
        raise ConfigError([Problem(message, line=line, column=column, hint=hint)]) from error
    except YAMLError as error:
        raise ConfigError([Problem(f"not valid YAML: {' '.join(str(error).split())}")]) from error
    except RecursionError as error:
        raise ConfigError([Problem(f"not valid YAML: nested deeper than {MAX_DEPTH} levels")]) from error
    except ValueError as error:
        raise ConfigError([Problem(f"not valid YAML: {error}")]) from error
    if root is None:
        return Node(None, line=1, column=1), []
    reader = _Reader(text)
    return reader.node(root, "", (None, None), 0), reader.problems


@dataclass
class _Reader:
    text: str
    count: int = 0
    problems: list[Problem] = field(default_factory=list)

    def node(self, raw: Any, path: str, key: tuple[int | None, int | None], depth: int) -> Node:
        line, column = raw.start_mark.line + 1, raw.start_mark.column + 1
        self.count += 1
        if depth > MAX_DEPTH or self.count > MAX_NODES:
            what = "nested too deeply" if depth > MAX_DEPTH else f"more than {MAX_NODES} values"
            message = f"{what}; an anchor that contains its own alias does this"
            raise ConfigError([Problem(message, path=path, line=line, column=column)])
        node = Node(None, path, line, column, *key)
        tag = str(raw.tag)
        if tag.startswith(_TAG):
            tag = tag[len(_TAG) :]
        if tag == "map":
            node.value = self.members(raw, path, depth)
        elif tag == "seq":
            node.value = [
                self.node(item, join_path(path, index), (None, None), depth + 1) for index, item in enumerate(raw.value)
            ]
        else:
            node.value = self.scalar(tag, raw.value, node)
        return node

    def members(self, raw: Any, path: str, depth: int) -> dict[str, Node]:
        found: dict[str, Node] = {}
        merged: dict[str, Node] = {}
        for raw_key, raw_value in raw.value:
            place = (raw_key.start_mark.line + 1, raw_key.start_mark.column + 1)
            if str(raw_key.tag) == _TAG + "merge":
                self.merge(raw_value, path, depth, merged, place)
                continue
            if not isinstance(raw_key.value, str):
                problem = Problem("a key must be a text", path=path, line=place[0], column=place[1])
                raise ConfigError([problem])
            key = raw_key.value
            node = self.node(raw_value, join_path(path, key), place, depth + 1)
            if key in found:
                message = f"this key stands twice in the same mapping, first on line {found[key].key_line}"
                self.problems.append(Problem(message, path=node.path, line=place[0], column=place[1]))
            found[key] = node
        return {**found, **{key: node for key, node in merged.items() if key not in found}}

    def merge(self, raw: Any, path: str, depth: int, into: dict[str, Node], place: tuple[int, int]) -> None:
        """`<<: *anchor` or a list of them; what stands first wins."""
        sources = raw.value if str(raw.tag) == _TAG + "seq" else [raw]
        for source in sources:
            if str(source.tag) != _TAG + "map":
                message = "<< takes a mapping or a list of mappings"
                raise ConfigError([Problem(message, path=path, line=place[0], column=place[1])])
            for key, node in self.members(source, path, depth + 1).items():
                into.setdefault(key, node)

    def scalar(self, tag: str, value: str, node: Node) -> Scalar:
        if tag == "null":
            return None
        if tag == "bool":
            return value.lower() == "true"
        if tag == "int":
            return self.integer(value, node)
        if tag == "float":
            return self.floating(value, node)
        if tag in ("str", "timestamp"):
            return value
        message = f"the tag !{tag.lstrip('!')} is not known here; write a plain value"
        raise ConfigError([Problem(message, path=node.path, line=node.line, column=node.column)])

    def integer(self, value: str, node: Node) -> int | str:
        digits = value.replace("_", "")
        if len(digits) > MAX_DIGITS:
            message = f"a number of more than {MAX_DIGITS} characters"
            raise ConfigError([Problem(message, path=node.path, line=node.line, column=node.column)])
        try:
            return int(digits, 0 if digits.lstrip("+-")[:2].lower() in ("0x", "0o", "0b") else 10)
        except ValueError:
            return value

    def floating(self, value: str, node: Node) -> float | str:
        try:
            number = float(value.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan"))
        except ValueError:
            return value
        if not math.isfinite(number):
            message = f"{value} is not a number that can be used here"
            raise ConfigError([Problem(message, path=node.path, line=node.line, column=node.column)])
        return number
