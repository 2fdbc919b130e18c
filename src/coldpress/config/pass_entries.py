"""Passes of the tree as typed entries, at every point of what is searched."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

from pydantic import BaseModel

from coldpress.config.check import check, without_type
from coldpress.config.defaults import has_eval_data, host_device, mend_training, training_defaults
from coldpress.config.dialects import legacy_names
from coldpress.config.rules_passes import TRAINING_PASSES, builders_of_adapters
from coldpress.config.schema import Frozen, ParityLimits, PassEntry
from coldpress.config.searching import Alternative, Parameter, Step
from coldpress.config.space import Point, Space
from coldpress.config.training_args import check_training_args
from coldpress.config.tree import Node, from_plain, plain, problem_at
from coldpress.errors import ConfigError, Problem

__all__ = ["PassEntries", "part"]

_TRIES = 64
"""Settings beside which a value is tried before it counts as wrong in itself."""


class _Shell(Frozen):
    """A pass entry but for its own parameters."""

    type: str
    host: str | None = None
    evaluator: str | None = None
    parity: ParityLimits | None = None


class PassEntries:
    """The steps of a file; each of them typed at a point, and kept for the next point that has the same settings."""

    def __init__(self, root: Node, steps: Sequence[Step], passes: Mapping[str, type[BaseModel]]) -> None:
        self._root = root
        self._steps = tuple(steps)
        self._passes = passes
        self._made: dict[tuple[str, int, tuple[int, ...], bool], PassEntry] = {}

    def at(self, point: Point) -> tuple[dict[str, PassEntry], Node]:
        """Every step at a point, typed and as a tree. Raises ConfigError for settings that do not go together."""
        chosen = {step.name: step.alternative(point) for step in self._steps}
        nodes = {name: one.at(point) for name, one in chosen.items()}
        inputs = builders_of_adapters(nodes)
        for name in inputs:
            nodes[name].members["adapter"] = nodes[name].child("adapter", "inputs")
        problems: list[Problem] = []
        entries: dict[str, PassEntry] = {}
        for name, alternative in chosen.items():
            key = (name, alternative.index, alternative.choices(point), name in inputs)
            made = self._made.get(key)
            if made is None:
                made, found = self.entry(nodes[name])
                problems += found
            if made is not None:
                entries[name] = self._made[key] = made
        if problems:
            raise ConfigError(problems)
        passes = self._root.get("passes")
        place = self._root if passes is None else passes
        return entries, part(place, nodes)

    def problems(self) -> list[Problem]:
        """What is wrong with the first settings of each alternative, and with every other value."""
        found: list[Problem] = []
        for step in self._steps:
            for alternative in step.alternatives:
                first = self.entry(alternative.at({}))[1]
                found += first
                for parameter in alternative.parameters:
                    tried = 0 if alternative.effective(parameter) else 1  # the first values are tried already
                    for index in range(tried, len(parameter.values)):
                        found += self.of_value(alternative, parameter, index, first)
        return found

    def of_value(
        self, alternative: Alternative, parameter: Parameter, index: int, first: Sequence[Problem]
    ) -> list[Problem]:
        """What is wrong with a value whatever stands beside it; with some settings only, it is told at the point."""
        chosen = {**alternative.effective(parameter), parameter.dimension.name: index}
        found = [one for one in self.entry(alternative.at(chosen))[1] if one not in first]
        if not found or first:
            return found
        others = Space(
            tuple(dataclasses.replace(one.dimension, of=None) for one in alternative.parameters if one != parameter)
        )
        for beside in itertools.islice(others.points(), 1, _TRIES):
            if not self.entry(alternative.at({**beside, **chosen}))[1]:
                return []
        return found

    def entry(self, node: Node) -> tuple[PassEntry | None, list[Problem]]:
        """One pass with one value for each parameter."""
        if node.mapping is None:
            return None, [] if node.damaged else [problem_at(node, "must be a mapping with the key type")]
        kind = node.text("type")
        if kind is None or kind not in self._passes:
            return None, [self.bad_type(node)]
        names = set(_Shell.model_fields)
        shell = part(node, {key: item for key, item in node.mapping.items() if key in names})
        own = part(node, {key: item for key, item in node.mapping.items() if key not in names})
        legacy = {"": [*sorted(names), *legacy_names(f"pass:{kind}"), *legacy_names("pass")]}
        first = check(_Shell, shell)
        problems = list(first.problems)
        if kind in TRAINING_PASSES:
            problems += self.training(kind, node, own)
        second = check(self._passes[kind], own, extra_names=legacy)
        problems += second.problems
        if first.value is None or second.value is None or problems:
            return None, problems
        shared = {key: getattr(first.value, key) for key in ("host", "evaluator", "parity")}
        return PassEntry(type=kind, config=second.value, **shared), []

    def bad_type(self, node: Node) -> Problem:
        """No type, no known keys: one error. (An unknown type has been reported already, and taken out.)"""
        given = node.get("type")
        if given is not None:
            hint = "alternatives are a list of passes, each with its type" if given.items else None
            return problem_at(given, "must be the name of a pass", hint=hint)
        return without_type(node, hint=f"passes: {', '.join(self._passes)}")

    def training(self, kind: str, node: Node, own: Node) -> list[Problem]:
        """Check the training arguments, then fill in what holds where they are silent; the document stays as it is."""
        given = node.get("training_args")
        if given is not None and given.mapping is None:
            own.members.pop("training_args")
            hint = "values to try are listed inside it, argument by argument" if given.items else None
            return [problem_at(given, "must be a mapping of training arguments", hint=hint)]
        device = host_device(self._root, node.text("host"))
        mend_training(node, device)
        values = plain(given) if given is not None else {}
        complete = {**training_defaults(kind, has_eval_data(node), device), **values}
        found = check_training_args(values, legacy_names("training_args"))
        if not found:
            found = [item for item in check_training_args(complete) if item.name in values]
        place = given or node
        problems = []
        for item in found:
            where = place.get(item.name) or place
            problems.append(problem_at(where, item.message, hint=item.hint, at_key=item.at_key))
        own.members["training_args"] = from_plain({} if found else complete, place.path, place)
        return problems


def part(node: Node, members: dict[str, Node]) -> Node:
    """A mapping in a node's place, with some members of it."""
    made = Node(members, node.path, node.line, node.column, node.key_line, node.key_column, node.origin)
    made.damaged = node.damaged
    return made
