"""`coldpress cache ls`, `prune` and `verify`."""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from coldpress.cli.text import table
from coldpress.errors import UsageError
from coldpress.units import duration, size

if TYPE_CHECKING:
    from coldpress.engine.store import Store

__all__ = ["cache", "list_steps", "prune", "verify"]


@click.group()
def cache() -> None:
    """Finished steps: list, prune, verify. Default: .coldpress-cache in this folder."""


def _of_a_cache(command: Any) -> Any:
    """Give a verb the options that name a cache, and the store they name as its first argument."""

    @functools.wraps(command)
    def with_store(cache_dir: Path | None, config: Path | None, **options: Any) -> None:
        command(_store(cache_dir, config), **options)

    wrapped = click.option("--config", "-c", type=click.Path(path_type=Path), help="A workflow whose cache is meant.")(
        with_store
    )
    return click.option("--cache-dir", type=click.Path(path_type=Path), help="The cache folder.")(wrapped)


def _store(cache_dir: Path | None, config: Path | None) -> Store:
    if config is not None and cache_dir is None:
        from coldpress.api import load_config

        cache_dir = config.resolve().parent / load_config(config).workflow.cache_dir
    from coldpress.engine.store import Store

    store = Store((cache_dir or Path(".coldpress-cache")).resolve())
    if not store.is_one:
        what = "is no cache of Coldpress" if store.root.is_dir() else "is not there"
        raise UsageError(
            f"the cache {store.root} {what}",
            hint="name it with --cache-dir, or the workflow that uses it with --config",
        )
    return store


@cache.command("ls")
@_of_a_cache
def list_steps(store: Store) -> None:
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
    damaged = len(store.damaged())
    unfinished = len(list((store.root / "partial").glob("*")))
    total = size(sum(entry.bytes for entry in entries))
    click.echo(f"{len(entries)} steps, {total}; {unfinished} unfinished, {damaged} damaged; {store.root}")


@cache.command()
@click.option(
    "--days", type=click.FloatRange(0), default=30.0, show_default=True, help="Delete what was not used for so long."
)
@click.option("--all", "everything", is_flag=True, help="Delete every finished and unfinished step.")
@_of_a_cache
def prune(store: Store, days: float, everything: bool) -> None:
    """Delete steps that were not used lately."""
    removed, freed = store.prune(unused_for=-1.0 if everything else days * 86400)
    for line in removed:
        click.echo(f"deleted  {line}")
    click.echo(f"{len(removed)} deleted, {size(freed)} freed")


@cache.command()
@_of_a_cache
def verify(store: Store) -> None:
    """Read every file again and compare its sha256 with the one that was committed."""
    wrong = store.verify()
    for line in wrong:
        click.echo(line, err=True)
    click.echo(f"{len(store.entries())} steps verified, {len(wrong)} files wrong")
    if wrong:
        click.get_current_context().exit(1)
