"""Evaluators in a run: what is measured when, what is kept, what goals come to. Workers, models and files are real."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import coldpress
from coldpress.errors import ConfigError, StepError
from coldpress.events import ScoreMeasured
from fakes.tiny_models import make_checkpoint, make_encoder

pytest.importorskip("onnxruntime")

SCRIPT = """
import os
from pathlib import Path

def files(model, device, execution_providers):
    mark = Path(__file__).with_name("calls")
    mark.write_text(mark.read_text() + "x" if mark.exists() else "x")
    return {"files": len(os.listdir(Path(model.model_path).parent)), "constant": 0.25}
"""
QUICK = {"warmup_num": 0, "repeat_test_num": 10, "confidence": 0.9, "max_seconds": 5}


def goal(kind: str, value: float) -> dict[str, Any]:
    return {"type": kind, "value": value}


def metric(kind: str, *subs: dict[str, Any], **rest: Any) -> dict[str, Any]:
    return {"name": kind, "type": kind, **({"sub_types": list(subs)} if subs else {}), **rest}


CUSTOM = {"user_config": {"user_script": "own.py", "evaluate_func": "files"}}
SIZE, ACCURACY = metric("size_on_disk"), metric("accuracy", data_config="rows")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, records, a script, and a store that the tests share."""
    folder = tmp_path_factory.mktemp("project")
    make_checkpoint(folder / "model")
    rows = [{"phrase": f"phrase {number}", "tone": ("joy", "fear")[number % 2]} for number in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "own.py").write_text(SCRIPT)
    return folder


@pytest.fixture
def run(project: Path, tmp_path: Path) -> Any:
    """Run a workflow that builds the model, with these metrics; returns the result and its events."""

    def do(*metrics: dict[str, Any], **more: Any) -> tuple[Any, list[ScoreMeasured]]:
        path = write(project, *metrics, output_dir=str(tmp_path / "output"), **more)
        events: list[Any] = []
        result = coldpress.run(path, sinks=[events.append])
        return result, [event for event in events if isinstance(event, ScoreMeasured)]

    return do


def write(project: Path, *metrics: dict[str, Any], **more: Any) -> Path:
    document = {
        "input_model": {"type": "HfModel", "model_path": "model"},
        "data_configs": [
            {
                "name": "rows",
                "type": "HuggingfaceContainer",
                "load_dataset_config": {"data_name": "json", "data_files": "rows.jsonl"},
                "pre_process_data_config": {
                    "text_template": "{phrase}={tone}", "label_col": "tone", "strategy": "line-by-line",
                },
            }
        ],
        "evaluators": {"ev": {"metrics": list(metrics)}},
        "passes": {"build": {"type": "ModelBuilder", "precision": "fp32", "parity": {"enabled": False}}},
        "evaluator": "ev",
        "cache_dir": "cache",
        **more,
    }  # fmt: skip
    path = project / "workflow.json"
    path.write_text(json.dumps(document))
    return path


def values(result: Any) -> dict[tuple[str, str], float]:
    return {(score.model, score.sub_type): score.value for score in result.scores}


def test_before_and_after_and_kept(run: Any, project: Path) -> None:
    kl = metric("divergence", {"name": "kl"}, tokens=100)
    result, events = run(ACCURACY, kl, SIZE)
    found = values(result)
    assert set(found) == {
        ("input", "accuracy_score"), ("input", "bytes"),
        ("build", "accuracy_score"), ("build", "kl"), ("build", "bytes"),
    }  # fmt: skip
    assert found["input", "accuracy_score"] == found["build", "accuracy_score"]
    assert 0 <= found["build", "kl"] < 1e-5
    assert found["build", "bytes"] > 0
    assert [(event.model, event.sub_type) for event in events] == list(found)
    assert not any(score.cached for score in result.scores)
    again, _ = run(ACCURACY, kl, SIZE)
    assert all(score.cached for score in again.scores)
    assert values(again) == found
    record = json.loads(again.record.read_text())
    assert [(one["model"], one["metric"], one["sub_type"], one["unit"]) for one in record["scores"]][:2] == [
        ("input", "accuracy", "accuracy_score", "share"), ("input", "size_on_disk", "bytes", "bytes"),
    ]  # fmt: skip
    assert record["scores"][0]["standard_error"] == pytest.approx(result.scores[0].standard_error)


