"""The section of a report on a search: the winner and why, the Pareto front, the history, every trial."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from coldpress.record import ObjectiveRecord, ScoreRecord, SearchRecord, TrialRecord
from coldpress.report.charts import COLOURS, Chart, plain
from coldpress.summary import Measured, lacks_text, number_name, score_name
from coldpress.units import duration, plain_value, settings_text

__all__ = ["history_chart", "pareto_chart", "trial_rows"]

_Axis = tuple[str, str, str, bool]
"""(metric, sub type, unit, higher is better)."""
_Placed = tuple[TrialRecord, ScoreRecord, ScoreRecord]
"""A trial with the two numbers that place it."""
_STATES: Mapping[str, str] = {
    "feasible": "meets every goal",
    "infeasible": "misses a goal",
    "unproved": "not proved, out of the race",
    "failed": "failed",
    "pruned": "not run: provably out of bounds",
}
_TITLE = 30
"""Characters of an axis's title that have room beside a chart; the caption has all."""
_TICKS = 8
"""Of the axis of trials, at most."""
_MANY = 100
"""Trials from which on their marks are small."""
_MARKS: Mapping[str, tuple[str, str]] = {
    "feasible": (COLOURS[0], "circle"),
    "infeasible": (COLOURS[5], "circle-open"),
    "unproved": (COLOURS[0], "circle-open"),
    "failed": (COLOURS[1], "x"),
    "pruned": (COLOURS[2], "square-open"),
}


def _every_axis(search: SearchRecord) -> list[_Axis]:
    """Objectives, then other numbers with a goal, those that most trials have first."""
    found = [_axis(one) for one in search.objectives]
    counts: dict[_Axis, int] = {}
    for trial in search.trials:
        for score in trial.scores:
            axis = (score.metric, score.sub_type, score.unit, score.higher_is_better)
            if score.goal is not None and axis[:2] not in [one[:2] for one in found]:
                counts[axis] = counts.get(axis, 0) + 1
    return found + sorted(counts, key=lambda axis: -counts[axis])


def _axis(objective: ObjectiveRecord) -> _Axis:
    return objective.metric, objective.sub_type, objective.unit, objective.higher_is_better


def _score(scores: Sequence[ScoreRecord], axis: _Axis) -> ScoreRecord | None:
    found = [one for one in scores if (one.metric, one.sub_type) == axis[:2] and one.value is not None]
    return found[-1] if found else None


def _name(axis: _Axis) -> str:
    return number_name(axis[0], axis[1])


def _better(axis: _Axis) -> str:
    return f"{_name(axis)} ({'higher' if axis[3] else 'lower'} is better)"


def _figure(score: ScoreRecord) -> str:
    return Measured(score.value, score.standard_error).text(score.unit)


def _hover(trial: TrialRecord) -> str:
    lines = [f"trial {trial.number}: {_state(trial)}"]
    lines += [f"{name} {plain_value(one)}" for name, one in trial.settings.items()]
    lines += [f"{score_name(one)}: {_figure(one)}" for one in trial.scores]
    return "<br>".join(plain(line) for line in lines)


def _state(trial: TrialRecord) -> str:
    return _STATES[trial.state] if trial.whole else f"the first steps alone, {_STATES[trial.state]}"


def _scaled(score: ScoreRecord) -> float:
    assert score.value is not None
    return score.value * (100.0 if score.unit == "share" else 1.0)


def _axis_layout(axis: _Axis) -> dict[str, Any]:
    unit = "%" if axis[2] == "share" else "" if axis[2] == "bytes" else axis[2]
    after = f", {unit}" if unit else ""
    name = next((one for one in (_name(axis), axis[1]) if one and len(one + after) <= _TITLE), None)
    name = name or f"{_name(axis)[: max(8, _TITLE - len(after) - 1)]}…"
    layout: dict[str, Any] = {"title": {"text": plain((name + after)[: 2 * _TITLE]), "font": {"size": 13}}}
    if axis[2] == "bytes":
        layout.update(tickformat=".3s", ticksuffix="B")
    return layout


def pareto_chart(search: SearchRecord, before: Sequence[ScoreRecord]) -> Chart | None:
    """Trials over the first two objectives, or a single one and the number with a goal that most trials have.

    The front is joined by a line. `before`: scores of the input model.
    """
    axes = _every_axis(search)[:2]
    if len(axes) < 2:
        return None
    placed = [
        (trial, x, y)
        for trial in search.trials
        if trial.same_as is None
        and trial.whole
        and (x := _score(trial.scores, axes[0])) is not None
        and (y := _score(trial.scores, axes[1])) is not None
    ]
    if not placed:
        return None
    traces = []
    on_front = _front(search, axes, placed)
    if len(on_front) > 1:
        traces.append(
            {"type": "scatter", "mode": "lines", "x": [x for x, _ in on_front], "y": [y for _, y in on_front],
             "name": "Pareto front", "line": {"color": COLOURS[3], "width": 2, "dash": "dot"}, "hoverinfo": "skip"}
        )  # fmt: skip
    for state, (colour, symbol) in _MARKS.items():
        mine = [(trial, x, y) for trial, x, y in placed if trial.state == state and trial.number != search.winner]
        if mine:
            traces.append(_points(mine, _STATES[state], {"size": _size(search), "color": colour, "symbol": symbol}))
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
    said = f"{_better(axes[0])} against {_better(axes[1])} of {len(placed)} trials"
    said += "; what no other beats in both is joined by the dotted line" if len(on_front) > 1 else ""
    said += ". Hover over one for its settings."
    return Chart("pareto", {"data": traces, "layout": layout}, said, 420)


