"""`coldpress eval`: measure a model, or two side by side."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from coldpress.cli.options import trust_option
from coldpress.errors import CheckpointError, ConfigError, DataError, Problem, UsageError
from coldpress.registry import nearest

if TYPE_CHECKING:
    from coldpress.config.schema import DataConfig
    from coldpress.scores import Score

__all__ = ["eval"]

_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
_DATA = "data"
_OF_ANSWERS = {"accuracy": "accuracy_score", "f1": "f1_score", "precision": "precision", "recall": "recall",
               "exact_match": "exact_match"}  # fmt: skip
_OF_TEXT = {"perplexity": "perplexity", "bits_per_byte": "bits_per_byte", "loss": "loss"}
_OF_TWO = {"kl": "kl", "top1": "top1_agreement", "cosine": "cosine_similarity"}
_OF_COST: Mapping[str, dict[str, Any]] = {
    "latency": {"type": "latency", "sub_types": [{"name": "p50"}, {"name": "p90"}, {"name": "p99"}]},
    "throughput": {"type": "throughput", "sub_types": [{"name": "avg"}]},
    "speed": {
        "type": "generation",
        "sub_types": [
            {"name": "time_to_first_token_p50"},
            {"name": "time_per_output_token_p50"},
            {"name": "time_per_output_token_p90"},
            {"name": "prefill_tokens_per_second"},
            {"name": "decode_tokens_per_second"},
        ],
    },
    "memory": {"type": "memory", "sub_types": [{"name": "peak_rss"}, {"name": "peak_anonymous"}]},
    "load": {"type": "load_time", "sub_types": [{"name": "load"}, {"name": "first_answer"}]},
    "size": {"type": "size_on_disk"},
}
_NAMES = (*_OF_ANSWERS, *_OF_TEXT, *_OF_TWO, *_OF_COST)


@click.command()
@click.argument("model")
@click.option("--compare", "other", metavar="OTHER", help="A model to hold against it.")
@click.option("-d", "--data", metavar="FILE", help="Records or text (json, jsonl, csv, parquet, txt).")
@click.option("--split", help="Split of the data, with slicing: train[:200].")
@click.option("--template", "text_template", help="Text of one record, {column} filled in; \\n is a line break.")
@click.option("--text-field", help="The column that holds the text.")
@click.option("--answer", "label_col", metavar="COLUMN", help="Column of the right answer; the template holds it too.")
@click.option("-m", "--metrics", metavar="NAMES", help=f"With commas: {', '.join(_NAMES)}. Default: what fits.")
@click.option("--evaluator", "evaluator_file", type=click.Path(path_type=Path), metavar="FILE",
              help="An evaluator of the config language, or a workflow whose evaluator is used.")  # fmt: skip
@click.option("--runner", type=click.Choice(["transformers", "onnxruntime", "onnxruntime-genai"]),
              help="What runs models that it can run.")  # fmt: skip
@click.option("--max-seconds", type=click.FloatRange(0, min_open=True), help="Time for each metric of speed.")
@click.option("--json", "as_json", is_flag=True, help="Scores as JSON.")
@trust_option
def eval(model: str, other: str | None, as_json: bool, trust_remote_code: bool, **options: Any) -> int:  # noqa: A001
    """Measure MODEL: a checkpoint, an adapter, an ONNX model, or the output folder of a run.

    With --compare, MODEL is what OTHER is compared with: KL divergence and goals are OTHER's against it, and speed is
    measured in turn. Exit code 3 when a goal of the evaluator is not met.
    """
    # Before torch is imported: GNU OpenMP's threads spin before they sleep, which beside other work is slow.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from coldpress.cli.display import Quiet, Terminal
    from coldpress.evaluate.apart import evaluate_apart
    from coldpress.goals import UNMET_EXIT_CODE

    models = _labelled({Path(path).resolve(): _model(path) for path in (model, other) if path is not None})
    if other is not None and len(models) < 2:
        raise UsageError(f"{model} is to be compared with itself", hint="give another model to --compare")
    metrics, data = _asked(model, options, [one.describe().config for one in models.values()])
    live = sys.stdout.isatty() and not as_json
    sink: Any = Terminal() if live else Quiet()
    try:
        scores = evaluate_apart(models, metrics, data, emit=sink, trust_remote_code=trust_remote_code)
    finally:
        sink.close()
    if as_json:
        click.echo(_as_json(models, scores))
    else:
        _show(scores, list(models))
    return UNMET_EXIT_CODE if any(score.goal is not None and not score.goal.met for score in scores) else 0


def _model(path: str) -> Any:
    """A model of the command line; what is none makes the command a wrong one."""
    from coldpress.artifacts.base import Artifact

    if not path:
        raise UsageError("the path of a model is empty", hint="give a folder; . is the working folder")
    try:
        found = Artifact.load(Path(path))
        found.describe()
    except CheckpointError as error:
        raise UsageError(error.message, hint=error.hint) from error
    return found


def _labelled(models: Mapping[Path, Any]) -> dict[str, Any]:
    """Names for a table: the folders', or more of the path where these are alike."""
    names: list[str] = []
    for length in range(1, max(len(path.parts) for path in models) + 1):
        names = ["/".join(path.parts[-length:]) for path in models]
        if len(set(names)) == len(names):
            break
    return dict(zip(names, models.values(), strict=True))


