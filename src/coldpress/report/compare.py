"""The sections of a page that compares runs: one column a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from coldpress.record import TrainingRecord
from coldpress.report.charts import overlay_chart, score_charts
from coldpress.report.runs import Run
from coldpress.report.sections import Section
from coldpress.summary import Comparison, Measured, comparisons, verdict
from coldpress.units import duration, settings_text, size

__all__ = ["COMPARED", "curves", "differences", "overview", "results"]

_ABSENT = "-"
_INPUT = "input model"
"""No run can be called so."""
_LONG = 200
"""Characters of a value that a cell shows."""


def overview(runs: Sequence[Run]) -> Section:
    """What each run was and came to."""
    rows = [("verdict", [verdict(run.record) for run in runs])]
    rows += [(name, [say(run) for run in runs]) for name, say in _FACTS.items()]
    if any(run.record.search is not None for run in runs):
        rows.append(("chosen by", [_chosen(run) for run in runs]))
    warned = [(run.name, list(dict.fromkeys(run.record.warnings))) for run in runs if run.record.warnings]
    values = {"names": [run.name for run in runs], "rows": rows, "warned": warned}
    return Section("overview", "Runs", "compare_overview.html", values)


def _base(run: Run) -> str:
    base = run.record.input_model
    return _ABSENT if base is None else f"{base.name or base.model_type}, {base.precision}, {size(base.bytes)}"


def _chosen(run: Run) -> str:
    """Which search chose its settings."""
    found = run.record.search
    if found is None:
        return _ABSENT
    search = f"{found.sampler}, {len(found.trials)} of {found.size:,} settings"
    winner = next((one for one in found.trials if one.number == found.winner), None)
    if winner is None:
        return f"{search}: none"
    kept = "" if found.met else "; it misses a goal"
    return f"{search}: trial {winner.number} ({settings_text(winner.settings)}){kept}"


def _weights(run: Run) -> str:
    last = run.record.steps[-1].model if run.record.steps else None
    return _ABSENT if last is None else f"{last.precision}, {size(last.bytes)}"


_FACTS: Mapping[str, Callable[[Run], str]] = {
    "folder": lambda run: str(run.folder),
    "begun": lambda run: run.record.started,
    "input model": _base,
    "steps": lambda run: " → ".join(f"{step.name} ({step.type})" for step in run.record.steps) or _ABSENT,
    "result": _weights,
    "time of all steps": lambda run: duration(sum(one.seconds + one.parity_seconds for one in run.record.steps)),
    "highest memory of a step": lambda run: size(max((one.peak_bytes for one in run.record.steps), default=None)),
    "machine": lambda run: f"{run.record.hardware.processor}, {run.record.hardware.threads} threads",
    "coldpress": lambda run: run.record.coldpress,
}


def results(runs: Sequence[Run]) -> Section | None:
    """Every figure of what each run handed over; of the input model too, where it is one and the same.

    A run that failed handed nothing over: its column is empty.
    """
    same_input = len({run.record.input.get("key") for run in runs}) == 1
    columns = ([_INPUT] if same_input else []) + [run.name for run in runs]
    rows = _rows([run for run in runs if run.record.status == "done"], same_input)
    if not rows:
        return None
    shown = [
        {
            "name": row.name,
            "wanted": "higher is better" if row.higher_is_better else "lower is better",
            "values": [row.models[name].text(row.unit) if name in row.models else "" for name in columns],
            "best": _best(row, columns),
        }
        for row in rows
    ]
    charts = tuple(score_charts(rows, columns, "compared"))
    return Section("results", "Results", "compare_results.html", {"columns": columns, "rows": shown}, charts)


def _rows(runs: Sequence[Run], same_input: bool) -> list[Comparison]:
    """One row for each figure, over the runs instead of over the models of one."""
    rows: dict[str, Comparison] = {}
    models: dict[str, dict[str, Measured]] = {}
    for run in runs:
        for row in comparisons(run.record):
            rows.setdefault(row.name, row)
            measured = models.setdefault(row.name, {})
            if same_input and row.before is not None:
                measured.setdefault(_INPUT, row.before)
            if row.after is not None:
                measured[run.name] = row.after
    return [
        Comparison(name, row.unit, row.higher_is_better, models[name]) for name, row in rows.items() if models[name]
    ]


def _best(row: Comparison, columns: Sequence[str]) -> list[bool]:
    """Which of the runs has the best value; none where they are alike."""
    values = {name: row.models[name].value for name in columns if name in row.models and name != _INPUT}
    known = [value for value in values.values() if value is not None]
    if len(set(known)) < 2:
        return [False] * len(columns)
    best = max(known) if row.higher_is_better else min(known)
    return [values.get(name) == best for name in columns]


def curves(runs: Sequence[Run]) -> Section | None:
    """The training curves of all runs in one chart."""
    found: dict[str, TrainingRecord] = {}
    for run in runs:
        for step, training in run.trainings.items():
            if training.losses:
                found[f"{run.name}: {step}" if len(run.trainings) > 1 else run.name] = training
    if not found:
        return None
    return Section("curves", "Training", "charts.html", {}, (overlay_chart(found),))


def differences(runs: Sequence[Run]) -> Section:
    """Where the configs differ, key by key."""
    flat = [dict(_flat(run.record.config)) for run in runs]
    keys = list(dict.fromkeys(key for one in flat for key in one))
    rows = []
    for key in keys:
        values = [one.get(key, _ABSENT) for one in flat]
        if len(set(values)) > 1:
            rows.append((key, [value if len(value) <= _LONG else value[:_LONG] + "…" for value in values]))
    values_of = {"names": [run.name for run in runs], "rows": rows}
    return Section("differences", "What was asked differently", "compare_differences.html", values_of)


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every plain value with its path; entries of a list that have a name go by it."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _flat(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
        for place, item in enumerate(value):
            name = item.get("name", place) if isinstance(item, Mapping) else place
            yield from _flat(item, f"{path}.{name}")
    else:
        yield path, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


COMPARED: tuple[Callable[[Sequence[Run]], Section | None], ...] = (overview, results, curves, differences)
"""In the page's order."""
