"""Olive's order, ModelBuilder then ExtractAdapters: the builder is told to leave the adapter out of the weights."""

from __future__ import annotations

from typing import Any

import pytest

from coldpress.config.load import load_config
from coldpress.errors import ConfigError
from coldpress.registry import PASSES

CONFIG: dict[str, Any] = {
    "input_model": {"type": "HfModel", "model_path": "model", "adapter_path": "adapter"},
    "passes": {
        "build": {"type": "ModelBuilder", "precision": "int4"},
        "extract": {"type": "ExtractAdapters", "save_format": "safetensors"},
    },
}


def loaded(**passes: Any) -> Any:
    types = {name: PASSES[name].Config for name in PASSES}
    return load_config({**CONFIG, "passes": {**CONFIG["passes"], **passes}}, (), passes=types)


def test_the_builder_before_it_leaves_the_adapter_as_inputs() -> None:
    found = loaded()
    assert found.workflow.passes["build"].config.adapter == "inputs"
    assert found.workflow.passes["extract"].config.save_format == "safetensors"
    told = [str(rewrite) for rewrite in found.rewrites if "adapter" in str(rewrite)]
    assert told == ["olive: default of passes.build.adapter -> passes.build.adapter = inputs"]


def test_what_the_user_says_stays() -> None:
    found = loaded(build={"type": "ModelBuilder", "precision": "int4", "adapter": "merge"})
    assert found.workflow.passes["build"].config.adapter == "merge"


def test_a_builder_alone_or_after_it_merges() -> None:
    found = load_config(
        {**CONFIG, "passes": {"build": CONFIG["passes"]["build"]}},
        (),
        passes={name: PASSES[name].Config for name in PASSES},
    )
    assert found.workflow.passes["build"].config.adapter == "merge"


@pytest.mark.parametrize("key", ["save_as_external_data", "all_tensors_to_one_file", "size_threshold"])
def test_olives_external_data_options_off_are_dropped(key: str) -> None:
    found = loaded(extract={"type": "ExtractAdapters", key: False})
    assert found.workflow.passes["extract"].config.save_format == "onnx_adapter"


def test_how_olive_stores_adapters_is_no_error() -> None:
    found = loaded(extract={"type": "ExtractAdapters", "pack_inputs": True, "save_as_external_data": True})
    assert [problem.path for problem in found.warnings] == [
        "passes.extract.pack_inputs",
        "passes.extract.save_as_external_data",
    ]


def test_a_conversion_and_a_builder_of_metadata_are_one_builder() -> None:
    """As AI Toolkit's templates have it: the builder comes last there, and has to come before the adapter's pass."""
    types = {name: PASSES[name].Config for name in PASSES}
    passes = {
        "convert": {"type": "OnnxConversion", "target_opset": 17},
        "optimize": {"type": "OrtTransformersOptimization", "float16": True},
        "extract": {"type": "ExtractAdapters"},
        "builder": {"type": "ModelBuilder", "metadata_only": True, "precision": "fp16"},
    }
    found = load_config({**CONFIG, "passes": passes}, (), passes=types)
    assert list(found.workflow.passes) == ["builder", "extract"]
    builder = found.workflow.passes["builder"].config
    assert (builder.precision, builder.metadata_only, builder.adapter) == ("fp16", False, "inputs")
    assert [rewrite for rewrite in found.rewrites if "which builds the model" in rewrite.new]


def test_builders_that_stay_as_they_are() -> None:
    """Metadata alone is refused by `check`, and a conversion beside a whole builder by its name."""
    types = {name: PASSES[name].Config for name in PASSES}
    alone = {"builder": {"type": "ModelBuilder", "metadata_only": True, "precision": "fp16"}}
    assert load_config({**CONFIG, "passes": alone}, (), passes=types).workflow.passes["builder"].config.metadata_only
    beside = {"convert": {"type": "OnnxConversion"}, "one": {"type": "ModelBuilder", "precision": "int4"}}
    with pytest.raises(ConfigError, match="OnnxConversion"):
        load_config({**CONFIG, "passes": beside}, (), passes=types)
