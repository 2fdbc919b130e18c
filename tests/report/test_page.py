"""The page of a run, as text: what it says, what it escapes, what it does without."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import coldpress
from coldpress.errors import StepError, StoreError
from coldpress.record import RunRecord, TrainingRecord, read_run
from coldpress.report.charts import POINTS, curve_chart, plain, smoothed
from coldpress.report.page import comparison_page, run_page, write_page
from coldpress.report.runs import Run, load_runs

pytestmark = pytest.mark.xdist_group("tiny_run")

HOSTILE = "<script>alert('x')</script><img src=http://evil.example/x>&\"'"


class Reader(html.parser.HTMLParser):
    """A page as a browser sees it: elements, their attributes, its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._skipped = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._skipped = tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._skipped = False

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


def figures(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.DOTALL)
    return {} if found is None else json.loads(found.group(1))


def hostile(record: RunRecord, count: int = 1) -> RunRecord:
    """The same run, with text that would do harm wherever a user's text may stand."""
    steps = []
    for number in range(count):
        for step in record.steps:
            training = step.training
            if training is not None and training.data is not None:
                data = training.data.model_copy(update={"name": HOSTILE, "origin": HOSTILE})
                training = training.model_copy(update={"data": data, "device": HOSTILE, "method": HOSTILE})
            steps.append(
                step.model_copy(update={"name": f"{step.name}{HOSTILE}{number}", "type": HOSTILE, "training": training})
            )
    scores = [
        score.model_copy(
            update={
                "metric": HOSTILE,
                "model": score.model if score.model == "input" else score.model + HOSTILE + "0",
                "unit": HOSTILE,
            }
        )
        for score in record.scores
    ]
    config = {"passes": {step.name: {"type": HOSTILE, HOSTILE: HOSTILE} for step in steps}}
    return record.model_copy(
        update={
            "workflow": HOSTILE,
            "steps": tuple(steps),
            "scores": tuple(scores),
            "warnings": (HOSTILE,),
            "config": config,
        }
    )


def test_a_real_run(tiny_run: Path) -> None:
    page = (tiny_run / "report.html").read_text()
    record, _ = read_run(tiny_run)
    seen = Reader(page)
    for said in (
        "Before and after", "Steps", "Training", "Machine and versions", "To do it again", record.hardware.processor,
        str(record.libraries["transformers"]), "coldpress run workflow-again.json", "perplexity", "layer by layer",
        "learning_rate 0.01", "per_device_train_batch_size 4", "weights on disk",
    ):  # fmt: skip
        assert said in seen.text, said
    assert list(figures(page)) == ["score-0", "score-1", "cost", "curve-0"]
    assert len(page) < 2_300_000, "Plotly goes in compressed"
    assert page == run_page(load_runs([tiny_run])[0]), "the record alone makes it again"


def test_every_chart_is_what_plotly_knows(tiny_run: Path) -> None:
    """Plotly's own Python side checks every name and type; colours are filled in by the page."""
    graph_objects = pytest.importorskip("plotly.graph_objects")
    runs = load_runs([tiny_run, tiny_run])
    drawn = {**figures(run_page(runs[0])), **figures(comparison_page(runs))}
    assert len(drawn) == 7
    for name, figure in drawn.items():
        text = re.sub(r"var\(--[\w-]+\)", "#123456", json.dumps(figure))
        made = graph_objects.Figure(json.loads(text))
        assert len(made.data) >= 1, name
    loss = next(trace for trace in drawn["curve-0"]["data"] if trace["name"] == "loss of a step")
    training = load_runs([tiny_run])[0].trainings["lora"]
    assert loss["y"] == list(training.losses)


def test_every_colour_is_one_of_the_style(tiny_run: Path) -> None:
    page = run_page(load_runs([tiny_run])[0])
    used = set(re.findall(r"var\((--[\w-]+)\)", page)) | set(re.findall(r'colour\("(--[\w-]+)"\)', page))
    light, dark = re.findall(r":root \{(.*?)\}", page, re.DOTALL)
    for scheme in (light, dark):
        assert used - set(re.findall(r"(--[\w-]+):", scheme)) == set()


def contrast(one: str, other: str) -> float:
    """WCAG 2.2's ratio of two colours."""

    def luminance(colour: str) -> float:
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_text_and_lines_can_be_seen(tiny_run: Path) -> None:
    page = (tiny_run / "report.html").read_text()
    for scheme in re.findall(r":root \{(.*?)\}", page, re.DOTALL):
        colour = dict(re.findall(r"--([\w-]+): (#\w{6})", scheme))
        for text, ground in (
            ("ink", "paper"), ("soft", "paper"), ("link", "paper"), ("good", "paper"), ("bad", "paper"),
            ("ink", "card"), ("ink", "warn-paper"), ("ink", "bad-paper"), ("bad", "bad-paper"),
        ):  # fmt: skip
            assert contrast(colour[text], colour[ground]) >= 4.5, (text, ground)
        for number in range(1, 7):
            assert contrast(colour[f"series-{number}"], colour["paper"]) >= 3, number


