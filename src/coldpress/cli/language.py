"""`coldpress migrate` and `schema`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from coldpress.cli.workflow import say_dialect

__all__ = ["migrate", "schema"]


@click.command()
@click.argument("old", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", "new", required=True, type=click.Path(path_type=Path), help="The file to write: .json or .yaml."
)
@click.option("--force", is_flag=True, help="Overwrite the file if it is there.")
def migrate(old: Path, new: Path, force: bool) -> None:
    """Rewrite a config of any older Olive dialect to today's; each rule that fired is listed."""
    from coldpress.api import load_config
    from coldpress.config.migrate import write_migrated

    loaded = load_config(old)
    write_migrated(loaded, new, force=force)
    say_dialect(loaded)
    click.echo(f"{new}: written ({len(loaded.rewrites)} rewrites)")


@click.command()
@click.option("--record", is_flag=True, help="Of run.json, the record of a run, instead.")
def schema(record: bool) -> None:
    """Print the JSON Schema of the config language; editors complete and check configs with it."""
    if record:
        from coldpress.record import record_json_schema

        click.echo(json.dumps(record_json_schema(), indent=2))
        return
    from coldpress.config.json_schema import workflow_json_schema
    from coldpress.registry import PASSES

    click.echo(json.dumps(workflow_json_schema({name: PASSES[name].Config for name in PASSES}), indent=2))
