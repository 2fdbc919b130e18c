"""The sections of a report, one function each: what it says, from the record; None where there is nothing to say.

A section is the name of a template, the values for it, and its charts. `SECTIONS` is the order of a run's page.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coldpress.record import DataRecord, ModelRecord, ScoreRecord, StepRecord
from coldpress.report.charts import Chart, cost_chart, curve_chart, logged, score_charts
from coldpress.report.runs import Run
from coldpress.report.search import history_chart, pareto_chart, trial_rows
from coldpress.summary import Comparison, comparisons, models_of, parity_text, score_name
from coldpress.units import duration, settings_text, size, wanted

__all__ = [
    "SECTIONS",
    "Section",
    "failure",
    "machine",
    "reproduce",
    "scores",
    "search",
    "steps",
    "training",
    "warnings",
]

_SHOWN_PARAMETERS = 160
"""Characters of a step's parameters in the table; all of them stand in the config."""
_LAID_ASIDE = frozenset(("type", "evaluator", "host", "parity", "training_args"))


@dataclass(frozen=True)
class Section:
    """One part of a page."""

    id: str
    title: str
    template: str
    values: Mapping[str, Any] = field(default_factory=dict)
    charts: tuple[Chart, ...] = ()


def failure(run: Run) -> Section | None:
    """Why it failed, and what to do."""
    error = run.record.error
    if error is None:
        return None
    proof = None if error.parity is None else f"{parity_text(error.parity)}; the limit is {error.parity.limit}"
    return Section("failure", "What failed", "failure.html", {"error": error, "proof": proof})


def warnings(run: Run) -> Section | None:
    """Everything that was warned of, each once."""
    if not run.record.warnings:
        return None
    return Section("warnings", "Warnings", "warnings.html", {"warnings": list(dict.fromkeys(run.record.warnings))})


def scores(run: Run) -> Section | None:
    """Before and after: every figure over every model it was measured on."""
    rows = comparisons(run.record)
    models = [name for name in models_of(run.record) if any(name in row.models for row in rows)]
    if not rows:
        return None
    goals = [(score, _goal(score)) for score in run.record.scores if score.goal is not None]
    values = {"rows": [_score_row(row, models) for row in rows], "models": models, "goals": goals}
    return Section("scores", "Before and after", "scores.html", values, tuple(score_charts(rows, models)))


def _goal(score: ScoreRecord) -> str:
    """What a goal asks of a score, in the score's unit, and how the config says it where that is something else."""
    assert score.goal is not None
    text = wanted(score.value, score.goal.bound, score.unit, higher_is_better=score.higher_is_better)
    relative = "" if score.goal.type == "threshold" else f" ({score.goal.type} {score.goal.value:g})"
    return f"{score_name(score)} of {score.model}: {text}{relative}"


def _score_row(row: Comparison, models: list[str]) -> dict[str, Any]:
    counts = sorted({one.n for one in row.models.values() if one.n is not None})
    return {
        "name": row.name,
        "wanted": "higher is better" if row.higher_is_better else "lower is better",
        "values": [row.models[name].text(row.unit) if name in row.models else "" for name in models],
        "n": " to ".join(f"{count:,}" for count in dict.fromkeys(counts[:1] + counts[-1:])),
        "change": row.change,
        "judgement": row.judgement,
    }


def search(run: Run) -> Section | None:
    """Why these settings: the trials, the front, the history."""
    found = run.record.search
    if found is None:
        return None
    rows = trial_rows(found)
    before = [score for score in run.record.scores if score.model == "input"]
    states = Counter(trial.state for trial in found.trials)
    counts = ", ".join(f"{count} {state}" for state, count in states.items())
    winner = next((row for row in rows if row["winner"]), None)
    values = {
        "search": found,
        "rows": rows,
        "winner": None if winner is None else winner["trial"],
        "settings": "" if winner is None else winner["settings"],
        "counts": counts or "none",
        "why": found.why[:1].upper() + found.why[1:],
        "time": duration(found.seconds),
        "nearest": [row for number in found.nearest for row in rows if row["trial"].number == number],
        "config": None if found.config is None else json.dumps(found.config, indent=2, ensure_ascii=False),
    }
    charts = [chart for chart in (pareto_chart(found, before), history_chart(found)) if chart is not None]
    return Section("search", "Search", "search.html", values, tuple(charts))


def steps(run: Run) -> Section | None:
    """What each step did, cost and changed."""
    record = run.record
    if not record.steps:
        return None
    before: ModelRecord | None = record.input_model
    rows = []
    for step in record.steps:
        rows.append(_step_row(run, step, before))
        before = step.model
    chart = cost_chart(record.steps)
    values = {"rows": rows, "total": duration(record.seconds), "cached": sum(step.cached for step in record.steps)}
    return Section("steps", "Steps", "steps.html", values, () if chart is None else (chart,))


def _step_row(run: Run, step: StepRecord, before: ModelRecord | None) -> dict[str, Any]:
    parameters = json.dumps(_parameters(run, step.name), ensure_ascii=False)[1:-1].replace('"', "")
    if len(parameters) > _SHOWN_PARAMETERS:
        parameters = parameters[:_SHOWN_PARAMETERS] + "…"
    made = ""
    if step.model is not None:
        made = ", ".join(part for part in (step.model.precision, size(step.model.bytes)) if part)
        if before is not None and before.bytes:
            made += f" ({step.model.bytes / before.bytes:.0%} of what it got)"
    return {"step": step, "parameters": parameters, "made": made, "time": duration(step.seconds),
            "memory": size(step.peak_bytes), "anonymous": size(step.peak_anonymous_bytes),
            "proof": None if step.parity is None else parity_text(step.parity),
            "proof_time": duration(step.parity_seconds), "proof_memory": size(step.parity_peak_bytes)}  # fmt: skip