def _asked(model: str, options: Mapping[str, Any], configs: Sequence[Mapping[str, Any]]) -> tuple[list[Any], Any]:
    """Metrics and data configs, through the config language: so that errors and defaults are the same."""
    from coldpress.engine.places import Places

    try:
        loaded, root = _loaded(model, options, configs)
    except ConfigError as error:
        raise ConfigError([_by_option(problem) for problem in error.problems]) from None
    for rewrite in loaded.rewrites:
        click.echo(f"  {rewrite}", err=True)
    places = Places(root, Path.cwd())
    evaluator = loaded.workflow.evaluators[str(loaded.workflow.evaluator)]
    metrics = [_with_options(places.metric(metric), options) for metric in evaluator.measured]
    used = {getattr(metric, "data_config", None) for metric in metrics}
    data = {config.name: places.data(config) for config in loaded.workflow.data_configs if config.name in used}
    for name, config in data.items():
        if name == _DATA and options["data"] is not None:
            data[name] = config.model_copy(update={"name": "--data"})
            _check_data(data[name], options)
        else:
            _check_source(config, f"{options['evaluator_file']}: data_configs.{name}")
    return metrics, data


def _loaded(model: str, options: Mapping[str, Any], configs: Sequence[Mapping[str, Any]]) -> tuple[Any, Path]:
    """A workflow whose evaluator says what to measure, and the folder that its relative paths start at."""
    from coldpress.api import load_config
    from coldpress.config.load import load_evaluator, read_document

    own = [] if options["data"] is None else [_data_config(options)]
    rest: dict[str, Any] = {"input_model": {"type": "HfModel", "model_path": model}, "data_configs": own}
    file = options["evaluator_file"]
    if file is None:
        metrics = _metrics(options, configs)
        return load_config({**rest, "evaluators": {"eval": {"metrics": metrics}}, "evaluator": "eval"}), Path.cwd()
    if options["metrics"] is not None:
        raise UsageError("--evaluator says what to measure, and so does --metrics", hint="give one of them")
    found = read_document(file)
    if "input_model" not in found and "evaluators" not in found:
        return load_evaluator(file, rest), file.resolve().parent
    whole = load_config(file, [f"input_model.model_path={model}"])
    if whole.workflow.evaluator is None:
        raise UsageError(f"the workflow {file} names no evaluator", hint="add `evaluator` to it")
    asked = {name: whole.document[name] for name in ("evaluators", "evaluator")}
    data = [*whole.document.get("data_configs", []), *own]
    return load_config({**rest, **asked, "data_configs": data}), file.resolve().parent


_OPTIONS = {"text_template": "--template", "text_field": "--text-field", "label_col": "--answer", "split": "--split"}
"""Key of a data config -> the option that gives it."""


