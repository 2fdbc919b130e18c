"""Several processes for one step: what each is told, whose result counts, what one failure does to all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import coldpress
from coldpress.engine.machines import together
from coldpress.errors import ConfigError, StepError, WorkerKilledError
from coldpress.events import Event, Message, StepFinished
from coldpress.hardware import detect
from coldpress.passes.base import Estimate
from coldpress.systems import group
from coldpress.systems.group import rank_environment
from coldpress.systems.hosts import Host, places, read_hosts

Make = Callable[..., dict[str, Any]]
Facts = dict[str, str | None]

CPU = {"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}
FAKE_SSH = """#!/bin/sh
# As ssh: options, a host, a command for that host's shell; HOME and the variables of this shell are not passed on.
while [ "${1#-}" != "$1" ]; do shift 2; done
host="$1"; shift
cd /
exec env -i PATH="$PATH" HOME=/nowhere FAKE_HOST="$host" sh -c "$*"
"""


@pytest.fixture
def grouped(workflow: Make) -> Make:
    """A workflow of one step that several processes run; `accelerators` and `hosts` are the system's."""

    def make(accelerators: int = 2, hosts: Path | None = None, **step: Any) -> dict[str, Any]:
        system: dict[str, Any] = {"type": "LocalSystem", "accelerators": [CPU] * accelerators}
        if hosts is not None:
            system["hosts"] = str(hosts)
        return workflow({"type": "Together", **step}, systems={"here": system}, host="here")

    return make