def test_what_changes_a_number_is_measured_anew(run: Any, project: Path) -> None:
    def cached(**changes: Any) -> bool:
        result, _ = run({**ACCURACY, **changes}, evaluate_input_model=False)
        (score,) = result.scores
        return bool(score.cached)

    cached()
    assert not cached(answer_by="generation")
    assert not cached(labels=["fear", "joy", "grief"])
    assert not cached(seed=3)
    assert cached(batch_size=3)
    assert cached(name="another")
    assert cached(sub_types=[{"name": "accuracy_score", "priority": 1}])
    rows = project / "rows.jsonl"
    text = rows.read_text()
    rows.write_text(text.replace("phrase 1", "phrasing 1"))
    assert not cached()
    rows.write_text(text)


def test_a_step_that_was_renamed_keeps_its_scores(run: Any) -> None:
    before, _ = run(ACCURACY, evaluate_input_model=False)
    build = {"type": "ModelBuilder", "precision": "fp32", "parity": {"enabled": False}}
    after, _ = run(ACCURACY, evaluate_input_model=False, passes={"other": build})
    assert values(after) == {("other", "accuracy_score"): values(before)["build", "accuracy_score"]}
    assert after.scores[0].cached


def test_costs_are_measured_in_turn(run: Any) -> None:
    latency = metric("latency", {"name": "avg", "metric_config": QUICK}, prompt_tokens=12)
    result, events = run(latency)
    assert [(event.model, event.metric) for event in events] == [("input", "latency"), ("build", "latency")]
    before, after = result.scores
    assert before.details["in_turn_with"] == ["build"]
    assert after.details["in_turn_with"] == ["input"]
    assert before.n == after.n
    again, _ = run(latency)
    assert all(score.cached for score in again.scores)
    alone, _ = run(latency, evaluate_input_model=False)
    assert [score.model for score in alone.scores] == ["build"]
    assert not alone.scores[0].cached, "measured beside another model it was another measurement"
    assert "in_turn_with" not in alone.scores[0].details


def test_goals_are_judged_and_decide(run: Any, project: Path) -> None:
    subs = {"name": "accuracy_score", "goal": goal("max-degradation", 0.01)}
    sizes = {"name": "bytes", "goal": goal("percent-min-improvement", 50)}
    result, events = run(metric("accuracy", subs, data_config="rows"), metric("size_on_disk", sizes))
    before, after = result.score("input", "size_on_disk"), result.score("build", "size_on_disk")
    assert before.goal is None, "the input is what others are held against"
    assert after.goal.bound == before.value / 2
    assert (after.goal.met, after.goal.margin) == (False, before.value / 2 - after.value)
    assert result.score("build", "accuracy").goal.met
    assert result.unmet == (after,)
    told = {event.metric: event for event in events if event.model == "build"}
    assert (told["size_on_disk"].goal, told["size_on_disk"].goal_met) == ("percent-min-improvement 50", False)
    record = json.loads(result.record.read_text())
    assert record["scores"][-1]["goal"]["met"] is False
    command = [sys.executable, "-m", "coldpress", "run", str(project / "workflow.json")]
    output = f"output_dir={result.record.parent}"
    done = subprocess.run([*command, output], capture_output=True, text=True, check=False)
    assert done.returncode == 3, "the same run from the command line"
    assert "these goals are not met: size_on_disk bytes" in done.stderr
    met, _ = run(metric("accuracy", subs, data_config="rows"))
    assert met.unmet == ()


def test_goals_of_a_step_are_shown_and_the_last_ones_decide(run: Any) -> None:
    never = {"name": "bytes", "goal": goal("threshold", 1)}
    evaluators = {"step": {"metrics": [metric("size_on_disk", never)]}, "ev": {"metrics": [SIZE]}}
    again = {"type": "ModelBuilder", "precision": "fp32", "parity": {"enabled": False}}
    result, _ = run(evaluators=evaluators, passes={"build": {**again, "evaluator": "step"}})
    assert result.score("build", "size_on_disk").value
    assert result.unmet == (), "the workflow's own evaluator decides"
    result, _ = run(evaluators=evaluators, passes={"build": {**again, "evaluator": "step"}}, evaluator=None)
    assert len(result.unmet) == 1, "where it has none, the last step's does"


