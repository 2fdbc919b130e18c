"""Two processes (gloo, on the CPU) train what one would: the same losses, weights, decisions; whole or sharded.

All trainings of a rank run in one process, since that takes seconds to start.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coldpress.nn.checkpoints import is_whole
from fakes.rank_scenarios import SCENARIOS, Outcome, perform, run_ranks
from fakes.tiny_models import make_checkpoint

SAME = 1e-5
"""Of losses in float32: the sums are the same, their order is not."""

Ranked = Callable[[str], tuple[Outcome, Outcome]]
Alone = Callable[[str], Outcome]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama"), family="llama")


@pytest.fixture(scope="module")
def out(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two ranks have done everything."""
    place = tmp_path_factory.mktemp("ranks")
    run_ranks(folder, place, list(SCENARIOS))
    return place


@pytest.fixture(scope="module")
def ranked(out: Path) -> Ranked:
    def read(name: str) -> tuple[Outcome, Outcome]:
        from safetensors.torch import load_file

        first, second = (
            json.loads((out / f"{name}.{rank}.json").read_text())
            | {"weights": load_file(out / f"{name}.{rank}.safetensors")}
            for rank in (0, 1)
        )
        return first, second

    return read


@pytest.fixture(scope="module")
def alone(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Alone:
    place = tmp_path_factory.mktemp("alone")
    return functools.cache(lambda name: perform(name, folder, place))


def evaluations(outcome: Outcome) -> list[float]:
    return [point["eval_loss"] for point in outcome["log"] if "eval_loss" in point]


def assert_weights(found: Outcome, expected: Outcome, tolerance: float) -> None:
    assert found["weights"].keys() == expected["weights"].keys()
    for name, value in expected["weights"].items():
        assert float((found["weights"][name] - value).abs().max()) <= tolerance, name


@pytest.mark.parametrize(
    "name",
    [
        "plain", "checkpointed", "padded", "grouped", "fewer_rows_than_ranks",
        "sharded", "sharded_saved_modules", "sharded_stopped", "sharded_tied",
    ],
)  # fmt: skip
def test_two_processes_train_what_one_does(ranked: Ranked, alone: Alone, name: str) -> None:
    first, second = ranked(name)
    expected = alone(name)
    assert expected["form"] == ("padded" if name == "padded" else "packed")
    # 13 rows in steps of 4: the last step of an epoch has one row, so one rank has none.
    assert len(expected["losses"]) == (2 if name == "fewer_rows_than_ranks" else 8)
    assert first["losses"] == second["losses"] == pytest.approx(expected["losses"], rel=SAME)
    assert evaluations(first) == evaluations(second) == pytest.approx(evaluations(expected), rel=SAME)
    assert first["tokens"] == second["tokens"] == expected["tokens"]
    assert first["form"] == expected["form"]
    # Adam divides by the gradient's size, so where that is next to nothing the order of sums is seen.
    assert_weights(first, expected, 1e-4)
    assert first["after"] == pytest.approx(evaluations(expected)[-1], rel=SAME)


@pytest.mark.parametrize("name", ["plain", "best"])
def test_ranks_hold_the_same_weights(ranked: Ranked, name: str) -> None:
    first, second = ranked(name)
    assert_weights(second, first, 0.0)


@pytest.mark.parametrize("name", ["sharded_bf16", "sharded_full_bf16"])
def test_sharded_in_bf16(ranked: Ranked, alone: Alone, name: str) -> None:
    first, _ = ranked(name)
    expected = alone(name)
    # 8 bits of a number; the loss itself is not rounded to them.
    assert first["losses"] == pytest.approx(expected["losses"], rel=1e-2)
    assert evaluations(first) == pytest.approx(evaluations(expected), rel=1e-2)
    assert any(loss * 64 % 1 for loss in first["losses"])


@pytest.mark.parametrize("name", ["best", "sharded_best"])
def test_ranks_agree_on_what_was_best_and_when_to_end(ranked: Ranked, alone: Alone, name: str) -> None:
    first, second = ranked(name)
    expected = alone(name)
    assert first["best_step"] == second["best_step"] == expected["best_step"]
    assert first["steps"] == second["steps"] == expected["steps"] < 36
    assert expected["best_step"] < expected["steps"]
    assert first["after"] == pytest.approx(first["eval_loss"], rel=SAME)
    assert first["eval_loss"] == min(evaluations(first))


@pytest.mark.parametrize("name", ["stopped", "sharded_stopped", "sharded_saved_modules"])
def test_a_signal_to_one_rank_stops_all_and_all_go_on(ranked: Ranked, out: Path, name: str) -> None:
    outcomes = ranked(name)
    for outcome in outcomes:
        assert outcome["first"]["error"] == "Interrupted"
        assert outcome["first"]["message"] == "stopped at step 6 of 8"  # of 4 in an epoch
        assert outcome["resumed_from"] == 6
        # With dropout as well: each rank has random numbers of its own, and they are kept.
        assert outcome["losses"] == outcome["whole"]
    checkpoint = out / name / "checkpoints" / "checkpoint-6"
    assert is_whole(checkpoint)
    recorded = json.loads((checkpoint / "complete").read_text())
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= recorded.keys()
    assert len([file for file in recorded if file.startswith(("optimizer", "scheduler"))]) == 2


@pytest.mark.parametrize("name", ["broken", "sharded_broken"])
def test_a_loss_that_one_rank_breaks_ends_all(ranked: Ranked, out: Path, name: str) -> None:
    first, second = ranked(name)
    assert first["error"] == second["error"] == "TrainingError"
    # All four rows of the step, two of each rank.
    assert "became nan in step 2" in first["message"]
    assert len(first["message"].partition("training sequences ")[2].partition(";")[0].split(", ")) == 4
    assert first["message"] == second["message"]
    assert (out / name / "last-good" / "adapter_model.safetensors").is_file()


def test_what_ranks_must_have_in_common() -> None:
    from coldpress.errors import TrainingError
    from coldpress.nn import ranks

    assert ranks.ranks() == 1
    ranks.check_alike(form="packed", sequences=3)

    def differing(facts: list[Any], value: Any) -> None:
        facts[:] = [value, 4]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "ranks", lambda: 2)
        patch.setattr(ranks.distributed, "all_gather_object", differing)
        with pytest.raises(TrainingError, match="differ in sequences: 3 on rank 0, 4 on rank 1"):
            ranks.check_alike(sequences=3)