def test_it_asks_for_nothing_and_can_be_read_aloud(tiny_run: Path) -> None:
    seen = Reader((tiny_run / "report.html").read_text())
    for tag, attributes in seen.elements:
        assert not {"src", "srcset", "action", "data"} & attributes.keys(), (tag, attributes)
        assert (attributes.get("href") or "#").startswith(("#", "data:,")), attributes
        if tag == "th":
            assert attributes.get("scope") in ("row", "col")
    assert ("html", {"lang": "en"}) in seen.elements
    assert seen.count("h1") == 1
    labelled = [attributes for _, attributes in seen.elements if attributes.get("role") in ("img", "region")]
    assert labelled
    assert all(attributes.get("aria-label") for attributes in labelled)
    ids = [attributes["id"] for _, attributes in seen.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_hostile_text_is_text(tiny_run: Path, tmp_path: Path) -> None:
    run = load_runs([tiny_run])[0]
    plain_run = Reader(run_page(run))
    bad = Run(HOSTILE, run.folder, hostile(run.record), {f"lora{HOSTILE}0": run.trainings["lora"]})
    page = run_page(bad)
    seen = Reader(page)
    assert "evil.example" in seen.text
    assert seen.count("img") == 0
    assert seen.count("script") == plain_run.count("script")
    drawn = json.dumps(figures(page))
    assert "evil.example" in drawn
    assert "<script" not in drawn, "Plotly reads some HTML in texts"
    both = Reader(comparison_page([bad, Run("other " + HOSTILE, run.folder, hostile(run.record), {})]))
    assert both.count("img") == 0
    assert both.count("script") == plain_run.count("script")


def test_hundreds_of_steps_and_a_very_long_config(tiny_run: Path) -> None:
    run = load_runs([tiny_run])[0]
    record = hostile(run.record, count=100)
    config = {**record.config, "long": ["x" * 1000] * 200, "deep": {"a" * 300: {"b" * 300: "c" * 5000}}}
    page = run_page(Run("many", run.folder, record.model_copy(update={"config": config}), {}))
    seen = Reader(page)
    assert sum(tag == "th" and attributes.get("scope") == "row" for tag, attributes in seen.elements) >= 300
    assert "c" * 5000 in seen.text
    assert len(figures(page)["cost"]["data"][0]["y"]) == 40, "a chart of 300 bars could not be read"
    assert len(page) < 3_500_000


def test_without_training_without_scores_and_cached(workflow: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    document = workflow({"mark": "a"}, {"mark": "b"})
    coldpress.run(document)
    coldpress.run(document)
    seen = Reader((tmp_path / "output" / "report.html").read_text())
    assert "Training" not in seen.text
    assert "2 of 2 steps were done before it" in seen.text
    assert "not compared" in seen.text


def test_a_failed_run_leaves_a_page_that_says_why(workflow: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(StepError):
        coldpress.run(workflow({"mark": "a"}, {"behave": "fail"}))
    seen = Reader((tmp_path / "output" / "report.html").read_text())
    for said in ("What failed", "StepError", "it failed on purpose", "ask for ok", "step0"):
        assert said in seen.text, said
    assert any(attributes.get("role") == "alert" for _, attributes in seen.elements)


def test_a_proof_says_what_it_compared(tiny_run: Path) -> None:
    record = load_runs([tiny_run])[0].record
    merge = record.steps[1]
    assert merge.parity is not None
    proof = merge.parity.model_copy(update={"compared": "texts", "tokens": 17})
    changed = record.model_copy(update={"steps": (merge.model_copy(update={"parity": proof}),)})
    assert "17 texts, input computed" in Reader(run_page(Run("classes", tiny_run, changed, {}))).text


def test_a_curve_that_is_gone_is_missed_aloud(tiny_run: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_run / "run.json", tmp_path / "run.json")
    page = run_page(load_runs([tmp_path])[0])
    assert "logs/lora/training.json is missing" in Reader(page).text
    assert "curve-0" not in figures(page)
    (tmp_path / "logs" / "lora").mkdir(parents=True)
    (tmp_path / "logs" / "lora" / "training.json").write_text("{")
    with pytest.raises(StoreError, match=r"training\.json is no record"):
        load_runs([tmp_path])


def training(losses: list[float]) -> TrainingRecord:
    return TrainingRecord(steps=len(losses), seconds=1, tokens=10 * len(losses), loss=1, losses=tuple(losses))


def test_long_curves_are_thinned_to_means() -> None:
    chart = curve_chart("c", "lora", training([float(step) for step in range(25_000)]))
    trace = chart.figure["data"][0]
    assert len(trace["x"]) == len(trace["y"]) == 1000 == POINTS
    # 25 steps a point: 1 to 25 have their middle at 13, and their losses 0 to 24 the mean 12.
    assert (trace["x"][0], trace["y"][0]) == (13, 12)
    assert (trace["x"][-1], trace["y"][-1]) == (24_988, 24_987)


def test_the_smoothed_loss_has_no_pull_to_its_start() -> None:
    assert smoothed([2.0] * 50) == pytest.approx([2.0] * 50)
    # After k steps of 1 that follow k of 0 it is 1 - (1 - 0.9^k) 0.9^k / (1 - 0.9^2k).
    k = 7
    assert smoothed([0.0] * k + [1.0] * k)[-1] == pytest.approx((1 - 0.9**k) / (1 - 0.9 ** (2 * k)))


def test_numbers_too_large_for_a_chart_are_left_out(tiny_run: Path, tmp_path: Path) -> None:
    written = json.loads((tiny_run / "run.json").read_text())
    written["scores"][0].update(value=-1e308, standard_error=1e308)
    for step in written["steps"]:
        step["seconds"] = 1e308
    (tmp_path / "run.json").write_text(json.dumps(written))
    runs = load_runs([tmp_path])
    drawn = figures(run_page(runs[0]))["score-0"]["data"][0]
    assert drawn["y"][0] is None
    assert None not in drawn["y"][1:]
    assert "2 runs" in comparison_page(runs * 2)


def test_text_for_plotly() -> None:
    assert plain("<b>&lt;") == "&lt;b&gt;&amp;lt;"


def test_runs_side_by_side(tiny_run: Path, tmp_path: Path) -> None:
    changed = json.loads((tiny_run / "run.json").read_text())
    changed["config"]["passes"]["lora"]["r"] = 16
    for score in changed["scores"]:
        if score["model"] == "int4":
            score["value"] = 0.999
    for name, status in (("better", "done"), ("broken", "failed")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps({**changed, "status": status}))
    page = comparison_page(load_runs([tiny_run, tmp_path / "better", tmp_path / "broken"]))
    seen = Reader(page)
    for said in ("3 runs compared", "passes.lora.r", "99.9 %", "Of the last model that each run measured"):
        assert said in seen.text, said
    drawn = figures(page)["compared-0"]["data"][0]
    assert drawn["x"] == ["input model", "output", "better"], "what failed handed nothing over"
    assert drawn["y"][2] == pytest.approx(99.9)
    bold = re.findall(r'<strong class="good">([^<]+)</strong>', page)
    assert len(bold) == 1
    assert bold[0].startswith("99.9 %")


@pytest.mark.parametrize(
    ("config_file", "name"),
    [("/a/workflow.json", "workflow-again.json"), ("/a/b.yaml", "b-again.json"), (None, "workflow.json")],
)
def test_doing_it_again_writes_over_no_config(tiny_run: Path, config_file: str | None, name: str) -> None:
    run = load_runs([tiny_run])[0]
    changed = run.record.model_copy(update={"config_file": config_file})
    seen = Reader(run_page(Run("again", run.folder, changed, {})))
    assert f"Save the config below as {name}" in seen.text
    assert f"coldpress run {name}" in seen.text


def test_names_tell_runs_apart(tiny_run: Path, tmp_path: Path) -> None:
    for folder in ("a/output", "b/output"):
        (tmp_path / folder).mkdir(parents=True)
        shutil.copy(tiny_run / "run.json", tmp_path / folder / "run.json")
    assert [run.name for run in load_runs([tmp_path / "a" / "output", tmp_path / "b" / "output"])] == [
        "a/output",
        "b/output",
    ]
    assert [run.name for run in load_runs([tiny_run, tiny_run])] == ["output (1)", "output (2)"]
    assert [run.name for run in load_runs([tiny_run])] == ["tiny"]
    for folder, changed in (("a", {"workflow": "other"}), ("b", {"workflow": "default_workflow", "steps": []})):
        record = {**json.loads((tiny_run / "run.json").read_text()), **changed}
        (tmp_path / folder / "run.json").write_text(json.dumps(record))
    assert [run.name for run in load_runs([tiny_run, tmp_path / "a"])] == ["tiny", "other"]
    assert [run.name for run in load_runs([tiny_run, tmp_path / "b"])] == ["output", "b"], "never by what was done"


def test_a_page_is_written_by_two_at_once(tmp_path: Path) -> None:
    """Each writes beside the place under a name of its own, and the last to end wins."""
    path = tmp_path / "report.html"
    pages = [str(number) * 100_000 for number in range(8)]
    with ThreadPoolExecutor(len(pages)) as pool:
        for _ in range(20):
            list(pool.map(lambda page: write_page(path, page), pages))
    assert path.read_text() in pages
    assert list(tmp_path.iterdir()) == [path]


def test_a_page_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        write_page(tmp_path / "file" / "report.html", "x")
