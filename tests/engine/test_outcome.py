"""What a run leaves in its output folder, whatever its end was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import coldpress
from coldpress.errors import ColdpressError, ConfigError, DiskFullError, StepError, StoreError
from coldpress.events import Event, Message
from coldpress.record import read_run, record_json_schema

Make = Callable[..., dict[str, Any]]


@pytest.mark.parametrize("behave", ["fail", "crash", "killed", "wrong"])
def test_a_failed_run_says_what_was_done_and_why_it_ended(workflow: Make, tmp_path: Path, behave: str) -> None:
    with pytest.raises(ColdpressError) as caught:
        coldpress.run(workflow({"mark": "a"}, {"behave": behave}))
    written = json.loads((tmp_path / "output" / "failed.json").read_text())
    jsonschema.Draft202012Validator(record_json_schema()).validate(written)
    record, _ = read_run(tmp_path / "output")
    assert record.status == "failed"
    assert record.error is not None
    assert (record.error.step, record.error.type, record.error.exit_code) == ("step1", type(caught.value).__name__, 1)
    assert record.error.message == caught.value.message
    assert record.error.hint == caught.value.hint
    assert [step.name for step in record.steps] == ["step0"]
    assert record.output is None
    assert not (tmp_path / "output" / "model").exists()


def test_a_failure_leaves_an_older_result_alone_and_a_success_ends_it(workflow: Make, tmp_path: Path) -> None:
    output = tmp_path / "output"
    coldpress.run(workflow({"mark": "a"}))
    before = (output / "run.json").read_text()
    with pytest.raises(StepError):
        coldpress.run(workflow({"behave": "fail"}))
    assert (output / "run.json").read_text() == before
    assert (output / "model" / "artifact.json").is_file()
    assert read_run(output)[0].status == "failed"
    coldpress.run(workflow({"mark": "b"}))
    assert not (output / "failed.json").exists()
    assert read_run(output)[0].status == "done"


def test_what_is_refused_before_work_leaves_nothing(workflow: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        coldpress.run(workflow({"behave": "refuse"}))
    assert not (tmp_path / "output").exists()


def test_a_disk_that_takes_no_record_does_not_hide_the_error(
    workflow: Make, tmp_path: Path, disk_of: Callable[..., Path]
) -> None:
    small = disk_of("1m")
    document = workflow({"behave": "fail"}, output_dir=str(small))
    with (small / "ballast").open("wb") as file:
        file.write(b"\0" * (1 << 20))
    with pytest.raises(StepError, match="it failed on purpose"):
        coldpress.run(document)


@pytest.mark.parametrize("full", [False, True])
def test_a_page_that_cannot_be_written_leaves_the_record(
    workflow: Make, tmp_path: Path, disk_of: Callable[..., Path], full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = disk_of("1m") if full else tmp_path / "output"
    (output / "report.html").mkdir(parents=True)
    if full:
        (output / "report.html").rmdir()
        monkeypatch.setattr("coldpress.report.page._text", lambda name: "x" * (2 << 20))
    with pytest.raises(StoreError, match=r"report\.html cannot be written") as caught:
        coldpress.run(workflow({"mark": "a"}, output_dir=str(output)))
    assert isinstance(caught.value, DiskFullError) == full
    assert "coldpress report" in str(caught.value.hint)
    written = read_run(output / "run.json")[0]
    assert written.status == "done"
    assert written.output is not None
    assert list(output.glob(".*.tmp")) == []


def test_warnings_and_cached_steps_are_in_the_record(workflow: Make, tmp_path: Path) -> None:
    document = workflow({"mark": "a"}, {"mark": "b"})
    coldpress.run(document)
    events: list[Event] = []
    coldpress.run(document, sinks=[events.append])
    record, _ = read_run(tmp_path / "output")
    assert [step.cached for step in record.steps] == [True, True]
    warned = [event.text for event in events if isinstance(event, Message) and event.level == "warning"]
    assert list(record.warnings) == warned


def test_a_rerun_writes_the_same_card(workflow: Make, tmp_path: Path) -> None:
    """Else the output would count as edited, and be published anew every time."""
    document = workflow({"mark": "a"})
    card = coldpress.run(document).output / "README.md"
    before = card.stat().st_mtime_ns
    coldpress.run(document)
    assert card.stat().st_mtime_ns == before
