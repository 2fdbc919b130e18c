"""The config language as JSON Schema (draft 2020-12): editors complete and check configs with it.

Today's flat form. A file in an older dialect is better checked with `coldpress check`, which knows the old names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema

from coldpress.config.check import takes_list
from coldpress.config.reporters import REPORTERS
from coldpress.config.rules_passes import DEFAULT, SEARCHABLE, TRAINING_PASSES
from coldpress.config.schema import PassEntry, Workflow
from coldpress.config.training_args import TrainingArgument, refused_arguments, training_arguments
from coldpress.described import descriptions_of

__all__ = ["workflow_json_schema"]

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_REMARKS: dict[str, Any] = {"^//": {}, "^_comment": {}, "^\\$comment$": {}}
_TYPES = {"int": "integer", "float": "number", "bool": "boolean", "str": "string", "list": "array", "dict": "object"}


def workflow_json_schema(passes: Mapping[str, type[BaseModel]]) -> dict[str, Any]:
    """One schema for a whole file; `passes` maps the name of each pass to the type of its parameters."""
    schema = Workflow.model_json_schema(schema_generator=GenerateJsonSchema)
    definitions: dict[str, Any] = schema.setdefault("$defs", {})
    for name in ("PassEntry", "Frozen"):
        definitions.pop(name, None)
    variants = []
    for name, model in passes.items():
        definitions[f"pass.{name}"] = _pass_schema(name, model, definitions)
        variants.append({"$ref": f"#/$defs/pass.{name}"})
    definitions["pass"] = {
        "type": "object",
        "required": ["type"],
        "properties": {"type": {"enum": list(passes), "description": descriptions_of(PassEntry)["type"]}},
        "oneOf": variants,
    }
    one = {"$ref": "#/$defs/pass"}
    several = {"type": "array", "items": one, "minItems": 1, "description": "Alternatives for a search."}
    schema["properties"]["passes"]["additionalProperties"] = {"anyOf": [one, several]}
    definitions["training_args"] = _training_schema()
    schema["properties"]["$schema"] = {"type": "string", "description": "Where this schema lies; for editors."}
    for part in (schema, *definitions.values()):
        if part.get("additionalProperties") is False:
            part["patternProperties"] = _REMARKS
    return {"$schema": _DIALECT, "title": "Coldpress workflow", **{k: v for k, v in schema.items() if k != "title"}}


def _pass_schema(name: str, model: type[BaseModel], definitions: dict[str, Any]) -> dict[str, Any]:
    """A pass's own parameters beside `type`, `host`, `evaluator` and `parity`, as they stand in a flat file."""
    own = model.model_json_schema()
    for key, value in own.pop("$defs", {}).items():
        definitions.setdefault(key, value)
    entry = PassEntry.model_json_schema()
    shared = {key: entry["properties"][key] for key in ("host", "evaluator", "parity")}
    own["title"] = name
    kind = {"const": name, "description": entry["properties"]["type"]["description"]}
    parameters = {
        key: value if key == "training_args" else _or_several(value, takes_list(model, key))
        for key, value in own.get("properties", {}).items()
    }
    own["properties"] = {"type": kind, **parameters, **shared}
    own["required"] = ["type", *own.get("required", [])]
    own["additionalProperties"] = False
    if name in TRAINING_PASSES and "training_args" in own["properties"]:
        described = own["properties"]["training_args"].get("description", "")
        own["properties"]["training_args"] = {"$ref": "#/$defs/training_args", "description": described}
    return own


def _or_several(one: Mapping[str, Any], holds_list: bool) -> dict[str, Any]:
    """A value, values for a search to try, or one of Olive's words; what is said of the value stays outside."""
    outside = {key: one[key] for key in ("title", "description", "default") if key in one}
    value = {key: item for key, item in one.items() if key not in outside}
    several: dict[str, Any] = {"type": "array", "items": value, "minItems": 1}
    if holds_list:  # a list of lists
        several["contains"] = {"type": "array"}
    return {"anyOf": [value, several, {"enum": [DEFAULT, SEARCHABLE]}], **outside}


def _training_schema() -> dict[str, Any]:
    refused = refused_arguments()
    properties = {
        name: _or_several(_argument(row), "list" in row.types)
        for name, row in training_arguments().items()
        if name not in refused
    }
    services = {"enum": list(REPORTERS)}
    properties["report_to"] = {
        "anyOf": [{"enum": [*REPORTERS, "none", None]}, {"type": "array", "items": services}, {"enum": [["none"]]}],
        "default": "none",
        "description": "Services to report the training to, one or a list; see docs/watching.md.",
    }
    return {
        "type": ["object", "null"],
        "properties": properties,
        "additionalProperties": False,
        "description": "Training arguments of Transformers.",
    }


def _argument(row: TrainingArgument) -> dict[str, Any]:
    kinds = [kind for kind in row.types if not (kind == "str" and {"int", "float"} & set(row.types))]
    schema: dict[str, Any] = {"description": row.help} if row.help else {}
    if row.values:
        choices: list[Any] = [*row.values]
        choices += [value for kind, value in (("bool", True), ("bool", False), ("null", None)) if kind in kinds]
        one: dict[str, Any] = {"enum": choices}
        if "list" in kinds:
            one = {"anyOf": [one, {"type": "array", "items": {"enum": list(row.values)}}]}
        schema.update(one)
    else:
        schema["type"] = [_TYPES[kind] for kind in kinds if kind != "null"] + (["null"] if "null" in kinds else [])
    schema["default"] = row.default
    return schema
