"""`coldpress report` as a user meets it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jsonschema
import pytest

from cli.test_main import coldpress

pytestmark = pytest.mark.xdist_group("tiny_run")


def test_a_report_is_made_again(tiny_run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "output"
    shutil.copytree(tiny_run, copy)
    before = (copy / "report.html").read_text()
    (copy / "report.html").unlink()
    done = coldpress("report", str(copy))
    assert done.returncode == 0, done.stderr
    assert str(copy / "report.html") in done.stdout
    assert (copy / "report.html").read_text() == before.replace(str(tiny_run), str(copy)).replace(
        str(copy / "model"), str(tiny_run / "model")
    ), "the same but for the folder it lies in"
    assert coldpress("report", str(copy / "run.json"), "-o", str(tmp_path / "new" / "page.html")).returncode == 0
    assert (tmp_path / "new" / "page.html").is_file()


def test_runs_are_compared(tiny_run: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_run, tmp_path / "other")
    done = coldpress("report", str(tiny_run), str(tmp_path / "other"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 runs compared" in (tmp_path / "comparison.html").read_text()


@pytest.mark.parametrize("text", [None, "{", "{}"])
def test_what_is_no_run_is_one_clear_message(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "run.json").write_text(text)
    done = coldpress("report", str(tmp_path))
    assert done.returncode == 1
    assert "run.json" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_schema_of_the_record(tiny_run: Path) -> None:
    done = coldpress("schema", "--record")
    assert done.returncode == 0
    schema = json.loads(done.stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(json.loads((tiny_run / "run.json").read_text()))
