"""From the tree in today's form to typed values; what does not fit is told in plain words, at its place.

Pydantic finds what is wrong; this module says it. Types are strict: the text "64" is no number, 1 is not true.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from coldpress.config.schema import MEMORY
from coldpress.config.secrets import looks_secret, masked
from coldpress.config.tree import Node, join_path, plain, problem_at
from coldpress.errors import Problem
from coldpress.registry import nearest

__all__ = ["Checked", "check", "field_names", "shown", "takes_list", "without_type"]

M = TypeVar("M", bound=BaseModel)
_Error = Mapping[str, Any]

_KINDS = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "a text",
    "path_type": "a path",
    "dict_type": "a mapping",
    "mapping_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "list_type": "a list",
    "tuple_type": "a list",
    "set_type": "a list",
    "frozen_set_type": "a list",
    "none_required": "null",
    "finite_number": "a finite number",
}
"""Pydantic's error type -> what the value must be."""

_PATTERNS = {
    MEMORY: "be a size such as 8GB",
    r"^[A-Za-z0-9_]+$": "have letters, digits and _ only",
    r"^[A-Za-z0-9][A-Za-z0-9_.-]*$": "have letters, digits, dots, _ and - only",
}
_MANY = 4
"""More unknown keys than this in one mapping are one problem."""

_SHOWN = 16
"""Names that a hint lists at most."""

_NESTING = ("config", "params", "engine")


@dataclass
class Checked:
    """What came out of a check: the value, or why there is none."""

    problems: list[Problem] = field(default_factory=list)
    value: Any = None


def check(model: type[M], node: Node, *, extra_names: Mapping[str, Sequence[str]] | None = None) -> Checked:
    """Validate a node as `model`. `extra_names`: older names by today's path below the node, for did-you-mean."""
    try:
        return Checked(value=model.model_validate_json(json.dumps(plain(node)), strict=True))
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=True)
    found = _Finder(model, node, extra_names or {})
    return Checked(found.problems(errors))


