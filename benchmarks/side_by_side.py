"""Measure two commands in turn: wall seconds and peak memory of the whole process tree, medians and the ratio."""

from __future__ import annotations

import contextlib
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil

__all__ = ["Measured", "in_turn", "machine", "markdown", "measure", "peer_python", "report", "verdict"]

HERE = Path(__file__).resolve().parent
T = TypeVar("T")


@dataclass(frozen=True)
class Measured:
    """One run of one command."""

    seconds: float
    peak_anonymous: int
    """Bytes, highest sum over the process tree, sampled every 20 ms, or as seldom as takes 2 % of a processor."""
    peak_resident: int
    output: str
    load: float = 0.0
    """Of the machine in the minute before the run."""
    status: int = 0
    """Exit status; negative is the signal that killed it."""
    largest_anonymous: int = 0
    """Bytes, of the one process that had the most."""
    largest_resident: int = 0


def measure(
    command: Sequence[str],
    *,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    allow_failure: bool = False,
) -> Measured:
    """Run a command to its end. Raises RuntimeError with its output when it fails."""
    load = psutil.getloadavg()[0]
    started = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    peak = {"anonymous": 0, "resident": 0, "largest_anonymous": 0, "largest_resident": 0}
    done = threading.Event()

    def watch() -> None:
        root = psutil.Process(process.pid)
        pause = 0.02
        while not done.wait(pause):
            began = time.thread_time()
            anonymous = resident = 0
            try:
                family = [root, *root.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            for one in family:
                try:
                    status = Path(f"/proc/{one.pid}/status").read_text()
                except OSError:
                    continue
                fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
                its_anonymous = int(fields.get("RssAnon", "0 kB").split()[0]) << 10
                its_resident = int(fields.get("VmRSS", "0 kB").split()[0]) << 10
                peak["largest_anonymous"] = max(peak["largest_anonymous"], its_anonymous)
                peak["largest_resident"] = max(peak["largest_resident"], its_resident)
                anonymous += its_anonymous
                resident += its_resident
            peak["anonymous"] = max(peak["anonymous"], anonymous)
            peak["resident"] = max(peak["resident"], resident)
            pause = max(0.02, 50 * (time.thread_time() - began))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    output, _ = process.communicate()
    seconds = time.perf_counter() - started
    done.set()
    thread.join()
    if process.returncode != 0 and not allow_failure:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{output[-4000:]}")
    return Measured(
        seconds,
        peak["anonymous"],
        peak["resident"],
        output,
        load,
        process.returncode,
        peak["largest_anonymous"],
        peak["largest_resident"],
    )


def in_turn(sides: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """A B C A B C ..., so that a drifting machine hits all alike."""
    found: dict[str, list[T]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            found[name].append(run())
    return found


def machine() -> str:
    """One line about the hardware."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        name = next(
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        )
    memory = psutil.virtual_memory().total / 2**30
    system = f"{platform.system()}, Python {platform.python_version()}"
    return f"{name}, {psutil.cpu_count()} logical CPUs, {memory:.0f} GiB, {system}"


def peer_python(name: str, requirements: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """The Python of a peer's own environment under `benchmarks/.envs`, made at first use."""
    folder = HERE / ".envs" / name
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if not python.exists():
        print(f"making the peer's environment in {folder} ...", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", *requirements]
        subprocess.run(install, check=True, env={**os.environ, **(environment or {})})
    return str(python)


def verdict(value: float, bar: float, *, most: bool = True) -> str:
    """`most`: the value may be the bar at most; otherwise at least."""
    return "reached" if (value <= bar if most else value >= bar) else "NOT reached"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)


def report(title: str, runs: Mapping[str, Sequence[Measured]], *, bar: float | None = None) -> str:
    """A markdown table: medians, ranges, and the ratio of the first to each other one (`bar`: to the second)."""
    ours, *peers = runs
    loads = [run.load for each in runs.values() for run in each]
    rows = [
        f"### {title}",
        "",
        f"{machine()}; {len(runs[ours])} rounds in turn, load {min(loads):.1f} to {max(loads):.1f}",
        "",
        "| | wall s (min-max) | peak anonymous MB | peak resident MB |",
        "| --- | --- | --- | --- |",
    ]
    for name, each in runs.items():
        seconds = [run.seconds for run in each]
        rows.append(
            f"| {name} | {statistics.median(seconds):.2f} ({min(seconds):.2f}-{max(seconds):.2f}) "
            f"| {statistics.median(run.peak_anonymous for run in each) / 1e6:.0f} "
            f"| {statistics.median(run.peak_resident for run in each) / 1e6:.0f} |"
        )
    for name in peers:
        seconds_, anonymous, resident = (
            statistics.median(getattr(run, field) for run in runs[ours])
            / max(statistics.median(getattr(run, field) for run in runs[name]), 1e-9)
            for field in ("seconds", "peak_anonymous", "peak_resident")
        )
        reached = f", bar {bar:g}: {verdict(seconds_, bar)}" if bar is not None and name == peers[0] else ""
        rows.append(f"| ratio to {name} | {seconds_:.3f}{reached} | {anonymous:.3f} | {resident:.3f} |")
    return "\n".join(rows) + "\n"
