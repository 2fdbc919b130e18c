"""The base of every config type."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field

from coldpress.described import Described

__all__ = ["Frozen", "Text"]

Text = Annotated[str, Field(min_length=1)]
"""A text that says something."""


class Frozen(Described):
    """Base of every config type: immutable, unknown keys forbidden, field docstrings become help text."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)
