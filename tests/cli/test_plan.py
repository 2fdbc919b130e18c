"""`coldpress plan` of a search: the space, and what of it the plans rule out before anything runs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import coldpress as library
from cli.test_main import coldpress
from coldpress.engine.plan import make_plan
from coldpress.search.outlook import first_setting, look_ahead


def size_goal(value: float, kind: str = "threshold") -> dict[str, Any]:
    size = {
        "name": "size",
        "type": "size_on_disk",
        "sub_types": [{"name": "bytes", "goal": {"type": kind, "value": value}}],
    }
    return {"evaluators": {"ev": {"metrics": [size]}}, "evaluator": "ev"}


@pytest.fixture
def written(workflow: Callable[..., dict[str, Any]], tmp_path: Path) -> Callable[..., str]:
    def write(*steps: dict[str, Any], **more: Any) -> str:
        path = tmp_path / "workflow.json"
        path.write_text(
            json.dumps(workflow(*steps, **{"search_strategy": {"sampler": "sequential"}, **size_goal(1e9), **more}))
        )
        return str(path)

    return write


def test_the_space_the_first_setting_and_what_is_out(written: Callable[..., str]) -> None:
    steps = {"a": [1, 2]}, {"behave": ["ok", "refuse"], "even": [False, True], "weights": [2000, 4000, 6000]}
    strategy = {"sampler": "random", "max_samples": 9}
    path = written(*steps, search_strategy=strategy, **size_goal(3000))
    done = coldpress("plan", path)
    assert done.returncode == 0, done.stderr
    for said in (
        "search  random over 24 settings, joint, at most 9 trials that run",
        "space   step0.a: 1, 2",
        "space   step1.behave: ok, refuse",
        "plans   12 of 24 settings are out: this pass refuses",
        "plans   8 of 24 settings are out: size: weights alone are over 3.0 kB",
        "steps   of the first setting: a 1, behave ok, weights 2000, even false",
    ):
        assert said in done.stdout, said
    told = json.loads(coldpress("plan", path, "--json").stdout)["search"]
    assert {key: told[key] for key in ("sampler", "execution_order", "size", "trials", "planned")} == {
        "sampler": "random", "execution_order": "joint", "size": 24, "trials": 9, "planned": 24,
    }  # fmt: skip
    assert told["first"] == {"step0.a": 1, "step1.behave": "ok", "step1.weights": 2000, "step1.even": False}
    assert told["dimensions"][0] == {"name": "step0.a", "choices": [1, 2]}
    assert sum(one["settings"] for one in told["out"]) == 20


def test_reasons_of_size_are_one_however_large_the_weights(written: Callable[..., str]) -> None:
    path = written({"weights": [2000, 4000, 6000, 8000]}, **size_goal(5000))
    assert "plans   2 of 4 settings are out: size: weights alone are over 5.0 kB" in coldpress("plan", path).stdout


def test_a_goal_against_the_input_knows_the_size_of_its_files(written: Callable[..., str], phi3: Path) -> None:
    total = sum(path.stat().st_size for path in phi3.iterdir() if path.suffix in (".json", ".safetensors", ".jinja"))
    path = written({"weights": [total // 4, total]}, **size_goal(50, "percent-min-improvement"))
    done = coldpress("plan", path)
    assert done.returncode == 0, done.stderr
    assert "plans   1 of 2 settings is out: size: weights alone are over" in done.stdout
    assert f"{total / 2e6:.1f} MB" in done.stdout


def test_when_no_setting_can_meet_the_goals_it_is_said(written: Callable[..., str]) -> None:
    done = coldpress("plan", written({"weights": [4000, 2000]}, **size_goal(1000)))
    assert done.returncode == 3, done.stderr
    assert "2 of 2 settings are out" in done.stdout
    assert "no setting can meet the goals" in done.stdout


def test_when_every_setting_is_refused_the_config_is_wrong(written: Callable[..., str]) -> None:
    done = coldpress("plan", written({"behave": "refuse", "a": [1, 2]}))
    assert done.returncode == 2
    assert "this pass refuses" in done.stderr


def test_a_first_setting_that_is_refused_is_no_refusal_of_the_search(written: Callable[..., str]) -> None:
    done = coldpress("plan", written({"behave": ["refuse", "ok"]}))
    assert done.returncode == 0, done.stderr
    assert "1 of 2 settings is out: this pass refuses" in done.stdout


def test_a_missing_model_is_told_as_ever(written: Callable[..., str]) -> None:
    done = coldpress("plan", written({"a": [1, 2]}, input_model={"type": "HfModel", "model_path": "./none"}))
    assert done.returncode == 2
    assert "none" in done.stderr


def test_of_a_large_space_the_first_settings_are_planned(written: Callable[..., str]) -> None:
    done = coldpress("plan", written({"a": list(range(30)), "weights": list(range(1, 21))}))
    assert "none of the first 200 settings is ruled out" in done.stdout
    assert "space   step0.a: 0, 1, 2, 3, 4, 5, 6, 7, … (30)" in done.stdout


def test_it_is_fast_and_knows_no_torch(phi3: Path, tmp_path: Path) -> None:
    saved = tmp_path / "w.json"
    made = coldpress("optimize", str(phi3), "--max-size", "6.6MB", "--save-config", str(saved), cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    loaded = library.load_config(saved)
    first, _ = first_setting(loaded)
    plan = make_plan(first)
    began = time.process_time()
    outlook = look_ahead(loaded, plan, most=48)
    # It takes 0.2 s on a free machine.
    assert time.process_time() - began < 3
    assert outlook.planned == 48
    script = f"""
import sys
from coldpress.cli.main import _root
_root(["plan", {str(saved)!r}], standalone_mode=False)
assert not {{"torch", "transformers", "optuna"}} & sys.modules.keys()
"""
    import subprocess

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "5 of 53 settings are out: size_on_disk: weights alone are over 6.6 MB" in done.stdout
