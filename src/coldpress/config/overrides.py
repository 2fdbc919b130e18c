"""`key.path=value` from the command line, put into the tree in the spelling the user chose."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from coldpress.config.tree import Node, from_plain, join_path
from coldpress.errors import Problem
from coldpress.registry import nearest

__all__ = ["apply_overrides"]


def apply_overrides(root: Node, overrides: Sequence[str]) -> list[Problem]:
    """Set each value; what cannot be set is a problem. Keys that do not exist are checked with the rest of the file."""
    problems = []
    for text in overrides:
        path, equals, raw = text.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            problem = Problem(f"{text!r} is not of the form key.path=value", file="command line")
            problems.append(problem)
            continue
        problem_or_none = _set(root, keys, _parse(raw))
        if problem_or_none is not None:
            problems.append(problem_or_none)
    return problems


def _parse(raw: str) -> Any:
    """JSON where it is JSON, else the text itself."""
    try:
        value = json.loads(raw, parse_constant=lambda word: word)
    except (ValueError, RecursionError):
        return raw
    return raw if isinstance(value, float) and not math.isfinite(value) else value


def _set(root: Node, keys: Sequence[str], value: Any) -> Problem | None:
    node, path = root, ""
    for number, key in enumerate(keys):
        last = number == len(keys) - 1
        path = join_path(path, key)
        if node.items is not None:
            index = _index(node.items, key)
            if index is None:
                return _no_element(node.items, key, path)
            if last:
                node.items[index] = from_plain(value, path, None, "override")
            else:
                node = node.items[index]
            continue
        if node.mapping is None and node.value is not None:
            above = ".".join(keys[:number])
            return Problem(f"{above} is a single value: there is nothing below it", path=path, file="command line")
        if node.mapping is None:
            node.value = {}
            node.origin = "way"
        if last:
            node.members[key] = from_plain(value, path, None, "override")
        else:
            node = node.members.setdefault(key, from_plain({}, path, None, "way"))
    return None


def _index(items: Sequence[Node], key: str) -> int | None:
    """A position, or the element whose `name` it is."""
    for index, item in enumerate(items):
        if item.text("name") == key:
            return index
    try:
        index = int(key)
    except ValueError:
        return None
    return index if 0 <= index < len(items) else None


def _no_element(items: Sequence[Node], key: str, path: str) -> Problem:
    names = [name for item in items if (name := item.text("name")) is not None]
    close = nearest(key, names)
    count = f"the list has {len(items)} element{'s' if len(items) != 1 else ''}"
    hint = f"did you mean {close}?" if close else f"{count}: {', '.join(names)}" if names else count
    return Problem(f"there is no element {key!r}", path=path, file="command line", hint=hint)
