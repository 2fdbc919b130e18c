"""What a run says while it goes: narrow terminals, pipes, JSON lines."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from coldpress.cli.display import JsonLines, PlainLines, Terminal
from coldpress.cli.figures import fitted, position, progress_figures
from coldpress.events import (
    EvaluationLoss,
    Event,
    Message,
    ParityMeasured,
    Progress,
    RunStarted,
    ScoreMeasured,
    SearchFinished,
    SearchStarted,
    StepFinished,
    StepStarted,
    TrialFinished,
    event_from_dict,
)

VALUES = {
    "loss": 0.46691,
    "tokens_per_second": 2017.4,
    "eta_seconds": 30.2,
    "learning_rate": 1.39e-3,
    "grad_norm": 1.3,
    "eval_loss": 0.5012,
    "best_eval_loss": 0.4987,
    "memory_bytes": 1.2e9,
}


def training(done: int, total: int = 153, **values: float) -> Progress:
    return Progress("lora", done, total, "steps", {**VALUES, **values})


def test_figures_in_the_order_they_are_wanted() -> None:
    assert progress_figures(training(51)) == [
        "loss 0.4669", "30 s left", "2,017 tok/s", "lr 0.00139", "eval loss 0.5012", "best eval loss 0.4987",
        "memory 1.2 GB", "grad norm 1.3",
    ]  # fmt: skip
    assert "left" not in " ".join(progress_figures(training(153)))
    assert progress_figures(Progress("x", 1, 2, "", {"vram_bytes": 3e9})) == ["vram 3.0 GB"]
    assert position(Progress("build", 3.1e9, 7.6e9, "B")) == "3.1 GB of 7.6 GB"
    assert position(training(51)) == "51/153 steps"


@pytest.mark.parametrize("width", [1, 8, 11, 12, 22, 40, 200])
def test_a_line_never_exceeds_its_width(width: int) -> None:
    line = fitted(["loss 0.4669", "30 s left", "2,017 tok/s"], width)
    assert len(line) <= width
    assert (line == "loss 0.4669") == (11 <= width < 22)
    assert ("tok/s" in line) == (width >= 35)


class Lines(PlainLines):
    """Plain lines, kept."""

    def __init__(self, between: float) -> None:
        super().__init__(between)
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


def shown(sink: Lines, *events: Event) -> list[str]:
    for event in events:
        sink(event)
    return [re.sub("\x1b\\[[0-9;]*m", "", line) for line in sink.lines]


def test_piped_lines_of_a_training() -> None:
    lines = shown(
        Lines(0),
        RunStarted("w", ("lora", "merge")),
        StepStarted("lora", "LoRA"),
        training(51),
        EvaluationLoss("lora", 60, 0.5012, 0.5012, 60),
        EvaluationLoss("lora", 120, 0.52, 0.5012, 60),
        training(153, loss=0.21),
        StepFinished("lora", "LoRA", False, 39.2, 1_214_000_000),
    )
    rest = "2,017 tok/s  lr 0.00139  eval loss 0.5012  best eval loss 0.4987  memory 1.2 GB  grad norm 1.3"
    assert lines == [
        f"lora   51/153 steps (33%)  loss 0.4669  30 s left  {rest}",
        "lora   evaluation loss 0.5012 at step 60 (best so far)",
        "lora   evaluation loss 0.5200 at step 120 (best 0.5012 at step 60)",
        f"lora   153/153 steps (100%)  loss 0.21  {rest}",
        "lora   done  LoRA  39 s  peak 1.2 GB",
    ]


def test_a_pipe_gets_a_line_now_and_then_and_the_last_loss() -> None:
    steps = [training(done) for done in range(1, 154)]
    lines = shown(Lines(3600), RunStarted("w", ("lora",)), StepStarted("lora", "LoRA"), *steps)
    assert [line.split()[1] for line in lines] == ["153/153"]


def test_a_short_phase_prints_nothing_and_a_long_one_says_what_it_is() -> None:
    tensors = [Progress("merge", done, 39, "tensors", {"memory_bytes": 1e8}) for done in range(1, 40)]
    started = RunStarted("w", ("merge",))
    assert shown(Lines(3600), started, StepStarted("merge", "MergeAdapterWeights"), *tensors) == []
    proof = shown(Lines(0), started, StepStarted("merge", "parity"), *tensors[-1:])
    assert proof == ["merge  proof: 39/39 tensors (100%)  memory 100.0 MB"]
    score = shown(Lines(0), started, StepStarted("input", "evaluate", detail="accuracy"), *tensors[:1])
    assert score == ["merge  evaluation accuracy: 1/39 tensors (3%)  memory 100.0 MB"]


@pytest.mark.parametrize("width", [24, 40, 80, 200])
def test_the_live_view_fits_the_terminal(width: int) -> None:
    out = io.StringIO()
    terminal = Terminal(Console(file=out, width=width, height=20, force_terminal=True, highlight=False))

    def drawn() -> list[str]:
        paper = Console(file=io.StringIO(), width=width, highlight=False)
        with paper.capture() as capture:
            paper.print(terminal._render())
        return capture.get().rstrip("\n").split("\n")

    terminal(RunStarted("w", ("fine_tune_the_whole_thing_with_a_long_name", "merge")))
    terminal(StepStarted("fine_tune_the_whole_thing_with_a_long_name", "LoRA"))
    assert drawn()[0].startswith("fine_tune")
    terminal(training(51))
    lines = drawn()
    assert len(lines) == 2
    assert all(len(line) <= width for line in lines)
    assert lines[1].startswith("  loss 0.4669")
    assert ("2,017 tok/s" in lines[1]) == (width >= 37)
    assert "51/153 steps" in lines[0]
    terminal(Message("info", "x" * 300))
    terminal.close()
    assert "x" * 20 in out.getvalue()


def test_the_live_view_is_empty_between_phases() -> None:
    console = Console(file=io.StringIO(), width=60, force_terminal=True)
    terminal = Terminal(console)
    terminal(StepStarted("lora", "LoRA"))
    terminal(StepFinished("lora", "LoRA", False, 1.0))
    assert str(terminal._render()) == ""
    terminal.close()


def test_nothing_stale_is_drawn_beside_a_score() -> None:
    """What is printed while the view stands redraws it: the phase must be over by then."""
    out = io.StringIO()
    terminal = Terminal(Console(file=out, width=80, height=20, force_terminal=True, highlight=False))
    terminal(StepStarted("int4", "evaluate", detail="accuracy"))
    terminal(Progress("int4", 160, 200, "records"))
    before = len(out.getvalue())
    terminal(ScoreMeasured("int4", "accuracy", 0.5, 0.01, 200))
    terminal.close()
    assert "160/200" not in out.getvalue()[before:]


def test_json_lines_read_back(capsys: pytest.CaptureFixture[str]) -> None:
    events: list[Event] = [training(51), EvaluationLoss("lora", 120, 0.52, 0.5012, 60)]
    for event in events:
        JsonLines()(event)
    assert [event_from_dict(json.loads(line)) for line in capsys.readouterr().out.splitlines()] == events


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_a_run_on_a_narrow_terminal(workflow: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """A real command on a real terminal of 44 columns, drawn by what it wrote."""
    import pty

    path = tmp_path / "workflow.json"
    path.write_text(json.dumps(workflow({"seconds": 1.5})))
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "coldpress", "run", str(path)],
        stdout=slave, stderr=slave, stdin=slave, env={**os.environ, "COLUMNS": "44", "LINES": "30", "TERM": "xterm"},
    )  # fmt: skip
    os.close(slave)
    text = b""
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        text += part
    os.close(master)
    assert process.wait(timeout=60) == 0
    drawn = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.decode()).replace("\r", "\n").split("\n")
    live = [line for line in drawn if "ticks" in line]
    assert any(re.search(r"step0 Fake  \d+/10 ticks", line) for line in live), drawn
    assert all(len(line) <= 44 for line in live)


def test_a_proof_says_what_it_compared() -> None:
    proof = ParityMeasured("merge", 0.0, 1.0, 2.0, 2.0, 0.0, 17, True, "KL 0.001", compared="texts")
    (line,) = shown(Lines(0), RunStarted("w", ("merge",)), proof)
    assert "(17 texts; limit KL 0.001)" in line


SEARCH: list[Event] = [
    SearchStarted("w", "tpe", 1440, 16),
    StepStarted("trial 1 build", "ModelBuilder"),
    StepFinished("trial 1 build", "ModelBuilder", False, 1.0),
    ScoreMeasured("trial 1 build", "perplexity", 31.5, 0.4, 4000),
    Message("warning", "no room for more", "trial 1 build"),
    TrialFinished(1, {"build.int4_block_size": 32, "lora.r": 8}, "feasible", "", {"speed p50": "4 ms"}, 12.4, True),
    TrialFinished(2, {"build.int4_block_size": 64, "lora.r": 8}, "feasible", "", {"speed p50": "5 ms"}, 11.0, False),
    TrialFinished(3, {"a.r": 1, "b.r": 2}, "infeasible", "perplexity 36, wanted at most 34", {}, 3.0, False),
    TrialFinished(4, {}, "failed", "loss is no number", {}, 2.0, False),
    TrialFinished(5, {"x": "y"}, "pruned", "size: its weights alone are 8.0 MB, allowed are 6.6 MB", {}, 0.0, False),
    TrialFinished(6, {"x": "z"}, "unproved", "trial 1 is no worse", {"speed p50": "4 ms"}, 1.0, False),
    SearchFinished(6, 2, 1, "of 2 that meet every goal, the best in speed p50, 4 ms", 29.0, "", 1),
]


def test_lines_of_a_search() -> None:
    lines = shown(Lines(0), RunStarted("w", ()), *SEARCH)
    assert lines == [
        "search  tpe over 1,440 settings, at most 16 trials that run",
        "trial 1 build  warning  no room for more",
        "trial  1  int4_block_size 32, r 8  best so far  speed p50 4 ms  12 s",
        "trial  2  int4_block_size 64, r 8  meets every goal  speed p50 5 ms  11 s",
        "trial  3  a.r 1, b.r 2  out: perplexity 36, wanted at most 34  3.0 s",
        "trial  4  as it is  failed: loss is no number  2.0 s",
        "trial  5  x y  not run: size: its weights alone are 8.0 MB, allowed are 6.6 MB",
        "trial  6  x z  not proved, out of the race: trial 1 is no worse  speed p50 4 ms  1.0 s",
        f"search  2 of 6 trials meet every goal, 1 out of the race; trial 1 is handed over: {SEARCH[-1].why} (29 s)",  # type: ignore[union-attr]
    ]


def test_after_a_search_steps_have_their_lines_again() -> None:
    lines = shown(Lines(0), *SEARCH, RunStarted("w", ("build",)), StepFinished("build", "ModelBuilder", True, 1.0))
    assert lines[-1] == "build  cached  ModelBuilder  1.0 s"


def test_a_search_that_met_nothing_says_so_once() -> None:
    why = "no trial meets every goal; this one lacks the least: loss 5, wanted at most 4"
    lines = shown(Lines(0), SearchStarted("w", "random", 1, 1), SearchFinished(3, 0, 2, why, 1.0))
    assert lines == [
        "search  random over one setting",
        f"search  0 of 3 trials meet every goal; trial 2 is handed over: {why.partition('; ')[2]} (1.0 s)",
    ]
    assert shown(Lines(0), SearchFinished(3, 0, None, "", 1.0)) == ["search  0 of 3 trials meet every goal (1.0 s)"]


def test_a_search_on_a_live_terminal() -> None:
    out = io.StringIO()
    terminal = Terminal(Console(file=out, width=60, height=20, force_terminal=True, highlight=False))
    terminal(SEARCH[0])
    terminal(SEARCH[1])
    terminal(Progress("trial 1 build", 3, 39, "tensors"))
    paper = Console(file=io.StringIO(), width=60, highlight=False)
    with paper.capture() as capture:
        paper.print(terminal._render())
    assert capture.get().startswith("trial 1 build Mo")
    for event in SEARCH[2:]:
        terminal(event)
    assert str(terminal._render()) == "", "nothing stale between trials"
    terminal.close()
    for said in ("at most 16 trials", "best so far", "wanted at most 34", "trial 1 is handed over"):
        assert said in " ".join(out.getvalue().split())
    assert "trial 1 build  done" not in out.getvalue(), "a trial is one line"


def test_json_lines_of_a_search_read_back(capsys: pytest.CaptureFixture[str]) -> None:
    for event in SEARCH:
        JsonLines()(event)
    assert [event_from_dict(json.loads(line)) for line in capsys.readouterr().out.splitlines()] == SEARCH
