"""Reports in a real browser: drawn, quiet, asking for nothing, on every screen and on paper."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import coldpress
from coldpress.errors import StepError
from coldpress.report.page import comparison_page, run_page, write_page
from coldpress.report.runs import Run, load_runs
from fakes.chromium import Chromium, chromium_program
from fakes.searches import made_up_run, made_up_search
from report.test_page import HOSTILE, hostile
from report.test_search import hostile_search

pytestmark = [
    pytest.mark.xdist_group("tiny_run"),
    pytest.mark.skipif(
        os.name != "posix" or chromium_program() is None,
        reason="needs Chromium (apt-get install chromium), and pipes as on POSIX",
    ),
]

WIDER_THAN_THEIR_PLACE = """
[...document.querySelectorAll('.plot')].filter((place) =>
  [...place.querySelectorAll('svg.main-svg')].some((svg) => svg.getBoundingClientRect().width > place.clientWidth + 1)
).map((place) => place.id)
"""
TITLES_OUTSIDE = """
[...document.querySelectorAll('#pareto, #history')].flatMap((place) => {
  const frame = place.getBoundingClientRect();
  return [...place.querySelectorAll('.xtitle, .ytitle')].map((title) => title.getBoundingClientRect()).filter(
    (box) => box.left < frame.left - 1 || box.right > frame.right + 1
      || box.top < frame.top - 1 || box.bottom > frame.bottom + 1
  ).map(() => place.id);
})
"""
LEGENDS_OVER_PLOTS = """
[...document.querySelectorAll('#pareto, #history')].filter((place) => {
  const legend = place.querySelector('.legend').getBoundingClientRect();
  const points = [...place.querySelectorAll('.scatterlayer .point')];
  return points.some((one) => one.getBoundingClientRect().top < legend.bottom - 3);
}).map((place) => place.id)
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    with Chromium() as opened:
        yield opened


def assert_quiet(browser: Chromium, page: Path) -> None:
    assert browser.complaints == []
    assert browser.requests == [page.resolve().as_uri()], "it asked for more than itself"


def drawn(browser: Chromium) -> list[str]:
    """Charts that Plotly drew something into: a curve, points or bars."""
    shapes = ".scatterlayer path, .scatterlayer .point, .barlayer .point path"
    found: list[str] = browser.evaluate(
        f"[...document.querySelectorAll('.plot')].filter((p) => p.querySelector('{shapes}')).map((p) => p.id)"
    )
    return found


def test_a_real_run(browser: Chromium, tiny_run: Path) -> None:
    page = tiny_run / "report.html"
    browser.open(page)
    assert_quiet(browser, page)
    assert drawn(browser) == ["score-0", "score-1", "cost", "curve-0"]
    assert browser.evaluate("document.querySelectorAll('#curve-0 .scatterlayer .trace').length") == 4
    assert browser.evaluate("document.querySelectorAll('#cost .barlayer .trace').length") == 4
    assert browser.evaluate("document.querySelectorAll('#score-0 .errorbar').length") == 3
    assert browser.evaluate("document.body.innerText").count("±") > 4


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_no_screen_is_too_narrow(browser: Chromium, tiny_run: Path, width: int) -> None:
    browser.open(tiny_run / "report.html", width=width)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(WIDER_THAN_THEIR_PLACE) == []
    assert len(drawn(browser)) == 4
    cell = "document.querySelector('#steps tbody td')"
    stacked = browser.evaluate(f"getComputedStyle({cell}).display === 'grid'")
    assert stacked == (width < 640), "on a phone a row is a list"


def test_light_and_dark(browser: Chromium, tiny_run: Path) -> None:
    seen = {}
    for dark in (False, True):
        browser.open(tiny_run / "report.html", dark=dark)
        ground = browser.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        text = browser.evaluate("getComputedStyle(document.querySelector('#curve-0 .xtick text')).fill")
        line = browser.evaluate("getComputedStyle(document.querySelector('#curve-0 path.js-line')).stroke")
        seen[dark] = (ground, text, line)
    assert seen[False][0] == "rgb(255, 255, 255)"
    assert seen[True][0] == "rgb(15, 20, 25)"
    assert all(light != dark for light, dark in zip(seen[False], seen[True], strict=True))
    # The reader changes his mind while the page is open.
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "light"}])
    fill = "getComputedStyle(document.querySelector('#curve-0 .xtick text')).fill"
    browser.wait(lambda: browser.evaluate(fill) == seen[False][1], "drawn again in light colours")


