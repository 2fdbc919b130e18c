"""`coldpress report`: the page of a run made again, or several runs side by side."""

from __future__ import annotations

from pathlib import Path

import click

__all__ = ["report"]


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN [RUN]...", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The page to write. Default: report.html beside the run's record; comparison.html here for several runs.",
)
def report(runs: tuple[Path, ...], output: Path | None) -> None:
    """Make the report of RUN (an output folder, or a run.json), or compare several."""
    from coldpress.report.page import REPORT_FILE, comparison_page, run_page, write_page
    from coldpress.report.runs import load_runs

    loaded = load_runs(runs)
    if len(loaded) == 1:
        path = output or loaded[0].folder / REPORT_FILE
        write_page(path, run_page(loaded[0]))
    else:
        path = output or Path("comparison.html")
        write_page(path, comparison_page(loaded))
    click.echo(f"{path}: written")
