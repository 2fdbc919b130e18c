"""What a file searches: alternatives under one name, lists of values, SEARCHABLE_VALUES, and Olive's own candidates.

The tree keeps what the user wrote; here each step becomes its alternatives, and each of these a mapping with one value
for every parameter at every point.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from coldpress.config.candidates import Candidates, candidates_of
from coldpress.config.check import shown, takes_list
from coldpress.config.pass_tree import is_searched, steps
from coldpress.config.rewriting import Rewrite, Rewriting
from coldpress.config.rules_passes import DEFAULT, SEARCHABLE, TRAINING_PASSES
from coldpress.config.space import Dimension, Point, Space
from coldpress.config.training_args import training_arguments
from coldpress.config.tree import Node, from_plain, join_path, plain, problem_at

__all__ = ["Alternative", "Parameter", "Step", "find_steps", "space_of"]

_OWN = frozenset(("type", "host", "evaluator", "parity", "training_args"))
"""Keys of a pass that have one value in any case."""
_WORD = re.compile(r"[\w-]{1,24}")
_WAY_OUT = "write search_strategy: true, or one value"


@dataclass(frozen=True)
class Parameter:
    """One parameter of an alternative with several values."""

    dimension: Dimension
    keys: tuple[str, ...]
    """The way to it from the pass."""
    values: tuple[Node, ...]


@dataclass(frozen=True)
class Alternative:
    """One pass of a step."""

    index: int
    node: Node
    """The pass as it stands in today's form; parameters that are searched are absent."""
    parameters: tuple[Parameter, ...] = ()
    conditions: Mapping[str, tuple[str, tuple[Any, ...]]] | None = None
    """Parameters with an effect only beside some values of another one that is searched."""

    def choices(self, point: Point) -> tuple[int, ...]:
        """The index of each parameter's value; the first where the point says nothing."""
        return tuple(point.get(one.dimension.name, 0) for one in self.parameters)

    def effective(self, parameter: Parameter) -> Point:
        """A choice of another parameter beside which this one has an effect; empty where it always has one."""
        other, values = (self.conditions or {}).get(parameter.keys[0], ("", ()))
        for one in self.parameters:
            if one.keys == (other,):
                found = [index for index, choice in enumerate(one.dimension.choices) if choice in values]
                return {one.dimension.name: found[0]} if found else {}
        return {}

    def at(self, point: Point) -> Node:
        """The pass with one value for each parameter. What has no effect there is left out."""
        if self.node.mapping is None:
            return self.node
        entry = _copy(self.node)
        arguments = entry.get("training_args")
        if arguments is not None and arguments.mapping is not None:  # what the point's data and machine lack is mended
            entry.members["training_args"] = _copy(arguments)
        for one, index in zip(self.parameters, self.choices(point), strict=True):
            parent = entry
            for key in one.keys[:-1]:
                parent = parent.members.setdefault(key, parent.child(key, {}))
            parent.members[one.keys[-1]] = one.values[index]
        for name, (other, values) in (self.conditions or {}).items():
            beside = entry.get(other)
            if beside is not None and plain(beside) not in values:
                entry.members.pop(name, None)
        return entry


@dataclass(frozen=True)
class Step:
    """One step of the workflow: a pass, or alternatives."""

    name: str
    choice: Dimension | None
    """Which alternative; None where there is one."""
    alternatives: tuple[Alternative, ...]

    def alternative(self, point: Point) -> Alternative:
        return self.alternatives[0 if self.choice is None else point.get(self.choice.name, 0)]

    @property
    def dimensions(self) -> Iterator[Dimension]:
        if self.choice is not None:
            yield self.choice
        for alternative in self.alternatives:
            for parameter in alternative.parameters:
                yield parameter.dimension


def space_of(found: Sequence[Step]) -> Space:
    """Everything that there is to choose."""
    return Space(tuple(dimension for step in found for dimension in step.dimensions))


def find_steps(rw: Rewriting) -> list[Step]:
    """The steps of a tree in today's form. What is searched for no good reason is a problem of the rewriting."""
    finder = _Finder(rw)
    found = [finder.step(name, nodes) for name, nodes in steps(rw.root).items()]
    names = [dimension.name for step in found for dimension in step.dimensions]
    for step in found:
        if any(names.count(dimension.name) > 1 for dimension in step.dimensions):
            message = f"the name {step.name!r} makes two things that are searched share one name"
            rw.problems.append(problem_at(step.alternatives[0].node, message, hint="rename the step"))
    if finder.by_default:
        space = space_of(found)
        told = f"searches {', '.join(map(str, finder.by_default))}; {space.size} settings in all"
        strategy = rw.root.members["search_strategy"]
        old = "default of search_strategy.include_pass_params"
        line = strategy.key_line or strategy.line
        rw.rewrites.append(Rewrite("search.include_pass_params", "olive", old, told, line))
    return found


