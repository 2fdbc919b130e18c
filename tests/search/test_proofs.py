"""Which results of a search are proved, and when: passes are fakes of known size and limit, the proofs are real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import coldpress
from coldpress.engine.store import Store
from coldpress.errors import ParityError, StepError
from coldpress.events import ParityMeasured, StepFinished, TrialFinished
from coldpress.record import read_run
from fakes.tiny_models import make_checkpoint

SIZE: dict[str, Any] = {
    "name": "size", "type": "size_on_disk",
    "sub_types": [{"name": "bytes", "priority": 1, "higher_is_better": False}],
}  # fmt: skip
SCRIPT = """
from pathlib import Path

def read(model, device, execution_providers, **kwargs):
    with Path(__file__).with_name("calls").open("a") as calls:
        calls.write("called\\n")
    return 1.0
"""
QUALITY: dict[str, Any] = {
    "name": "loss", "type": "custom", "user_config": {"user_script": "own.py", "evaluate_func": "read"},
    "sub_types": [{"name": "loss", "higher_is_better": False, "goal": {"type": "threshold", "value": 2.0}}],
}  # fmt: skip
HOLDS, FAILS = 0.01, -1.0
"""Limits of KL: nothing changes in a fake's result but its size."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def document(workflow: Callable[..., dict[str, Any]], model: Path, tmp_path: Path, monkeypatch: Any) -> Any:
    """A search over alternatives (size, limit) of each of its steps."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(SCRIPT)

    def make(*steps: list[tuple[int, float]], metrics: Any = (SIZE,), **strategy: Any) -> dict[str, Any]:
        passes = {
            f"step{place}": [{"type": "Fake", "size": size, "max_kl": limit} for size, limit in step]
            for place, step in enumerate(steps)
        }
        return workflow(
            input_model={"type": "HfModel", "model_path": str(model)},
            passes=passes,
            parity={"tokens": 200},
            evaluators={"ev": {"metrics": list(metrics)}},
            evaluator="ev",
            search_strategy={"sampler": "sequential", **strategy},
            evaluate_input_model=False,
        )

    return make


def run(document: dict[str, Any]) -> tuple[Any, list[Any]]:
    events: list[Any] = []
    return coldpress.run(document, sinks=[events.append]), events


def states(result: Any) -> list[str]:
    return [trial.state for trial in result.search.trials]


def proofs(events: list[Any]) -> list[str]:
    return [event.step for event in events if isinstance(event, ParityMeasured)]


def proved_in_store(tmp_path: Path) -> int:
    return sum("parity" in entry.record for entry in Store(tmp_path / "cache").entries())


def test_what_is_no_better_than_a_proved_one_is_not_proved(document: Any, tmp_path: Path) -> None:
    asked = document([(20, HOLDS), (30, HOLDS), (10, HOLDS), (11, HOLDS)], metrics=(SIZE, QUALITY))
    result, events = run(asked)
    assert states(result) == ["feasible", "unproved", "feasible", "unproved"]
    assert [trial.why for trial in result.search.trials] == ["", "trial 1 is no worse", "", "trial 3 is no worse"]
    assert proofs(events) == ["trial 1 step0", "trial 3 step0"]
    assert proved_in_store(tmp_path) == 2
    assert (tmp_path / "calls").read_text().count("called") == 2, "nor measured further"
    assert (result.search.winner, result.search.front) == (3, (3,))
    assert result.search.why.endswith("; 2 more are no better and not proved")
    assert result.steps[0].parity is not None
    # A run that wants one of them proves it, and does not make it again.
    alone = {**asked, "passes": {"step0": asked["passes"]["step0"][1]}, "search_strategy": False}
    later, events = run(alone)
    assert [step.cached for step in later.steps] == [True]
    assert later.steps[0].parity is not None
    assert proofs(events) == ["step0"]
    assert proved_in_store(tmp_path) == 3
    # The search goes the same way again, and has nothing to prove.
    again, events = run(asked)
    assert (states(again), again.search.winner, proofs(events)) == (states(result), 3, [])


def test_the_next_best_where_the_proof_of_the_best_fails(document: Any) -> None:
    asked = document([(20, HOLDS), (10, FAILS), (30, HOLDS), (21, HOLDS), (15, HOLDS)])
    result, _ = run(asked)
    assert states(result) == ["feasible", "failed", "unproved", "unproved", "feasible"]
    assert "too far from its input" in result.search.trials[1].why
    assert result.search.winner == 5
    # What was refused is refused by a run as well.
    alone = {**asked, "passes": {"step0": asked["passes"]["step0"][1]}, "search_strategy": False}
    with pytest.raises(ParityError):
        run(alone)


def test_a_failed_proof_puts_nobody_out_of_the_race(document: Any) -> None:
    result, _ = run(document([(10, FAILS), (20, HOLDS)]))
    assert states(result) == ["failed", "feasible"]


def test_where_an_objective_is_dear_every_result_is_proved_before_it_is_measured(document: Any) -> None:
    ranked = {**QUALITY, "sub_types": [{**QUALITY["sub_types"][0], "priority": 2}]}
    result, events = run(document([(10, HOLDS), (20, HOLDS)], metrics=(SIZE, ranked)))
    assert states(result) == ["feasible", "feasible"]
    measured = [place for place, event in enumerate(events) if getattr(event, "metric", "") == "loss"]
    proved = [place for place, event in enumerate(events) if isinstance(event, ParityMeasured)]
    assert proved[0] < measured[0] < proved[1] < measured[1]


def test_the_nearest_that_is_handed_over_is_proved(document: Any, model: Path) -> None:
    """Sizes are over the goal, so nothing is proved while trials run; of the nearest two the first does not hold."""
    least = sum(path.stat().st_size for path in model.iterdir())
    goal = {**SIZE, "sub_types": [{**SIZE["sub_types"][0], "goal": {"type": "threshold", "value": least}}]}
    result, events = run(document([(30, HOLDS), (10, FAILS), (20, HOLDS)], metrics=(goal,)))
    assert states(result) == ["infeasible", "failed", "infeasible"]
    assert proofs(events) == ["trial 2 step0", "trial 3 step0"]
    assert (result.search.winner, result.search.met) == (3, False)
    assert [(one.number, one.state) for one in events if isinstance(one, TrialFinished)][-2:] == [
        (2, "failed"), (3, "infeasible")
    ]  # fmt: skip


def test_pass_by_pass_proves_what_is_gone_on_with(document: Any) -> None:
    first = [(10, HOLDS), (20, HOLDS), (5, FAILS)]
    result, events = run(document(first, [(1, HOLDS), (2, HOLDS)], execution_order="pass-by-pass"))
    assert states(result) == ["feasible", "unproved", "failed", "feasible", "unproved"]
    assert result.search.trials[3].settings["step0"] == result.search.trials[0].settings["step0"]
    assert proofs(events) == ["trial 1 step0", "trial 3 step0", "trial 4 step1"]
    # Where nothing holds that is built on the best, what was put aside is proved, and gone on with.
    with pytest.raises(StepError, match="trials failed"):
        run(document(first[:2], [(3, FAILS), (4, FAILS)], execution_order="pass-by-pass"))
    record, _ = read_run(Path("output"))
    assert record.search is not None
    assert [trial.state for trial in record.search.trials] == ["feasible", "feasible", *["failed"] * 4]


def test_killed_before_a_proof_it_is_made_by_the_next_run(document: Any, tmp_path: Path) -> None:
    asked = document([(20, HOLDS), (10, HOLDS), (30, HOLDS)])
    (tmp_path / "config.json").write_text(json.dumps(asked))
    command = [sys.executable, "-m", "coldpress", "run", "config.json", "--log-format", "json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=os.environ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            event = json.loads(line)
            if event["event"] == "StepFinished" and event["step"] == "trial 2 step0":
                process.kill()
                break
    assert proved_in_store(tmp_path) == 1
    result, events = run(asked)
    assert states(result) == ["feasible", "feasible", "unproved"]
    assert result.search.winner == 2
    made = [event.step for event in events if isinstance(event, StepFinished) and not event.cached]
    assert made == ["trial 3 step0"]
    assert proofs(events) == ["trial 2 step0"]


def test_trials_beside_each_other_come_to_the_same(document: Any, tmp_path: Path) -> None:
    """What is out of the race depends on the trials that were told, not on those that happen to be done."""
    asked = document([(size, HOLDS) for size in (20, 30, 10, 40)], max_concurrent_trials=2)
    first, _ = run(asked)
    second, _ = run({**asked, "cache_dir": str(tmp_path / "other")})
    assert states(first) == states(second)
    assert first.search.winner == second.search.winner == 3
    assert states(first)[3] == "unproved"