@pytest.fixture
def fake_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An ssh that reaches every host, and finds this machine there."""
    program = tmp_path / "bin" / "ssh"
    program.parent.mkdir()
    program.write_text(FAKE_SSH)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")


def facts_of(result: Any, ranks: int) -> list[Facts]:
    return [json.loads((result.output / f"rank-{rank}.json").read_text()) for rank in range(ranks)]


def test_all_ranks_do_the_step_and_rank_0_makes_the_result(
    grouped: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    events: list[Event] = []
    result = coldpress.run(grouped(), sinks=[events.append])
    facts = facts_of(result, 2)
    assert [one["RANK"] for one in facts] == [one["LOCAL_RANK"] for one in facts] == ["0", "1"]
    assert {one["WORLD_SIZE"] for one in facts} == {one["LOCAL_WORLD_SIZE"] for one in facts} == {"2"}
    assert {one["MASTER_ADDR"] for one in facts} == {"127.0.0.1"}
    assert len({one["MASTER_PORT"] for one in facts}) == 1
    # They share the cores.
    assert {one["OMP_NUM_THREADS"] for one in facts} == {str(max(1, detect().threads // 2))}
    assert (result.output / "mine").read_text() == "0"
    assert [event.text for event in events if isinstance(event, Message) and "says so" in event.text] == [
        "rank 0 says so"
    ]
    assert not list((tmp_path / "cache" / "partial").rglob("mine"))
    assert [log.name for log in sorted((tmp_path / "cache" / "logs").glob("*rank*"))] == [
        "default_workflow-step0-rank0.log",
        "default_workflow-step0-rank1.log",
    ]


def test_threads_that_the_user_chose(grouped: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert {one["OMP_NUM_THREADS"] for one in facts_of(coldpress.run(grouped()), 2)} == {"3"}


def test_the_number_of_processes_is_part_of_the_key(grouped: Make, workflow: Make) -> None:
    one, two, three = (coldpress.plan(grouped(number)).steps[0] for number in (1, 2, 3))
    assert len({one.key, two.key, three.key}) == 3
    assert one.key == coldpress.plan(workflow({"type": "Together"})).steps[0].key
    assert [step.notes[-1] for step in (one, two, three)] == ["1 ranks", "2 ranks", "3 ranks"]
    assert two.notes[0] == "2 processes: about 1.0 kB of memory each, 2.0 kB on this machine"
    assert (one.estimate.ram, three.estimate.ram) == (1000, 3000)  # type: ignore[union-attr]
    # Another step is one process, and says nothing of it.
    document = grouped()
    document["passes"]["step0"]["type"] = "Fake"
    plan = coldpress.plan(document)
    assert plan.steps[0].hosts == ()
    assert "of 2 accelerators one is used: each step of this workflow is one process" in plan.notes


def test_a_rank_that_fails_ends_the_others(grouped: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    monkeypatch.setattr(group, "GRACE_SECONDS", 0.5)

    with pytest.raises(StepError, match="the last rank fails on purpose"):
        coldpress.run(grouped(behave="fail"))
    assert not [one for one in psutil.Process().children(recursive=True) if one.status() != psutil.STATUS_ZOMBIE]
    assert not list((tmp_path / "cache" / "steps").iterdir())


def test_a_rank_that_dies_is_named_with_its_log(grouped: Make) -> None:
    with pytest.raises(WorkerKilledError) as caught:
        coldpress.run(grouped(behave="killed"))
    said = str(caught.value)
    assert "rank 1 of 2 is gone, and the others were ended" in said
    assert "killed (signal 9)" in said
    assert "| rank 1 was here" in said
    assert "rank 0 was here" not in said


def start(document: dict[str, Any], tmp_path: Path) -> subprocess.Popen[str]:
    path = tmp_path / "workflow.json"
    path.write_text(json.dumps(document))
    return subprocess.Popen(
        [sys.executable, "-m", "coldpress", "run", str(path), "--log-format", "json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for(path: Path, pattern: str, count: int) -> list[Path]:
    end = time.monotonic() + 30
    while len(found := list(path.glob(pattern))) < count:
        assert time.monotonic() < end, f"{pattern} never appeared under {path}"
        time.sleep(0.02)
    return found


@pytest.mark.skipif(os.name != "posix", reason="signals as on POSIX")
@pytest.mark.parametrize("away", [False, True])
def test_a_stop_reaches_all_ranks(grouped: Make, tmp_path: Path, fake_ssh: None, away: bool) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost\nnode2\n" if away else "localhost slots=2\n")
    process = start(grouped(1, hosts, behave="endless"), tmp_path)
    wait_for(tmp_path / "cache", "partial/*/work/rank-*", 2)
    process.send_signal(signal.SIGTERM)
    _, complaint = process.communicate(timeout=30)
    assert process.returncode == 130, complaint
    assert {path.name for path in wait_for(tmp_path / "cache", "partial/*/work/saved-*", 2)} == {"saved-0", "saved-1"}


@pytest.mark.skipif(os.name != "posix", reason="reads /proc or process tables as on POSIX")
@pytest.mark.parametrize("away", [False, True])
def test_no_rank_outlives_a_killed_run(grouped: Make, tmp_path: Path, fake_ssh: None, away: bool) -> None:
    import psutil

    hosts = tmp_path / "hosts"
    hosts.write_text("localhost\nnode2\n" if away else "localhost slots=2\n")
    process = start(grouped(1, hosts, behave="endless"), tmp_path)
    wait_for(tmp_path / "cache", "partial/*/work/rank-*", 2)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    process.kill()
    process.communicate(timeout=30)
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive


# -- machines ----------------------------------------------------------------------------------------------------------


def test_several_machines(grouped: Make, tmp_path: Path, fake_ssh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_SETTING", "spaces and 'quotes'")
    hosts = tmp_path / "hosts"
    hosts.write_text("# two machines\nlocalhost slots=1\nme@node2 slots=2  # the big one\n")
    result = coldpress.run(grouped(1, hosts))
    facts = facts_of(result, 3)
    assert [one["FAKE_HOST"] for one in facts] == [None, "me@node2", "me@node2"]
    assert [one["RANK"] for one in facts] == ["0", "1", "2"]
    assert [one["LOCAL_RANK"] for one in facts] == ["0", "0", "1"]
    assert [one["LOCAL_WORLD_SIZE"] for one in facts] == ["1", "2", "2"]
    assert {one["cwd"] for one in facts} == {str(Path.cwd())}
    assert {one["FAKE_SETTING"] for one in facts} == {"spaces and 'quotes'"}
    assert len({one["MASTER_ADDR"] for one in facts}) == 1
    assert facts[0]["MASTER_ADDR"] != "127.0.0.1", "node2 must be able to reach it"


def test_a_machine_that_cannot_be_reached(grouped: Make, tmp_path: Path, fake_ssh: None) -> None:
    (tmp_path / "bin" / "ssh").write_text("#!/bin/sh\necho 'ssh: Could not resolve hostname node2' >&2\nexit 255\n")
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost\nnode2\n")
    with pytest.raises(StepError) as caught:
        coldpress.run(grouped(1, hosts))
    assert "rank 1 on node2 of 2 is gone" in str(caught.value)
    assert "exit code 255" in str(caught.value)
    assert "| ssh: Could not resolve hostname node2" in str(caught.value)


def test_one_process_on_another_machine(grouped: Make, tmp_path: Path, fake_ssh: None) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("node2\n")
    result = coldpress.run(grouped(1, hosts))
    assert [one["FAKE_HOST"] for one in facts_of(result, 1)] == ["node2"]
    plan = coldpress.plan(grouped(1, hosts))
    # The same was learned, wherever.
    assert plan.steps[0].key == coldpress.plan(grouped(1)).steps[0].key


def test_what_is_wrong_with_a_hosts_file_is_told_with_its_line(grouped: Make, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost\n\nnode2 slots=0\nnode 3\n# node4\nlocalhost slots=2\nnode5 slots=two\n")
    with pytest.raises(ConfigError) as caught:
        coldpress.plan(grouped(1, hosts))
    said = [str(problem) for problem in caught.value.problems]
    assert [line.partition(": ")[0] for line in said] == [f"{hosts}:{number}" for number in (3, 4, 6, 7)]
    assert "slots=0 must be a whole number above 0" in said[0]
    assert "'node 3' is no machine" in said[1]
    assert "localhost stands here twice" in said[2]
    assert "with the sum as slots" in said[2]
    assert "slots=two must be" in said[3]


@pytest.mark.parametrize(("text", "says"), [(None, "there is no hosts file"), ("# none\n", "names no machine")])
def test_a_hosts_file_that_is_not_there_or_empty(grouped: Make, tmp_path: Path, text: str | None, says: str) -> None:
    hosts = tmp_path / "hosts"
    if text is not None:
        hosts.write_text(text)
    with pytest.raises(ConfigError, match=says):
        coldpress.plan(grouped(1, hosts))


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch, grouped: Make) -> None:
    from dataclasses import replace

    from coldpress.engine import plan as planning
    from coldpress.hardware import Gpu

    machine = replace(
        detect(), gpus=(Gpu("one", 1 << 34),), execution_providers=("CUDAExecutionProvider", "CPUExecutionProvider")
    )
    monkeypatch.setattr(planning, "detect", lambda: machine)
    document = grouped()
    document["systems"]["here"]["accelerators"] = [
        {"device": "gpu", "execution_providers": ["CUDAExecutionProvider"]}
    ] * 2
    with pytest.raises(ConfigError, match="2 processes need a GPU each, and this machine has 1"):
        coldpress.plan(document)


def test_hosts_and_their_ranks(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("a\nb slots = 3\n")
    hosts, problems = read_hosts(path, default_slots=2)
    assert (hosts, problems) == ((Host("a", 2), Host("b", 3)), ())
    assert [(place.rank, place.host.name, place.local_rank) for place in places(hosts)] == [
        (0, "a", 0), (1, "a", 1), (2, "b", 0), (3, "b", 1), (4, "b", 2),
    ]  # fmt: skip
    estimate, said = together(Estimate(ram=10**9, vram=10**10), (Host("localhost", 2), Host("b", 3)))
    assert (estimate.ram, estimate.vram) == (2 * 10**9, 10**10)
    assert said.startswith("5 processes on localhost, b: about 1.0 GB of memory each, 2.0 GB on this machine; 10.")


def test_each_process_sees_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = (Host("localhost", 2), Host("b", 2))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    made = [rank_environment(place, hosts, "gpu", 1234) for place in places(hosts)]
    assert [one["CUDA_VISIBLE_DEVICES"] for one in made] == ["5", "7", "0", "1"]
    # To libraries it is the only one of a machine.
    assert {(one["LOCAL_RANK"], one["LOCAL_WORLD_SIZE"]) for one in made} == {("0", "1")}
    assert [one["RANK"] for one in made] == ["0", "1", "2", "3"]
    assert "ACCELERATE_USE_CPU" not in made[0]


def test_a_finished_step_is_taken_from_the_cache(grouped: Make) -> None:
    coldpress.run(grouped())
    events: list[Event] = []
    coldpress.run(grouped(), sinks=[events.append])
    assert [event.cached for event in events if isinstance(event, StepFinished)] == [True]
