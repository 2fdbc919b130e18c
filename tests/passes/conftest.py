"""A tiny model, tiny data, and contexts to run passes in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coldpress.config.schema import Accelerator, DataConfig, LoadDataset, PreProcess
from coldpress.events import Event
from coldpress.hardware import detect
from coldpress.passes.base import Context, PlanContext
from fakes.tiny_models import make_checkpoint

TEMPLATE = "{phrase} -> {tone}"


@pytest.fixture(scope="session")
def tiny_phi3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("phi3"))


@pytest.fixture(scope="session")
def data_configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, DataConfig]:
    """`lines`: completion only, line by line; `stream`: joined."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"phrase": f"phrase {number}", "tone": ("joy", "fear")[number % 2]} for number in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def config(name: str, **pre: Any) -> DataConfig:
        return DataConfig(
            name=name,
            load_dataset_config=LoadDataset(data_name="json", data_files=str(path)),
            pre_process_data_config=PreProcess(text_template=TEMPLATE, **pre),
        )

    return {
        "lines": config("lines", strategy="line-by-line", label_col="tone", completion_only_loss=True, max_seq_len=64),
        "stream": config("stream", max_seq_len=2048),
    }


@pytest.fixture
def events() -> list[Event]:
    return []


@pytest.fixture
def context(tmp_path: Path, data_configs: dict[str, DataConfig], events: list[Event]) -> Callable[[str], Context]:
    """A context with fresh folders for each step name."""

    def make(step: str) -> Context:
        output, work = tmp_path / step / "out", tmp_path / step / "work"
        output.mkdir(parents=True)
        work.mkdir()
        return Context(
            step=step,
            output=output,
            work=work,
            hardware=detect(),
            accelerator=Accelerator(),
            data_configs=data_configs,
            emit=events.append,
        )

    return make


@pytest.fixture
def plan_context(data_configs: dict[str, DataConfig]) -> PlanContext:
    return PlanContext(detect(), Accelerator(), data_configs, dict.fromkeys(data_configs, 500))
