"""The metric `lm_eval`: tasks of the Language Model Evaluation Harness, by the harness's own code, on our runners.

A task is a name that the harness knows, or a task file; its data may lie beside it, so that nothing is downloaded.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from coldpress.config.metrics import LmEvalMetric
from coldpress.errors import DataError, MissingExtraError, PlanError
from coldpress.evaluate.abilities import Needs
from coldpress.evaluate.bench import Bench
from coldpress.events import Progress
from coldpress.registry import nearest
from coldpress.scores import Measurement

__all__ = ["measure"]

_SHARES = ("acc", "exact_match", "f1", "em", "mcc", "brier_score", "likelihood_diff", "pct_stereotype")
"""Numbers of the harness between 0 and 1; the others are shown bare."""
_OF_FILES = "correct the task file: do its templates and functions name columns that its data has?"
_OF_DATA = "is the task file right, and its data here? A hub is reached only where the network allows it"
_UNITS = {"bits_per_byte": "bits/byte"}


def measure(metric: LmEvalMetric, bench: Bench) -> list[Measurement]:
    """All numbers that the tasks give, or those that the sub types name."""
    try:
        from lm_eval.evaluator import evaluate

        from coldpress.evaluate.harness_model import HarnessModel
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"tasks of lm-eval need the package {error.name}", hint="pip install 'coldpress[eval]'"
        ) from error
    with _quiet():
        tasks = _tasks(metric)
    writes = any(task.OUTPUT_TYPE == "generate_until" for task in tasks["tasks"].values())
    needs: Needs = ("log-likelihood", "generation") if writes else ("log-likelihood",)
    model = HarnessModel(
        bench.runner(needs, metric.runner),
        bench.tokenizer(),
        batch_size=metric.batch_size,
        max_length=metric.max_length,
        name=str(bench.model.path),
        on_done=lambda done, total, unit: bench.emit(Progress(bench.step, done, total, unit)),
    )
    with _quiet(), _told(f"lm-eval cannot ask {', '.join(tasks['tasks'])} of {metric.name}", _OF_FILES):
        found = evaluate(
            model,
            tasks,
            limit=metric.limit,
            bootstrap_iters=metric.bootstrap_iters,
            apply_chat_template=metric.apply_chat_template,
            system_instruction=metric.system_instruction,
            fewshot_as_multiturn=metric.fewshot_as_multiturn,
            log_samples=False,
        )
    assert found is not None
    return _chosen(metric, _measurements(found))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's log and its progress bars."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _told(what: str, hint: str) -> Iterator[None]:
    """Whatever is wrong with a task, its templates or its functions becomes a DataError."""
    import yaml  # type: ignore[import-untyped]
    from jinja2 import TemplateError

    try:
        yield
    except (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, TypeError, ValueError,
            TemplateError, yaml.YAMLError) as error:  # fmt: skip
        raise DataError(f"{what}: {type(error).__name__}: {' '.join(str(error).split())}", hint=hint) from error


def _tasks(metric: LmEvalMetric) -> Any:
    """What the tasks' names and files stand for; raises PlanError for one that is not there, and DataError."""
    from lm_eval.tasks import TaskManager

    files = metric.task_files
    with _told(f"the task files of {metric.name} cannot be read", _OF_FILES):
        known = TaskManager(include_path=metric.include_path, include_defaults=len(files) < len(metric.tasks))
    unknown = [name for name in metric.tasks if name not in files and name not in known.task_index]
    if unknown:
        close = nearest(unknown[0], known.all_tasks)
        raise PlanError(
            f"lm-eval has no task {', '.join(repr(name) for name in unknown)}",
            hint=f"did you mean {close}?" if close else "`lm_eval ls tasks` lists them; a file is named by its path",
        )
    with _told(f"a task of {metric.name} cannot be loaded ({', '.join(metric.tasks)})", _OF_DATA):
        loaded = known.load(list(metric.tasks))
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        if own is None or (metric.num_fewshot is not None and own != 0):  # a task that says 0 means it
            task.set_config(key="num_fewshot", value=metric.num_fewshot or 0)
        task.set_fewshot_seed(seed=metric.seed)
    return loaded


def _measurements(results: Mapping[str, Any]) -> list[Measurement]:
    """The harness's table, one measurement a number."""
    found = []
    tables = {**results["results"], **results.get("groups", {})}
    for task, row in tables.items():
        counts = results["n-samples"].get(task, {}).get("effective", row.get("sample_len", 0))
        for key, value in row.items():
            name, _, filtered = key.partition(",")
            if not filtered or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = row.get(f"{name}_stderr,{filtered}")
            better = results["higher_is_better"].get(task, {}).get(name)
            shown = name if filtered == "none" else f"{name},{filtered}"
            share = any(name == one or name.startswith(f"{one}_") for one in _SHARES)
            found.append(
                Measurement(
                    f"{task}.{shown}",
                    float(value),
                    _UNITS.get(name, "share" if share else ""),
                    True if better is None else bool(better),
                    int(counts or 0),
                    float(error) if isinstance(error, int | float) else None,
                )
            )
    return found


def _chosen(metric: LmEvalMetric, found: list[Measurement]) -> list[Measurement]:
    """Those that the sub types name, in their order; all where there are none."""
    if not metric.sub_types:
        return found
    by_name = {one.sub_type: one for one in found}
    tasks = {one.sub_type.partition(".")[0] for one in found}
    chosen = []
    for sub in metric.sub_types:
        short = [one for name, one in by_name.items() if name.partition(".")[2] == sub.name]
        one = by_name.get(sub.name) or (short[0] if len(short) == 1 else None)
        if one is None:
            close = nearest(sub.name, by_name)
            raise PlanError(
                f"the tasks {', '.join(sorted(tasks))} give no number {sub.name!r}; they give: {', '.join(by_name)}",
                hint=f"did you mean {close}?" if close else "write task.metric",
            )
        chosen.append(Measurement(sub.name, *[getattr(one, key) for key in _FIELDS]))
    return chosen


_FIELDS = ("value", "unit", "higher_is_better", "n", "standard_error", "details")
