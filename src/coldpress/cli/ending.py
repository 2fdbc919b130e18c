"""The end of a run on the terminal: what the report says, in ten lines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from coldpress.record import RunRecord, read_run
from coldpress.report.page import REPORT_FILE
from coldpress.report.search import settings_text
from coldpress.summary import Comparison, comparisons
from coldpress.units import duration, size

__all__ = ["LINES", "ending"]

LINES = 10
"""At most."""


def ending(record: Path) -> list[str]:
    """Before and after of every figure, proofs, training, cost, and where the files are."""
    run, _ = read_run(record)
    below = [*_search(run), *_training(run), *_proofs(run), *_cost(run), *_warnings(run), *_places(run, record)]
    figures = [(row.name, _figure(row)) for row in comparisons(run) if row.after is not None]
    room = LINES - len(below)
    if len(figures) > room:
        figures = [*figures[: room - 1], ("", f"{len(figures) - room + 1} more figures are in the report")]
    lines = [*figures, *below]
    width = max(len(name) for name, _ in lines)
    return [f"{name:{width}s}  {text}" for name, text in lines]


def _figure(row: Comparison) -> str:
    assert row.after is not None
    after = row.after.text(row.unit)
    if row.before is None:
        return after
    judged = ", ".join(part for part in (row.change, row.judgement) if part)
    return f"{row.before.text(row.unit)} → {after}" + (f"  ({judged})" if judged else "")


def _search(run: RunRecord) -> Iterator[tuple[str, str]]:
    found = run.search
    if found is None or found.winner is None:
        return
    settings = next((settings_text(one.settings) for one in found.trials if one.number == found.winner), "")
    yield "search", f"trial {found.winner} of {len(found.trials)} ({settings or 'as it is'}): {found.why}"


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
    peak = max((max(step.peak_bytes, step.parity_peak_bytes) for step in run.steps), default=None)
    cached = sum(step.cached for step in run.steps)
    done = f"  ({cached} of {len(run.steps)} steps cached)" if cached else ""
    yield "time, memory", f"{duration(run.seconds)}, at most {size(peak)}{done}"


def _warnings(run: RunRecord) -> Iterator[tuple[str, str]]:
    if run.warnings:
        yield "warnings", f"{len(set(run.warnings))}, in the report"


def _places(run: RunRecord, record: Path) -> Iterator[tuple[str, str]]:
    if run.output is not None:
        yield "model", run.output.path
    yield "report", str(record.with_name(REPORT_FILE))
    yield "record", str(record)
