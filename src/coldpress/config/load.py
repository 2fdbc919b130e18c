"""Text to typed values: read, apply overrides, translate the dialect, check everything, report all of it at once."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from pydantic import BaseModel

from coldpress.config.check import check
from coldpress.config.dialects import legacy_names, translate
from coldpress.config.document import in_schema_order
from coldpress.config.json_text import parse_json
from coldpress.config.meaning import check_meaning
from coldpress.config.overrides import apply_overrides
from coldpress.config.pass_entries import PassEntries
from coldpress.config.pass_tree import pass_nodes
from coldpress.config.rewriting import Rewrite, Rewriting
from coldpress.config.rules_passes import DEFAULT, SEARCHABLE
from coldpress.config.schema import Workflow
from coldpress.config.search_meaning import check_objectives
from coldpress.config.searching import find_steps, space_of
from coldpress.config.secrets import find_placeholders, find_secrets
from coldpress.config.space import Point, Space
from coldpress.config.tree import Node, drop_comments, from_plain, plain, problem_at, walk_lines
from coldpress.errors import ConfigError, Problem
from coldpress.registry import nearest

__all__ = ["LoadedConfig", "load_config", "load_evaluator", "read_document"]

_ORDER = tuple(Workflow.model_fields)
_NAME = re.compile(r"^[A-Za-z0-9_]+$")


@dataclass(frozen=True)
class LoadedConfig:
    """A config that was read without an error."""

    workflow: Workflow
    path: Path | None
    """The file; None when the config came as a mapping."""
    dialect: str
    """`today`, or the Olive version whose language the file speaks: 0.6, 0.7, 0.8, 0.9."""
    rewrites: tuple[Rewrite, ...]
    """Every dialect rule that fired."""
    warnings: tuple[Problem, ...]
    """What was dropped although the user may have counted on it."""
    placeholders: tuple[Problem, ...]
    """Values that a template left to be filled in."""
    lines: Mapping[str, int]
    """Today's path -> line in the file."""
    document: Mapping[str, Any]
    """The config in today's language, flat: what `migrate` writes."""
    space: Space | None = None
    """What is searched; None without a search."""
    _entries: PassEntries | None = field(default=None, repr=False, compare=False)
    _passes: Mapping[str, type[BaseModel]] = field(default_factory=dict, repr=False, compare=False)

    def at(self, point: Point) -> LoadedConfig:
        """The same workflow with the settings of a point, without a search.

        A point of the first steps only takes the first choice of the others. Raises ConfigError for settings that do
        not go together, and ValueError for what is no point of the space.
        """
        if self.space is None or self._entries is None:
            raise ValueError("this workflow has no search, so there is no point in it")
        self.space.check(point)
        try:
            entries, passes = self._entries.at(point)
        except ConfigError as error:
            raise ConfigError(_in_order(error.problems, "" if self.path is None else str(self.path))) from None
        document = {**self.document, "search_strategy": False}
        if "passes" in document:
            document["passes"] = in_schema_order({"passes": plain(passes)}, self._passes)["passes"]
        lines = {path: line for path, line in self.lines.items() if not path.startswith("passes.")}
        return dataclasses.replace(
            self,
            workflow=self.workflow.model_copy(update={"passes": entries, "search_strategy": False}),
            lines={**lines, **dict(walk_lines(passes, "passes"))},
            document=document,
            space=None,
        )

    def line_of(self, path: str) -> int | None:
        """Line of a path in today's form, or of what is nearest above it. Elements go by number or by name."""
        keys = path.split(".")
        data = self.document.get("data_configs")
        if keys[0] == "data_configs" and len(keys) > 1 and isinstance(data, (list, tuple)):
            names = [item.get("name") for item in data]
            if keys[1] in names:
                keys[1] = str(names.index(keys[1]))
        for end in range(len(keys), 0, -1):
            line = self.lines.get(".".join(keys[:end]))
            if line is not None:
                return line
        return None


def load_config(
    source: Path | str | Mapping[str, Any], overrides: Sequence[str] = (), *, passes: Mapping[str, type[BaseModel]]
) -> LoadedConfig:
    """Read a config file or mapping. Raises ConfigError with every problem in it.

    `passes` maps the name of each pass to the type of its parameters.
    """
    path = None if isinstance(source, Mapping) else Path(source)
    try:
        root, problems = _from_mapping(source) if isinstance(source, Mapping) else _read(Path(source))
        return _load(root, problems, path, overrides, passes)
    except ConfigError as error:
        file = "" if path is None else str(path)
        raise ConfigError(_in_order(error.problems, file)) from error.__cause__


