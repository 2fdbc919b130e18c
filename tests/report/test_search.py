"""What a report says of a search: the page as text, and what its charts are made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coldpress.record import GoalRecord, RunRecord, SearchRecord
from coldpress.report.page import comparison_page, run_page
from coldpress.report.runs import Run, load_runs
from coldpress.report.search import history_chart, pareto_chart
from fakes.searches import made_up_run, made_up_search
from report.test_page import HOSTILE, Reader, figures


def page(search: SearchRecord | None, **more: Any) -> str:
    return run_page(Run("searched", Path("output"), made_up_run(search, **more), {}))


def hostile_search() -> SearchRecord:
    search = made_up_search(12)
    trials = tuple(
        one.model_copy(
            update={
                "settings": {f"build.{HOSTILE}": HOSTILE, f"lora.{HOSTILE}": [HOSTILE]},
                "why": HOSTILE,
                "scores": tuple(score.model_copy(update={"metric": HOSTILE, "unit": HOSTILE}) for score in one.scores),
            }
        )
        for one in search.trials
    )
    objectives = tuple(one.model_copy(update={"metric": HOSTILE, "unit": HOSTILE}) for one in search.objectives)
    more = {
        "trials": trials,
        "objectives": objectives,
        "why": HOSTILE,
        "stopped": HOSTILE,
        "config": {HOSTILE: HOSTILE},
    }
    return search.model_copy(update=more)


def traces(chart: Any) -> dict[str, Any]:
    return {trace["name"]: trace for trace in chart.figure["data"]}


def test_the_winner_why_and_every_trial() -> None:
    search = made_up_search(40)
    seen = Reader(page(search))
    winner = search.trials[(search.winner or 0) - 1]
    for said in (
        f"Trial {winner.number} is handed over: build ModelBuilder",
        "Of 21 that meet every goal",
        "tpe (joint, seed 1) tried 40 of 1,440 settings in 15 min 00 s",
        "It ended at max_time: 900 s.",
        "Steps worked on: 77; found done: 3.",
        "the step lora failed: loss is no number at step 12",
        "size: its weights alone are 8.0 MB, allowed are 6.6 MB",
        "on the Pareto front",
        'build[ModelBuilder].int4_block_size: 32, 64, 128',
    ):  # fmt: skip
        assert said in seen.text, said
    assert "Nearest" not in seen.text
    assert list(figures(page(search)))[-2:] == ["pareto", "history"]


def test_a_run_without_a_search_says_nothing_of_one() -> None:
    seen = Reader(page(None))
    assert "Search" not in seen.text
    assert not {"pareto", "history"} & figures(page(None)).keys()


def test_two_objectives_show_the_front_of_the_search() -> None:
    search = made_up_search(40, objectives=2)
    chart = pareto_chart(search, made_up_run(None).scores[:2])
    assert chart is not None
    drawn = traces(chart)
    values = {one.number: (one.scores[1].value, one.scores[0].value) for one in search.trials if len(one.scores) > 1}
    front = sorted({values[number] for number in search.front})
    assert len(front) > 2
    assert list(zip(drawn["Pareto front"]["x"], drawn["Pareto front"]["y"], strict=True)) == front
    assert (drawn["handed over"]["x"], drawn["handed over"]["y"]) == tuple([one] for one in values[search.winner or 0])
    assert drawn["input model"]["x"] == [made_up_run(None).scores[1].value]
    assert chart.figure["layout"]["xaxis"]["title"]["text"] == "time_per_output_token_p50, ms"
    assert "speed: time_per_output_token_p50 (lower is better) against perplexity (lower is better)" in chart.caption


def test_beside_one_objective_stands_the_number_with_a_goal_and_their_front() -> None:
    both, one = made_up_search(40, objectives=2), made_up_search(40, objectives=1)
    assert len(one.front) < len(both.front)
    drawn = [traces(pareto_chart(search, ()))["Pareto front"] for search in (both, one)]
    assert drawn[0] == drawn[1]


def test_higher_is_better_turns_the_front_round() -> None:
    search = made_up_search(40, objectives=1)
    turned = search.model_copy(
        update={
            "objectives": (search.objectives[0].model_copy(update={"higher_is_better": True}),),
        }
    )
    front = traces(pareto_chart(turned, ()))["Pareto front"]
    slowest = max(one.scores[1].value or 0.0 for one in search.trials if one.state == "feasible")
    assert front["x"][-1] == slowest
    assert front["y"] == sorted(front["y"])


def test_one_number_alone_has_a_history_and_no_scatter() -> None:
    search = made_up_search(6, objectives=1, state="feasible")
    alone = search.model_copy(
        update={"trials": tuple(one.model_copy(update={"scores": one.scores[1:]}) for one in search.trials)}
    )
    assert pareto_chart(alone, ()) is None
    chart = history_chart(alone)
    assert chart is not None
    best = traces(chart)["best so far"]
    assert best["y"] == sorted(best["y"], reverse=True)
    assert best["x"][-1] == 6


def test_without_a_feasible_trial_the_nearest_are_told() -> None:
    search = made_up_search(12, state="infeasible")
    seen = Reader(page(search))
    assert f"No trial meets every goal; trial {search.winner} is handed over" in seen.text
    assert "Nearest" in seen.text
    assert len(search.nearest) == 3
    for number in search.nearest:
        assert f"trial {number} (build ModelBuilder" in seen.text
        assert search.trials[number - 1].why in seen.text
    # No trial came to the objective, which is dearer: the history is of what was measured.
    history = history_chart(search)
    assert history is not None
    assert history.figure["layout"]["yaxis"]["title"]["text"] == "perplexity"
    assert len(traces(history)["misses a goal"]["y"]) == 12
    assert pareto_chart(search, ()) is None


def test_a_search_of_which_every_trial_failed() -> None:
    search = made_up_search(4, state="failed")
    error = {"type": "StepError", "message": "all 4 trials failed", "exit_code": 1}
    record = RunRecord.model_validate({**made_up_run(search, status="failed").model_dump(), "error": error})
    text = run_page(Run("failed", Path("output"), record, {}))
    seen = Reader(text)
    for said in ("What failed", "all 4 trials failed", "Nothing is handed over", "4 failed", "loss is no number"):
        assert said in seen.text, said
    assert not {"pareto", "history"} & figures(text).keys(), "there is nothing to draw"


def test_a_single_trial() -> None:
    text = page(made_up_search(1, objectives=1, state="feasible"))
    assert "Trial 1 is handed over" in Reader(text).text
    assert "All 1 trials" not in text
    assert "history" not in figures(text)
    assert "Pareto front" not in [trace["name"] for trace in figures(text)["pareto"]["data"]]


def test_what_was_done_of_the_first_steps_alone_is_no_candidate() -> None:
    search = made_up_search(10, state="feasible")
    part = tuple(one.model_copy(update={"whole": one.number > 6}) for one in search.trials)
    parted = search.model_copy(update={"trials": part, "front": (), "winner": 7})
    assert "the first steps alone, meets every goal" in Reader(page(parted)).text
    drawn = traces(pareto_chart(parted, ()))
    assert len(drawn["meets every goal"]["x"]) + 1 == 4
    history = history_chart(parted)
    assert history is not None
    assert traces(history)["best so far"]["x"][0] == 7


def test_what_was_not_proved_says_which_trial_is_no_worse() -> None:
    search = made_up_search(10, state="feasible")
    winner = search.trials[(search.winner or 0) - 1]
    beaten = {"state": "unproved", "why": f"trial {winner.number} is no worse"}
    some = tuple(one if one is winner else one.model_copy(update=beaten) for one in search.trials)
    raced = search.model_copy(update={"trials": some, "front": (winner.number,)})
    seen = Reader(page(raced)).text
    assert seen.count("not proved, out of the race") >= 9
    assert seen.count(f"trial {winner.number} is no worse") == 9
    assert "1 feasible" in seen
    assert "9 unproved" in seen
    assert "not proved, out of the race" in traces(pareto_chart(raced, ()))


@pytest.mark.parametrize(("last", "apart"), [(2, 1), (8, 1), (9, 2), (40, 5), (41, 10), (500, 100), (1000, 200)])
def test_trials_are_counted_in_whole_numbers(last: int, apart: int) -> None:
    chart = history_chart(made_up_search(last, state="feasible"))
    assert chart is not None
    axis = chart.figure["layout"]["xaxis"]
    assert (axis["dtick"], axis["tick0"]) == (apart, 0)


def test_titles_of_axes_have_room() -> None:
    search = made_up_search(5, state="feasible")
    objectives = (search.objectives[0].model_copy(update={"metric": "m" * 90, "sub_type": "s" * 90}),)
    long = search.model_copy(
        update={
            "objectives": objectives,
            "trials": tuple(
                one.model_copy(
                    update={
                        "scores": tuple(
                            score.model_copy(update={"metric": "m" * 90, "sub_type": "s" * 90})
                            if score.metric == "speed" else score for score in one.scores
                        )
                    }
                )
                for one in search.trials
            ),
        }
    )  # fmt: skip
    chart = history_chart(long)
    assert chart is not None
    assert chart.figure["layout"]["yaxis"]["title"]["text"] == "m" * 25 + "…, ms"
    assert "m" * 90 + ": " + "s" * 90 in chart.caption


def test_hundreds_of_trials() -> None:
    text = page(made_up_search(500))
    seen = Reader(text)
    rows = [a for tag, a in seen.elements if tag == "th" and a.get("scope") == "row"]
    assert len(rows) >= 500
    assert ("details", {}) in seen.elements, "a long table is shut"
    assert len(text) < 2_600_000


def test_hostile_text_is_text() -> None:
    text = page(hostile_search())
    seen = Reader(text)
    assert "evil.example" in seen.text
    assert seen.count("img") == 0
    assert seen.count("script") == Reader(page(made_up_search(12))).count("script")
    drawn = figures(text)
    assert {"pareto", "history"} <= drawn.keys()
    for name in ("pareto", "history"):
        said = json.dumps(drawn[name])
        assert "evil.example" in said
        assert "<script" not in said, "Plotly reads some HTML in texts"
        assert "<img" not in said


def test_charts_are_what_plotly_knows() -> None:
    graph_objects = pytest.importorskip("plotly.graph_objects")
    for search in (made_up_search(40), made_up_search(40, objectives=1), hostile_search()):
        for name in ("pareto", "history"):
            text = json.dumps(figures(page(search))[name]).replace("var(--series-", "#12345")
            made = graph_objects.Figure(json.loads(text.replace(')"', '"')))
            assert len(made.data) >= 2


def test_a_comparison_says_which_search_chose_a_run(tmp_path: Path) -> None:
    found = {"met": made_up_search(40), "unmet": made_up_search(12, state="infeasible"), "none": None}
    for name, search in found.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(made_up_run(search).model_dump_json())
    seen = Reader(comparison_page(load_runs([tmp_path / name for name in found])))
    assert "chosen by" in seen.text
    assert "tpe, 40 of 1,440 settings: trial 15 (build ModelBuilder 2" in seen.text
    assert "it misses a goal" in seen.text
    only = Reader(comparison_page(load_runs([tmp_path / "none", tmp_path / "none"])))
    assert "chosen by" not in only.text


def test_goals_are_said_in_the_units_of_their_scores() -> None:
    run = made_up_run(None)
    asked = GoalRecord(type="threshold", value=6.6e6, bound=6.6e6, met=False, margin=-4000.0)
    size = run.scores[2].model_copy(update={"metric": "size", "sub_type": "bytes", "unit": "bytes", "value": 6604000.0})
    kept = asked.model_copy(update={"type": "percent-max-degradation", "value": 2.0, "bound": 34.0, "met": True})
    scores = (size.model_copy(update={"goal": asked}), run.scores[2].model_copy(update={"goal": kept, "value": 33.0}))
    reader = Reader(run_page(Run("r", Path("output"), run.model_copy(update={"scores": scores}), {})))
    said = " ".join(reader.text.split())
    assert "size: bytes of build: 6.604 MB, wanted at most 6.600 MB: not met" in said
    assert "perplexity of build: 33, wanted at most 34 (percent-max-degradation 2): met" in said
