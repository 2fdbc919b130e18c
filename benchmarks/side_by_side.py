"""Measure two commands in turn: wall seconds and peak memory of the whole process tree, medians and the ratio."""

from __future__ import annotations

import contextlib
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

__all__ = ["Measured", "alternate", "machine", "measure", "peer_python", "report"]

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Measured:
    """One run of one command."""

    seconds: float
    peak_anonymous: int
    """Bytes, highest sum over the process tree, sampled every 20 ms."""
    peak_resident: int
    output: str


def measure(
    command: Sequence[str],
    *,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    allow_failure: bool = False,
) -> Measured:
    """Run a command to its end. Raises RuntimeError with its output when it fails."""
    import os

    started = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    peak = {"anonymous": 0, "resident": 0}
    done = threading.Event()

    def watch() -> None:
        root = psutil.Process(process.pid)
        while not done.wait(0.02):
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
                anonymous += int(fields.get("RssAnon", "0 kB").split()[0]) << 10
                resident += int(fields.get("VmRSS", "0 kB").split()[0]) << 10
            peak["anonymous"] = max(peak["anonymous"], anonymous)
            peak["resident"] = max(peak["resident"], resident)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    output, _ = process.communicate()
    seconds = time.perf_counter() - started
    done.set()
    thread.join()
    if process.returncode != 0 and not allow_failure:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{output[-4000:]}")
    return Measured(seconds, peak["anonymous"], peak["resident"], output)


def alternate(
    ours: Callable[[], Measured], peer: Callable[[], Measured], rounds: int
) -> tuple[list[Measured], list[Measured]]:
    """A B A B ..., so that a drifting machine hits both alike."""
    left, right = [], []
    for _ in range(rounds):
        left.append(ours())
        right.append(peer())
    return left, right


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


def peer_python(name: str, requirements: Sequence[str]) -> str:
    """The Python of a peer's own environment under `benchmarks/.envs`, made at first use."""
    folder = HERE / ".envs" / name
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if not python.exists():
        print(f"making the peer's environment in {folder} ...", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *requirements], check=True)
    return str(python)


def report(
    title: str, ours: Sequence[Measured], peer: Sequence[Measured], *, peer_name: str, bar: float | None = None
) -> str:
    """A markdown table: medians, ranges, ratio of the medians."""
    rows = [
        f"### {title}",
        "",
        f"{machine()}; {len(ours)} alternating runs",
        "",
        "| | wall s (min-max) | peak anonymous MB | peak resident MB |",
        "| --- | --- | --- | --- |",
    ]
    for name, runs in (("Coldpress", ours), (peer_name, peer)):
        seconds = [run.seconds for run in runs]
        rows.append(
            f"| {name} | {statistics.median(seconds):.2f} ({min(seconds):.2f}-{max(seconds):.2f}) "
            f"| {statistics.median(run.peak_anonymous for run in runs) / 1e6:.0f} "
            f"| {statistics.median(run.peak_resident for run in runs) / 1e6:.0f} |"
        )
    ratio = statistics.median(run.seconds for run in ours) / statistics.median(run.seconds for run in peer)
    verdict = "" if bar is None else f"; bar {bar:g}: {'reached' if ratio <= bar else 'NOT reached'}"
    rows.append(f"| ratio | {ratio:.3f}{verdict} | | |")
    return "\n".join(rows) + "\n"
