"""The base of every config type."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Frozen", "Text"]

Text = Annotated[str, Field(min_length=1)]
"""A text that says something."""


class Frozen(BaseModel):
    """Base of every config type: immutable, unknown keys forbidden, field docstrings become help text."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), populate_by_name=True
    )
