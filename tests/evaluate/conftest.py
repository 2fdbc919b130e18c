from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from coldpress.artifacts.base import Artifact
from coldpress.config.schema import DataConfig, LoadDataset, PreProcess
from coldpress.data.tokenizer import Tokenizer
from coldpress.evaluate.bench import Bench, OpenRunners
from coldpress.events import Event
from fakes.models_built import build_fp32
from fakes.tiny_models import make_checkpoint, make_tokenizer

MakeData = Callable[..., DataConfig]


@pytest.fixture(scope="session")
def tiny_phi3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("phi3"))


@pytest.fixture(scope="session")
def tiny_onnx(tiny_phi3: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The same model, built by the real builder."""
    pytest.importorskip("onnxruntime")
    return build_fp32(tiny_phi3, tmp_path_factory.mktemp("onnx"))


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return Tokenizer.load(folder)


@pytest.fixture
def make_data(tmp_path: Path) -> MakeData:
    """A data config of (text, label) rows; `pre` are keys of pre_process_data_config."""

    def make(rows: Sequence[tuple[str, Any]], **pre: Any) -> DataConfig:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
        return DataConfig(
            name="rows",
            load_dataset_config=LoadDataset(data_name="json", data_files=str(path)),
            pre_process_data_config=PreProcess(
                **{"text_template": "{text}={label}", "label_col": "label", "strategy": "line-by-line", **pre}
            ),
        )

    return make


@pytest.fixture
def told() -> list[Event]:
    """What a bench told while it measured."""
    return []


@pytest.fixture
def bench_of(told: list[Event]) -> Callable[..., Bench]:
    """A bench for a model and its data."""

    def make(model: Artifact | Path, *data: DataConfig, **options: Any) -> Bench:
        artifact = Artifact.load(model) if isinstance(model, Path) else model
        configs = {config.name: config for config in data}
        return Bench(artifact, OpenRunners(), configs, emit=told.append, step="measured", **options)

    return make
