"""`coldpress data`: the first prepared samples of a workflow's data sets, as the training will see them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from coldpress.cli.workflow import load
from coldpress.errors import PlanError, UsageError
from coldpress.registry import nearest

__all__ = ["data"]


@click.command()
@click.argument("arguments", nargs=-1, metavar="FILE [KEY.PATH=VALUE]...")
@click.option("--config", "-c", metavar="FILE", help="The config file; the same as giving it first.")
@click.option("--name", "names", multiple=True, help="Which data config; default: all.")
@click.option("--samples", type=click.IntRange(1), default=3, show_default=True, help="Sequences to show.")
@click.option("--ids/--no-ids", default=True, help="Show token ids.")
def data(arguments: Sequence[str], config: str | None, names: Sequence[str], samples: int, ids: bool) -> None:
    """Show prepared samples: text, token ids, and which tokens carry loss (green, in brackets without colour)."""
    from coldpress.data.prepare import preview
    from coldpress.data.tokenizer import Tokenizer
    from coldpress.engine.plan import input_artifact, make_plan

    loaded = load(config, arguments)
    plan = make_plan(loaded)
    known = plan.data_configs
    for name in names:
        if name not in known:
            close = nearest(name, known)
            raise UsageError(
                f"there is no data config called {name!r}",
                hint=f"did you mean {close}?" if close else f"there are: {', '.join(known) or 'none'}",
            )
    if not known:
        raise PlanError(f"{loaded.path} has no data_configs")
    artifact = input_artifact(plan)
    tokenizer = Tokenizer.load(artifact.tokenizer_path)
    context = artifact.describe().context_length
    for name in names or known:
        _show(name, preview(known[name], tokenizer, context_length=context, samples=samples), ids)


def _show(name: str, seen: Any, ids: bool) -> None:
    lengths = seen.lengths
    click.echo(click.style(f"{name}  {seen.origin}", bold=True))
    click.echo(f"  {seen.rows} rows, columns {', '.join(seen.columns)}")
    click.echo(
        f"  {seen.sequences} sequences of up to {seen.max_seq_len} tokens; {seen.tokens} tokens, "
        f"{seen.loss_tokens} of them ({seen.loss_tokens / max(seen.tokens, 1):.0%}) carry loss"
    )
    click.echo(
        f"  lengths: shortest {lengths.shortest}, median {lengths.median}, 95th percentile {lengths.percentile_95}, "
        f"longest {lengths.longest}"
    )
    for note in seen.notes:
        click.echo(f"  {click.style('note', fg='yellow')} {note}")
    for number, sample in enumerate(seen.samples, 1):
        click.echo(click.style(f"  sample {number}", dim=True))
        click.echo("    " + "".join(_token(text, loss) for text, _, loss in sample.tokens).replace("\n", "\n    "))
        if ids:
            click.echo("    ids  " + " ".join(str(one) for _, one, _ in sample.tokens))
            click.echo("    loss " + " ".join("1" if loss else "." for _, _, loss in sample.tokens))


def _token(text: str, loss: bool) -> str:
    return click.style(f"[{text}]", fg="green") if loss else text