def test_on_paper(browser: Chromium, tiny_run: Path, tmp_path: Path) -> None:
    browser.open(tiny_run / "report.html", dark=True)
    browser.pdf(tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF-")
    assert browser.evaluate("[...document.querySelectorAll('details')].every((part) => part.open)"), "all is printed"
    browser.call("Emulation.setDeviceMetricsOverride", width=718, height=1000, deviceScaleFactor=1, mobile=False)
    browser.call(
        "Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}]
    )
    ground = browser.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert ground == "rgb(255, 255, 255)", "no ink for a dark ground"
    browser.wait(lambda: browser.evaluate(WIDER_THAN_THEIR_PLACE) == [], "charts fit the paper")
    browser.call("Emulation.setEmulatedMedia", media="", features=[])


def test_hostile_text_does_nothing(browser: Chromium, tiny_run: Path, tmp_path: Path) -> None:
    run = load_runs([tiny_run])[0]
    bad = Run(HOSTILE, run.folder, hostile(run.record, count=3), {f"lora{HOSTILE}0": run.trainings["lora"]})
    page = tmp_path / "bad.html"
    for text in (run_page(bad), comparison_page([bad, run])):
        write_page(page, text)
        browser.open(page)
        assert_quiet(browser, page)
        assert browser.evaluate("document.querySelectorAll('main img, main script').length") == 0
        assert drawn(browser)
        assert "evil.example" in browser.evaluate("document.querySelector('.plot').textContent")


def test_hundreds_of_steps(browser: Chromium, tiny_run: Path, tmp_path: Path) -> None:
    run = load_runs([tiny_run])[0]
    config = {"long": ["x" * 1000] * 200, "deep": {"a" * 300: "c" * 5000}}
    many = hostile(run.record, count=100).model_copy(update={"config": config})
    page = tmp_path / "many.html"
    write_page(page, run_page(Run("many", run.folder, many, {})))
    browser.open(page, width=390)
    assert_quiet(browser, page)
    assert browser.evaluate("document.querySelectorAll('#steps tbody tr').length") == 300
    assert browser.evaluate("document.documentElement.scrollWidth") <= 390


def test_runs_side_by_side(browser: Chromium, tiny_run: Path, tmp_path: Path) -> None:
    copies = [tmp_path / name for name in ("one", "two")]
    for copy in copies:
        shutil.copytree(tiny_run, copy)
    page = tmp_path / "comparison.html"
    write_page(page, comparison_page(load_runs([tiny_run, *copies])))
    for width in (390, 1280):
        browser.open(page, width=width)
        assert_quiet(browser, page)
        assert drawn(browser) == ["compared-0", "compared-1", "losses"]
        assert browser.evaluate("document.documentElement.scrollWidth") <= width


OUTSIDE_THEIR_CELL = """
[...document.querySelectorAll('.scroll')].filter((place) => place.scrollWidth > place.clientWidth).map(
  (place) => place.ariaLabel
)
"""
OVER_FIGURES = """
[...document.querySelectorAll('#results tbody td')].filter((cell) => {
  const label = getComputedStyle(cell, '::before');
  return label.content !== 'none' && label.whiteSpace === 'nowrap';
}).length
"""
ROOM_OF_CHARTS = """
[...document.querySelectorAll('#results .plot .nsewdrag')].map((place) => place.getBoundingClientRect().height)
"""
CUT_OFF = """
[...document.querySelectorAll('.plot')].filter((place) => {
  const frame = place.getBoundingClientRect();
  return [...place.querySelectorAll('.xtick text, .legendtext')].map((one) => one.getBoundingClientRect()).some(
    (box) => box.left < frame.left - 1 || box.right > frame.right + 1 || box.bottom > frame.bottom + 1
  );
}).map((place) => place.id)
"""


@pytest.mark.parametrize("width", [320, 400, 1200, 1700])
def test_runs_with_long_names_side_by_side(browser: Chromium, tiny_run: Path, tmp_path: Path, width: int) -> None:
    run = load_runs([tiny_run])[0]
    deep = {"pre_process_data_config": {"text_template_of_" + "a_long_name_" * 4: "x"}}
    others = [run.record.model_copy(update={"config": {**run.record.config, "data": deep}}), run.record]
    names = ["fine-tuned-on-all-phrases-rank-64-", "HuggingFaceTB/SmolLM2: LoRA → MergeAdapterWeights → "]
    runs = [
        Run(name + str(place), run.folder, record, run.trainings)
        for place, (name, record) in enumerate(zip(names, others, strict=True))
    ]
    page = tmp_path / "comparison.html"
    write_page(page, comparison_page(runs))
    browser.open(page, width=width)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(OUTSIDE_THEIR_CELL) == [], "no table is wider than the page"
    assert browser.evaluate(OVER_FIGURES) == 0, "no name is written over a figure"
    assert min(browser.evaluate(ROOM_OF_CHARTS)) > 100, "names leave the charts their room"
    assert browser.evaluate(CUT_OFF) == []


def test_a_failed_run_and_one_without_charts(
    browser: Chromium, workflow: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    with pytest.raises(StepError):
        coldpress.run(workflow({"behave": "fail"}))
    page = tmp_path / "output" / "report.html"
    browser.open(page)
    assert_quiet(browser, page)
    assert "it failed on purpose" in browser.evaluate("document.querySelector('[role=alert]').innerText")
    assert browser.evaluate("document.querySelectorAll('.plot').length") == 0
    assert "Plotly" not in page.read_text()[:200_000], "what draws nothing carries no Plotly"


def test_without_scripts_all_figures_are_there(browser: Chromium, tiny_run: Path) -> None:
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.call("Page.navigate", url=(tiny_run / "report.html").resolve().as_uri())
        text = "document.body?.innerText"
        browser.wait(lambda: "Held-out losses" in str(browser.evaluate(text)), "loaded")
        record = json.loads((tiny_run / "run.json").read_text())
        assert browser.evaluate("document.querySelector('.plot').offsetHeight") == 0, "no empty frames"
        assert f"{record['steps'][0]['training']['eval_loss']:.4f}" in browser.evaluate(text)
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)


@pytest.mark.parametrize("width", [320, 390, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_a_search(browser: Chromium, tmp_path: Path, width: int, dark: bool) -> None:
    page = tmp_path / "search.html"
    write_page(page, run_page(Run("searched", tmp_path, made_up_run(made_up_search(40)), {})))
    browser.open(page, width=width, dark=dark)
    assert_quiet(browser, page)
    assert drawn(browser)[-2:] == ["pareto", "history"]
    assert browser.evaluate("document.querySelectorAll('#pareto .scatterlayer .point').length") == 22
    assert browser.evaluate("document.querySelectorAll('#history .scatterlayer .point').length") == 40
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(WIDER_THAN_THEIR_PLACE) == []
    assert browser.evaluate(TITLES_OUTSIDE) == [], "no title is cut off"
    assert browser.evaluate(LEGENDS_OVER_PLOTS) == []
    ticks = browser.evaluate("[...document.querySelectorAll('#history .xtick text')].map((one) => one.textContent)")
    assert all(tick.isdigit() for tick in ticks)
    assert len(ticks) == len(set(ticks))


def test_a_search_on_paper_and_of_many_trials(browser: Chromium, tmp_path: Path) -> None:
    page = tmp_path / "search.html"
    write_page(page, run_page(Run("searched", tmp_path, made_up_run(made_up_search(500)), {})))
    browser.open(page)
    assert_quiet(browser, page)
    assert browser.evaluate("document.querySelectorAll('#history .scatterlayer .point').length") == 500
    browser.pdf(tmp_path / "search.pdf")
    assert browser.evaluate("[...document.querySelectorAll('details')].every((part) => part.open)"), "all is printed"


def test_a_search_with_hostile_text(browser: Chromium, tmp_path: Path) -> None:
    page = tmp_path / "search.html"
    write_page(page, run_page(Run("searched", tmp_path, made_up_run(hostile_search()), {})))
    browser.open(page, width=390)
    assert_quiet(browser, page)
    assert browser.evaluate("document.querySelectorAll('main img, main script').length") == 0
    assert browser.evaluate("document.documentElement.scrollWidth") <= 390