def load_evaluator(path: Path, rest: Mapping[str, Any]) -> LoadedConfig:
    """A file that is one evaluator, called `eval`, in a workflow of the rest; both may have data configs.

    Raises ConfigError, with places in the file as the user wrote it.
    """
    try:
        root, problems = _read(path)
        whole, _ = _from_mapping({**rest, "evaluator": "eval"})
        data = None if root.mapping is None else root.mapping.pop("data_configs", None)
        if data is not None:
            more = whole.members.get("data_configs")
            if more is not None and data.items is not None:
                data.items.extend(more.elements)
            whole.members["data_configs"] = data
        whole.members["evaluators"] = Node({"eval": root}, "", root.line)
        return _load(whole, problems, path, (), {})
    except ConfigError as error:
        raise ConfigError(_in_order(error.problems, str(path))) from error.__cause__


def _load(
    root: Node,
    problems: Sequence[Problem],
    path: Path | None,
    overrides: Sequence[str],
    passes: Mapping[str, type[BaseModel]],
) -> LoadedConfig:
    if root.mapping is None:
        raise ConfigError([Problem("a config must be a mapping of keys to values", line=root.line)])
    problems = [*problems, *apply_overrides(root, overrides)]
    drop_comments(root)
    problems += find_secrets(root)
    rw = translate(root, passes)
    steps = find_steps(rw)
    problems += rw.problems
    entries = PassEntries(root, steps, passes)
    checked = _Sections(rw, entries)
    workflow = checked.workflow()
    problems += checked.problems
    if problems or workflow is None:
        raise ConfigError(problems)
    file = "" if path is None else str(path)
    return LoadedConfig(
        workflow=workflow,
        path=path,
        dialect=rw.dialect,
        rewrites=tuple(rw.rewrites),
        warnings=_in_order(rw.warnings, file),
        placeholders=_in_order(find_placeholders(root), file),
        lines=dict(walk_lines(root)),
        document=in_schema_order(plain(root), passes),
        space=space_of(steps) if workflow.strategy is not None else None,
        _entries=entries,
        _passes=passes,
    )


def _in_order(problems: Sequence[Problem], file: str) -> tuple[Problem, ...]:
    """In the order of the file, each once, with the file's name."""
    named = [problem if problem.file else dataclasses.replace(problem, file=file) for problem in problems]
    unique: dict[object, Problem] = {}
    for item in named:  # an anchor and its aliases stand at one place
        unique.setdefault((item.file, item.line or item.path, item.column, item.message), item)
    return tuple(sorted(unique.values(), key=lambda item: (item.line is None, item.line or 0, item.column or 0)))


def read_document(path: Path) -> dict[str, Any]:
    """A JSON or YAML file as it stands, without any rule; raises ConfigError."""
    try:
        root, problems = _read(path)
        if root.mapping is None:
            raise ConfigError([Problem("must be a mapping of keys to values", line=root.line)])
        if problems:
            raise ConfigError(problems)
    except ConfigError as error:
        raise ConfigError(_in_order(error.problems, str(path))) from error.__cause__
    document: dict[str, Any] = plain(root)
    return document