@dataclass
class _Finder:
    model: type[BaseModel]
    root: Node
    extra_names: Mapping[str, Sequence[str]]

    def problems(self, errors: Sequence[_Error]) -> list[Problem]:
        found: list[Problem] = []
        errors = self.without_foreign_branches(errors)
        unknown = [error for error in errors if error["type"] == "extra_forbidden"]
        found.extend(self.unknown_keys(unknown))
        groups: dict[tuple[int, str], list[_Error]] = {}
        for error in errors:
            if error["type"] != "extra_forbidden":
                node, _ = self.locate(error["loc"])
                key = str(error["loc"][-1]) if error["type"] == "missing" else ""
                groups.setdefault((id(node), key), []).append(error)
        odd = {id(self.locate(error["loc"][:-1])[0]) for error in unknown}
        branching = self.deeper_branches(groups, odd)
        for (identity, missing), group in groups.items():
            if identity in branching and not missing:
                continue
            problem = self.problem(group)
            if problem is not None:
                found.append(problem)
        return found

    def without_foreign_branches(self, errors: Sequence[_Error]) -> list[_Error]:
        """Of a union of a free mapping and a typed one (`type: ...`), a mapping without a type is the free one."""
        free: set[int] = set()
        tagged: list[tuple[_Error, Node, str]] = []
        for error in errors:
            node, tag = self.first_branch(error["loc"])
            tagged.append((error, node, tag))
            if tag.startswith("dict[") and node.get("type") is None:
                free.add(id(node))
        return [error for error, node, tag in tagged if id(node) not in free or not tag[:1].isupper()]

    def first_branch(self, loc: Sequence[int | str]) -> tuple[Node, str]:
        """The first node of a location that is a union, and the branch; no branch where there is no union."""
        for end in range(1, len(loc) + 1):
            node, rest = self.locate(loc[:end])
            if rest:
                return node, str(rest[0])
        return self.root, ""

    def deeper_branches(self, groups: Mapping[tuple[int, str], list[_Error]], odd: set[int]) -> set[int]:
        """Nodes that fit no branch of a union while one branch got further in: only the further errors are told.

        `odd`: mappings with unknown keys, which are such errors.
        """
        told: set[int] = set()
        nodes = {identity for identity, _ in groups}
        for (identity, missing), group in groups.items():
            node, rest = self.locate(group[0]["loc"])
            if missing or not rest:
                continue
            below = {id(item) for item in _descendants(node)}
            if below & (nodes | odd) or identity in odd or any(other == identity and key for other, key in groups):
                told.add(identity)
        return told

    def locate(self, loc: Sequence[int | str]) -> tuple[Node, tuple[int | str, ...]]:
        """The node that a location reaches, what of the location is no key (names of union branches, missing keys)."""
        node, rest = self.root, []
        for step in loc:
            below: Node | None = None
            if isinstance(step, int) and node.items is not None and step < len(node.items):
                below = node.items[step]
            elif isinstance(step, str) and node.mapping is not None:
                below = node.mapping.get(step)
            if below is None:
                rest.append(step)
            else:
                node = below
        return node, tuple(rest)

    def unknown_keys(self, errors: Sequence[_Error]) -> list[Problem]:
        """One problem a key; one for all where a whole mapping seems to stand in the wrong place."""
        found: list[Problem] = []
        by_parent: dict[int, list[Problem]] = {}
        for error in errors:
            parent, _ = self.locate(error["loc"][:-1])
            by_parent.setdefault(id(parent), []).append(self.unknown_key(error))
        for problems in by_parent.values():
            lost = [problem for problem in problems if not (problem.hint or "").startswith("did you mean")]
            if len(lost) <= _MANY:
                found.extend(problems)
                continue
            names = ", ".join(problem.path.rpartition(".")[2] for problem in lost)
            found.extend(problem for problem in problems if problem not in lost)
            found.append(
                dataclasses.replace(lost[0], path=lost[0].path.rpartition(".")[0], message=f"unknown keys: {names}")
            )
        return found

    def unknown_key(self, error: _Error) -> Problem:
        loc = error["loc"]
        parent, _ = self.locate(loc[:-1])
        node = parent.get(str(loc[-1])) or parent
        names = field_names(self.model, loc[:-1])
        where = ".".join(str(step) for step in loc[:-1] if not isinstance(step, int))
        known = [*names, *self.extra_names.get(where, ())]
        close = nearest(str(loc[-1]), [name for name in (*known, *_NESTING) if name != loc[-1]])
        if close is not None:
            parent.damaged = True
        there = f"known here: {', '.join(names)}" if 0 < len(names) <= _SHOWN else None
        hint = there if close is None or (close in _NESTING and node.mapping is None) else f"did you mean {close}?"
        if loc[-1] == "data_config" and "sub_types" in names:
            hint = "this metric takes no data"
        return problem_at(node, "unknown key", hint=hint, at_key=True)

    def problem(self, group: Sequence[_Error]) -> Problem | None:
        error = group[0]
        node, _ = self.locate(error["loc"])
        kind = error["type"]
        if kind == "missing":
            key = str(error["loc"][-1])
            if node.damaged:
                return None
            path = join_path(node.path, key)
            return problem_at(node, f"the key {key} is missing", path=path, at_key=True)
        value = shown(node)
        if kind == "literal_error" or kind == "enum":
            return self.not_one_of(group, node)
        if kind == "union_tag_not_found":
            return None if node.damaged else without_type(node)
        if kind == "value_error":
            return problem_at(node, str(error["ctx"]["error"]))
        if kind == "too_short" and len(node.items or ()) >= error["ctx"]["min_length"]:
            return None  # its elements are wrong, and told
        bound = _bound(error)
        if bound is not None:
            return problem_at(node, f"must {bound}" + ("" if bound == "not be empty" else f", got {value}"))
        if kind == "string_pattern_mismatch":
            words = _PATTERNS.get(error["ctx"]["pattern"], f"match {error['ctx']['pattern']}")
            return problem_at(node, f"must {words}, got {value}")
        return self.wrong_type(group, node)

    def not_one_of(self, group: Sequence[_Error], node: Node) -> Problem:
        """No member of a choice; where other branches take a text, they are told as well."""
        choices = [choice for error in group for choice in _choices(error)]
        value = shown(node)
        close = nearest(str(node.value), choices) if isinstance(node.value, str) else None
        others = [_KINDS[error["type"]] for error in group if error["type"] in _KINDS]
        allowed = choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
        must = " or ".join([*dict.fromkeys(others), allowed])
        return problem_at(node, f"must be {must}, got {value}", hint=f"did you mean {close}?" if close else None)

    def wrong_type(self, group: Sequence[_Error], node: Node) -> Problem:
        kinds = list(dict.fromkeys(_KINDS[error["type"]] for error in group if error["type"] in _KINDS))
        if not kinds:
            return problem_at(node, f"{group[0]['msg'][:1].lower()}{group[0]['msg'][1:]}, got {shown(node)}")
        if any(error["type"] in ("literal_error", "enum") for error in group):
            return self.not_one_of(group, node)
        message = f"must be {' or '.join(kinds)}, got {shown(node)}"
        return problem_at(node, message, hint=_type_hint(kinds, node))


