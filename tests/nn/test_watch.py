"""What ends a training, what counts as best, and which checkpoint is gone on from."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from coldpress.errors import TrainingError
from coldpress.nn.checkpoints import last_checkpoint, resume_point
from coldpress.nn.watch import DIVERGED_STEPS, FIRST_STEPS, Evaluations, Watch, diverged_by


def watch() -> Watch:
    return Watch("t", lambda event: None, timed=False, describe=lambda row: f"text of {row}")


def test_a_diverging_loss_is_named_with_its_batch() -> None:
    seen = watch()
    for step in range(FIRST_STEPS):
        seen.add(1.0, 10, (step,))

    def diverge() -> None:
        for step in range(200):
            seen.add(9.0, 10, (100 + step, 7))

    with pytest.raises(TrainingError) as error:
        diverge()
    assert len(seen.losses) < FIRST_STEPS + 12, "within a dozen steps"
    assert "it began at 1 and is" in error.value.message
    assert "3 is the limit" in error.value.message
    last = len(seen.losses) - 1 - FIRST_STEPS
    assert f"sequences {100 + last}, 7; sequence {100 + last} begins 'text of {100 + last}'" in error.value.message
    assert "lower learning_rate" in (error.value.hint or "")


def test_worse_than_guessing() -> None:
    seen = watch()
    seen.guessing = 4.0

    def diverge() -> None:
        for step in range(30):
            seen.add(2.0 if step == 0 else 7.0, 10, (step,))

    with pytest.raises(TrainingError, match=r"it began at 2 and is .*4\.5 is the limit"):
        diverge()
    untrained = watch()
    untrained.guessing = 4.0
    for step in range(30):
        untrained.add(5.0, 10, (step,))
    assert untrained.good, "it began there"


@pytest.mark.parametrize("wave", [lambda step: 3 + 2.5 * math.sin(step), lambda step: 0.5 if step % 9 else 6.0])
def test_a_restless_loss_is_no_divergence(wave: object) -> None:
    seen = watch()
    for step in range(300):
        seen.add(wave(step), 10, (step,))  # type: ignore[operator]
    assert seen.good


def test_a_high_start_may_rise_further() -> None:
    assert diverged_by(1.0) == 2.0
    assert diverged_by(10.0) == 5.0
    assert DIVERGED_STEPS > 1, "one step is chance"


def test_best_and_enough() -> None:
    ours = Evaluations(patience=2)
    assert [ours.add(loss, step) for step, loss in enumerate([3.0, 2.0, 2.5, 1.9, 1.95, 1.94])] == [
        True, True, False, True, False, False,
    ]  # fmt: skip
    assert (ours.best, ours.best_step, ours.enough) == (1.9, 3, True)


def test_a_small_improvement_is_kept_but_does_not_count() -> None:
    ours = Evaluations(patience=2, threshold=0.1)
    assert [ours.add(loss, step) for step, loss in enumerate([2.0, 1.95, 1.9])] == [True, True, True]
    assert ours.enough


def checkpoint(folder: Path, step: int) -> Path:
    place = folder / f"checkpoint-{step}"
    place.mkdir(parents=True)
    (place / "trainer_state.json").write_text("{}")
    (place / "optimizer.pt").write_bytes(b"x" * 100)
    seen = watch()
    seen.losses, seen.tokens = [1.0] * step, 10 * step
    seen.evaluations.add(0.5, step)
    seen.saved(place)
    return place


def test_a_checkpoint_that_was_cut_short_is_passed_over(tmp_path: Path) -> None:
    checkpoint(tmp_path, 4)
    cut = checkpoint(tmp_path, 8)
    assert last_checkpoint(tmp_path) == cut
    (cut / "optimizer.pt").write_bytes(b"x" * 60)
    found, broken = resume_point(tmp_path, None)
    assert found == tmp_path / "checkpoint-4"
    assert broken == ["checkpoint-8"]
    assert not cut.exists()


@pytest.mark.parametrize("damage", ["", "[]", "{", '{"trainer_state.json": 2, "gone.pt": 5}'])
def test_a_mark_that_is_damaged_is_no_mark(tmp_path: Path, damage: str) -> None:
    (checkpoint(tmp_path, 4) / "complete").write_text(damage)
    assert last_checkpoint(tmp_path) is None


def test_what_a_checkpoint_knows(tmp_path: Path) -> None:
    place = checkpoint(tmp_path, 4)
    seen = watch()
    seen.resume(place)
    assert (seen.resumed_from, seen.losses, seen.tokens) == (4, [1.0] * 4, 40)
    assert (seen.evaluations.best, seen.evaluations.best_step) == (0.5, 4)
    assert json.loads((place / "complete").read_text())["optimizer.pt"] == 100
