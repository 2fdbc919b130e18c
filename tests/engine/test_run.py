"""The engine on fake passes: caching, resuming, failing, being killed, sharing a cache."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import coldpress
from coldpress.errors import ColdpressError, ConfigError, DiskFullError, StepError, StoreError, WorkerKilledError
from coldpress.events import Event, Message, Progress, StepFinished

Make = Callable[..., dict[str, Any]]


def finished(events: list[Event]) -> list[tuple[str, bool]]:
    return [(event.step, event.cached) for event in events if isinstance(event, StepFinished)]


def leftovers(cache: Path) -> list[str]:
    """Files of unfinished steps that nothing can continue from."""
    return [str(path) for path in (cache / "partial").rglob("*") if path.is_file() and "work" not in path.parts]


def test_results_are_typed_and_recorded(workflow: Make, tmp_path: Path) -> None:
    result = coldpress.run(workflow({"mark": "a"}, {"mark": "b"}))
    assert result.output == tmp_path / "output" / "model"
    assert [step.name for step in result.steps] == ["step0", "step1"]
    assert all(step.peak_bytes >= step.peak_anonymous_bytes > 10_000_000 for step in result.steps)
    record = json.loads(result.record.read_text())
    assert [step["key"] for step in record["steps"]] == [step.key for step in result.steps]
    assert record["libraries"]["numpy"]
    assert (result.output / "artifact.json").is_file()


def test_progress_tells_the_memory_in_use(workflow: Make) -> None:
    events: list[Event] = []
    coldpress.run(workflow({"seconds": 0.5}), sinks=[events.append])
    progress = [event for event in events if isinstance(event, Progress)]
    assert progress[-1].done == progress[-1].total == 10
    assert progress[-1].values["memory_bytes"] > 10_000_000


def test_a_rerun_does_nothing_and_says_so(workflow: Make) -> None:
    coldpress.run(workflow({"mark": "a"}, {"mark": "b"}))
    events: list[Event] = []
    coldpress.run(workflow({"mark": "a"}, {"mark": "b"}), sinks=[events.append])
    assert finished(events) == [("step0", True), ("step1", True)]


def test_a_changed_step_reuses_what_comes_before_it(workflow: Make) -> None:
    coldpress.run(workflow({"mark": "a"}, {"mark": "b"}))
    events: list[Event] = []
    coldpress.run(workflow({"mark": "a"}, {"mark": "c"}), sinks=[events.append])
    assert finished(events) == [("step0", True), ("step1", False)]


@pytest.mark.parametrize(
    ("behave", "error", "says"),
    [
        ("fail", StepError, "it failed on purpose"),
        ("crash", StepError, "a bug, for once on purpose"),
        ("killed", WorkerKilledError, "memory runs out"),
        ("segfault", StepError, "signal 11"),
        ("full", DiskFullError, "no space left"),
        ("wrong", StepError, "something else than was planned"),
    ],
)
def test_a_failed_step_is_an_error_and_never_cached(
    workflow: Make, tmp_path: Path, behave: str, error: type[ColdpressError], says: str
) -> None:
    document = workflow({"mark": "a"}, {"behave": behave})
    for _ in range(2):
        with pytest.raises(error, match=says) as caught:
            coldpress.run(document)
        assert caught.value.exit_code == 1
        assert "step1" in str(caught.value)
        assert "finished before it, and kept: step0" in str(caught.value)
        assert not leftovers(tmp_path / "cache")
        assert not (tmp_path / "output" / "run.json").exists()
        assert not (tmp_path / "output" / "model").exists()


def test_refusals_come_before_any_work(workflow: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="this pass refuses") as caught:
        coldpress.run(workflow({"mark": "a"}, {"behave": "refuse"}))
    assert caught.value.exit_code == 2
    assert not (tmp_path / "cache").exists()


def test_what_cannot_fit_is_refused_with_both_figures(workflow: Make) -> None:
    with pytest.raises(ConfigError, match=r"needs about 1000000\.0 GB of memory, and this machine has"):
        coldpress.plan(workflow({"ram": 10**15}))


def test_an_edited_weight_file_is_noticed(workflow: Make) -> None:
    result = coldpress.run(workflow({"mark": "a"}))
    with (result.steps[0].path / "half").open("a") as file:
        file.write("tampered")
    events: list[Event] = []
    coldpress.run(workflow({"mark": "a"}), sinks=[events.append])
    assert finished(events) == [("step0", False)]


def test_an_edited_output_is_put_right(workflow: Make) -> None:
    result = coldpress.run(workflow({"mark": "a"}))
    (result.output / "half").write_text("mine")
    again = coldpress.run(workflow({"mark": "a"}))
    assert (again.output / "half").read_text() == "written before anything goes wrong"
    assert again.steps[0].cached


def test_what_lies_at_the_output_is_not_overwritten(workflow: Make, tmp_path: Path) -> None:
    mine = tmp_path / "output" / "model" / "thesis.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("years of work")
    with pytest.raises(ConfigError, match="Coldpress did not write"):
        coldpress.run(workflow({"mark": "a"}))
    assert mine.read_text() == "years of work"


def test_the_input_model_is_not_overwritten(workflow: Make, tmp_path: Path) -> None:
    first = coldpress.run(workflow({"mark": "a"}))
    document = workflow({"mark": "b"}, input_model={"type": "HfModel", "model_path": str(first.output)})
    with pytest.raises(ConfigError, match="is an input"):
        coldpress.run(document)


def test_an_output_that_is_a_file_is_found_before_any_work(workflow: Make, tmp_path: Path) -> None:
    (tmp_path / "output").write_text("a file")
    with pytest.raises(ConfigError, match="is a file"):
        coldpress.run(workflow({"mark": "a"}))
    assert not (tmp_path / "cache").exists()


def test_clean_cache_is_in_the_plan(workflow: Make) -> None:
    document = workflow({"mark": "a"})
    coldpress.run(document)
    assert coldpress.plan(document).steps[0].cached
    assert not coldpress.plan({**document, "clean_cache": True}).steps[0].cached


def test_a_workflow_without_passes_is_refused(workflow: Make) -> None:
    with pytest.raises(ConfigError, match="no passes"):
        coldpress.plan(workflow())


@pytest.mark.parametrize("damage", ["{", "[]", "{}"])
def test_a_damaged_record_counts_as_absent(workflow: Make, tmp_path: Path, damage: str) -> None:
    document = workflow({"mark": "a"})
    result = coldpress.run(document)
    (result.steps[0].path / "record.json").write_text(damage)
    (tmp_path / "cache" / "digests.json").write_text("[1]")
    assert not coldpress.plan(document).steps[0].cached
    assert not coldpress.run(document).steps[0].cached


def test_nobody_prunes_under_a_run(workflow: Make, tmp_path: Path) -> None:
    from coldpress.engine.store import Store

    process = start(workflow({"seconds": 5.0}), tmp_path)
    wait_for(tmp_path / "cache", "partial/*/work/tick-0")
    with pytest.raises(StoreError, match="a run is using"):
        Store(tmp_path / "cache").prune(unused_for=-1)
    process.kill()
    process.communicate(timeout=30)
    time.sleep(0.2)
    Store(tmp_path / "cache").prune(unused_for=-1)
    assert not list((tmp_path / "cache" / "partial").iterdir())


def test_changed_data_changes_the_key(workflow: Make, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    document = workflow(
        {"train_data_config": "train"},
        data_configs=[
            {
                "name": "train",
                "type": "HuggingfaceContainer",
                "load_dataset_config": {"data_name": "json", "data_files": str(data)},
                "pre_process_data_config": {"text_field": "text"},
            }
        ],
    )
    data.write_text('{"text": "one"}\n')
    first = coldpress.plan(document).steps[0].key
    assert coldpress.plan(document).steps[0].key == first
    data.write_text('{"text": "two"}\n')
    assert coldpress.plan(document).steps[0].key != first


def start(document: dict[str, Any], tmp_path: Path, name: str = "workflow.json") -> subprocess.Popen[str]:
    path = tmp_path / name
    path.write_text(json.dumps(document))
    return subprocess.Popen(
        [sys.executable, "-m", "coldpress", "run", str(path), "--log-format", "json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for(path: Path, pattern: str, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not list(path.glob(pattern)):
        assert time.monotonic() < end, f"{pattern} never appeared under {path}"
        time.sleep(0.02)


@pytest.mark.skipif(os.name != "posix", reason="signals as on POSIX")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -9)])
def test_a_stopped_run_is_continued(workflow: Make, tmp_path: Path, number: signal.Signals, code: int) -> None:
    document = workflow({"seconds": 5.0})
    process = start(document, tmp_path)
    wait_for(tmp_path / "cache", "partial/*/work/tick-2")
    process.send_signal(number)
    _, complaint = process.communicate(timeout=30)
    assert process.returncode == code
    if code == 130:
        assert "the same command goes on" in complaint
    assert not (tmp_path / "output").exists()
    assert not list((tmp_path / "cache" / "steps").iterdir())

    document["passes"]["step0"]["seconds"] = 5.0
    events: list[Event] = []
    coldpress.run(document, sinks=[events.append])
    said = [event.text for event in events if isinstance(event, Message) and "ticks done before" in event.text]
    assert int(said[0].split(":")[1]) >= 3, "it began from nothing"
    assert not list((tmp_path / "cache" / "partial").iterdir())


@pytest.mark.skipif(os.name != "posix", reason="reads /proc or process tables as on POSIX")
def test_no_worker_outlives_a_killed_run(workflow: Make, tmp_path: Path) -> None:
    import psutil

    process = start(workflow({"seconds": 20.0}), tmp_path)
    wait_for(tmp_path / "cache", "partial/*/work/tick-0")
    workers = psutil.Process(process.pid).children(recursive=True)
    assert workers
    process.kill()
    process.communicate(timeout=30)
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive


def test_two_runs_share_a_cache(workflow: Make, tmp_path: Path) -> None:
    document = workflow({"seconds": 1.5})
    other = {**document, "output_dir": str(tmp_path / "other")}
    lists: list[list[Event]] = [[], []]
    threads = [
        threading.Thread(target=coldpress.run, args=(one,), kwargs={"sinks": [events.append]})
        for one, events in zip((document, other), lists, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(cached for events in lists for _, cached in finished(events)) == [False, True]
    assert any("waiting" in event.text for events in lists for event in events if isinstance(event, Message))
    assert (tmp_path / "other" / "run.json").is_file()
    assert (tmp_path / "output" / "run.json").is_file()


def test_a_cache_that_cannot_be_written(workflow: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ConfigError, match="is a file"):
        coldpress.run(workflow({"mark": "a"}, cache_dir=str(tmp_path / "file" / "cache")))


@pytest.mark.parametrize("key", ["cache_dir", "output_dir"])
def test_nothing_goes_into_the_input_model(key: str, workflow: Make) -> None:
    document = workflow({"mark": "a"})
    model = Path(document["input_model"]["model_path"])
    before = sorted(model.rglob("*"))
    for folder in (model, model / "deeper" / "x"):
        with pytest.raises(ConfigError, match=f"{key}: .*where nothing may be written .give another {key}"):
            coldpress.run({**document, key: str(folder)})
    assert sorted(model.rglob("*")) == before


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="a folder that even root cannot make others in")
def test_an_output_folder_that_cannot_be_made_is_found_before_any_work(workflow: Make) -> None:
    events: list[Event] = []
    with pytest.raises(StoreError, match="output_dir /proc/x cannot be made"):
        coldpress.run(workflow({"mark": "a"}, output_dir="/proc/x"), sinks=[events.append])
    assert not events


@pytest.fixture
def read_only(tmp_path: Path, disk_of: Callable[..., Path]) -> Path:
    """A folder without write permission; root may write everywhere, so for root it is a read-only file system."""
    if os.name == "posix" and os.geteuid() == 0:
        return disk_of("1m", "ro")
    place = tmp_path / "closed"
    place.mkdir(mode=0o555)
    return place


def test_a_cache_without_write_permission(workflow: Make, tmp_path: Path, read_only: Path) -> None:
    path = tmp_path / "workflow.json"
    path.write_text(json.dumps(workflow({"mark": "a"}, cache_dir=str(read_only))))
    process = start(json.loads(path.read_text()), tmp_path)
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 2, "found before any work"
    assert f"{read_only} cannot be written" in complaint
    assert "write permission" in complaint
    assert "Traceback" not in complaint


def test_a_full_disk(workflow: Make, disk_of: Callable[..., Path]) -> None:
    small_disk = disk_of("6m")
    with (small_disk / "ballast").open("wb") as file:
        file.write(b"\0" * (6 << 20))
    with pytest.raises((DiskFullError, ConfigError), match=r"no space left|of disk"):
        coldpress.run(workflow({"mark": "a"}, cache_dir=str(small_disk / "cache")))
