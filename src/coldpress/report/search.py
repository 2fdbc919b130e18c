"""The section of a report on a search: the winner and why, the Pareto front, the history, every trial."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from coldpress.record import ObjectiveRecord, ScoreRecord, SearchRecord, TrialRecord
from coldpress.report.charts import COLOURS, Chart, plain
from coldpress.units import duration, quantity, spread

__all__ = ["history_chart", "pareto_chart", "settings_text", "trial_rows"]

_Axis = tuple[str, str, str, bool]
"""(metric, sub type, unit, higher is better)."""
_STATES: Mapping[str, str] = {
    "feasible": "meets every goal",
    "infeasible": "misses a goal",
    "failed": "failed",
    "pruned": "not run: provably out of bounds",
}
_MARKS: Mapping[str, tuple[str, str]] = {
    "feasible": (COLOURS[0], "circle"),
    "infeasible": (COLOURS[5], "circle-open"),
    "failed": (COLOURS[1], "x"),
    "pruned": (COLOURS[2], "square-open"),
}


def _axes(search: SearchRecord) -> list[_Axis]:
    """What a scatter shows: the first two objectives; beside a single one, the number with a goal that most have."""
    found = [_axis(one) for one in search.objectives]
    counts: dict[_Axis, int] = {}
    for trial in search.trials:
        for score in trial.scores:
            axis = (score.metric, score.sub_type, score.unit, score.higher_is_better)
            if score.goal is not None and axis[:2] not in [one[:2] for one in found]:
                counts[axis] = counts.get(axis, 0) + 1
    found += sorted(counts, key=lambda axis: -counts[axis])
    return found[:2]


def _axis(objective: ObjectiveRecord) -> _Axis:
    return objective.metric, objective.sub_type, objective.unit, objective.higher_is_better


def _score(scores: Sequence[ScoreRecord], axis: _Axis) -> ScoreRecord | None:
    found = [one for one in scores if (one.metric, one.sub_type) == axis[:2] and one.value is not None]
    return found[-1] if found else None


def _name(axis: _Axis) -> str:
    return axis[0] if axis[1] in ("", axis[0], "accuracy_score") else f"{axis[0]}: {axis[1]}"


def _figure(score: ScoreRecord) -> str:
    return f"{quantity(score.value, score.unit)} {spread(score.standard_error, score.unit)}".rstrip()


def settings_text(settings: Mapping[str, Any]) -> str:
    """Dimensions and their values in one line."""
    return ", ".join(f"{name} {one if isinstance(one, str) else json.dumps(one)}" for name, one in settings.items())


def _hover(trial: TrialRecord) -> str:
    lines = [f"trial {trial.number}: {_STATES[trial.state]}"]
    lines += [f"{name} {one if isinstance(one, str) else json.dumps(one)}" for name, one in trial.settings.items()]
    lines += [f"{_name((one.metric, one.sub_type, '', False))}: {_figure(one)}" for one in trial.scores]
    return "<br>".join(plain(line) for line in lines)


def _scaled(score: ScoreRecord) -> float:
    assert score.value is not None
    return score.value * (100.0 if score.unit == "share" else 1.0)


def _axis_layout(axis: _Axis) -> dict[str, Any]:
    unit = "%" if axis[2] == "share" else "" if axis[2] == "bytes" else axis[2]
    better = "higher is better" if axis[3] else "lower is better"
    title = f"{_name(axis)}{f', {unit}' if unit else ''} ({better})"
    layout: dict[str, Any] = {"title": {"text": plain(title)}}
    if axis[2] == "bytes":
        layout.update(tickformat=".3s", ticksuffix="B")
    return layout


def pareto_chart(search: SearchRecord, before: Sequence[ScoreRecord]) -> Chart | None:
    """Trials over two numbers, the front joined by a line; `before`: scores of the input model."""
    axes = _axes(search)
    if len(axes) < 2:
        return None
    placed = [
        (trial, x, y)
        for trial in search.trials
        if trial.same_as is None
        and (x := _score(trial.scores, axes[0])) is not None
        and (y := _score(trial.scores, axes[1])) is not None
    ]
    if not placed:
        return None
    traces = []
    on_front = sorted(
        ((_scaled(x), _scaled(y)) for trial, x, y in placed if trial.number in search.front), key=lambda pair: pair[0]
    )
    if len(on_front) > 1:
        traces.append(
            {"type": "scatter", "mode": "lines", "x": [x for x, _ in on_front], "y": [y for _, y in on_front],
             "name": "Pareto front", "line": {"color": COLOURS[3], "width": 2, "dash": "dot"}, "hoverinfo": "skip"}
        )  # fmt: skip
    for state, (colour, symbol) in _MARKS.items():
        mine = [(trial, x, y) for trial, x, y in placed if trial.state == state and trial.number != search.winner]
        if mine:
            traces.append(_points(mine, _STATES[state], {"size": 10, "color": colour, "symbol": symbol}))
    winner = [one for one in placed if one[0].number == search.winner]
    if winner:
        name = "handed over" if search.met else "handed over, though it misses a goal"
        traces.append(_points(winner, name, {"size": 17, "color": COLOURS[3], "symbol": "star"}))
    x0, y0 = _score(before, axes[0]), _score(before, axes[1])
    if x0 is not None and y0 is not None:
        traces.append(
            {"type": "scatter", "mode": "markers", "x": [_scaled(x0)], "y": [_scaled(y0)], "name": "input model",
             "marker": {"size": 12, "color": COLOURS[4], "symbol": "diamond"},
             "hovertemplate": f"input model<br>{plain(_figure(x0))}<br>{plain(_figure(y0))}<extra></extra>"}
        )  # fmt: skip
    layout = {"xaxis": _axis_layout(axes[0]), "yaxis": _axis_layout(axes[1]), "hovermode": "closest"}
    said = f"{_name(axes[0])} against {_name(axes[1])} of {len(placed)} trials; hover over one for its settings."
    return Chart("pareto", {"data": traces, "layout": layout}, said, 420)


def _points(
    placed: Sequence[tuple[TrialRecord, ScoreRecord, ScoreRecord]], name: str, marker: dict[str, Any]
) -> dict[str, Any]:
    return {
        "type": "scatter", "mode": "markers", "x": [_scaled(x) for _, x, _ in placed],
        "y": [_scaled(y) for _, _, y in placed], "name": name, "marker": marker,
        "text": [_hover(trial) for trial, _, _ in placed], "hovertemplate": "%{text}<extra></extra>",
    }  # fmt: skip


def history_chart(search: SearchRecord) -> Chart | None:
    """The first objective trial by trial, the best so far as a line, and what gave no figure below."""
    if not search.objectives or len(search.trials) < 2:
        return None
    axis = _axis(search.objectives[0])
    scored = [(one, score) for one in search.trials if (score := _score(one.scores, axis)) is not None]
    traces: list[dict[str, Any]] = []
    best: list[tuple[int, float]] = []
    for trial, score in scored:
        value = _scaled(score)
        if trial.state == "feasible" and (not best or (value > best[-1][1] if axis[3] else value < best[-1][1])):
            best.append((trial.number, value))
    if best:
        best.append((search.trials[-1].number, best[-1][1]))
        traces.append(
            {"type": "scatter", "mode": "lines", "x": [x for x, _ in best], "y": [y for _, y in best],
             "name": "best so far", "line": {"color": COLOURS[3], "width": 2, "shape": "hv"}, "hoverinfo": "skip"}
        )  # fmt: skip
    for state, (colour, symbol) in _MARKS.items():
        mine = [(trial, score) for trial, score in scored if trial.state == state]
        rest = [one for one in search.trials if one.state == state and _score(one.scores, axis) is None]
        marker = {"size": 10, "color": colour, "symbol": symbol}
        shared = {"type": "scatter", "mode": "markers", "name": _STATES[state], "legendgroup": state,
                  "marker": marker, "hovertemplate": "%{text}<extra></extra>"}  # fmt: skip
        if mine:
            traces.append({**shared, "x": [trial.number for trial, _ in mine], "y": [_scaled(one) for _, one in mine],
                           "text": [_hover(trial) for trial, _ in mine]})  # fmt: skip
        if rest:
            traces.append({**shared, "x": [one.number for one in rest], "y": ["not measured"] * len(rest),
                           "yaxis": "y2", "text": [_hover(one) for one in rest], "showlegend": not mine})  # fmt: skip
    below = any(trace.get("yaxis") == "y2" for trace in traces)
    layout: dict[str, Any] = {
        "xaxis": {"title": {"text": "trial"}, "rangemode": "tozero"},
        "yaxis": {**_axis_layout(axis), "domain": [0.2 if below else 0, 1]},
        "hovermode": "closest",
    }
    if below:
        layout["yaxis2"] = {"type": "category", "domain": [0, 0.12]}
        layout["xaxis"]["anchor"] = "y2"
    return Chart("history", {"data": traces, "layout": layout}, f"{_name(axis)} of each trial, in order.", 380)


def trial_rows(search: SearchRecord) -> list[dict[str, Any]]:
    """Every trial as a row of a table."""
    return [
        {
            "trial": trial,
            "settings": settings_text(trial.settings) or "as it is",
            "state": _STATES[trial.state],
            "figures": "; ".join(f"{_name((s.metric, s.sub_type, '', False))} {_figure(s)}" for s in trial.scores),
            "time": duration(trial.seconds) if trial.seconds else "",
            "front": trial.number in search.front and len(search.objectives) > 1,
            "winner": trial.number == search.winner,
        }
        for trial in search.trials
    ]
