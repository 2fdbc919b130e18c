"""Types whose fields say what they are: the string under a field is its description in the JSON Schema.

Source is read when a schema is made, not when a class is: most runs make none.
Validators are built when a type is first used, for the same reason.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler
from pydantic_core import CoreSchema

__all__ = ["Described", "descriptions_of"]


class Described(BaseModel):
    """Base of types that are written down as JSON."""

    model_config = ConfigDict(frozen=True, protected_namespaces=(), defer_build=True)

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        schema = handler(core_schema)
        properties = handler.resolve_ref_schema(schema).get("properties", {})
        for name, text in descriptions_of(cls).items():
            field = cls.model_fields[name]
            for key in {name, field.alias, field.serialization_alias} & set(properties):
                properties[key].setdefault("description", text)
        return schema


@functools.cache
def descriptions_of(cls: type[BaseModel]) -> dict[str, str]:
    """Field -> what is said of it: by `Field(description=...)`, else by the string under it, else a base's."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        found |= _of_module(base.__module__).get(base.__qualname__, {})
    said = {name: field.description or found.get(name) for name, field in cls.model_fields.items()}
    return {name: text for name, text in said.items() if text}


@functools.cache
def _of_module(name: str) -> dict[str, dict[str, str]]:
    """Class -> field -> the string under it, of a module that has its source."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[name]))
    except (KeyError, OSError, TypeError, SyntaxError):
        return {}
    return {where: dict(_strings(node)) for where, node in _classes(tree, "")}


def _classes(parent: ast.AST, where: str) -> Iterator[tuple[str, ast.ClassDef]]:
    """Classes below a node, by their qualified names."""
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, ast.ClassDef):
            yield f"{where}{node.name}", node
            yield from _classes(node, f"{where}{node.name}.")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _classes(node, f"{where}{node.name}.<locals>.")
        else:
            yield from _classes(node, where)


def _strings(cls: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for field, below in zip(cls.body, cls.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            text = below.value.value if isinstance(below.value, ast.Constant) else None
            if isinstance(text, str):
                yield field.target.id, inspect.cleandoc(text)
