"""Ten lines that say what the report says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cli.test_main import coldpress
from coldpress.cli.ending import LINES, ending
from coldpress.record import SearchRecord, read_run
from fakes.searches import made_up_run, made_up_search
from search.test_driver import SCRIPT, custom

pytestmark = pytest.mark.xdist_group("tiny_run")


def test_ten_lines_of_a_real_run(tiny_run: Path) -> None:
    lines = ending(tiny_run / "run.json")
    assert len(lines) <= LINES
    record, _ = read_run(tiny_run)
    training, parity = record.steps[0].training, record.steps[2].parity
    assert training is not None
    assert parity is not None
    text = "\n".join(lines)
    scores = {score.model: score for score in record.scores}
    before, after = (100 * (scores[model].value or 0) for model in ("input", "int4"))
    assert f"{before:.1f} % ± " in text
    assert f"→ {after:.1f} % ± " in text
    for said in (
        f"{training.loss:.3f}; held-out {training.eval_loss:.3f}",
        f"int4 KL {parity.kl:.2g}",
        str(tiny_run / "model"),
        str(tiny_run / "report.html"),
        str(tiny_run / "run.json"),
    ):
        assert said in text, said
    assert [line.split("  ")[0] for line in lines] == [
        "accuracy", "weights on disk", "training loss", "against input", "time, memory", "warnings", "model", "report",
        "record",
    ]  # fmt: skip


def test_more_figures_than_lines(tiny_run: Path, tmp_path: Path) -> None:
    written = json.loads((tiny_run / "run.json").read_text())
    written["scores"] = [{**score, "metric": f"m{number}"} for number in range(20) for score in written["scores"]]
    written["warnings"] = ["one", "one", "two"]
    path = tmp_path / "run.json"
    path.write_text(json.dumps(written))
    lines = ending(path)
    assert len(lines) == LINES
    # Twenty metrics and the size, of which two are shown; the note takes a line of its own.
    assert [line for line in lines if "19 more figures are in the report" in line]
    assert [line for line in lines if line.startswith("warnings") and line.endswith("2, in the report")]


def test_the_command_ends_with_them(workflow: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    path = tmp_path / "workflow.json"
    path.write_text(json.dumps(workflow({"mark": "a"})))
    done = coldpress("run", str(path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].split() == ["record", str(tmp_path / "output" / "run.json")]


def test_a_failed_command_says_where_its_report_is(workflow: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    path = tmp_path / "workflow.json"
    path.write_text(json.dumps(workflow({"behave": "fail"})))
    done = coldpress("run", str(path))
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1].endswith(f"why it ended: {tmp_path / 'output' / 'report.html'}")
    assert "it failed on purpose" in done.stderr


def of_search(tmp_path: Path, search: SearchRecord, **more: Any) -> list[str]:
    path = tmp_path / "run.json"
    path.write_text(made_up_run(search, **more).model_dump_json())
    return ending(path)


def test_a_search_is_one_line(tmp_path: Path) -> None:
    lines = of_search(tmp_path, made_up_search(40))
    (line,) = (line for line in lines if line.startswith("search"))
    assert (
        "trial 15 of 40 (build ModelBuilder 2, int4_block_size 32, int4_is_symmetric false, r 8): of 21 that meet"
        in line
    )
    assert len(lines) <= LINES
    long = made_up_search(40).model_copy(update={"why": "x" * 500})
    assert max(len(line) for line in of_search(tmp_path, long)) < 220


def test_a_search_that_met_nothing_tells_the_nearest_and_what_stopped_them(tmp_path: Path) -> None:
    search = made_up_search(12, state="infeasible")
    record = made_up_run(search)
    many = [score.model_copy(update={"metric": f"m{number}"}) for number in range(9) for score in record.scores]
    path = tmp_path / "run.json"
    path.write_text(record.model_copy(update={"scores": tuple(many), "warnings": ("one",)}).model_dump_json())
    lines = ending(path)
    assert len(lines) <= LINES
    at = next(place for place, line in enumerate(lines) if line.startswith("search"))
    assert "none of 12 trials meets every goal; trial 5 is handed over; the nearest:" in lines[at]
    for number, line in zip(search.nearest, lines[at + 1 : at + 4], strict=True):
        assert line.strip().startswith(f"trial {number} (build ModelBuilder")
        assert line.endswith(search.trials[number - 1].why)
    assert [line for line in lines if line.startswith("record")]


def test_the_command_of_a_search_that_met_nothing(workflow: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    (tmp_path / "own.py").write_text(SCRIPT)
    goal = {"goal": {"type": "threshold", "value": 4}}
    document = workflow(
        {"a": [9, 5, 7]},
        evaluators={"ev": {"metrics": [custom("loss", priority=1, **goal)]}},
        evaluator="ev",
        evaluate_input_model=False,
        search_strategy={"sampler": "sequential"},
    )
    path = tmp_path / "workflow.json"
    path.write_text(json.dumps(document))
    done = coldpress("run", str(path), cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    assert "these goals are not met: loss loss" in done.stderr
    end = done.stdout.rstrip().splitlines()
    at = next(place for place, line in enumerate(end) if "none of 3 trials meets every goal" in line)
    assert [line.strip() for line in end[at + 1 : at + 4]] == [
        "trial 2 (a 5) lacks 25 %: loss 5, wanted at most 4",
        "trial 3 (a 7) lacks 75 %: loss 7, wanted at most 4",
        "trial 1 (a 9) lacks 125 %: loss 9, wanted at most 4",
    ]
    assert end[-1].split() == ["record", str(tmp_path / "output" / "run.json")]
    assert coldpress("run", str(path), "search_strategy.sampler=tpe", cwd=tmp_path).returncode == 3


def test_the_command_of_a_search_of_which_nothing_can_meet_the_goals(
    workflow: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    size = {"name": "size", "type": "size_on_disk",
            "sub_types": [{"name": "bytes", "goal": {"type": "threshold", "value": 1000}}]}  # fmt: skip
    document = workflow({"weights": [4000, 2000]}, evaluators={"ev": {"metrics": [size]}}, evaluator="ev",
                        search_strategy={"sampler": "sequential"})  # fmt: skip
    path = tmp_path / "workflow.json"
    path.write_text(json.dumps(document))
    done = coldpress("run", str(path), cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    assert (
        "trial 2 (weights 2000) lacks at least 100 %: size: its weights alone are 2.0 kB, allowed are 1.0 kB"
        in done.stderr
    )
    assert "loosen the goal, or widen the space" in done.stderr