def test_a_steps_relative_goal_has_a_baseline(run: Any) -> None:
    relative = {"name": "accuracy_score", "goal": goal("max-degradation", 0)}
    evaluators = {"step": {"metrics": [metric("accuracy", relative, data_config="rows"), SIZE]}}
    build = {"type": "ModelBuilder", "precision": "fp32", "parity": {"enabled": False}, "evaluator": "step"}
    result, _ = run(evaluators=evaluators, passes={"build": build}, evaluator=None)
    assert [(score.model, score.metric) for score in result.scores] == [
        ("input", "accuracy"), ("build", "accuracy"), ("build", "size_on_disk"),
    ]  # fmt: skip
    assert result.score("build", "accuracy").goal.met


def test_the_users_script_counts(run: Any, project: Path) -> None:
    custom = metric("custom", {"name": "constant"}, {"name": "files", "higher_is_better": False}, **CUSTOM)
    result, _ = run(custom, evaluate_input_model=False)
    assert values(result)["build", "constant"] == 0.25
    assert not result.score("build", "custom", "files").higher_is_better
    calls = (project / "calls").read_text()
    run(custom, evaluate_input_model=False)
    assert (project / "calls").read_text() == calls
    script = project / "own.py"
    script.write_text(script.read_text() + "\n# another script\n")
    run(custom, evaluate_input_model=False)
    assert (project / "calls").read_text() == calls + "x"


def test_a_script_that_fails_fails_the_run(run: Any, project: Path) -> None:
    (project / "bad.py").write_text("def files(*_):\n    return [][1]\n")
    broken = {"user_config": {"user_script": "bad.py", "evaluate_func": "files"}}
    with pytest.raises(StepError, match=r"raised IndexError: list index out of range at line 2 \(return \[\]\[1\]\)"):
        run(metric("custom", {"name": "n"}, **broken))
    (project / "nan.py").write_text("def files(*_):\n    return float('nan')\n")
    broken = {"user_config": {"user_script": "nan.py", "evaluate_func": "files"}}
    with pytest.raises(StepError, match=r"files of .*nan\.py gave nan for n"):
        run(metric("custom", {"name": "n"}, **broken))


def test_a_plan_refuses_what_cannot_be_measured(project: Path) -> None:
    def refusals(*metrics: dict[str, Any], **more: Any) -> list[tuple[str, str]]:
        with pytest.raises(ConfigError) as caught:
            coldpress.plan(write(project, *metrics, **more))
        return [(problem.path, problem.message) for problem in caught.value.problems]

    lost = metric("custom", {"name": "n"}, user_config={"user_script": "own.py", "evaluate_func": "filse"})
    ((path, message),) = refusals(SIZE, lost)
    assert path == "evaluators.ev.metrics.1"
    assert "has no function 'filse'" in message
    evaluator = {"type": "LMEvaluator", "metrics": [SIZE], "tasks": ["lost.yaml", "size_on_disk"]}
    told = refusals(evaluators={"ev": evaluator})
    assert told == [("evaluators.ev.tasks", "lm_eval: there is no task file lost.yaml")]
    make_encoder(project / "encoder")
    encoder = {"input_model": {"type": "HfModel", "model_path": "encoder"}}
    speed, kl = metric("generation"), metric("divergence", {"name": "kl"})
    told = [message for path, message in refusals(speed, ACCURACY, kl, **encoder) if path.startswith("evaluators")]
    assert [message.partition(":")[0] for message in told] == ["generation", "accuracy", "divergence"]
    assert "writes nothing, so it has no generation" in told[0]
    assert "without a classification head" in told[1]


def test_quality_of_both_forms_agrees(run: Any) -> None:
    result, _ = run(metric("perplexity", data_config="rows"))
    assert values(result)["input", "perplexity"] == pytest.approx(values(result)["build", "perplexity"], rel=1e-4)
