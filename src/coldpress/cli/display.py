"""Events on the terminal: a live view of the step under way, a plain line for what is done, JSON lines on request."""

from __future__ import annotations

import contextlib
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from coldpress.cli.figures import fitted, position, progress_figures
from coldpress.events import (
    EvaluationLoss,
    Event,
    Message,
    ParityMeasured,
    Progress,
    RunFinished,
    RunStarted,
    ScoreMeasured,
    SearchFinished,
    SearchStarted,
    StepFailed,
    StepFinished,
    StepStarted,
    TrialFinished,
    event_to_json,
)
from coldpress.units import apart, duration, quantity, settings_text, size, spread

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

__all__ = ["JsonLines", "PlainLines", "Quiet", "Terminal", "sink_for"]

_BAR_FROM = 56
"""Columns that a terminal must have for a bar to leave room for the rest."""
_BAR = 20


def sink_for(log_format: str) -> JsonLines | PlainLines | Terminal:
    if log_format == "json":
        return JsonLines()
    if log_format == "plain" or not sys.stdout.isatty():
        return PlainLines()
    return Terminal()


class JsonLines:
    """Every event as one JSON line on standard output."""

    def __call__(self, event: Event) -> None:
        _echo(event_to_json(event))

    def close(self) -> None:
        """Nothing to put away."""


class Quiet:
    """Warnings alone, on standard error: standard output is for the result."""

    def __call__(self, event: Event) -> None:
        if isinstance(event, Message) and event.level == "warning":
            where = f"{event.step}: " if event.step else ""
            click.echo(f"{click.style('warning', fg='yellow')} {where}{event.text}", err=True)

    def close(self) -> None:
        """Nothing to put away."""


@dataclass
class _Phase:
    """What a step is busy with: its pass, its proof, an evaluation; or one stretch of it with a count of its own."""

    step: str = ""
    name: str = ""
    began: float = field(default_factory=time.monotonic)
    last: Progress | None = None
    shown: float | None = None
    """When a line of it was last printed."""

    @property
    def label(self) -> str:
        return " ".join(part for part in (self.step, self.name) if part)

    def take(self, event: Progress) -> None:
        """Note where it stands. Another count in the same step begins anew, as nothing was shown of it yet."""
        before = self.last
        if before is not None and (event.step, event.unit, event.total) != (before.step, before.unit, before.total):
            self.shown = None
        self.step = self.step or event.step
        self.last = event


_PHASES = {"parity": "proof", "evaluate": "evaluation"}


class PlainLines:
    """One line for each thing that happened; of progress one every few seconds, so short phases print none."""

    def __init__(self, seconds_between_progress: float = 5.0) -> None:
        self._between = seconds_between_progress
        self._width = 0
        self._phase = _Phase()
        self._trials = 0
        """Of the search that is under way, at most; a trial is then one line, whatever its steps tell."""

    def __call__(self, event: Event) -> None:
        if isinstance(event, SearchStarted):
            self._trials = event.trials
        if isinstance(event, SearchFinished):
            self._trials = 0
        if self._trials and isinstance(event, StepFinished | StepFailed | ScoreMeasured | ParityMeasured):
            self._phase = _Phase()
        elif isinstance(event, StepStarted):
            name = _PHASES.get(event.kind, event.kind)
            self._phase = _Phase(event.step, f"{name} {event.detail}".rstrip())
        elif isinstance(event, Progress):
            self._phase.take(event)
            self.progress(event)
        else:
            if isinstance(event, RunStarted):
                self._width = max((len(name) for name in (*event.steps, "input")), default=8)
            if isinstance(event, StepFinished | StepFailed | ScoreMeasured | ParityMeasured | TrialFinished):
                self._phase = _Phase()
            text = _text_of_search(event, self._trials) or _text(event, self._width)
            if text is not None:
                self.line(text)

    def progress(self, event: Progress) -> None:
        """Print where a phase stands, every few seconds, and its end: of a training always, else if it took long."""
        now, phase = time.monotonic(), self._phase
        ended = event.done >= event.total and (phase.shown is not None or "loss" in event.values)
        if ended or now - (phase.began if phase.shown is None else phase.shown) >= self._between:
            phase.shown = now
            share = f"({event.done / event.total:.0%})" if event.total > 0 and event.unit != "B" else ""
            parts = [f"{position(event)} {share}".rstrip(), *progress_figures(event)]
            name = "" if "loss" in event.values or not phase.name else f"{phase.name}: "
            self.line(f"{event.step:{self._width}s}  {name}{'  '.join(parts)}")

    def line(self, text: str) -> None:
        _echo(text)

    def close(self) -> None:
        """Nothing to put away."""