def _read(path: Path) -> tuple[Node, list[Problem]]:
    try:
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise ConfigError([Problem("there is no such file", hint=_similar_file(path))]) from error
    except IsADirectoryError as error:
        raise ConfigError([Problem("is a folder, not a file", hint=_similar_file(path / "x"))]) from error
    except OSError as error:
        raise ConfigError([Problem(f"cannot be read: {error.strerror or error}")]) from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        message = "not UTF-8 text" + (": it looks like UTF-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "")
        raise ConfigError([Problem(message, line=line, hint="save the file as UTF-8")]) from error
    if not text.strip():
        raise ConfigError([Problem("the file is empty")])
    if _is_json(path, text):
        return parse_json(text)
    from coldpress.config.yaml_text import parse_yaml

    return parse_yaml(text)


def _from_mapping(source: Mapping[str, Any]) -> tuple[Node, list[Problem]]:
    """A tree of Python values, as far as they could stand in a file."""
    try:
        text = json.dumps(source, default=_as_text, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError([Problem(f"this mapping could not be written as JSON: {error}")]) from error
    return from_plain(json.loads(text), origin="file"), []


def _as_text(value: Any) -> str:
    if isinstance(value, PurePath):
        return str(value)
    raise TypeError(f"{type(value).__name__} is no text, number, list or mapping")


def _is_json(path: Path, text: str) -> bool:
    suffix = path.suffix.lower()
    if suffix in (".yaml", ".yml"):
        return False
    return suffix == ".json" or text.lstrip()[:1] in ("{", "[")


def _similar_file(path: Path) -> str | None:
    try:
        names = sorted(item.name for item in path.parent.iterdir() if item.suffix in (".json", ".yaml", ".yml"))
    except OSError:
        return f"there is no folder {path.parent} either"
    close = nearest(path.name, names)
    if close:
        return f"did you mean {path.parent / close}?"
    return f"configs there: {', '.join(names[:8])}" if names else None


class _Sections:
    """The tree in today's form, checked part by part."""

    def __init__(self, rw: Rewriting, entries: PassEntries) -> None:
        self.rw = rw
        self.root = rw.root
        self.entries = entries
        self.problems: list[Problem] = []
        self.dangling: dict[tuple[str, str], list[Node]] = {}
        self.known: dict[str, set[str]] = {}

    def workflow(self) -> Workflow | None:
        """The typed workflow; None when there are problems."""
        if self.root.get("input_model") is None and not self.root.damaged:
            self.root.damaged = self.has_typo("input_model")
        rest = Node(dict(self.root.mapping or {}), "", self.root.line, damaged=self.root.damaged)
        passes = rest.members.pop("passes", None)
        checked = check(Workflow, rest, extra_names=_legacy())
        self.problems += checked.problems
        if passes is not None and passes.value is not None and passes.mapping is None:
            self.problems.append(problem_at(passes, "must be a mapping of names to passes"))
        self.problems += self.entries.problems()
        self.references()
        self.report_dangling()
        self.problems += check_meaning(self.root)
        if not self.has_typo("evaluator") and not self.has_typo("evaluators"):
            self.problems += check_objectives(self.root)
        if self.problems or checked.value is None:
            return None
        workflow: Workflow = checked.value
        return workflow.model_copy(update={"passes": self.entries.at({})[0]})

    def has_typo(self, name: str) -> bool:
        """Whether some unknown key at the top may be this one misspelt."""
        return any(key not in _ORDER and nearest(key, _ORDER) == name for key in self.root.mapping or {})

    def references(self) -> None:
        """Names of systems, evaluators and data configs that exist nowhere."""
        systems = self.names("systems")
        evaluators = self.names("evaluators")
        data = self.data_names()
        for parent in (self.root, *self.pass_nodes()):
            for key in ("host", "target") if parent is self.root else ("host",):
                self.refers(parent.get(key), systems, "system", "systems")
            self.refers(parent.get("evaluator"), evaluators, "evaluator", "evaluators")
            for key, item in (parent.mapping or {}).items():
                if key.endswith("data_config"):
                    for one in item.items or [item]:
                        self.refers(one, data, "data config", "data_configs")
            self.refers(parent.get("parity", "data_config"), data, "data config", "data_configs")
        for evaluator in self.mapping("evaluators").values():
            metrics = evaluator.get("metrics")
            for metric in (metrics.items if metrics else None) or []:
                self.refers(metric.get("data_config"), data, "data config", "data_configs")

    def pass_nodes(self) -> list[Node]:
        return [node for _, node in pass_nodes(self.root) if node.text("type") in self.rw.passes]

    def mapping(self, key: str) -> Mapping[str, Node]:
        node = self.root.get(key)
        return node.mapping if node is not None and node.mapping is not None else {}

    def names(self, section: str) -> set[str] | None:
        """What a section defines; None where its definitions could not be read."""
        node = self.root.get(section)
        if self.has_typo(section) or (node is not None and node.mapping is None):
            return None
        return set(node.mapping) if node is not None and node.mapping is not None else set()

    def data_names(self) -> set[str] | None:
        node = self.root.get("data_configs")
        if node is None:
            return None if self.has_typo("data_configs") else set()
        if node.items is None or not all(_NAME.match(item.text("name") or "") for item in node.items):
            return None
        names: set[str] = set()
        for item in node.items:
            name = item.text("name") or ""
            if name in names:
                where = item.get("name") or item
                self.problems.append(problem_at(where, f"two data configs are called {name!r}"))
            names.add(name)
        return names

    def refers(self, node: Node | None, known: set[str] | None, what: str, section: str) -> None:
        if node is None or known is None or not isinstance(node.value, str) or node.value in known:
            return
        if node.value in (DEFAULT, SEARCHABLE):
            return
        lost = f"data:{node.value}" if section == "data_configs" else node.value
        if lost in self.rw.lost:
            return
        self.dangling.setdefault((what, node.value), []).append(node)
        if len(self.dangling[what, node.value]) == 1:
            self.known[what] = known

    def report_dangling(self) -> None:
        """One problem for each name that exists nowhere, however often it is used."""
        for (what, name), nodes in self.dangling.items():
            known = self.known[what]
            close = nearest(name, known)
            there = f"there are: {', '.join(sorted(known))}" if known else "there are none"
            message = f"there is no {what} called {name!r}"
            if len(nodes) > 1:
                message += f" (named by {', '.join(node.path for node in nodes[1:])} as well)"
            self.problems.append(problem_at(nodes[0], message, hint=f"did you mean {close}?" if close else there))


def _legacy() -> dict[str, list[str]]:
    """Older names by where they stand in today's form, list indices left out."""
    levels = {
        "": "workflow",
        "input_model": "model",
        "input_model.load_kwargs": "load_kwargs",
        "data_configs": "data_config",
        "data_configs.load_dataset_config": "load_dataset",
        "data_configs.pre_process_data_config": "pre_process",
    }
    return {path: sorted(legacy_names(level)) for path, level in levels.items()}