def _by_option(problem: Problem) -> Problem:
    """A problem of the data that the command line names, at its option."""
    if problem.line is not None or not problem.path.startswith("data_configs."):
        return problem
    return dataclasses.replace(problem, path=_OPTIONS.get(problem.path.rpartition(".")[2], "--data"), file="")


def _check_source(config: DataConfig, where: str) -> bool:
    """Whether the data are local files; what is not there makes the command a wrong one."""
    from coldpress.data.sources import check_source

    try:
        return check_source(config)
    except DataError as error:
        hint = error.hint if not where.startswith("--") else (error.hint or "").replace("config file's", "working")
        raise UsageError(f"{where}: {error.message}", hint=hint) from error


def _check_data(config: DataConfig, options: Mapping[str, Any]) -> None:
    """Whether the file of --data has what the options say of it; told with their names, before a model is loaded."""
    from coldpress.data.formats import read_as, unknown
    from coldpress.data.sources import read_records
    from coldpress.data.templates import columns_of

    if not _check_source(config, "--data" if options["split"] is None else "--data and --split"):
        return
    records, pre = read_records(config), config.pre_process_data_config
    reading = read_as(records.columns, records.rows[:100], pre, has_template=True)
    if reading is None:
        raise UsageError(unknown(records, pre).message, hint="say what the text is: --template or --text-field")
    columns, key = columns_of(pre, reading)
    try:
        records.require(columns, _OPTIONS.get(key, key))
        records.require([pre.label_col] if pre.label_col else [], _OPTIONS["label_col"])
    except DataError as error:
        raise UsageError(error.message, hint="correct the name on the command line") from error


