from __future__ import annotations

import json
from pathlib import Path

import pytest

from coldpress.config.json_text import parse_json
from coldpress.config.tree import Node, plain
from coldpress.errors import ConfigError, Problem


def refused(text: str) -> Problem:
    with pytest.raises(ConfigError) as caught:
        parse_json(text)
    (problem,) = caught.value.problems
    return problem


def test_equals_the_standard_decoder_on_the_seed(seed_file: Path) -> None:
    text = seed_file.read_text()
    root, problems = parse_json(text)
    assert plain(root) == json.loads(text)
    assert problems == []


@pytest.mark.parametrize(
    "text",
    [
        '{"a": [1, -2.5e3, true, null, "\\u00e9\\n\\ud83d\\ude00"], "b": {}, "c": []}',
        "[]",
        '"x"',
        "-0",
        "[1e-4]",
        ' {"":0} ',
    ],
)
def test_equals_the_standard_decoder(text: str) -> None:
    assert plain(parse_json(text)[0]) == json.loads(text)


def test_places_are_exact_with_tabs_and_line_ends() -> None:
    text = '{\r\n\t"a":\t{ "b" : [10,\n\n  20]},\n"c"\n:\ntrue}'
    root, _ = parse_json(text)

    def place(node: Node | None) -> tuple[int | None, int | None, int | None, int | None]:
        assert node is not None
        return node.line, node.column, node.key_line, node.key_column

    assert place(root.get("a")) == (2, 7, 2, 2)
    items = root.get("a", "b")
    assert items is not None
    assert items.items is not None
    assert place(items) == (2, 15, 2, 9)
    assert place(items.items[0]) == (2, 16, None, None)
    assert place(items.items[1]) == (4, 3, None, None)
    assert place(root.get("c")) == (7, 1, 5, 1)
    assert items.items[1].path == "a.b.1"


def test_repeated_key_tells_both_lines() -> None:
    _, problems = parse_json('{"a": 1,\n"b": {"x": 1,\n"x": 2},\n"a": 3}')
    assert [(p.path, p.line) for p in problems] == [("b.x", 3), ("a", 4)]
    assert "first on line 2" in problems[0].message
    assert "first on line 1" in problems[1].message


@pytest.mark.parametrize(
    ("text", "line", "column", "what"),
    [
        ('{\n "a": 1,\n}', 2, 8, "comma with nothing after it"),
        ('{"a": [1, 2,]}', 1, 12, "comma with nothing after it"),
        ('{\n "a": 1\n "b": 2}', 3, 2, "expected a comma or }"),
        ("{\n 'a': 1}", 2, 2, "expected a key in double quotes"),
        ('{"a" 1}', 1, 6, "expected a colon"),
        ('{"a": }', 1, 7, "expected a value"),
        ('{"a": True}', 1, 7, "True is not JSON"),
        ('{"a": NaN}', 1, 7, "expected a value"),
        ('{"a": 01}', 1, 7, "is not a number"),
        ('{"a": 1.}', 1, 7, "is not a number"),
        ('{"a": 1e999}', 1, 7, "too large"),
        ('{"a": "x\ny"}', 1, 7, "no closing quote on its line"),
        ('{"a": "x\ty"}', 1, 9, "control character"),
        ('{"a": "C:\\data"}', 1, 10, "not an escape"),
        ('{"a": "\\ud800"}', 1, 7, "surrogate"),
        ('{"a": 1', 1, 8, "ends before the }"),
        ('{"a": [1', 1, 9, "ends before the ]"),
        ('{"a":', 1, 6, "ends where a value is expected"),
        ('{"a": 1} x', 1, 10, "more text after the end"),
        ('{"a": 1, // why\n"b": 2}', 1, 10, "no comments"),
        ("{\n# why\n}", 2, 1, "no comments"),
        ('{"a": .5}', 1, 7, "expected a value"),
    ],
)
def test_syntax_errors_name_line_column_and_text(text: str, line: int, column: int, what: str) -> None:
    problem = refused(text)
    assert (problem.line, problem.column) == (line, column)
    assert what in problem.message
    assert f"column {column}" in problem.message
    shown = text.split("\n")[line - 1].strip()
    assert problem.message.endswith(shown)


def test_deep_nesting_and_long_numbers_are_refused_not_crashed() -> None:
    assert "nested deeper" in refused("[" * 100_000).message
    assert "more than 300 characters" in refused('{"a": ' + "9" * 5000 + "}").message


def test_hints_say_what_to_write() -> None:
    assert refused('{"a": False}').hint == "write false"
    assert "double quotes" in str(refused("{'a': 1}").hint)
    assert "YAML" in str(refused('{"a": 1 // b\n}').hint)
