"""The end of a run on the terminal: what the report says, in ten lines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from coldpress.record import RunRecord, read_run
from coldpress.report.page import REPORT_FILE
from coldpress.summary import Comparison, comparisons, lacks_text
from coldpress.units import duration, settings_text, size

__all__ = ["LINES", "ending"]

LINES = 10
"""At most."""
_NEAREST = 3
"""Trials of a search that misses its goals."""
_SETTINGS, _WHY = 76, 90
"""Characters of a trial's settings and of a reason; the report has all."""


def ending(record: Path) -> list[str]:
    """Before and after of every figure, proofs, training, cost, and where the files are."""
    run, _ = read_run(record)
    # Where a search met no goal, what was missed and by which settings is more to the point.
    done = [*_training(run), *_proofs(run)] if run.search is None or run.search.met else []
    below = [*_search(run), *done, *_cost(run), *_warnings(run), *_places(run, record)]
    figures = [(row.name, _figure(row)) for row in comparisons(run) if row.after is not None or not run.steps]
    room = LINES - len(below)
    if len(figures) > room:
        left = len(figures) - room + 1
        figures = [*figures[: room - 1], ("", f"{left} {'more ' if room > 1 else ''}figures are in the report")]
    lines = [*figures, *below]
    width = max(len(name) for name, _ in lines)
    return [f"{name:{width}s}  {text}" for name, text in lines]


def _figure(row: Comparison) -> str:
    only = row.after or row.before
    assert only is not None
    if row.after is None or row.before is None:
        return only.text(row.unit)
    after = row.after.text(row.unit)
    judged = ", ".join(part for part in (row.change, row.judgement) if part)
    return f"{row.before.text(row.unit)} → {after}" + (f"  ({judged})" if judged else "")


def _search(run: RunRecord) -> Iterator[tuple[str, str]]:
    found = run.search
    if found is None or found.winner is None:
        return
    trials = {one.number: one for one in found.trials}
    if found.met:
        settings = _cut(settings_text(trials[found.winner].settings), _SETTINGS)
        yield "search", f"trial {found.winner} of {len(trials)} ({settings}): {_cut(found.why, _WHY)}"
        return
    yield "search", f"none of {len(trials)} trials meets every goal; trial {found.winner} is handed over; the nearest:"
    for number in found.nearest[:_NEAREST]:
        trial = trials[number]
        settings = _cut(settings_text(trial.settings), _SETTINGS)
        yield "", f"trial {number} ({settings}) {lacks_text(trial)}: {_cut(trial.why, _WHY)}"


def _cut(text: str, width: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1].rstrip() + "…"


def _training(run: RunRecord) -> Iterator[tuple[str, str]]:
    trained = [step.training for step in run.steps if step.training is not None]
    if trained:
        one = trained[-1]
        first = "" if one.loss_first is None else f"{one.loss_first:.3f} → "
        held_out = "" if one.eval_loss is None else f"; held-out {one.eval_loss:.3f}"
        yield "training loss", f"{first}{one.loss:.3f}{held_out}  ({one.steps:,} steps, {one.tokens:,} tokens)"


def _proofs(run: RunRecord) -> Iterator[tuple[str, str]]:
    found = [(step.name, step.parity) for step in run.steps if step.parity is not None]
    if found:
        said = (
            f"{name} KL {'not a number' if parity.kl is None else f'{parity.kl:.2g}'}" for name, parity in found[-4:]
        )
        yield "against input", "; ".join(said)


def _cost(run: RunRecord) -> Iterator[tuple[str, str]]:
    peak = max((max(step.peak_bytes, step.parity_peak_bytes) for step in run.steps), default=0)
    cached = sum(step.cached for step in run.steps)
    done = f"  ({cached} of {len(run.steps)} steps cached)" if cached else ""
    yield "time, memory", f"{duration(run.seconds)}{f', at most {size(peak)}' if peak else ''}{done}"


def _warnings(run: RunRecord) -> Iterator[tuple[str, str]]:
    if run.warnings:
        yield "warnings", f"{len(set(run.warnings))}, in the report"


def _places(run: RunRecord, record: Path) -> Iterator[tuple[str, str]]:
    if run.output is not None:
        yield "model", run.output.path
    yield "report", str(record.with_name(REPORT_FILE))
    yield "record", str(record)
