"""`coldpress cache ls`, `prune` and `verify`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from coldpress.cli.text import duration, size, table
from coldpress.errors import UsageError

__all__ = ["cache", "list_steps", "prune", "verify"]


@click.group()
@click.option("--cache-dir", type=click.Path(path_type=Path), help="The cache folder.")
@click.option("--config", "-c", type=click.Path(path_type=Path), help="A workflow whose cache is meant.")
@click.pass_context
def cache(ctx: click.Context, cache_dir: Path | None, config: Path | None) -> None:
    """Finished steps: list, prune, verify. Default: .coldpress-cache in this folder."""
    if config is not None and cache_dir is None:
        from coldpress.api import load_config

        cache_dir = config.resolve().parent / load_config(config).workflow.cache_dir
    root = (cache_dir or Path(".coldpress-cache")).resolve()
    if not root.is_dir():
        raise UsageError(f"there is no cache at {root}", hint="name it with --cache-dir, or a workflow with --config")
    from coldpress.engine.store import Store

    ctx.obj = Store(root)


@cache.command("ls")
@click.pass_obj
def list_steps(store: Any) -> None:
    """List finished steps, last used first."""
    entries = store.entries()
    rows = [
        [
            entry.key[:12],
            str(entry.record.get("pass", "?")),
            str(entry.record.get("step", "?")),
            size(entry.bytes),
            duration(entry.record.get("seconds")),
            f"{duration(time.time() - entry.last_used)} ago",
        ]
        for entry in entries
    ]
    click.echo(table(["key", "pass", "step", "size", "took", "used"], rows, right=(3, 4)))
    unfinished = len(list((store.root / "partial").glob("*")))
    click.echo(
        f"{len(entries)} steps, {size(sum(entry.bytes for entry in entries))}; {unfinished} unfinished; {store.root}"
    )


@cache.command()
@click.option(
    "--days", type=click.FloatRange(0), default=30.0, show_default=True, help="Delete what was not used for so long."
)
@click.option("--all", "everything", is_flag=True, help="Delete every finished and unfinished step.")
@click.pass_obj
def prune(store: Any, days: float, everything: bool) -> None:
    """Delete steps that were not used lately."""
    removed, freed = store.prune(unused_for=-1.0 if everything else days * 86400)
    for line in removed:
        click.echo(f"deleted  {line}")
    click.echo(f"{len(removed)} deleted, {size(freed)} freed")


@cache.command()
@click.pass_context
def verify(ctx: click.Context) -> None:
    """Read every file again and compare its sha256 with the one that was committed."""
    wrong = ctx.obj.verify()
    for line in wrong:
        click.echo(line, err=True)
    click.echo(f"{len(ctx.obj.entries())} steps verified, {len(wrong)} files wrong")
    if wrong:
        ctx.exit(1)
