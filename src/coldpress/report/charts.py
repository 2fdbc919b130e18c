"""Charts as plain values in Plotly's JSON. Colours are names of CSS variables, filled in where the page is drawn.

Text of users stands in them only through `plain`, since Plotly reads some HTML in texts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coldpress.record import StepRecord, TrainingRecord
from coldpress.summary import Comparison
from coldpress.units import duration, size

__all__ = ["Chart", "cost_chart", "curve_chart", "logged", "overlay_chart", "plain", "score_charts", "smoothed"]

COLOURS = tuple(f"var(--series-{number})" for number in range(1, 7))
POINTS = 1000
"""Most points of a curve; longer ones are drawn as means over equal stretches."""
BARS = 40
"""Most steps in a bar chart; of more, the costliest are drawn."""
TICK = 16
"""Most characters of a name under a chart: longer ones would leave the chart no room. Its caption has them whole."""
LEGEND = 32
"""Most characters of a name in a legend, which on a phone has a line for each."""
SMOOTHING = 0.9
"""Weight of the past in the smoothed loss."""


@dataclass(frozen=True)
class Chart:
    """A figure and what it shows, in words for those who do not see it."""

    id: str
    figure: Mapping[str, Any]
    """`data` and `layout` as Plotly takes them."""
    caption: str
    height: int = 320
    """Pixels."""


def plain(text: str) -> str:
    """Text that Plotly shows as it is."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _cut(text: str, most: int) -> str:
    """A name without its middle, as Plotly shows it: what tells names apart stands at their ends."""
    kept = most // 2
    return plain(text if len(text) <= most else f"{text[: most - kept - 1]}…{text[-kept:]}")


