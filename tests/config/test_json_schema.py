from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from coldpress.config.json_schema import workflow_json_schema
from coldpress.config.load import LoadedConfig, load_config
from coldpress.registry import PASSES

jsonschema = pytest.importorskip("jsonschema")

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
Load = Callable[..., LoadedConfig]


@pytest.fixture
def schema(passes: Mapping[str, type[BaseModel]]) -> dict[str, Any]:
    return workflow_json_schema(passes)


@pytest.fixture
def validator(schema: dict[str, Any]) -> Any:
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_it_is_json_of_the_2020_12_draft(schema: dict[str, Any]) -> None:
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    json.dumps(schema)


def test_it_accepts_todays_form(validator: Any, today: Any) -> None:
    today["$schema"] = "x"
    today["passes"]["ft"]["// why"] = "y"
    assert list(validator.iter_errors(today)) == []


def test_it_accepts_the_migrated_seed(validator: Any, seed_file: Path, load: Load) -> None:
    assert list(validator.iter_errors(load(seed_file).document)) == []


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*/workflow.*")), ids=lambda path: path.parent.name)
def test_it_accepts_the_examples_with_the_real_passes(path: Path) -> None:
    passes = {name: PASSES[name].Config for name in PASSES}
    document = load_config(path, passes=passes).document
    validator = jsonschema.Draft202012Validator(workflow_json_schema(passes))
    assert list(validator.iter_errors(document)) == []


@pytest.mark.parametrize(
    ("path", "key", "value"),
    [
        ("", "hots", 1),
        ("input_model", "model_pth", "x"),
        ("passes.ft", "rr", 1),
        ("passes.ft", "r", "x"),
        ("passes.build", "precision", "int5"),
        ("passes.build", "type", "Foo"),
        ("passes.ft.training_args", "max_step", 1),
        ("passes.ft.training_args", "optim", "zzz"),
        ("passes.ft.training_args", "train_sampling_strategy", "zzz"),
        ("data_configs.0.pre_process_data_config", "max_seq_len", 0),
        ("systems.box", "type", "Docker"),
    ],
)
def test_it_refuses_what_load_refuses(validator: Any, today: Any, path: str, key: str, value: Any) -> None:
    node = today
    for step in path.split(".") if path else ():
        node = node[int(step) if isinstance(node, list) else step]
    node[key] = value
    assert list(validator.iter_errors(today))


def test_help_texts_are_descriptions(schema: dict[str, Any]) -> None:
    definitions = schema["$defs"]
    assert definitions["PreProcess"]["properties"]["max_seq_len"]["description"].startswith("Tokens in a sequence")
    assert definitions["pass.LoRA"]["properties"]["r"]["description"] == "Rank of the adapter."
    assert definitions["training_args"]["properties"]["learning_rate"]["description"]
    undescribed = [
        f"{name}.{key}"
        for name, definition in definitions.items()
        if not name.startswith("pass.") and name != "training_args"
        for key, field in definition.get("properties", {}).items()
        if not {"description", "$ref"} & field.keys()
    ]
    assert undescribed == []
