"""Bytes on disk: what a model is run from, once each, without reading it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from coldpress.artifacts.base import Artifact
from coldpress.config.metrics import SizeMetric
from coldpress.evaluate.bench import Bench
from coldpress.evaluate.size import files_to_run, measure

SIZE = SizeMetric(name="size", type="size_on_disk")


def names(model: Artifact) -> set[str]:
    return {path.name for path in files_to_run(model)}


def test_a_checkpoint(tiny_phi3: Path, bench_of: Callable[..., Bench]) -> None:
    (found,) = measure(SIZE, bench_of(tiny_phi3))
    expected = sum(path.stat().st_size for path in tiny_phi3.iterdir())
    assert (found.value, found.unit, found.higher_is_better) == (expected, "bytes", False)
    assert found.standard_error == 0


def test_what_is_not_run_does_not_count(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json", "pytorch_model.bin", "run.json", "README.md",
                 "artifact.json", ".hidden.json", "optimizer.pt"):  # fmt: skip
        (tmp_path / name).write_bytes(b"x" * 10)
    (tmp_path / "checkpoint-5").mkdir()
    model = Artifact(tmp_path, "checkpoint", tmp_path)
    assert names(model) == {"config.json", "model.safetensors", "tokenizer.json"}
    (tmp_path / "model.safetensors").unlink()
    assert names(model) == {"config.json", "pytorch_model.bin", "tokenizer.json"}


def test_only_the_parts_that_an_index_names(tmp_path: Path) -> None:
    for name in ("config.json", "model-1.safetensors", "model-2.safetensors", "old.safetensors"):
        (tmp_path / name).write_bytes(b"x")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert names(Artifact(tmp_path, "checkpoint", tmp_path)) == {
        "config.json", "model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json",
    }  # fmt: skip


def test_an_adapter_counts_with_its_base_and_shared_files_once(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    for path in (base / "config.json", base / "model.safetensors", base / "tokenizer.json"):
        path.write_bytes(b"x" * 100)
    for path in (adapter / "adapter_config.json", adapter / "adapter_model.safetensors"):
        path.write_bytes(b"x" * 7)
    os.link(base / "tokenizer.json", adapter / "tokenizer.json")
    files = files_to_run(Artifact(adapter, "checkpoint", base, adapter=adapter, tokenizer=adapter))
    assert sum(path.stat().st_size for path in files) == 314


def test_an_onnx_model(tiny_onnx: Artifact, bench_of: Callable[..., Bench]) -> None:
    (found,) = measure(SIZE, bench_of(tiny_onnx))
    files = [path for path in tiny_onnx.model.iterdir() if path.name not in ("artifact.json", "record.json")]
    assert {"model.onnx", "model.onnx.data", "genai_config.json"} <= names(tiny_onnx)
    assert found.value == sum(path.stat().st_size for path in files)
