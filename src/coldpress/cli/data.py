"""`coldpress data`: the records of a workflow's data sets, or of one file, as the training will see them.

Tokens that carry loss stand between [[ and ]], and are green where there is colour. A line separates the records of a
pack.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from coldpress.cli.data_options import data_config, text_options, text_settings
from coldpress.cli.documents import in_options, options_by_name
from coldpress.cli.workflow import load
from coldpress.errors import PlanError, UsageError
from coldpress.registry import nearest

if TYPE_CHECKING:
    from coldpress.data.preview import Distribution, Preview, PreviewSample

__all__ = ["data"]

_WIDTH = 40
"""Of the longest bar of a histogram."""
_OF_A_FILE = (
    "model", "split", "text_template", "text_field", "chat_template", "form", "label_col", "loss", "assistant_turns",
    "strategy", "max_seq_len",
)  # fmt: skip
"""Options that say what a config file says."""


@click.command()
@click.argument("arguments", nargs=-1, metavar="[FILE [KEY.PATH=VALUE]...]")
@click.option("--config", "-c", metavar="FILE", help="The config file; the same as giving it first.")
@click.option("--name", "names", multiple=True, help="Which data config; default: all.")
@click.option("--model", "-m", help="A checkpoint folder, to look at --data without a config file.")
@click.option("--data", "-d", "file", help="File of records (json, jsonl, csv, parquet, txt), with --model.")
@click.option("--split", help="Split of --data.")
@text_options
@click.option(
    "--classes",
    is_flag=True,
    help="As for sequence classification, which a workflow's task says itself: --answer or label_col is the class.",
)
@click.option("--samples", type=click.IntRange(0), default=3, show_default=True, help="Sequences to show.")
@click.option("--ids/--no-ids", default=False, help="List the tokens of each sample with their ids.")
def data(arguments: Sequence[str], config: str | None, names: Sequence[str], samples: int, **options: Any) -> None:
    """Show prepared samples: which tokens carry loss, how long the records are, what does not fit.

    Either of a workflow (coldpress data FILE), or of a data file (coldpress data --model FOLDER --data FILE).
    """
    from coldpress.artifacts.classifiers import CLASSIFICATION
    from coldpress.data.preview import preview
    from coldpress.data.tokenizer import Tokenizer

    if options["file"] is not None:
        if arguments or config or names:
            raise UsageError("--data stands in place of a config file", hint="give one of them")
        document = _document(options)
    else:
        given = [option for name, option in options_by_name().items() if name in _OF_A_FILE and options.get(name)]
        if given:
            said = f"{', '.join(given)} has a meaning only together with --data"
            if not arguments and not config:
                raise UsageError(said, hint="give --data too")
            raise UsageError(
                f"{said}: the config file says it otherwise",
                hint="coldpress data FILE data_configs.0.pre_process_data_config.max_seq_len=512 overrides a file",
            )
        document = None
    with contextlib.nullcontext() if document is None else in_options():
        known, artifact = _configs(arguments, config, names, document)
        tokenizer = Tokenizer.load(artifact.tokenizer_path)
        model = artifact.describe()
        classes = options["classes"] or (document is None and model.task == CLASSIFICATION)
        for one in known:
            seen = preview(one, tokenizer, context_length=model.context_length, samples=samples, classes=classes)
            _show(one.name, seen, options["ids"])


def _document(options: dict[str, Any]) -> dict[str, Any]:
    """A workflow of one data config and no step."""
    if options["model"] is None:
        raise UsageError("--data needs --model: its tokenizer makes the tokens", hint="--model FOLDER")
    settings = {"strategy": "line-by-line", **text_settings(options)}
    if options["classes"]:
        settings.pop("completion_only_loss", None)
    return {
        "input_model": {"type": "HfModel", "model_path": options["model"]},
        "data_configs": [data_config("data", options["file"], options["split"], settings)],
        "passes": {},
    }


def _configs(
    arguments: Sequence[str], config: str | None, names: Sequence[str], document: dict[str, Any] | None
) -> tuple[list[Any], Any]:
    """The data configs to show, with their paths resolved, and the model."""
    from coldpress.api import load_config
    from coldpress.engine.plan import input_artifact, make_plan

    loaded = load(config, arguments) if document is None else load_config(document)
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
    return [known[name] for name in names or known], input_artifact(plan)


def _show(name: str, seen: Preview, ids: bool) -> None:
    click.echo(click.style(f"{name}  {seen.origin}", bold=True))
    click.echo(f"  {seen.rows} rows, columns {', '.join(seen.columns)}")
    for fact in seen.facts:
        click.echo(f"  {fact}")
    carry = f", {seen.loss_tokens} of them ({seen.loss_tokens / max(seen.tokens, 1):.0%}) carry loss"
    click.echo(
        f"  {seen.sequences} sequences of up to {seen.max_seq_len} tokens; {seen.tokens} tokens"
        + ("" if seen.classes else carry)
    )
    if seen.classes:
        click.echo("  classes: " + ", ".join(f"{label} ({count})" for label, count in seen.classes))
    _lengths(seen.records, seen.max_seq_len)
    if seen.loss_share is not None:
        low, middle, high = seen.loss_share
        click.echo(f"  loss share of a record: lowest {low:.0%}, median {middle:.0%}, highest {high:.0%}")
    if seen.repeats:
        click.echo(f"  {seen.repeats} records repeat the text of another one")
    for note in seen.notes:
        click.echo(f"  {click.style('note', fg='yellow')} {note}")
    for number, sample in enumerate(seen.samples, 1):
        _show_sample(number, sample, ids, bool(seen.classes))


def _lengths(records: Distribution, limit: int) -> None:
    """Lengths of the records as a histogram."""
    click.echo(
        f"  tokens of a record: shortest {records.shortest}, median {records.median}, mean {records.mean:.1f}, "
        f"95 % up to {records.percentile_95}, longest {records.longest}"
    )
    if records.shortest == records.longest:
        return
    most = max(count for _, _, count in records.histogram)
    wide = len(str(records.longest))
    for low, high, count in records.histogram:
        bar = "#" * (0 if not count else max(round(_WIDTH * count / most), 1))
        beyond = "  longer than a sequence" if count and low > limit else ""
        click.echo(f"    {low:>{wide}} to {high:>{wide}}  {bar:<{_WIDTH}} {count}{beyond}")


def _show_sample(number: int, sample: PreviewSample, ids: bool, classes: bool) -> None:
    what = f"class {sample.target}" if classes else f"{sample.loss_tokens} carry loss, between [[ and ]]"
    records = f", {len(sample.lengths)} records" if len(sample.lengths) > 1 else ""
    click.echo(click.style(f"  sample {number}: {len(sample.tokens)} tokens{records}; {what}", dim=True))
    start = 0
    for place, length in enumerate(sample.lengths, 1):
        tokens = sample.tokens[start : start + length]
        start += length
        if len(sample.lengths) > 1:
            title = f"-- record {place} of {len(sample.lengths)}, {length} tokens "
            click.echo(click.style("    " + title + "-" * max(72 - len(title), 0), dim=True))
        click.echo("    " + _text(tokens).replace("\n", "\n    "))
        if ids:
            for position, (text, token, loss) in enumerate(tokens):
                click.echo(f"      {position:>5} {token:>7} {'loss' if loss else '  . '} {text!r}")


def _text(tokens: Sequence[tuple[str, int, bool]]) -> str:
    """The text of a record, with what carries loss between signs."""
    runs: list[tuple[bool, str]] = []
    for text, _, loss in tokens:
        if runs and runs[-1][0] == loss:
            runs[-1] = (loss, runs[-1][1] + text)
        else:
            runs.append((loss, text))
    return "".join(click.style(f"[[{text}]]", fg="green") if loss else text for loss, text in runs)
