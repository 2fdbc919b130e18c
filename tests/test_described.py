"""The strings under fields, as a JSON Schema says them."""

from __future__ import annotations

import subprocess
import sys

from pydantic import Field

from coldpress.described import Described, descriptions_of


class Outer(Described):
    """Fields of all kinds."""

    plain: int
    """In one line."""
    long: int = 1
    """In two lines,

    with a second part.
    """
    silent: int = 2
    named: int = Field(3, alias="other")
    """Under its alias."""
    said: int = Field(4, description="In the field.")
    """Not this."""

    class Inner(Described):
        """A class in a class."""

        plain: str
        """Of the inner one."""


class Heir(Outer):
    """Says one thing anew."""

    long: int = 5
    """Otherwise."""
    more: Outer.Inner
    """A part."""


def test_strings_under_fields_are_descriptions() -> None:
    assert descriptions_of(Outer) == {
        "plain": "In one line.",
        "long": "In two lines,\n\nwith a second part.",
        "named": "Under its alias.",
        "said": "In the field.",
    }
    assert descriptions_of(Outer.Inner) == {"plain": "Of the inner one."}
    assert descriptions_of(Heir) == {**descriptions_of(Outer), "long": "Otherwise.", "more": "A part."}


def test_the_schema_holds_them() -> None:
    schema = Heir.model_json_schema()
    said = {name: one.get("description") for name, one in schema["properties"].items()}
    own = descriptions_of(Heir)
    assert said == {
        **{name: text for name, text in own.items() if name != "named"},
        "other": own["named"],
        "silent": None,
    }
    assert schema["$defs"]["Inner"]["properties"]["plain"]["description"] == "Of the inner one."


def test_a_class_without_source_has_none() -> None:
    made = (
        "from coldpress.described import Described, descriptions_of\n"
        "class Typed(Described):\n    field: int\n    'No source.'\n"
        "assert descriptions_of(Typed) == {}\n"
        "assert Typed.model_json_schema()['properties'] == {'field': {'title': 'Field', 'type': 'integer'}}\n"
    )
    subprocess.run([sys.executable, "-c", made], check=True)


def test_a_class_in_a_function_is_told_from_its_namesake() -> None:
    class Outer(Described):
        plain: int
        """Of the function's."""

    assert descriptions_of(Outer) == {"plain": "Of the function's."}