class _Finder:
    def __init__(self, rw: Rewriting) -> None:
        self.rw = rw
        self.on = is_searched(rw.root)
        include = rw.root.get("search_strategy", "include_pass_params")
        self.include = self.on and (include is None or include.value is not False)
        self.provider = _provider(rw.root)
        self.by_default: list[Dimension] = []

    def step(self, name: str, nodes: list[Node]) -> Step:
        kept = self.distinct(nodes, "alternative")
        entry = self.rw.root.members["passes"].members[name]
        if entry.items is not None:
            entry.value = list(kept)
        if not kept:
            self.problem(entry, "has no pass: the list is empty", "name one pass, or several alternatives")
            nothing = from_plain(None, entry.path, entry)
            nothing.damaged = True
            return Step(name, None, (Alternative(0, nothing),))
        labels = _labels(kept)
        choice = Dimension(name, name, tuple(labels)) if len(kept) > 1 else None
        alternatives = []
        for index, (node, label) in enumerate(zip(kept, labels, strict=True)):
            prefix = f"{name}[{label}]" if choice is not None else name
            of = (name, index) if choice is not None else None
            alternatives.append(self.alternative(index, node, name, prefix, of))
        return Step(name, choice, tuple(alternatives))

    def alternative(self, index: int, node: Node, step: str, prefix: str, of: tuple[str, int] | None) -> Alternative:
        """Take a pass apart: what is fixed, and what has several values."""
        kind = node.text("type") or ""
        model = self.rw.passes.get(kind)
        if node.mapping is None or model is None:
            return Alternative(index, node)
        fixed, parameters = _copy(node), []
        declared = candidates_of(model)
        places: list[tuple[tuple[str, ...], Node]] = [((key,), item) for key, item in node.mapping.items()]
        arguments = node.get("training_args") if kind in TRAINING_PASSES else None
        if arguments is not None and arguments.mapping is not None:
            fixed.members["training_args"] = _copy(arguments)
            places += [(("training_args", key), item) for key, item in arguments.mapping.items()]
        told = len(self.rw.problems)
        for keys, item in places:
            values = self.values(keys, item, model, kind, declared)
            if values is None:
                continue
            parent = fixed if len(keys) == 1 else fixed.members["training_args"]
            del parent.members[keys[-1]]
            if len(values) == 1:
                parent.members[keys[-1]] = values[0]
            elif values:
                parameters.append(_parameter(prefix, step, keys, values, of))
        fixed.damaged = fixed.damaged or len(self.rw.problems) > told
        for key, candidates in declared.items() if self.include else ():
            if self.silent(node, key, candidates, parameters):
                at_default = [node.child(key, value) for value in candidates.values]
                parameters.append(_parameter(prefix, step, tuple(key.split(".")), at_default, of))
                self.by_default.append(parameters[-1].dimension)
        order = list(model.model_fields)
        parameters.sort(key=lambda one: order.index(one.keys[0]))
        searched = {one.keys[0] for one in parameters}
        conditions = {
            key: candidates.only_with
            for key, candidates in declared.items()
            if candidates.only_with is not None and candidates.only_with[0] in searched
        }
        self.refuse_without_effect(node, parameters, conditions)
        return Alternative(index, fixed, tuple(parameters), conditions)

    def refuse_without_effect(
        self, node: Node, parameters: Sequence[Parameter], conditions: Mapping[str, tuple[str, tuple[Any, ...]]]
    ) -> None:
        """What the file gives and no setting would use."""
        for key, (other, wanted) in conditions.items():
            beside = next((one.dimension.choices for one in parameters if one.keys == (other,)), ())
            given = node.get(key)
            if given is not None and given.value != DEFAULT and not any(choice in wanted for choice in beside):
                message = f"has no effect at {other} {', '.join(map(str, beside))}, the values that are searched"
                self.problem(given, message, f"leave it out, or search {other} {', '.join(map(str, wanted))} as well")

    def silent(self, node: Node, key: str, candidates: Candidates, parameters: Sequence[Parameter]) -> bool:
        """Whether a parameter is searched by default: the file says nothing of it, and it would have an effect."""
        if not candidates.by_default or node.get(*key.split(".")) is not None:
            return False
        if any((given := node.get(name)) is not None and given.value for name in candidates.unless):
            return False
        if self.provider in candidates.not_for:
            return False
        if key == "r" and self.rw.root.get("input_model", "adapter_path") is not None:
            return False  # an adapter that is trained further has its rank
        if candidates.only_with is None:
            return True
        other, values = candidates.only_with
        beside = node.get(other)
        for parameter in parameters:
            if parameter.keys == (other,):
                return any(plain(value) in values for value in parameter.values)
        return beside is not None and plain(beside) in values

    def values(
        self,
        keys: tuple[str, ...],
        node: Node,
        model: type[BaseModel],
        kind: str,
        declared: Mapping[str, Candidates],
    ) -> list[Node] | None:
        """The values that a key asks to try; None where it has one, and what is wrong with it is told elsewhere."""
        name = ".".join(keys)
        if keys[0] in _OWN and len(keys) == 1:
            return None
        if node.value == DEFAULT:
            return []
        known = keys[-1] in (model.model_fields if len(keys) == 1 else training_arguments())
        if node.value == SEARCHABLE and known:
            return self.magic(node, name, kind, declared)
        if node.items is None or not known:
            return None
        lists = any(item.items is not None for item in node.items)
        return self.listed(node) if lists or not _holds_list(keys, model) else None

    def magic(self, node: Node, name: str, kind: str, declared: Mapping[str, Candidates]) -> list[Node]:
        """SEARCHABLE_VALUES: the pass's own candidates."""
        if not self.on:
            self.problem(node, "SEARCHABLE_VALUES asks for a search, and search_strategy is off", _WAY_OUT)
            return []
        if name not in declared:
            some = f"those of {', '.join(declared)} are known" if declared else f"{kind} has none at all"
            self.problem(node, f"there are no candidates for {name}; {some}", "list the values to try")
            return []
        return [from_plain(value, node.path, node, node.origin) for value in declared[name].values]

    def listed(self, node: Node) -> list[Node]:
        """A list of values where the parameter takes one."""
        if not self.on:
            message = "a list of values to try is a search, and search_strategy is off"
            self.problem(node, message, _WAY_OUT)
            return []
        if not node.elements:
            self.problem(node, "an empty list: there is nothing to try", "list the values to try, or leave it out")
            return []
        words = [item for item in node.elements if item.value in (DEFAULT, SEARCHABLE)]
        for item in words:
            message = f"{item.value} stands for a whole parameter, not for one of its values"
            self.problem(item, message, "list the values themselves")
        if words:
            return []
        node.value = self.distinct(node.elements, "value")
        return list(node.elements)

    def distinct(self, nodes: Sequence[Node], what: str) -> list[Node]:
        """Each once, with a warning for the others."""
        kept: dict[str, Node] = {}
        for node in nodes:
            key = json.dumps(_comparable(plain(node)), sort_keys=True)
            if key in kept:
                value = "" if node.mapping is not None or node.items is not None else f", {shown(node)}"
                message = f"the same {what} as {kept[key].path}{value}; dropped"
                self.rw.warnings.append(problem_at(node, message))
            kept.setdefault(key, node)
        return list(kept.values())

    def problem(self, node: Node, message: str, hint: str) -> None:
        self.rw.problems.append(problem_at(node, message, hint=hint, at_key=True))


