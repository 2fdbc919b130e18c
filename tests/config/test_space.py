"""What a search chooses from, as points; no file is read."""

from __future__ import annotations

import itertools

import pytest

from coldpress.config.space import Dimension, Space

SPACE = Space(
    (
        Dimension("lora", "lora", ("LoRA", "QLoRA")),
        Dimension("lora[LoRA].r", "lora", (8, 16, 32), ("lora", 0)),
        Dimension("lora[LoRA].alpha", "lora", (16, 32), ("lora", 0)),
        Dimension("lora[QLoRA].quant_type", "lora", ("nf4", "fp4"), ("lora", 1)),
        Dimension("build.precision", "build", ("int4", "int8")),
    )
)


def test_the_size_is_the_number_of_points() -> None:
    assert SPACE.size == (3 * 2 + 2) * 2
    points = list(SPACE.points())
    assert len(points) == SPACE.size
    assert len({tuple(point.items()) for point in points}) == SPACE.size


def test_points_come_in_order_the_last_dimension_fastest() -> None:
    points = SPACE.points()
    assert next(points) == {"lora": 0, "lora[LoRA].r": 0, "lora[LoRA].alpha": 0, "build.precision": 0}
    assert next(points) == {"lora": 0, "lora[LoRA].r": 0, "lora[LoRA].alpha": 0, "build.precision": 1}
    assert next(points)["lora[LoRA].alpha"] == 1
    assert list(SPACE.points())[-1] == {"lora": 1, "lora[QLoRA].quant_type": 1, "build.precision": 1}


def test_a_point_has_only_the_dimensions_that_exist_in_it() -> None:
    for point in SPACE.points():
        assert ("lora[QLoRA].quant_type" in point) == (point["lora"] == 1)
        assert ("lora[LoRA].r" in point) == (point["lora"] == 0)


def test_points_are_made_as_they_are_asked_for() -> None:
    wide = Space(tuple(Dimension(f"s{i}.p", f"s{i}", tuple(range(10))) for i in range(200)))
    assert wide.size == 10**200
    assert len(list(itertools.islice(wide.points(), 25))) == 25


def test_nothing_to_choose_is_one_point() -> None:
    assert Space().size == 1
    assert list(Space().points()) == [{}]
    assert str(Space()) == "nothing"


def test_steps() -> None:
    assert SPACE.steps == ("lora", "build")
    assert SPACE.of_step("lora").size == 8
    assert SPACE.of_step("build").dimensions == SPACE.dimensions[-1:]
    assert SPACE.of_step("merge") == Space()


def test_settings_are_values_and_labels() -> None:
    point = {"lora": 1, "lora[QLoRA].quant_type": 1, "build.precision": 0}
    assert SPACE.settings(point) == {"lora": "QLoRA", "lora[QLoRA].quant_type": "fp4", "build.precision": "int4"}
    assert SPACE.settings({"lora": 0}) == {"lora": "LoRA"}, "a prefix"


@pytest.mark.parametrize(
    ("point", "says"),
    [
        ({"lora.r": 0}, "no dimension 'lora.r'"),
        ({"lora": 2}, "lora has choices 0 to 1, got 2"),
        ({"lora": -1}, "lora has choices 0 to 1, got -1"),
        ({"lora": 1, "lora[LoRA].r": 0}, "exists only where lora is 0"),
        ({"lora[QLoRA].quant_type": 0}, "exists only where lora is 1"),
    ],
)
def test_what_is_no_point(point: dict[str, int], says: str) -> None:
    with pytest.raises(ValueError, match=says.replace("[", r"\[")):
        SPACE.settings(point)


def test_it_prints_what_there_is_to_choose() -> None:
    assert str(Space(SPACE.dimensions[:2])) == "lora (2), lora[LoRA].r (3)"