def _metrics(options: Mapping[str, Any], configs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    from coldpress.evaluate.encoders import is_encoder

    two, encodes = len(configs) > 1, is_encoder(configs[0])
    if options["metrics"] is None:
        names = _fitting(options, two, encodes)
    else:
        names = [name.strip() for name in options["metrics"].split(",") if name.strip()]
    unknown = [name for name in names if name not in _NAMES]
    if unknown:
        close = nearest(unknown[0], _NAMES)
        hint = f"did you mean {close}?" if close else f"there are: {', '.join(_NAMES)}"
        raise UsageError(f"there is no metric called {', '.join(map(repr, unknown))}", hint=hint)
    needy = [name for name in names if name in (*_OF_ANSWERS, *_OF_TEXT)]
    if needy and options["data"] is None:
        raise UsageError(f"{', '.join(needy)} need records", hint="give --data FILE")
    compared = [name for name in names if name in _OF_ANSWERS]
    if compared and options["label_col"] is None and "|loss}" not in (options["text_template"] or ""):
        raise UsageError(f"right answers are needed for {', '.join(compared)}, and --data names no answer",
                         hint="give --answer COLUMN")  # fmt: skip
    if not two and (alone := [name for name in names if name in _OF_TWO]):
        raise UsageError(f"{', '.join(alone)} compare two models", hint="give --compare OTHER")
    return _as_config(names, options)


def _fitting(options: Mapping[str, Any], two: bool, encodes: bool) -> list[str]:
    """What can be measured with what was given."""
    names = []
    if options["data"] is not None:
        names += ["accuracy", "f1"] if options["label_col"] is not None else [] if encodes else ["perplexity"]
    if two:
        names += ["cosine"] if encodes else ["kl", "top1"]
    if encodes and options["label_col"] is not None:
        names = [name for name in names if name not in _OF_TWO]
    return [*names, "latency" if encodes else "speed", "size"]


def _as_config(names: Sequence[str], options: Mapping[str, Any]) -> list[dict[str, Any]]:
    data = {} if options["data"] is None else {"data_config": _DATA}
    found: list[dict[str, Any]] = []
    for kind, table in (("accuracy", _OF_ANSWERS), ("perplexity", _OF_TEXT), ("divergence", _OF_TWO)):
        subs = [{"name": table[name]} for name in names if name in table]
        if subs:
            found.append({"name": kind, "type": kind, "sub_types": subs, **data})
    for name in names:
        if name in _OF_COST:
            extra = data if name in ("latency", "throughput", "speed") else {}
            found.append({"name": name, **_OF_COST[name], **extra})
    return found


def _data_config(options: Mapping[str, Any]) -> dict[str, Any]:
    file = options["data"]
    kind = _FORMATS.get(Path(file).suffix.lower())
    load: dict[str, Any] = {"data_name": file} if kind is None else {"data_name": kind, "data_files": file}
    if options["split"] is not None:
        load["split"] = options["split"]
    template = options["text_template"]
    pre = {
        "text_template": template.replace("\\n", "\n") if template else None,
        "text_field": options["text_field"],
        "label_col": options["label_col"],
        "strategy": "line-by-line" if kind != "text" else "join",
        "joiner": None if kind != "text" else "\n",
    }
    return {
        "name": _DATA,
        "type": "HuggingfaceContainer",
        "load_dataset_config": load,
        "pre_process_data_config": {key: value for key, value in pre.items() if value is not None},
    }


def _with_options(metric: Any, options: Mapping[str, Any]) -> Any:
    """A metric with what the command line says of all of them."""
    changes: dict[str, Any] = {}
    if options["runner"] is not None and "runner" in type(metric).model_fields:
        changes["runner"] = options["runner"]
    if options["max_seconds"] is not None and metric.type in ("latency", "throughput", "generation"):
        from coldpress.config.metrics import Timing

        changes["sub_types"] = tuple(
            sub.model_copy(
                update={
                    "metric_config": (sub.metric_config or Timing()).model_copy(
                        update={"max_seconds": options["max_seconds"]}
                    )
                }
            )
            for sub in metric.sub_types
        )
    return metric.model_copy(update=changes)


def _as_json(models: Mapping[str, Any], scores: Sequence[Score]) -> str:
    """All of it as JSON, in which a number that is not finite is null, as in run.json."""
    from pydantic_core import to_json

    from coldpress.evaluate.timing import machine_state

    paths = {label: str(one.path) for label, one in models.items()}
    record = {"models": paths, "scores": scores, "machine": machine_state()}
    return to_json(record, indent=2, inf_nan_mode="null").decode()


def _show(scores: Sequence[Any], labels: Sequence[str]) -> None:
    """A row for each number: of each model with its error, the change, and what the goal came to."""
    from coldpress.cli.text import table
    from coldpress.summary import Comparison, Measured, score_name
    from coldpress.units import quantity, spread

    rows = []
    for score in scores:
        if any((score.metric, score.sub_type) == (one.metric, one.sub_type) for one in scores[: scores.index(score)]):
            continue
        same = {one.model: one for one in scores if (one.metric, one.sub_type) == (score.metric, score.sub_type)}
        cells = []
        for label in labels:
            one = same.get(label)
            error = "" if one is None else spread(one.standard_error, one.unit)
            cells.append("-" if one is None else f"{quantity(one.value, one.unit)} {error}".rstrip())
        row = [score_name(score), *cells]
        if len(labels) > 1:
            measured = {
                name: Measured(same[label].value, same[label].standard_error)
                for name, label in (("input", labels[0]), ("other", labels[-1]))
                if label in same
            }
            compared = Comparison(score.metric, score.unit, score.higher_is_better, measured)
            row += [compared.change, compared.judgement]
        goal = same[labels[-1]].goal if labels[-1] in same else None
        row.append("" if goal is None else _goal(goal, same[labels[-1]].value, score.unit))
        rows.append([*row, f"{max(one.n for one in same.values()):,}"])
    head = ["", *labels, *(["change", "judged"] if len(labels) > 1 else []), "goal", "n"]
    if not any(row[-2] for row in rows):
        head.pop(-2)
        rows = [[*row[:-2], row[-1]] for row in rows]
    click.echo(table(head, rows, right=(*range(1, 1 + len(labels)), len(head) - 1)))
    click.echo("(±: one standard error; judged the same within two of the difference)" if len(labels) > 1 else
               "(±: one standard error)")  # fmt: skip


def _goal(goal: Any, value: float, unit: str) -> str:
    from coldpress.units import apart

    sign = click.style("met", fg="green") if goal.met else click.style("NOT MET", fg="red")
    return f"{goal.type} {goal.value:g} ({apart(value, goal.bound, unit)[1]}) {sign}"