class Terminal(PlainLines):
    """The same, with a live view of the phase under way instead of lines of progress."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        import rich.console
        from rich.live import Live

        self._console = console or rich.console.Console(highlight=False)
        self._live = Live(console=self._console, get_renderable=self._render, transient=True, refresh_per_second=4)
        self._live.start()

    def progress(self, event: Progress) -> None:
        """The live view reads it when it is drawn next."""

    def line(self, text: str) -> None:
        from rich.text import Text

        self._live.console.print(Text.from_ansi(text))

    def _render(self) -> RenderableType:
        """Two lines: what and how far, then the figures; nothing between phases."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        phase, width = self._phase, self._console.width
        if not phase.step:
            return Text()
        last, took = phase.last, duration(time.monotonic() - phase.began)
        if last is None:
            return Text(fitted([phase.label, took], width))
        where, with_bar = position(last), width >= _BAR_FROM
        beside = len(where) + 2 + (_BAR + 2 + len(took) + 2 if with_bar else 0)
        label = fitted([phase.label], max(8, width - beside))
        head: Any = Text(fitted([label, where, took], width))
        if with_bar:
            head = Table.grid(padding=(0, 2))
            head.add_row(label, ProgressBar(total=last.total, completed=last.done, width=_BAR), where, took)
        figures = fitted(progress_figures(last), width - 2)
        return Group(head, Text(f"  {figures}")) if figures else Group(head)

    def close(self) -> None:
        self._phase = _Phase()
        self._live.stop()


def _echo(text: str) -> None:
    """Print; when the reader went away (`| head`), the run goes on without one."""
    with contextlib.suppress(BrokenPipeError):
        click.echo(text)


def _text(event: Event, width: int) -> str | None:
    if isinstance(event, EvaluationLoss):
        best = "best so far" if event.best_at == event.at else f"best {event.best:.4f} at step {event.best_at}"
        return f"{event.step:{width}s}  evaluation loss {event.loss:.4f} at step {event.at} ({best})"
    if isinstance(event, StepFinished):
        how = click.style("cached", fg="cyan") if event.cached else click.style("done", fg="green")
        memory = f"  peak {size(event.peak_bytes)}" if event.peak_bytes else ""
        return f"{event.step:{width}s}  {how}  {event.kind}  {duration(event.seconds)}{memory}"
    if isinstance(event, ParityMeasured):
        sign = click.style("proved", fg="green") if event.passed else click.style("REFUSED", fg="red", bold=True)
        return (
            f"{event.step:{width}s}  {sign}  against its input: KL {event.kl:.2e}, top-1 {event.top1_agreement:.1%}, "
            f"perplexity {event.perplexity_reference:.4g} -> {event.perplexity:.4g} "
            f"({event.growth}) ({event.tokens} {event.compared}; limit {event.limit})"
        )
    if isinstance(event, ScoreMeasured):
        cached = click.style(" (cached)", fg="cyan") if event.cached else ""
        value = quantity(event.value, event.unit)
        if event.goal_bound is not None:
            value, _ = apart(event.value, event.goal_bound, event.unit)
        value = f"{value} {spread(event.standard_error, event.unit)}".rstrip()
        return f"{event.model:{width}s}  {event.name} {value} (n {event.n:,}){_goal(event)}{cached}"
    if isinstance(event, Message):
        if event.level == "debug":
            return None
        sign = {"warning": click.style("warning", fg="yellow"), "error": click.style("error", fg="red")}.get(
            event.level, ""
        )
        return "  ".join(part for part in (f"{event.step:{width}s}", sign, event.text) if part.strip()) or None
    if isinstance(event, StepFailed):
        return f"{event.step:{width}s}  {click.style('failed', fg='red')}  {event.kind}"
    if isinstance(event, RunFinished):
        from coldpress.cli.ending import ending

        return "\n".join(["", *ending(Path(event.record))])
    return None


_STATES = {
    "feasible": ("meets every goal", "green"),
    "infeasible": ("out", "yellow"),
    "unproved": ("not proved, out of the race", "cyan"),
    "failed": ("failed", "red"),
    "pruned": ("not run", "cyan"),
}


def _text_of_search(event: Event, trials: int) -> str | None:
    if isinstance(event, SearchStarted):
        many = f"{event.space:,} settings" if event.space != 1 else "one setting"
        least = "" if event.trials >= event.space else f", at most {event.trials:,} trials that run"
        return f"search  {event.sampler} over {many}{least}"
    if isinstance(event, TrialFinished):
        said, colour = _STATES[event.state]
        sign = click.style("best so far" if event.best else said, fg=colour, bold=event.best)
        figures = ", ".join(f"{name} {value}" for name, value in event.figures.items())
        why = "" if event.best or not event.why else f": {event.why}"
        took = duration(event.seconds) if event.seconds else ""
        number = f"trial {event.number:>{len(str(trials))}d}"
        return "  ".join(
            part for part in (number, settings_text(event.settings), f"{sign}{why}", figures, took) if part
        )
    if isinstance(event, SearchFinished):
        some = f"{event.feasible} of {event.trials} trials meet every goal"
        some += f", {event.unproved} out of the race" if event.unproved else ""
        why = event.why if event.feasible else event.why.removeprefix("no trial meets every goal; ")
        chosen = "" if event.winner is None else f"; trial {event.winner} is handed over: {why}"
        ended = f"; it ended at {event.stopped}" if event.stopped else ""
        return f"search  {some}{chosen}{ended} ({duration(event.seconds)})"
    return None


def _goal(event: ScoreMeasured) -> str:
    """What was asked of a score, and whether it is so."""
    if event.goal is None:
        return ""
    sign = click.style("met", fg="green") if event.goal_met else click.style("NOT MET", fg="red", bold=True)
    bound = "" if event.goal_bound is None else f" ({apart(event.value, event.goal_bound, event.unit)[1]})"
    return f"  goal {event.goal}{bound} {sign}"
