"""What dialect rules work with: the kinds of rule, and the record of what they did."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from pydantic import BaseModel

from coldpress.config.tree import Node, from_plain, join_path, problem_at
from coldpress.errors import Problem

__all__ = ["Action", "Custom", "Drop", "Refuse", "Rename", "Rewrite", "Rewriting", "Rule", "Version"]

Version = tuple[int, ...]


@dataclass(frozen=True)
class Rewrite:
    """One rule that fired."""

    rule: str
    """Name of the rule."""
    dialect: str
    """Whose language the old form is: `olive-0.6`, `transformers-4`."""
    old: str
    """Path in the user's file."""
    new: str
    """Path in today's form, or what became of the value."""
    line: int | None = None

    def __str__(self) -> str:
        return f"{self.dialect}: {self.old} -> {self.new}"


@dataclass(frozen=True)
class Rename:
    """The value is right, its name is not."""

    to: str
    """New key; with dots, inside mappings of the same level."""


@dataclass(frozen=True)
class Drop:
    """The key has no effect any more: told as a rewrite, or as a warning where the user may have counted on it."""

    why: str
    warn: bool = False


@dataclass(frozen=True)
class Refuse:
    """Nothing here does what the key asks for."""

    why: str
    hint: str | None = None


@dataclass(frozen=True)
class Custom:
    """More than a name: a function of the rewriting, the rule, the mapping's node and its path changes the mapping."""

    apply: Callable[[Rewriting, Rule, Node, str], None]


Action = Rename | Drop | Refuse | Custom


@dataclass(frozen=True)
class Rule:
    """One row of the table: in a mapping of this level, this key is old, foreign or gone."""

    level: str
    key: str
    action: Action
    until: Version | None = None
    """Last Olive version that knew the key in this place; None where the key tells nothing about the dialect."""
    when: Callable[[Node], bool] | None = None
    """Look at the value first; the rule fires only where this is true."""
    dialect: str | None = None
    """Whose language, where it is not the file's own dialect."""

    @property
    def name(self) -> str:
        return f"{self.level}.{self.key}"

    def fires(self, mapping: Node) -> bool:
        if self.key == "*":
            return True
        node = mapping.get(self.key)
        return node is not None and (self.when is None or self.when(node))


@dataclass
class Rewriting:
    """The tree while rules change it, and what they have to say."""

    root: Node
    passes: Mapping[str, type[BaseModel]]
    dialect: str = "today"
    rewrites: list[Rewrite] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)
    mixed: bool = False
    """Keys of different dialects are reported already."""
    lost: set[str] = field(default_factory=set)
    """Names of systems, data configs and evaluators that a reported problem took away: no second error for them."""

    @property
    def label(self) -> str:
        return "olive" if self.dialect == "today" else f"olive-{self.dialect}"

    def told(self, rule: str, node: Node, new: str, *, dialect: str | None = None) -> None:
        line = node.key_line or node.line
        self.rewrites.append(Rewrite(rule, dialect or self.label, node.path, new, line))

    def default(self, rule: str, parent: Node, key: str, value: object, at: str) -> None:
        """Write a dialect's default out where the file is silent."""
        if parent.mapping is None or key in parent.members:
            return
        parent.members[key] = parent.child(key, value)
        shown = value if isinstance(value, str) and value else repr(value)
        old = f"default of {join_path(parent.path, key)}"
        self.rewrites.append(Rewrite(rule, self.label, old, f"{join_path(at, key)} = {shown}", parent.line))

    def refuse(self, parent: Node, key: str, message: str, hint: str | None = None) -> None:
        """Report what stands under `key` and take it out."""
        node = parent.members.pop(key)
        parent.damaged = True
        self.problems.append(problem_at(node, message, hint=hint, at_key=True))

    def refuse_silently(self, parent: Node, key: str) -> None:
        """Take out what a reported problem has made unreadable."""
        parent.members.pop(key, None)
        parent.damaged = True

    def drop(
        self, parent: Node, key: str, why: str, *, rule: str, warn: bool = False, dialect: str | None = None
    ) -> None:
        node = parent.members.pop(key)
        if warn:
            self.warnings.append(problem_at(node, why, at_key=True))
        else:
            self.told(rule, node, f"dropped: {why}", dialect=dialect)

    def move(self, parent: Node, key: str, into: Node, new: str) -> bool:
        """Put what stands under `key` of `parent` under `new` of `into`; False where both were given and clash."""
        node = parent.members.pop(key)
        there = into.members.get(new)
        if there is None:
            into.members[new] = node
            return True
        kept = self.join(there, node)
        if kept is None and self.mixed:
            into.damaged = True
            return False
        if kept is None:
            message = f"given twice: here and as {there.path}" + (f" on line {there.line}" if there.line else "")
            self.problems.append(problem_at(node, message, hint="keep one of them", at_key=True))
            into.damaged = True
            return False
        into.members[new] = kept
        return True

    def join(self, first: Node, second: Node) -> Node | None:
        """Two nodes for one place: the command line wins over the file; None where both come from the file."""
        ranks = {"rule": 0, "file": 1, "way": 2, "override": 3}
        low, high = sorted((first, second), key=lambda node: ranks[node.origin])
        if high.origin == "way" and high.mapping is not None and low.mapping is not None:
            for key, item in high.mapping.items():
                there = low.mapping.get(key)
                joined = item if there is None else self.join(there, item)
                low.mapping[key] = item if joined is None else joined
            return low
        if ranks[low.origin] == ranks[high.origin]:
            return None
        return high

    def unfold(self, parent: Node, key: str) -> None:
        """Lift the content of a nested block (`config`, `params`, `engine`) to the level of its siblings."""
        if parent.mapping is None or key not in parent.members:
            return
        block = parent.members[key]
        if block.value is None:
            del parent.members[key]
            return
        if block.mapping is None:
            self.refuse(parent, key, "must be a mapping")
            return
        del parent.members[key]
        parent.damaged = parent.damaged or block.damaged
        for name in list(block.mapping):
            self.move(block, name, parent, name)

    def apply(self, rule: Rule, parent: Node, at: str) -> None:
        """Let a rule that fires do its work; `at` is today's path of the mapping."""
        action = rule.action
        if isinstance(action, Custom):
            action.apply(self, rule, parent, at)
        elif isinstance(action, Refuse):
            self.refuse(parent, rule.key, action.why, action.hint)
        elif isinstance(action, Drop):
            self.drop(parent, rule.key, action.why, rule=rule.name, warn=action.warn, dialect=rule.dialect)
        else:
            self.rename(rule, action.to, parent, at)

    def rename(self, rule: Rule, to: str, parent: Node, at: str) -> None:
        *way, last = to.split(".")
        into = parent
        for step in way:
            below = into.members.get(step)
            if below is None or below.mapping is None:
                below = from_plain({}, join_path(into.path, step), into, "rule")
                into.members[step] = below
            into = below
        node = parent.members[rule.key]
        if self.move(parent, rule.key, into, last):
            self.told(rule.name, node, join_path(at, to), dialect=rule.dialect)
