"""Events on the terminal: a live line for the step under way, a plain line for what is done, JSON lines on request."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import Any

import click

from coldpress.events import (
    Event,
    Message,
    ParityMeasured,
    Progress,
    RunFinished,
    RunStarted,
    ScoreMeasured,
    StepFailed,
    StepFinished,
    StepStarted,
    event_to_json,
)
from coldpress.units import duration, size

__all__ = ["JsonLines", "PlainLines", "Terminal", "sink_for"]

_NAMES = {"tokens_per_second": "tok/s", "learning_rate": "lr", "eval_loss": "eval loss", "memory_bytes": "mem"}


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


class PlainLines:
    """One line for each thing that happened; progress at most every few seconds."""

    seconds_between_progress = 5.0

    def __init__(self) -> None:
        self._last_progress = 0.0
        self._width = 0

    def __call__(self, event: Event) -> None:
        if isinstance(event, Progress):
            now = time.monotonic()
            if now - self._last_progress >= self.seconds_between_progress or event.done >= event.total:
                self._last_progress = now
                self.line(f"{event.step:{self._width}s}  {_progress(event)}")
            return
        if isinstance(event, RunStarted):
            self._width = max((len(name) for name in (*event.steps, "input")), default=8)
        text = _text(event, self._width)
        if text is not None:
            self.line(text)

    def line(self, text: str) -> None:
        _echo(text)

    def close(self) -> None:
        """Nothing to put away."""


class Terminal(PlainLines):
    """The same, with a live line for the step under way."""

    def __init__(self) -> None:
        super().__init__()
        from rich.console import Console
        from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        self._bars = Bars(
            SpinnerColumn(),
            TextColumn("{task.fields[label]}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            console=Console(highlight=False),
            transient=True,
        )
        self._bars.start()
        self._task: Any = None

    def __call__(self, event: Event) -> None:
        if isinstance(event, StepStarted):
            self._clear()
            self._task = self._bars.add_task("", total=None, label=f"{event.step} {event.kind}", figures="")
            return
        if isinstance(event, Progress):
            if self._task is None:
                self._task = self._bars.add_task("", total=None, label=event.step, figures="")
            self._bars.update(self._task, total=event.total, completed=event.done, figures=_progress(event))
            return
        if isinstance(event, StepFinished | StepFailed | ParityMeasured | ScoreMeasured):
            self._clear()
        super().__call__(event)

    def line(self, text: str) -> None:
        from rich.text import Text

        self._bars.console.print(Text.from_ansi(text))

    def _clear(self) -> None:
        if self._task is not None:
            self._bars.remove_task(self._task)
            self._task = None

    def close(self) -> None:
        self._clear()
        self._bars.stop()


def _echo(text: str) -> None:
    """Print; when the reader went away (`| head`), the run goes on without one."""
    with contextlib.suppress(BrokenPipeError):
        click.echo(text)


def _progress(event: Progress) -> str:
    figures = []
    for name, value in event.values.items():
        if name == "eta_seconds":
            figures.append(f"{duration(value)} left")
        elif name == "memory_bytes":
            figures.append(size(value))
        elif name == "tokens_per_second":
            figures.append(f"{value:,.0f} tok/s")
        else:
            figures.append(f"{_NAMES.get(name, name)} {value:.4g}")
    where = f"{event.done:g}/{event.total:g} {event.unit}".rstrip()
    if event.unit == "B":
        where = f"{size(event.done)} of {size(event.total)}"
    return "  ".join([where, *figures])


def _text(event: Event, width: int) -> str | None:
    if isinstance(event, StepStarted):
        return None
    if isinstance(event, StepFinished):
        how = click.style("cached", fg="cyan") if event.cached else click.style("done", fg="green")
        memory = f"  peak {size(event.peak_bytes)}" if event.peak_bytes else ""
        return f"{event.step:{width}s}  {how}  {event.kind}  {duration(event.seconds)}{memory}"
    if isinstance(event, ParityMeasured):
        sign = click.style("proved", fg="green") if event.passed else click.style("REFUSED", fg="red", bold=True)
        return (
            f"{event.step:{width}s}  {sign}  against its input: KL {event.kl:.2e}, top-1 {event.top1_agreement:.1%}, "
            f"perplexity {event.perplexity_reference:.4g} -> {event.perplexity:.4g} "
            f"({event.growth}) ({event.tokens} tokens; limit {event.limit})"
        )
    if isinstance(event, ScoreMeasured):
        cached = click.style(" (cached)", fg="cyan") if event.cached else ""
        return (
            f"{event.model:{width}s}  {event.metric} {event.value:.1%} ± {event.standard_error:.1%} "
            f"({event.n} records){cached}"
        )
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
        margin = " " * (width + 2)
        return f"{margin}model  {event.output}\n{margin}record {event.record}\n{margin}total  {duration(event.seconds)}"
    return None
