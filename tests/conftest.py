"""Fixtures shared by all tests: where the real models and texts lie, when they are here."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def _shared() -> Path | None:
    named = os.environ.get("COLDPRESS_SHARED")
    place = Path(named) if named else ROOT.parent / "shared"
    return place if (place / "models").is_dir() else None


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models and texts; the test is skipped when it is absent."""
    place = _shared()
    if place is None:
        pytest.skip("the shared models and texts are not here (COLDPRESS_SHARED names their folder)")
    return place


@pytest.fixture(scope="session")
def phi3() -> Path:
    """The 7M-parameter Phi-3 that ships with the example."""
    return ROOT / "examples" / "phrase-classification" / "model"


@pytest.fixture(scope="session")
def phrases() -> Path:
    """The data set that ships with the example: a folder with train.jsonl and test.jsonl."""
    return ROOT / "examples" / "phrase-classification" / "dataset"


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a real run on a tiny model; whoever changes something copies it first."""
    import coldpress
    from fakes.tiny_runs import tiny_project

    return coldpress.run(tiny_project(tmp_path_factory.mktemp("tiny"))).record.parent


@pytest.fixture
def disk_of(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount a small disk (`disk_of("6m")`), where this process may mount one."""
    mounted: list[Path] = []

    def mount(size: str, *options: str) -> Path:
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", *options]), "tmpfs", str(place)]
        if os.name != "posix" or subprocess.run(command, capture_output=True, check=False).returncode != 0:
            pytest.skip("no permission to mount a small tmpfs")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", str(place)], check=True)
