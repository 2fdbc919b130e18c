"""Models for devices that are not here: built, and proved on the CPU; neither trained nor measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import coldpress
from coldpress.errors import ConfigError
from coldpress.events import Event, Message, ParityMeasured
from coldpress.hardware import detect

pytest.importorskip("onnxruntime")


def workflow(model: Path, folder: Path, provider: str, **more: Any) -> dict[str, Any]:
    accelerator = {"device": "gpu", "execution_providers": [f"{provider}ExecutionProvider"]}
    return {
        "input_model": {"type": "HfModel", "model_path": str(model)},
        "systems": {"there": {"type": "LocalSystem", "accelerators": [accelerator]}},
        "target": "there",
        "passes": {"build": {"type": "ModelBuilder", "precision": "fp16"}},
        "cache_dir": str(folder / "cache"),
        "output_dir": str(folder / "out"),
        **more,
    }


@pytest.fixture(autouse=True)
def without_gpu() -> None:
    if detect().gpus or len(detect().execution_providers) > 1:
        pytest.skip("this machine has a GPU, or kernels for one")


@pytest.mark.parametrize("provider", ["CUDA", "Dml", "WebGpu"])
def test_a_build_needs_no_gpu(phi3: Path, tmp_path: Path, provider: str) -> None:
    seen: list[Event] = []
    coldpress.run(workflow(phi3, tmp_path, provider), sinks=[seen.append])
    assert [event.passed for event in seen if isinstance(event, ParityMeasured)] == [True]
    said = [event.text for event in seen if isinstance(event, Message) and event.level == "warning"]
    assert any(f"those of {provider}ExecutionProvider, which is not here, were not run" in text for text in said)
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert any(f"{provider}ExecutionProvider" in warning for warning in record["warnings"])


def test_what_is_not_here_is_not_measured(phi3: Path, tmp_path: Path) -> None:
    metric = {"name": "size", "type": "size_on_disk", "sub_types": [{"name": "bytes"}]}
    document = workflow(phi3, tmp_path, "CUDA", evaluators={"size": {"metrics": [metric]}}, evaluator="size")
    with pytest.raises(ConfigError, match="CUDAExecutionProvider cannot be measured here") as caught:
        coldpress.run(document)
    assert [problem.path for problem in caught.value.problems] == ["evaluator"]
    del document["evaluator"]
    document["passes"]["build"]["evaluator"] = "size"
    with pytest.raises(ConfigError, match="cannot be measured here") as caught:
        coldpress.run(document)
    assert [problem.path for problem in caught.value.problems] == ["passes.build.evaluator"]


def test_a_bf16_graph_has_no_proof_here(phi3: Path, tmp_path: Path) -> None:
    document = workflow(phi3, tmp_path, "CUDA", passes={"build": {"type": "ModelBuilder", "precision": "bf16"}})
    with pytest.raises(ConfigError, match="the CPU has no kernels for it"):
        coldpress.run(document)
    coldpress.run({**document, "parity": {"enabled": False}})
    assert (tmp_path / "out" / "model" / "genai_config.json").is_file()