def _parameters(run: Run, step: str) -> dict[str, Any]:
    """The parameters of a step as the config has them, those of every step left out."""
    search = run.record.search
    config = run.record.config if search is None or search.config is None else search.config
    passes = config.get("passes")
    entry = passes.get(step) if isinstance(passes, Mapping) else None
    return {} if not isinstance(entry, Mapping) else {k: v for k, v in entry.items() if k not in _LAID_ASIDE}


def training(run: Run) -> Section | None:
    """What each training did, and its curve."""
    rows, charts = [], []
    for place, step in enumerate(run.record.steps):
        if step.training is None:
            continue
        curve = run.trainings.get(step.name)
        chart = curve_chart(f"curve-{place}", step.name, curve) if curve is not None and curve.losses else None
        if chart is not None:
            charts.append(chart)
        evaluations = [] if curve is None else logged(curve, "eval_loss")
        facts = [(name, value) for name, value in _training_facts(step) if value]
        rows.append({"step": step.name, "facts": facts, "chart": chart, "evaluations": evaluations,
                     "missing": step.training_file if curve is None else None})  # fmt: skip
    return Section("training", "Training", "training.html", {"rows": rows}, tuple(charts)) if rows else None


def _training_facts(step: StepRecord) -> list[tuple[str, str]]:
    one = step.training
    assert one is not None
    rate = "" if one.tokens_per_second is None else f", {one.tokens_per_second:,.0f} tokens/s"
    first = "" if one.loss_first is None else f"{one.loss_first:.4f} → "
    best = "" if one.best_step is None else f", of step {one.best_step}, whose weights were handed over"
    trained = one.trained
    share = (
        "" if trained is None else f"{trained.parameters:,} of {trained.of:,} ({trained.parameters / trained.of:.2%})"
    )
    return [
        ("method", one.method),
        ("parameters trained", share),
        ("settings", _said(one.settings)),
        ("training arguments", _said(one.arguments)),
        ("data", _data(one.data)),
        ("held out", _data(one.held_out)),
        ("training steps", f"{one.steps:,}; {one.tokens:,} tokens{rate}"),
        ("loss, nats per token", f"{first}{one.loss:.4f} (means over the first and the last tenth of the steps)"),
        ("held-out loss", "" if one.eval_loss is None else f"{one.eval_loss:.4f}{best}"),
        ("time", duration(one.seconds)),
        ("went on from", "" if one.resumed_from is None else f"the checkpoint at step {one.resumed_from}"),
        ("device", one.device),
    ]


def _said(settings: Mapping[str, Any]) -> str:
    """Settings in one line, empty ones left out."""
    given = {key: value for key, value in settings.items() if value not in (None, "", {}, [])}
    return settings_text(given) if given else ""


def _data(data: DataRecord | None) -> str:
    if data is None:
        return ""
    counts = f"{data.rows:,} rows, {data.tokens:,} tokens, {data.loss_tokens:,} with loss"
    return f"{data.name} ({data.origin}): {counts}" + (f"; sha256 {data.fingerprint[:12]}…" if data.fingerprint else "")


def machine(run: Run) -> Section:
    """Hardware and versions."""
    one = run.record.hardware
    gpus = ", ".join(f"{gpu.name} ({size(gpu.memory)})" for gpu in one.gpus)
    rows = [
        ("processor", f"{one.processor}, {one.cores} cores, {one.threads} threads"),
        ("instruction sets", ", ".join(one.instruction_sets)),
        ("GPU", gpus or "none"),
        ("memory", f"{size(one.memory)}; {size(one.available)} were free"),
        ("execution providers", ", ".join(one.execution_providers)),
        ("system", f"{one.system}, {one.machine}"),
    ]
    versions = {"coldpress": run.record.coldpress, **run.record.libraries}
    values = {
        "rows": [(name, value) for name, value in rows if value],
        "versions": [(name, version or "not installed") for name, version in versions.items()],
    }
    return Section("machine", "Machine and versions", "machine.html", values)


def reproduce(run: Run) -> Section:
    """Commands, places and the config."""
    record = run.record
    output = record.output.path if record.output is not None else None
    generate = [f'coldpress generate {_quoted(output)} --prompt "..."'] if output else []
    # A name of its own: the user's file may say more than its values, and is not to be written over.
    name = "workflow.json" if record.config_file is None else f"{Path(record.config_file).stem}-again.json"
    values = {
        "name": name,
        "commands": [f"coldpress run {_quoted(name)}", *generate, f"coldpress report {_quoted(str(run.folder))}"],
        "config": json.dumps(record.config, indent=2, ensure_ascii=False),
        "config_file": record.config_file,
        "model": output,
        "dialect": record.dialect,
        "keys": [(step.name, step.key) for step in record.steps],
    }
    return Section("reproduce", "To do it again", "reproduce.html", values)


def _quoted(path: str) -> str:
    import shlex

    return shlex.quote(path)


SECTIONS: tuple[Callable[[Run], Section | None], ...] = (
    failure, warnings, scores, search, steps, training, machine, reproduce,
)  # fmt: skip
"""In the page's order."""
