"""Searches from start to end: passes are fakes whose result is known, workers, metrics and the store are real."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import coldpress
from coldpress.errors import ConfigError, StepError, UnmetError
from coldpress.events import SearchFinished, StepFinished, TrialFinished
from coldpress.record import read_run

pytest.importorskip("optuna")

SCRIPT = """
import json
from pathlib import Path

def read(model, device, execution_providers, **kwargs):
    place = model.bench.model.path / "figures.json"
    figures = json.loads(place.read_text()) if place.is_file() else {"loss": 1.0}
    with Path(__file__).with_name("calls").open("a") as calls:
        calls.write(f"{kwargs.get('of', 'loss')} {figures}\\n")
    if figures["loss"] == 666:
        raise ValueError("no such figure")
    return float("nan") if figures["loss"] == 667 else figures[kwargs.get("of", "loss")]
"""


def custom(name: str = "loss", **more: Any) -> dict[str, Any]:
    user = {"user_script": "own.py", "evaluate_func": "read", "evaluate_func_kwargs": {"of": name}}
    return {"name": name, "type": "custom", "user_config": user,
            "sub_types": [{"name": name, "higher_is_better": False, **more}]}  # fmt: skip


def at_most(value: float) -> dict[str, Any]:
    return {"goal": {"type": "threshold", "value": value}}


SIZE: dict[str, Any] = {"name": "size", "type": "size_on_disk"}


@pytest.fixture
def search(workflow: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Search steps by metrics; returns the result and the events."""
    (tmp_path / "own.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)

    def run(steps: list[dict[str, Any]], *metrics: dict[str, Any], **strategy: Any) -> tuple[Any, list[Any]]:
        more = strategy.pop("more", {})
        document = workflow(
            *steps,
            evaluators={"ev": {"metrics": list(metrics)}},
            evaluator="ev",
            search_strategy={"sampler": "sequential", **strategy},
            evaluate_input_model=False,
            **more,
        )
        events: list[Any] = []
        return coldpress.run(document, sinks=[events.append]), events

    return run


def trials(result: Any) -> list[tuple[str, Any]]:
    return [(trial.state, dict(trial.settings)) for trial in result.search.trials]


def calls(tmp_path: Path) -> list[str]:
    file = tmp_path / "calls"
    return file.read_text().splitlines() if file.is_file() else []


def test_the_best_within_the_goals_is_handed_over_and_shared_steps_run_once(search: Any, tmp_path: Path) -> None:
    result, events = search(
        [{"a": [3, 1, 2]}, {"b": [10, 0]}], custom("loss", priority=1, goal={"type": "threshold", "value": 12})
    )
    found = result.search
    assert found.size == 6
    assert [trial.state for trial in found.trials] == ["infeasible", *["feasible"] * 5]
    assert found.trials[found.winner - 1].settings == {"step0.a": 1, "step1.b": 0}
    assert found.met
    assert "of 5 that meet every goal" in found.why
    assert json.loads((result.output / "figures.json").read_text())["loss"] == 1.0
    worked = Counter(event.output for event in events if isinstance(event, StepFinished) and not event.cached)
    assert len(worked) == 3 + 6
    assert set(worked.values()) == {1}
    assert (found.steps_run, found.steps_shared) == (9, 3)
    # What was handed over is the run of that setting: its record, its config without a search.
    record, _ = read_run(result.output.parent)
    assert record.search is not None
    assert record.config["passes"]["step0"]["a"] == [3, 1, 2]
    assert found.config["passes"]["step0"]["a"] == 1
    assert [step.cached for step in record.steps] == [True, True]
    assert result.score("step1", "loss").value == 1.0
    again = coldpress.run({**found.config, "output_dir": str(tmp_path / "again")})
    assert all(step.cached for step in again.steps)


def test_a_rerun_does_nothing_again(search: Any, tmp_path: Path) -> None:
    steps, metric = [{"a": [3, 1, 2]}], custom("loss", priority=1)
    first, _ = search(steps, metric, sampler="tpe", sampler_config={"max_samples": 3, "seed": 5})
    before = calls(tmp_path)
    second, events = search(steps, metric, sampler="tpe", sampler_config={"max_samples": 3, "seed": 5})
    assert calls(tmp_path) == before
    assert all(event.cached for event in events if isinstance(event, StepFinished))
    assert trials(first) == trials(second)


def test_cheap_metrics_first_and_dear_ones_only_in_the_race(search: Any, tmp_path: Path) -> None:
    size = {**SIZE, "sub_types": [{"name": "bytes", "goal": {"type": "threshold", "value": 1}}]}
    with_figures = {"figures": {"other": 3.0}}
    result, _ = search([{"a": [1, 2], "weights": 1, **with_figures}], custom("loss", priority=1), size)
    assert [trial.state for trial in result.search.trials] == ["infeasible", "infeasible"]
    # Only for the nearest, which is handed over, all is measured in the end.
    assert len(calls(tmp_path)) == 1
    assert "size bytes" in result.search.trials[0].why
    assert [score.metric for score in result.unmet] == ["size"]


def test_what_the_plan_proves_out_of_bounds_is_not_run_and_not_counted(search: Any) -> None:
    size = {**SIZE, "sub_types": [{"name": "bytes", "goal": {"type": "threshold", "value": 10**9}}]}
    result, events = search(
        [{"weights": [10**12, 10**6, 2 * 10**12], "a": [1, 2]}], size, custom("loss", priority=1), max_samples=2
    )
    states = Counter(trial.state for trial in result.search.trials)
    assert states == {"pruned": 3, "feasible": 2}
    assert "its weights alone are 1000.0 GB, allowed are 1.0 GB" in result.search.trials[0].why
    assert sum(isinstance(event, StepFinished) and not event.cached for event in events) == 2


def test_failed_refused_and_invalid_settings_are_shown_and_not_fatal(search: Any) -> None:
    behave = ["fail", "crash", "refuse", "killed", "ok"]
    result, events = search([{"behave": behave}, {"a": [2, 1], "even": [True, False]}], custom("loss", priority=1))
    by_setting = {tuple(trial.settings.values()): trial for trial in result.search.trials}
    best = {"step0.behave": "ok", "step1.a": 1, "step1.even": False}
    assert result.search.trials[result.search.winner - 1].settings == best
    assert by_setting["fail", 2, True].state == "failed"
    assert "it failed on purpose" in by_setting["fail", 2, True].why
    assert "RuntimeError" in by_setting["crash", 2, True].why
    assert by_setting["refuse", 2, True].state == "pruned"
    assert "this pass refuses" in by_setting["refuse", 2, True].why
    assert "was killed (signal 9)" in by_setting["killed", 2, True].why
    assert by_setting["ok", 1, True].state == "pruned"
    assert "a is to be even" in by_setting["ok", 1, True].why
    finished = [event for event in events if isinstance(event, TrialFinished)]
    assert [event.number for event in finished] == list(range(1, 21))


def test_a_metric_that_raises_or_is_no_number_fails_its_trial_alone(search: Any) -> None:
    result, _ = search([{"a": [666, 667, 5]}], custom("loss", priority=1))
    raised, nan, _ = result.search.trials
    assert (raised.state, nan.state) == ("failed", "failed")
    assert "raised ValueError: no such figure" in raised.why
    assert "nan" in nan.why
    assert result.search.winner == 3


def test_when_all_fail_the_reasons_are_told(search: Any, tmp_path: Path) -> None:
    with pytest.raises(StepError, match="all 2 trials failed") as caught:
        search([{"behave": "fail", "a": [1, 2]}], custom("loss", priority=1))
    assert "it failed on purpose (trial 1, 2)" in caught.value.message
    record, _ = read_run(tmp_path / "output")
    assert record.status == "failed"
    assert record.search is not None
    assert [trial.state for trial in record.search.trials] == ["failed", "failed"]


def test_when_all_are_refused_it_is_the_config_that_is_wrong(search: Any) -> None:
    with pytest.raises(ConfigError, match="this pass refuses"):
        search([{"behave": "refuse", "a": [1, 2]}], custom("loss", priority=1))


def test_when_nothing_can_meet_the_goals_the_nearest_are_told(search: Any) -> None:
    size = {**SIZE, "sub_types": [{"name": "bytes", "goal": {"type": "threshold", "value": 1000}}]}
    with pytest.raises(UnmetError, match="none was run") as caught:
        search([{"weights": [4000, 2000, 3000]}], size)
    assert caught.value.exit_code == 3
    nearest = caught.value.message.splitlines()[1:]
    assert [line.split()[1] for line in nearest] == ["2", "3", "1"]


def test_without_a_feasible_trial_the_nearest_is_handed_over(search: Any) -> None:
    result, events = search([{"a": [9, 5, 7]}], custom("loss", priority=1, **at_most(4)))
    assert not result.search.met
    assert [score.value for score in result.unmet] == [5.0]
    assert result.search.nearest == (2, 3, 1)
    assert result.search.trials[0].why == "loss 9, wanted at most 4"
    (ended,) = (event for event in events if isinstance(event, SearchFinished))
    assert (ended.winner, ended.feasible) == (2, 0)


def of_two(first: float, second: float) -> dict[str, Any]:
    return {"type": "Fake", "a": first, "figures": {"other": second, "dear": 1}}


def test_what_may_lack_the_least_is_measured_on_until_one_is_known_to(search: Any, tmp_path: Path) -> None:
    """Both are to be at most 10; a trial ends at the first that it misses, so of three of them one figure is known."""
    settings = [of_two(10.1, 20), of_two(10.2, 10.1), of_two(10, 10.9), of_two(10.4, 10)]
    metrics = [custom("loss", **at_most(10)), custom("other", **at_most(10)), custom("dear", priority=1)]
    result, events = search([], *metrics, more={"passes": {"only": settings}})
    found = result.search
    assert [trial.violation for trial in found.trials] == pytest.approx([1.01, 0.03, 0.09, 0.04])
    assert [trial.judged for trial in found.trials] == [True, True, True, False]
    assert (found.winner, found.nearest) == (2, (2, 4, 3))
    assert found.trials[1].why == "loss 10.2, wanted at most 10; other 10.1, wanted at most 10"
    assert (
        found.why
        == f"no trial meets every goal; of the models there are this one lacks the least: {found.trials[1].why}"
    )
    assert sum(score.goal.margin for score in result.unmet) == pytest.approx(-0.3)
    assert [event.number for event in events if isinstance(event, TrialFinished)] == [1, 2, 3, 4, 1, 2]
    dear = [line for line in calls(tmp_path) if line.startswith("dear")]
    assert len(dear) == 1, "of what misses a goal only the other goals are measured, until it is handed over"


def test_what_is_measured_on_ends_where_it_lacks_more_than_the_best_known(search: Any, tmp_path: Path) -> None:
    settings = [of_two(10, 10.3), of_two(10.1, 10.5), of_two(10.2, 99)]
    metrics = [
        custom("loss", **at_most(10)),
        custom("other", **at_most(10)),
        custom("dear", priority=1, **at_most(0.9)),
    ]
    result, _ = search([], *metrics, more={"passes": {"only": settings}})
    found = result.search
    # The first misses two: 3 % and 11 %. The others are measured on up to that: 1 + 5 + 11 %, and 2 + 890 %.
    assert [trial.violation for trial in found.trials] == pytest.approx([0.03 + 1 / 9, 0.06 + 1 / 9, 8.92])
    assert [trial.judged for trial in found.trials] == [True, True, False]
    assert (found.winner, found.nearest) == (1, (1, 2, 3))


def test_limits_end_a_search(search: Any) -> None:
    steps, metric = [{"a": [9, 5, 3, 1]}], custom("loss", priority=1, **at_most(6))
    result, _ = search(steps, metric, stop_when_goals_met=True)
    assert (len(result.search.trials), result.search.stopped) == (2, "a trial met every goal")
    result, _ = search(steps, metric, max_iter=3)
    assert (len(result.search.trials), result.search.winner) == (3, 3)
    result, _ = search([{"a": [9, 5, 3, 1], "seconds": 1.0}], metric, max_time=1.5)
    assert len(result.search.trials) < 4
    assert result.search.stopped == "max_time: 1.5 s"


@pytest.mark.parametrize("sampler", ["sequential", "random", "tpe"])
def test_a_large_space_of_which_nothing_can_run(search: Any, monkeypatch: pytest.MonkeyPatch, sampler: str) -> None:
    monkeypatch.setattr("coldpress.search.driver._IN_VAIN", 5, raising=False)
    step = {"a": list(range(30)), "b": list(range(30)), "behave": "refuse"}
    with pytest.raises(ConfigError, match="this pass refuses"):
        search([step], custom("loss", priority=1), sampler=sampler, sampler_config={"max_samples": 2})
    record = json.loads(Path("output/failed.json").read_text())
    assert len(record["search"]["trials"]) == 5
    assert record["search"]["stopped"] == "5 settings one after the other that need no run"


def test_a_limit_before_the_first_trial(search: Any) -> None:
    with pytest.raises(StepError, match=r"no trial was begun before the limit of the search \(max_time: 1e-06 s\)"):
        search([{"a": [1, 2]}], custom("loss", priority=1), max_time=1e-6)


def test_a_space_of_one_and_more_samples_than_settings(search: Any) -> None:
    result, _ = search([{"a": 2}], custom("loss", priority=1))
    assert (result.search.size, trials(result)) == (1, [("feasible", {})])
    result, events = search([{"a": [2, 1]}], custom("loss", priority=1), sampler="tpe", max_samples=50)
    assert len(result.search.trials) == 2
    assert any("the space has 2 settings: each is tried once" in getattr(event, "text", "") for event in events)


def test_objectives_give_a_front(search: Any) -> None:
    passes = [[{"type": "Fake", "a": a, "figures": {"cost": c}} for a, c in ((1, 9), (2, 5), (3, 7), (4, 1))]]
    result, _ = search([], custom("loss", priority=1), custom("cost", priority=2), more={"passes": {"only": passes[0]}})
    assert result.search.front == (1, 2, 4)
    assert result.search.winner == 1


def test_pass_by_pass_goes_on_from_the_best_and_steps_back_when_the_goal_is_missed(search: Any) -> None:
    steps = [{"a": [5, 1, 3]}, {"b": [20, 10]}]
    result, events = search(steps, custom("loss", priority=1), execution_order="pass-by-pass")
    settings = [dict(trial.settings) for trial in result.search.trials]
    assert settings == [
        {"step0.a": 5}, {"step0.a": 1}, {"step0.a": 3},
        {"step0.a": 1, "step1.b": 20}, {"step0.a": 1, "step1.b": 10},
    ]  # fmt: skip
    assert result.search.winner == 5
    assert [trial.whole for trial in result.search.trials] == [False] * 3 + [True] * 2
    (ended,) = (event for event in events if isinstance(event, SearchFinished))
    assert ended.feasible == 2, "of the first step alone nothing can be handed over"
    worked = [event for event in events if isinstance(event, StepFinished) and not event.cached]
    assert len(worked) == 3 + 2
    # The first step's best cannot meet this goal of the second step's result: the next best is gone on with.
    passes = {
        "step0": {"type": "Fake", "a": [1, 3]},
        "step1": {"type": "Fake", "b": [-1, 10], "figures": {"other": 1}},
    }
    goal = {"name": "loss", "type": "custom", "user_config": custom()["user_config"],
            "sub_types": [{"name": "loss", "higher_is_better": True, "priority": 1, **at_most(12.5)}]}  # fmt: skip
    result, _ = search([], goal, execution_order="pass-by-pass", more={"passes": passes})
    assert [dict(trial.settings) for trial in result.search.trials][-1] == {"step0.a": 3, "step1.b": 10}
    assert result.search.met


def test_several_at_once_come_to_the_same(search: Any, tmp_path: Path) -> None:
    steps, metric = [{"a": [4, 1, 3, 2], "seconds": 0.5}, {"b": [0, 1]}], custom("loss", priority=1)
    strategy = {"sampler": "tpe", "seed": 3, "max_samples": 6, "max_concurrent_trials": 3}
    first, events = search(steps, metric, **strategy)
    worked = Counter(event.output for event in events if isinstance(event, StepFinished) and not event.cached)
    assert set(worked.values()) == {1}
    assert [trial.number for trial in first.search.trials] == [1, 2, 3, 4, 5, 6]
    second, _ = search(steps, metric, **strategy, more={"cache_dir": str(tmp_path / "other")})
    assert trials(first) == trials(second)


def test_clean_cache_makes_each_shared_step_once_again(search: Any) -> None:
    steps, metric = [{"a": [1, 2]}, {"b": [0, 1]}], custom("loss", priority=1)
    search(steps, metric)
    _, events = search(steps, metric, more={"clean_cache": True})
    worked = [event for event in events if isinstance(event, StepFinished) and not event.cached]
    assert len(worked) == 6


def test_killed_and_run_again_it_goes_on(search: Any, workflow: Any, tmp_path: Path) -> None:
    document = workflow(
        {"a": [4, 1, 3, 2], "seconds": 1.0},
        evaluators={"ev": {"metrics": [custom("loss", priority=1)]}},
        evaluator="ev",
        evaluate_input_model=False,
        search_strategy={"sampler": "tpe", "seed": 7},
    )
    (tmp_path / "config.json").write_text(json.dumps(document))
    command = [sys.executable, "-m", "coldpress", "run", "config.json", "--log-format", "json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=os.environ) as process:
        assert process.stdout is not None
        done = 0
        for line in process.stdout:
            done += json.loads(line)["event"] == "TrialFinished"
            if done == 2:
                process.kill()
                break
    before = calls(tmp_path)
    assert len(before) == 2
    events: list[Any] = []
    result = coldpress.run(tmp_path / "config.json", sinks=[events.append])
    assert len(result.search.trials) == 4  # type: ignore[union-attr]
    assert calls(tmp_path)[:2] == before
    assert len(calls(tmp_path)) == 4


def test_stopped_it_says_what_is_the_best_so_far(workflow: Any, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(SCRIPT)
    document = workflow(
        {"a": [4, 1, 3], "seconds": 1.0},
        evaluators={"ev": {"metrics": [custom("loss", priority=1)]}},
        evaluator="ev",
        evaluate_input_model=False,
        search_strategy={"sampler": "sequential"},
    )
    (tmp_path / "config.json").write_text(json.dumps(document))
    command = [sys.executable, "-m", "coldpress", "run", "config.json", "--log-format", "json"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=os.environ
    )
    assert process.stdout is not None
    for line in process.stdout:
        if json.loads(line)["event"] == "TrialFinished":
            break
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped after 1 trial, kept in the cache; best so far: trial 1 (a 4" in errors


def test_settings_that_make_the_same_model_are_measured_once(search: Any, tmp_path: Path) -> None:
    passes = [
        {"type": "Fake", "a": 1},
        {"type": "Fake", "a": 1, "ram": [1000, 1000.0]},
        {"type": "Fake", "a": 1, "b": 0.0},
    ]
    result, _ = search([], custom("loss", priority=1), max_samples=2, more={"passes": {"only": passes}})
    assert [trial.same_as for trial in result.search.trials][1:] == [1, 1]
    assert len(calls(tmp_path)) == 1