def _provider(root: Node) -> str | None:
    """The execution provider of the workflow's target, as far as the file says it."""
    name = root.text("target") or root.text("host") or ""
    accelerators = root.get("systems", name, "accelerators")
    first = accelerators.items[0] if accelerators is not None and accelerators.items else None
    providers = first.get("execution_providers") if first is not None else None
    value = providers.items[0].value if providers is not None and providers.items else None
    return value if isinstance(value, str) else None


def _parameter(
    prefix: str, step: str, keys: tuple[str, ...], values: Sequence[Node], of: tuple[str, int] | None
) -> Parameter:
    choices = tuple(plain(value) for value in values)
    return Parameter(Dimension(join_path(prefix, ".".join(keys)), step, choices, of), keys, tuple(values))


def _labels(nodes: Sequence[Node]) -> list[str]:
    """The type of each; of several of a type with the value that tells them apart, else numbered from the second on."""
    kinds = [node.text("type") or "pass" for node in nodes]
    labels: list[str] = []
    for place, (kind, node) in enumerate(zip(kinds, nodes, strict=True)):
        alike = [other for other, name in zip(nodes, kinds, strict=True) if name == kind]
        told = _telling(alike) if len(alike) > 1 else None
        number = kinds[:place].count(kind) + 1
        plainly = kind if number == 1 else f"{kind} {number}"
        labels.append(plainly if told is None else f"{kind} {plain(node.members[told])}")
    return labels


def _telling(nodes: Sequence[Node]) -> str | None:
    """A key whose value is a word or a number in all of them, and another one in each."""
    for key in nodes[0].mapping or ():
        values = [value for node in nodes if (value := node.get(key)) is not None]
        texts = {str(value.value) for value in values if isinstance(value.value, str | int)}
        if key not in _OWN and len(texts) == len(nodes) and all(_WORD.fullmatch(text) for text in texts):
            return key
    return None


def _holds_list(keys: tuple[str, ...], model: type[BaseModel]) -> bool:
    if len(keys) == 1:
        return takes_list(model, keys[0])
    return "list" in training_arguments()[keys[1]].types


def _comparable(value: Any) -> Any:
    """Equal numbers alike: 1 and 1.0 train the same model."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {key: _comparable(item) for key, item in value.items()}
    return [_comparable(item) for item in value] if isinstance(value, list) else value


def _copy(node: Node) -> Node:
    """The same mapping, to be changed apart."""
    place = node.path, node.line, node.column, node.key_line, node.key_column
    return Node(dict(node.members), *place, node.origin, node.damaged)
