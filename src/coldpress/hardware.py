"""What this machine is: cores, instruction sets, memory, GPUs, execution providers present. Imports no framework."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

__all__ = ["NVIDIA_PROVIDERS", "Gpu", "Hardware", "detect", "library_versions"]

NVIDIA_PROVIDERS = ("CUDAExecutionProvider", "TensorrtExecutionProvider")
"""Execution providers whose device is a GPU that nvidia-smi lists; of the others' GPUs it knows nothing."""

_INTERESTING = (
    "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16",
    "neon", "asimd", "asimddp", "bf16", "i8mm", "sve",
)  # fmt: skip


@dataclass(frozen=True)
class Gpu:
    name: str
    memory: int
    """Bytes."""


@dataclass(frozen=True)
class Hardware:
    """A machine. Memory and disk in bytes."""

    system: str
    machine: str
    processor: str
    cores: int
    """Physical cores this process may use."""
    threads: int
    """Logical processors this process may use."""
    instruction_sets: tuple[str, ...]
    memory: int
    """Bytes this process may use: physical memory, or the container's limit where that is lower."""
    available: int
    gpus: tuple[Gpu, ...]
    execution_providers: tuple[str, ...]
    """Execution providers of the installed ONNX Runtime; empty when there is none."""

    @property
    def bf16_unit(self) -> str | None:
        """What multiplies bf16 matrices on this CPU, as people call it."""
        units = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16", "bf16": "BF16"}
        return next((name for flag, name in units.items() if flag in self.instruction_sets), None)

    @property
    def fast_bf16(self) -> bool:
        """Whether bf16 matrix products are faster than fp32 on this CPU."""
        return self.bf16_unit is not None


def _allowed_cpus() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def _cpu_quota() -> float | None:
    """CPUs that the container's control group grants, or None."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _memory_limit() -> int | None:
    try:
        text = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        return None if text == "max" else int(text)
    except (OSError, ValueError):
        return None


def _cpuinfo() -> tuple[str, tuple[str, ...]]:
    """Processor name and the instruction sets worth knowing."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        name = platform.processor() or platform.machine()
        if sys.platform == "darwin" and platform.machine() == "arm64":
            return name, ("neon",)
        return name, ()
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    present = set(flags.group(1).split()) if flags else set()
    return (model.group(1) if model else platform.machine()), tuple(flag for flag in _INTERESTING if flag in present)


def _gpus() -> tuple[Gpu, ...]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    command = [program, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    rows = [line.rsplit(",", 1) for line in out.splitlines() if "," in line]
    return tuple(Gpu(name.strip(), int(float(memory)) << 20) for name, memory in rows)


def _execution_providers() -> tuple[str, ...]:
    """Read from which packages are installed: importing ONNX Runtime costs time that a plan does not have."""
    by_package = {
        "onnxruntime-gpu": ("CUDAExecutionProvider",),
        "onnxruntime-directml": ("DmlExecutionProvider",),
        "onnxruntime": (),
    }
    installed = [package for package in by_package if library_versions((package,))[package] is not None]
    found = [provider for package in installed for provider in by_package[package]]
    return (*found, "CPUExecutionProvider") if installed else ()


def library_versions(names: tuple[str, ...]) -> dict[str, str | None]:
    """Installed version of each distribution, None where it is absent."""
    return {name: _version(name) for name in names}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def detect() -> Hardware:
    """Look at this machine once."""
    import psutil

    allowed = len(_allowed_cpus())
    quota = _cpu_quota()
    threads = max(1, min(allowed, int(quota))) if quota else allowed
    physical = psutil.cpu_count(logical=False) or threads
    memory = psutil.virtual_memory()
    limit = _memory_limit()
    name, flags = _cpuinfo()
    return Hardware(
        system=f"{platform.system()} {platform.release()}",
        machine=platform.machine(),
        processor=name,
        cores=min(physical, threads),
        threads=threads,
        instruction_sets=flags,
        memory=min(memory.total, limit) if limit else memory.total,
        available=min(memory.available, limit) if limit else memory.available,
        gpus=_gpus(),
        execution_providers=_execution_providers(),
    )