def _type_hint(kinds: Sequence[str], node: Node) -> str | None:
    if isinstance(node.value, str):
        text = node.value.strip().lower()
        if "true or false" in kinds and text in ("true", "false", "yes", "no", "on", "off"):
            return f"write {'true' if text in ('true', 'yes', 'on') else 'false'} without quotes"
        if kinds[0].endswith("number"):
            try:
                float(text)
            except ValueError:
                return None
            return "without quotes"
    return None


def _bound(error: _Error) -> str | None:
    context = error.get("ctx", {})
    words = {
        "greater_than": ("be more than", "gt"),
        "greater_than_equal": ("be at least", "ge"),
        "less_than": ("be less than", "lt"),
        "less_than_equal": ("be at most", "le"),
        "multiple_of": ("be a multiple of", "multiple_of"),
    }
    if error["type"] in words:
        text, key = words[error["type"]]
        return f"{text} {context[key]:g}"
    if error["type"] in ("too_short", "string_too_short") and context["min_length"] == 1:
        return "not be empty"
    if error["type"] in ("too_short", "string_too_short"):
        return f"have at least {context['min_length']}"
    if error["type"] in ("too_long", "string_too_long"):
        return f"have at most {context['max_length']}"
    return None


def _choices(error: _Error) -> list[str]:
    """The members of a Literal, out of pydantic's text `'a', 'b' or 'c'`."""
    expected = str(error.get("ctx", {}).get("expected", ""))
    if error["type"] not in ("literal_error", "enum"):
        return []
    parts = [part.strip().strip("'\"") for part in expected.replace(" or ", ", ").split(", ") if part.strip()]
    return [{"True": "true", "False": "false", "None": "null"}.get(part, part) for part in parts]


def _descendants(node: Node) -> list[Node]:
    below = list(node.mapping.values()) if node.mapping is not None else (node.items or [])
    return [found for item in below for found in (item, *_descendants(item))]


def without_type(node: Node, hint: str | None = None) -> Problem:
    """Nothing is known about a mapping without a type: one problem, at what may be the type misspelt."""
    for key, child in (node.mapping or {}).items():
        if nearest(key, ["type"]):
            return problem_at(child, "unknown key", hint="did you mean type?", at_key=True)
    return problem_at(node, "the key type is missing", path=join_path(node.path, "type"), hint=hint, at_key=True)


def shown(node: Node, limit: int = 60) -> str:
    """A value for a message: short, and never a secret."""
    if node.mapping is not None:
        return "a mapping"
    if node.items is not None:
        return "a list"
    if node.value is None:
        return "null"
    if isinstance(node.value, bool):
        return str(node.value).lower()
    if isinstance(node.value, str):
        text = node.value
        if looks_secret(node.path.rpartition(".")[2], text):
            return masked(text)
        return repr(text if len(text) <= limit else text[: limit - 3] + "...")
    return repr(node.value)


def field_names(model: type[BaseModel], loc: Sequence[int | str]) -> list[str]:
    """The keys that are known at a location inside a model."""
    kinds: list[Any] = [model]
    for step in loc:
        kinds = _below(kinds, step) or _tagged(kinds, step) or kinds
    return list(dict.fromkeys(name for kind in _branches(kinds) if _is_model(kind) for name in kind.model_fields))


def _tagged(kinds: Sequence[Any], tag: int | str) -> list[Any]:
    """Of a union whose branches have a `type`, the one that a location names by it."""
    branches = [kind for kind in _branches(kinds) if _is_model(kind) and "type" in kind.model_fields]
    return [kind for kind in branches if tag in typing.get_args(kind.model_fields["type"].annotation)]


def takes_list(model: type[BaseModel], key: str) -> bool:
    """Whether a field may hold a list; true for a key that the model does not know."""
    if key not in model.model_fields:
        return True
    kinds = _branches([model.model_fields[key].annotation])
    return any(kind is Any or (typing.get_origin(kind) or kind) in (list, tuple, set, frozenset) for kind in kinds)


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _branches(kinds: Sequence[Any]) -> list[Any]:
    """Unions and annotations taken apart."""
    found: list[Any] = []
    for kind in kinds:
        origin = typing.get_origin(kind)
        if origin is typing.Annotated:
            found.extend(_branches([typing.get_args(kind)[0]]))
        elif origin in (typing.Union, types.UnionType):
            found.extend(_branches(typing.get_args(kind)))
        else:
            found.append(kind)
    return found


def _below(kinds: Sequence[Any], step: int | str) -> list[Any]:
    found: list[Any] = []
    for kind in _branches(kinds):
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if _is_model(kind):
            if step in kind.model_fields:
                found.append(kind.model_fields[step].annotation)
        elif origin in (tuple, list) and isinstance(step, int):
            found.append(arguments[0])
        elif len(arguments) == 2 and isinstance(step, str) and origin not in (tuple, list):
            found.append(arguments[1])
    return found
