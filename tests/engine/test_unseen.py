"""What is said before a model is there: by `check`, and by the plan of a model that is still on a hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coldpress.api import load_config
from coldpress.engine.plan import make_plan
from coldpress.engine.unseen import without_the_model

BUILD: dict[str, Any] = {"type": "ModelBuilder", "precision": "int4"}
LORA: dict[str, Any] = {"type": "LoRA", "train_data_config": "rows"}


@pytest.mark.parametrize(
    ("passes", "said"),
    [
        ({"build": BUILD}, []),
        ({"build": {**BUILD, "metadata_only": True}}, ["metadata_only takes an ONNX model"]),
        ({"build": {**BUILD, "extra_options": {"use_paged_attention": True}}}, ["use_paged_attention"]),
        ({"out": {"type": "ExtractAdapters"}}, ["ExtractAdapters takes an ONNX model, and input_model is a Hugging"]),
        ({"build": BUILD, "ft": LORA}, ["LoRA takes a Hugging Face checkpoint, and build is an ONNX model"]),
        ({"build": BUILD, "again": BUILD}, ["ModelBuilder takes a Hugging Face checkpoint, and build is"]),
        ({"build": BUILD, "out": {"type": "ExtractAdapters", "adapter_type": "dora"}}, ["adapter_type dora"]),
        (
            {"a": {"type": "ExtractAdapters"}, "b": {**BUILD, "metadata_only": True}},
            ["ExtractAdapters takes", "metadata_only"],
        ),
    ],
)
def test_what_speaks_against_a_workflow_whatever_its_model_is(
    tmp_path: Path, passes: dict[str, Any], said: list[str]
) -> None:
    path = tmp_path / "w.json"
    path.write_text(
        json.dumps(
            {
                "input_model": {"type": "HfModel", "model_path": "some/model"},
                "data_configs": [{"name": "rows", "load_dataset_config": {"data_name": "some/data"}}],
                "passes": passes,
            },
            indent=1,
        )
    )
    problems = without_the_model(load_config(path))
    assert [text in problem.message for text, problem in zip(said, problems, strict=True)] == [True] * len(said)
    lines = path.read_text().splitlines()
    for problem in problems:
        assert problem.line is not None
        assert f'"{problem.path.split(".")[1]}"' in lines[problem.line - 1]
    refused = {problem.message for problem in make_plan(load_config(path)).refusals}
    assert {problem.message for problem in problems} <= refused, "a model on a hub"
