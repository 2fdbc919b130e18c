"""A config as a plain document: keys in the order of the schema, written as JSON or YAML."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from coldpress.config.metrics import METRIC_TYPES, SubType
from coldpress.config.schema import (
    Accelerator,
    AzureMLSystem,
    DataConfig,
    Evaluator,
    InputModel,
    LoadDataset,
    LoadKwargs,
    PreProcess,
    Workflow,
)
from coldpress.config.search_strategy import SamplerConfig, SearchStrategy

__all__ = ["document_text", "in_schema_order"]

_MODELS: dict[tuple[str, ...], type[BaseModel]] = {
    (): Workflow,
    ("input_model",): InputModel,
    ("input_model", "load_kwargs"): LoadKwargs,
    ("search_strategy",): SearchStrategy,
    ("search_strategy", "sampler_config"): SamplerConfig,
    ("systems", "*"): AzureMLSystem,
    ("systems", "*", "accelerators", "*"): Accelerator,
    ("data_configs", "*"): DataConfig,
    ("data_configs", "*", "load_dataset_config"): LoadDataset,
    ("data_configs", "*", "pre_process_data_config"): PreProcess,
    ("evaluators", "*"): Evaluator,
    ("evaluators", "*", "metrics", "*", "sub_types", "*"): SubType,
}
"""Where the order of keys is that of a type; `*` is a name or a number."""

_NAMED = {("systems",), ("evaluators",), ("passes",)}


def in_schema_order(document: Mapping[str, Any], passes: Mapping[str, type[BaseModel]]) -> dict[str, Any]:
    """The same document, keys in the order of their types; names and training arguments in the user's order."""
    ordered: dict[str, Any] = _ordered(document, (), passes)
    return ordered


def _ordered(value: Any, where: tuple[str, ...], passes: Mapping[str, type[BaseModel]]) -> Any:
    if isinstance(value, list):
        return [_ordered(item, (*where, "*"), passes) for item in value]
    if not isinstance(value, Mapping):
        return value
    keys = list(value)
    order = _order(value, where, passes)
    if order is not None:
        keys.sort(key=lambda key: order.index(key) if key in order else len(order))
    named = where in _NAMED
    return {key: _ordered(value[key], (*where, "*" if named else key), passes) for key in keys}


def _order(
    value: Mapping[str, Any], where: tuple[str, ...], passes: Mapping[str, type[BaseModel]]
) -> Sequence[str] | None:
    if where in _MODELS:
        return list(_MODELS[where].model_fields)
    if where == ("evaluators", "*", "metrics", "*"):
        metric = METRIC_TYPES.get(value.get("type", ""))
        return None if metric is None else list(metric.model_fields)
    if where in (("passes", "*"), ("passes", "*", "*")):
        model = passes.get(value.get("type", ""))
        return ["type", *(model.model_fields if model else ()), "host", "evaluator", "parity"]
    return None


def document_text(document: Mapping[str, Any], path: Path) -> str:
    """As YAML where the file's name ends in .yaml or .yml, else as JSON."""
    if path.suffix.lower() not in (".yaml", ".yml"):
        return json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.allow_unicode = True
    yaml.width = 4096
    out = io.StringIO()
    yaml.dump(dict(document), out)
    return out.getvalue()
