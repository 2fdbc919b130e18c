"""Records of searches that never ran: trials with figures from a formula."""

from __future__ import annotations

from typing import Any

from coldpress.record import (
    DimensionRecord,
    GoalRecord,
    HardwareRecord,
    ObjectiveRecord,
    RunRecord,
    ScoreRecord,
    SearchRecord,
    TrialRecord,
)

__all__ = ["PERPLEXITY", "SPEED", "made_up_run", "made_up_search"]

SPEED = ("speed", "time_per_output_token_p50", "ms", False)
PERPLEXITY = ("perplexity", "perplexity", "", False)
_SETTINGS: dict[str, tuple[Any, ...]] = {
    "build": ("ModelBuilder", "ModelBuilder 2"),
    "build[ModelBuilder].int4_block_size": (32, 64, 128),
    "build[ModelBuilder].int4_is_symmetric": (True, False),
    "lora.r": (8, 16, 32),
}


def _scores(number: int, bound: float, model: str = "build") -> tuple[ScoreRecord, ...]:
    """Faster is worse: the front has several trials."""
    place = (number * 7 % 20) / 20
    slow, perplexity = 3.0 + 4 * place, 30.0 * (1.2 - 0.2 * place + 0.02 * (number % 5))
    goal = GoalRecord(type="threshold", value=bound, bound=bound, met=perplexity <= bound, margin=bound - perplexity)
    return (
        ScoreRecord(model=model, metric=PERPLEXITY[0], sub_type=PERPLEXITY[1], value=perplexity, unit="",
                    higher_is_better=False, n=4000, standard_error=0.4, goal=goal),
        ScoreRecord(model=model, metric=SPEED[0], sub_type=SPEED[1], value=slow, unit="ms", higher_is_better=False,
                    n=20, standard_error=0.05, priority=1),
    )  # fmt: skip


def _trial(number: int, bound: float, state: str | None) -> TrialRecord:
    settings = {name: values[number % len(values)] for name, values in _SETTINGS.items()}
    if state is None:
        state = {3: "failed", 5: "pruned"}.get(number % 9, "")
    scores = _scores(number, bound)
    if not state:
        state = "feasible" if scores[0].goal is not None and scores[0].goal.met else "infeasible"
    more: dict[str, Any] = {}
    if state == "infeasible":
        value = scores[0].value or 0.0
        more = {"why": f"perplexity {value:.4g}, wanted at most {bound:g}", "violation": (value - bound) / bound,
                "scores": scores[:1], "key": f"key-{number}"}  # fmt: skip
    elif state == "failed":
        more = {"why": "the step lora failed: loss is no number at step 12"}
    elif state == "pruned":
        more = {"why": "size: its weights alone are 8.0 MB, allowed are 6.6 MB", "violation": 0.2}
    else:
        more = {"scores": scores, "key": f"key-{number}"}
    return TrialRecord(number=number, settings=settings, state=state, seconds=12.5 * (state != "pruned"), **more)


def made_up_search(trials: int = 40, *, objectives: int = 2, state: str | None = None) -> SearchRecord:
    """A search of so many trials; `state`: of all of them, else of all kinds."""
    bound = 34.5 if state is None else 1.0 if state == "infeasible" else 100.0
    made = tuple(_trial(number, bound, state) for number in range(1, trials + 1))
    feasible = [trial for trial in made if trial.state == "feasible"]
    near = sorted((one for one in made if one.violation), key=lambda one: (one.violation, one.number))
    nearest = () if feasible else tuple(one.number for one in near[:3])

    def figures(trial: TrialRecord) -> list[float]:
        return [trial.scores[1].value or 0.0, trial.scores[0].value or 0.0][:objectives]

    def beaten(trial: TrialRecord) -> bool:
        mine = figures(trial)
        return any(
            figures(one) != mine and all(a <= b for a, b in zip(figures(one), mine, strict=True)) for one in feasible
        )

    winner = min(feasible, key=figures, default=None)
    handed_over = winner.number if winner else next((one.number for one in near if one.key), None)
    why = f"of {len(feasible)} that meet every goal the best in speed time_per_output_token_p50, 3 ms"
    if winner is None:
        why = f"no trial meets every goal; this one lacks the least: {made[handed_over - 1].why}" if handed_over else ""
    return SearchRecord(
        execution_order="joint",
        sampler="tpe",
        seed=1,
        space=tuple(DimensionRecord(name=name, choices=values) for name, values in _SETTINGS.items()),
        size=1440,
        objectives=tuple(
            ObjectiveRecord(metric=one[0], sub_type=one[1], unit=one[2], higher_is_better=one[3])
            for one in (SPEED, PERPLEXITY)[:objectives]
        ),
        trials=made,
        front=tuple(trial.number for trial in feasible if not beaten(trial)),
        winner=handed_over,
        why=why,
        met=winner is not None,
        nearest=nearest,
        config={"passes": {"build": {"type": "ModelBuilder", "int4_block_size": 64}}},
        steps_run=2 * trials - 3,
        steps_shared=3,
        seconds=900.0,
        stopped="max_time: 900 s",
    )


def made_up_run(search: SearchRecord | None, **more: Any) -> RunRecord:
    """A run that ended with the search's winner."""
    return RunRecord(
        coldpress="0.1.0",
        workflow="searched",
        started="2026-01-02T03:04:05+0000",
        seconds=910.0,
        config_file=None,
        dialect="today",
        config={"passes": {"build": {"type": "ModelBuilder", "int4_block_size": [32, 64, 128]}}},
        hardware=HardwareRecord(
            system="Linux", machine="x86_64", processor="a processor", cores=2, threads=4, memory=8 << 30,
            available=4 << 30,
        ),
        libraries={"optuna": "5.0.0"},
        input={"key": "input-key", "path": "model"},
        scores=(*_scores(19, 34.5, "input"), *_scores(20, 34.5)),
        search=search,
        **more,
    )  # fmt: skip