def _front(search: SearchRecord, axes: Sequence[_Axis], placed: Sequence[_Placed]) -> list[tuple[float, float]]:
    """Feasible trials that no other beats in both numbers that are shown, from left to right.

    With two objectives these are the search's own front.
    """
    signs = [-1.0 if axis[3] else 1.0 for axis in axes]
    points = [(_scaled(x), _scaled(y)) for trial, x, y in placed if trial.state == "feasible"]
    if len(search.objectives) == 2:
        points = [(_scaled(x), _scaled(y)) for trial, x, y in placed if trial.number in search.front]
    found: list[tuple[float, float]] = []
    lowest = math.inf
    for x, y in sorted(set(points), key=lambda point: (signs[0] * point[0], signs[1] * point[1])):
        if signs[1] * y < lowest:
            lowest = signs[1] * y
            found.append((x, y))
    return sorted(found)


def _size(search: SearchRecord) -> int:
    return 10 if len(search.trials) <= _MANY else 6


def _points(placed: Sequence[_Placed], name: str, marker: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "scatter", "mode": "markers", "x": [_scaled(x) for _, x, _ in placed],
        "y": [_scaled(y) for _, _, y in placed], "name": name, "marker": marker,
        "text": [_hover(trial) for trial, _, _ in placed], "hovertemplate": "%{text}<extra></extra>",
    }  # fmt: skip


def history_chart(search: SearchRecord) -> Chart | None:
    """The first objective trial by trial, the best so far as a line, and what gave no figure below.

    Where no trial came as far as that, the next number that was measured.
    """
    measured = {(one.metric, one.sub_type) for trial in search.trials for one in trial.scores if one.value is not None}
    axis = next((axis for axis in _every_axis(search) if axis[:2] in measured), None)
    if axis is None or len(search.trials) < 2:
        return None
    scored = [(one, score) for one in search.trials if (score := _score(one.scores, axis)) is not None]
    traces: list[dict[str, Any]] = []
    best: list[tuple[int, float]] = []
    for trial, score in scored:
        value = _scaled(score)
        if (
            trial.state == "feasible"
            and trial.whole
            and (not best or (value > best[-1][1] if axis[3] else value < best[-1][1]))
        ):
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
        marker = {"size": _size(search), "color": colour, "symbol": symbol}
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
        "xaxis": {"title": {"text": "trial", "font": {"size": 13}}, **_whole_ticks(search.trials[-1].number)},
        "yaxis": {**_axis_layout(axis), "domain": [0.2 if below else 0, 1]},
        "hovermode": "closest",
    }
    if below:
        layout["yaxis2"] = {"type": "category", "domain": [0, 0.1], "showticklabels": False}
        # Beside the axis it would lie under the other axis's title.
        layout["annotations"] = [
            {"text": "not measured", "showarrow": False, "xref": "paper", "x": 0, "xanchor": "left", "yref": "paper",
             "y": 0.1, "yanchor": "bottom", "font": {"size": 12}}
        ]  # fmt: skip
        layout["xaxis"]["anchor"] = "y2"
    return Chart("history", {"data": traces, "layout": layout}, f"{_better(axis)} of each trial, in order.", 420)


def _whole_ticks(last: int) -> dict[str, Any]:
    """Ticks at whole numbers of trials: 1, 2, 5, 10, 20 ... apart."""
    apart = next(
        one for power in range(1 + len(str(last))) for one in (10**power, 2 * 10**power, 5 * 10**power)
        if last <= one * _TICKS
    )  # fmt: skip
    return {"tickformat": "d", "tick0": 0, "dtick": apart, "range": [1 - 0.03 * last, last * 1.03]}


def trial_rows(search: SearchRecord) -> list[dict[str, Any]]:
    """Every trial as a row of a table."""
    return [
        {
            "trial": trial,
            "settings": settings_text(trial.settings),
            "state": _state(trial),
            "figures": "; ".join(f"{score_name(s)} {_figure(s)}" for s in trial.scores),
            "lacks": lacks_text(trial),
            "time": duration(trial.seconds) if trial.seconds else "",
            "front": trial.number in search.front and len(search.objectives) > 1,
            "winner": trial.number == search.winner,
        }
        for trial in search.trials
    ]