def smoothed(losses: Sequence[float]) -> list[float]:
    """Exponential moving average, without the pull towards the first value (Kingma and Ba 2015, section 3)."""
    found, mean = [], 0.0
    for step, loss in enumerate(losses, start=1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        found.append(mean / (1 - SMOOTHING**step))
    return found


def logged(training: TrainingRecord, name: str) -> list[tuple[int, float]]:
    """(step, value) of everything logged under a name, as far as it is a number."""
    found = [(point.get("step"), point.get(name)) for point in training.log]
    return [(int(step), float(value)) for step, value in found if step is not None and value is not None]


def _thinned(values: Sequence[float]) -> tuple[list[float], list[float]]:
    """(steps, values), at most POINTS of them: means over equal stretches at their middles."""
    stretch = math.ceil(len(values) / POINTS)
    steps, means = [], []
    for start in range(0, len(values), stretch):
        part = values[start : start + stretch]
        steps.append(start + (len(part) + 1) / 2)
        means.append(sum(part) / len(part))
    return steps, means


def _line(x: Sequence[float], y: Sequence[float], name: str, colour: str, **more: Any) -> dict[str, Any]:
    line = {"color": colour, "width": more.pop("width", 2)}
    return {
        "type": "scatter",
        "mode": "lines",
        "x": list(x),
        "y": list(y),
        "name": _cut(name, LEGEND),
        "line": line,
        **more,
    }


def curve_chart(name: str, step: str, training: TrainingRecord) -> Chart:
    """Loss of every step, smoothed loss, evaluation losses; the learning rate below them."""
    x, losses = _thinned(training.losses)
    _, smooth = _thinned(smoothed(training.losses))
    held_out, rates = logged(training, "eval_loss"), logged(training, "learning_rate")
    traces = [
        _line(x, losses, "loss of a step", COLOURS[0], width=1, opacity=0.45, hoverinfo="skip"),
        _line(x, smooth, "smoothed", COLOURS[0], hovertemplate="step %{x:.0f}: %{y:.4f}"),
    ]
    if held_out:
        at, values = zip(*held_out, strict=True)
        marks = {"mode": "lines+markers", "marker": {"size": 8, "symbol": "diamond"}}
        traces.append(_line(at, values, "held-out", COLOURS[1], hovertemplate="step %{x}: %{y:.4f}", **marks))
    layout: dict[str, Any] = {
        "xaxis": {"title": {"text": "training step"}, "rangemode": "tozero"},
        "yaxis": {"title": {"text": "loss, nats per token"}, "domain": [0.34 if rates else 0, 1]},
    }
    if rates:
        at, values = zip(*rates, strict=True)
        traces.append(_line(at, values, "learning rate", COLOURS[2], yaxis="y2", hovertemplate="step %{x}: %{y:.3g}"))
        layout["yaxis2"] = {"title": {"text": "rate"}, "nticks": 4, "domain": [0, 0.22], "rangemode": "tozero"}
        layout["xaxis"]["anchor"] = "y2"
    said = f"Loss of {step} over {len(training.losses):,} training steps, from {training.losses[0]:.3f} to "
    said += f"{training.losses[-1]:.3f}"
    if held_out:
        best, best_at = min((value, at) for at, value in held_out)
        said += f"; held-out loss at best {best:.4f} at step {best_at}"
    return Chart(name, {"data": traces, "layout": layout}, said + ".", 420)


def overlay_chart(trainings: Mapping[str, TrainingRecord]) -> Chart:
    """Smoothed losses of several trainings, by name, over what each had trained on."""
    traces = []
    for place, (name, training) in enumerate(trainings.items()):
        x, smooth = _thinned(smoothed(training.losses))
        share = training.tokens / max(len(training.losses), 1)
        tokens = [step * share for step in x]
        colour = COLOURS[place % len(COLOURS)]
        traces.append(_line(tokens, smooth, name, colour, hovertemplate="%{x:,.0f} tokens: %{y:.4f}"))
    axes = {"xaxis": {"title": {"text": "tokens trained on"}}, "yaxis": {"title": {"text": "smoothed loss"}}}
    said = f"Smoothed training loss of {', '.join(trainings)}."
    return Chart("losses", {"data": traces, "layout": axes}, said, 380)


def score_charts(rows: Sequence[Comparison], order: Sequence[str], prefix: str = "score") -> list[Chart]:
    """One small chart for each figure: a point for each model, with its standard error."""
    return [_score_chart(f"{prefix}-{place}", row, order) for place, row in enumerate(rows) if len(row.models) > 1]


def _score_chart(name: str, row: Comparison, order: Sequence[str]) -> Chart:
    models = [model for model in order if model in row.models and row.models[model].value is not None]
    factor = 100.0 if row.unit == "share" else 1.0
    values = [factor * (row.models[model].value or 0.0) for model in models]
    errors = [factor * (row.models[model].error or 0.0) for model in models]
    said = [row.models[model].text(row.unit) for model in models]
    texts = [plain(text) for text in said]
    trace: dict[str, Any] = {
        "type": "scatter", "mode": "markers", "x": [plain(model) for model in models], "y": values,
        "marker": {"size": 11, "color": COLOURS[0]}, "text": texts, "hovertemplate": "%{x}: %{text}<extra></extra>",
        "error_y": {"type": "data", "array": errors, "color": COLOURS[0], "thickness": 2, "width": 6},
    }  # fmt: skip
    axis: dict[str, Any] = {"rangemode": "tozero"}
    if row.unit == "bytes":
        axis.update(tickformat=".2s", ticksuffix="B")
    elif row.unit == "share":
        axis.update(ticksuffix=" %")
    else:
        axis.update(title={"text": plain(row.unit)})
    names = {"type": "category", "tickmode": "array", "tickvals": list(range(len(models))),
             "ticktext": [_cut(model, TICK) for model in models]}  # fmt: skip
    layout = {"xaxis": names, "yaxis": axis, "showlegend": False, "hovermode": "closest"}
    caption = "; ".join(f"{model} {text}" for model, text in zip(models, said, strict=True))
    return Chart(name, {"data": [trace], "layout": layout}, f"{row.name}: {caption}.", 240)


def cost_chart(steps: Sequence[StepRecord]) -> Chart | None:
    """Time and peak memory of the steps, proofs beside passes; None for a single step, which a table says better."""
    if len(steps) < 2:
        return None
    shown = steps
    if len(steps) > BARS:
        costly = sorted(steps, key=lambda step: -(step.seconds + step.parity_seconds))[:BARS]
        shown = [step for step in steps if step in costly]
    names = [plain(step.name) for step in shown]

    def bars(values: Sequence[float], name: str, colour: str, texts: Sequence[str], axis: str) -> dict[str, Any]:
        return {
            "type": "bar", "orientation": "h", "y": names, "x": list(values), "name": name, "xaxis": axis,
            "marker": {"color": colour}, "text": list(texts), "textposition": "none",
            "hovertemplate": "%{y}: %{text}<extra>" + name + "</extra>", "showlegend": axis == "x", "legendgroup": name,
        }  # fmt: skip

    traces = [
        trace
        for name, colour, times, peaks in (
            ("the pass", COLOURS[0], [s.seconds for s in shown], [s.peak_bytes for s in shown]),
            ("its proof", COLOURS[1], [s.parity_seconds for s in shown], [s.parity_peak_bytes for s in shown]),
        )
        for trace in (
            bars(times, name, colour, [duration(one) for one in times], "x"),
            bars(peaks, name, colour, [size(one) for one in peaks], "x2"),
        )
    ]
    layout = {
        "barmode": "group",
        "yaxis": {"type": "category", "autorange": "reversed"},
        "xaxis": {"title": {"text": "time"}, "ticksuffix": " s", "domain": [0, 0.46], "nticks": 4},
        "xaxis2": {
            "title": {"text": "peak memory"},
            "ticksuffix": "B",
            "domain": [0.54, 1],
            "anchor": "y",
            "tickformat": ".2s",
            "nticks": 4,
        },
        "hovermode": "closest",
    }
    left = f"; the {len(shown)} longest of {len(steps)}" if len(shown) < len(steps) else ""
    said = f"Time and highest resident memory of each step and of its proof{left}."
    return Chart("cost", {"data": traces, "layout": layout}, said, 130 + 44 * len(shown))
