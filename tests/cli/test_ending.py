"""Ten lines that say what the report says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cli.test_main import coldpress
from coldpress.cli.ending import LINES, ending
from coldpress.record import read_run

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
