from __future__ import annotations

import json
from pathlib import Path

import pytest

from coldpress.config.json_text import parse_json
from coldpress.config.tree import plain, walk_lines
from coldpress.config.yaml_text import parse_yaml
from coldpress.errors import ConfigError, Problem


def refused(text: str) -> Problem:
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text)
    return caught.value.problems[0]


def test_json_is_yaml_with_the_same_places(seed_file: Path) -> None:
    text = seed_file.read_text()
    from_yaml, _ = parse_yaml(text)
    from_json, _ = parse_json(text)
    assert plain(from_yaml) == json.loads(text)
    assert list(walk_lines(from_yaml)) == list(walk_lines(from_json))


def test_scalars_are_yaml_1_2() -> None:
    text = "a: 1e-4\nb: no\nc: on\nd: true\ne: 0x1f\nf: 012\ng: 2024-01-01\nh: ~\ni: .5\nj: 'x'\nk: null\nl: False\n"
    text += "m: 1_000\n"
    assert plain(parse_yaml(text)[0]) == {
        "a": 1e-4, "b": "no", "c": "on", "d": True, "e": 31, "f": 12, "g": "2024-01-01", "h": None, "i": 0.5,
        "j": "x", "k": None, "l": False, "m": 1000,
    }  # fmt: skip


def test_anchors_aliases_and_merges_keep_the_line_of_what_they_name() -> None:
    text = "base: &b\n  x: 1\n  y: 2\nuse:\n  <<: *b\n  y: 3\nagain: *b\nlist:\n- <<: [{x: 7}, {x: 8, z: 9}]\n"
    root, problems = parse_yaml(text)
    assert plain(root) == {
        "base": {"x": 1, "y": 2},
        "use": {"x": 1, "y": 3},
        "again": {"x": 1, "y": 2},
        "list": [{"x": 7, "z": 9}],
    }
    assert problems == []
    merged = root.get("use", "x")
    assert merged is not None
    assert merged.key_line == 2


def test_unicode_keys_and_values() -> None:
    assert plain(parse_yaml("größe: 'Überraschung 😀'\n")[0]) == {"größe": "Überraschung 😀"}


def test_repeated_key_tells_both_lines() -> None:
    _, problems = parse_yaml("a: 1\nb: 2\na: 3\n")
    assert [(p.path, p.line) for p in problems] == [("a", 3)]
    assert "first on line 1" in problems[0].message


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("a: 1\nb: [1, 2\n", 3, "expected"),
        ("a:\n\t- b\n", 2, "cannot start any token"),
        ("a: 1\n b: 2\n", 2, ""),
        ("a: !!python/object:os.system x\n", 1, "tag"),
        ("a: 1\nb: !secret x\n", 2, "tag"),
        ("a: &a [*a]\n", 1, "too deeply"),
        ("a: 1\n---\nb: 2\n", 2, "another document"),
        ("a: .inf\n", 1, "not a number"),
        ("a: .nan\n", 1, "not a number"),
        ("? [a, b]\n: 1\n", 1, "a key must be a text"),
        ("a: 1\n<<: 3\n", 2, "takes a mapping"),
        ("a: *b\n", 1, "undefined alias"),
    ],
)
def test_syntax_errors_name_the_line(text: str, line: int, what: str) -> None:
    problem = refused(text)
    assert problem.line == line
    assert what in problem.message


def test_an_alias_bomb_is_refused() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    assert "more than 100000 values" in refused("\n".join(lines)).message


def test_control_characters_are_refused() -> None:
    assert "not valid YAML" in refused("a: \x00").message
