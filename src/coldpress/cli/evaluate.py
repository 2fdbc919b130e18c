"""`coldpress eval`: measure a model, or two side by side."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from coldpress.cli.options import trust_option
from coldpress.errors import UsageError
from coldpress.registry import nearest

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
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--compare", "other", type=click.Path(path_type=Path), metavar="OTHER", help="A model to hold against it."
)
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
def eval(model: Path, other: Path | None, as_json: bool, trust_remote_code: bool, **options: Any) -> int:  # noqa: A001
    """Measure MODEL: a checkpoint, an adapter, an ONNX model, or the output folder of a run.

    With --compare, MODEL is what OTHER is compared with: KL divergence and goals are OTHER's against it, and speed is
    measured in turn. Exit code 3 when a goal of the evaluator is not met.
    """
    # Before torch is imported: GNU OpenMP's threads spin before they sleep, which beside other work is slow.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from coldpress.artifacts.base import Artifact
    from coldpress.cli.display import Quiet, Terminal
    from coldpress.evaluate.apart import evaluate_apart
    from coldpress.goals import UNMET_EXIT_CODE

    models = _labelled({path.resolve(): Artifact.load(path) for path in (model, other) if path is not None})
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
        import json

        from coldpress.evaluate.timing import machine_state

        paths = {label: str(one.path) for label, one in models.items()}
        record = {"models": paths, "scores": [asdict(score) for score in scores], "machine": machine_state()}
        click.echo(json.dumps(record, indent=2))
    else:
        _show(scores, list(models))
    return UNMET_EXIT_CODE if any(score.goal is not None and not score.goal.met for score in scores) else 0


def _labelled(models: Mapping[Path, Any]) -> dict[str, Any]:
    """Names for a table: the folders', or more of the path where these are alike."""
    names: list[str] = []
    for length in range(1, max(len(path.parts) for path in models) + 1):
        names = ["/".join(path.parts[-length:]) for path in models]
        if len(set(names)) == len(names):
            break
    return dict(zip(names, models.values(), strict=True))


def _asked(model: Path, options: Mapping[str, Any], configs: Sequence[Mapping[str, Any]]) -> tuple[list[Any], Any]:
    """Metrics and data configs, through the config language: so that errors and defaults are the same."""
    from coldpress.api import load_config
    from coldpress.engine.places import Places

    root = Path.cwd()
    if options["evaluator_file"] is not None:
        if options["metrics"] is not None:
            raise UsageError("--evaluator says what to measure, and so does --metrics", hint="give one of them")
        document, root = _from_file(options["evaluator_file"], model)
    else:
        document = {"evaluators": {"eval": {"metrics": _metrics(options, configs)}}, "evaluator": "eval"}
    if options["data"] is not None:
        document.setdefault("data_configs", []).append(_data_config(options))
    loaded = load_config({"input_model": {"type": "HfModel", "model_path": str(model)}, **document})
    for rewrite in loaded.rewrites:
        click.echo(f"  {rewrite}", err=True)
    places = Places(root, Path.cwd())
    evaluator = loaded.workflow.evaluators[str(loaded.workflow.evaluator)]
    metrics = [_with_options(places.metric(metric), options) for metric in evaluator.measured]
    return metrics, {config.name: places.data(config) for config in loaded.workflow.data_configs}


def _from_file(path: Path, model: Path) -> tuple[dict[str, Any], Path]:
    """The parts of a file that say what to measure: of an evaluator, or of a workflow."""
    from coldpress.api import load_config
    from coldpress.config.load import read_document

    found = read_document(path)
    if "input_model" in found or "evaluators" in found:
        loaded = load_config(path, [f"input_model.model_path={model}"])
        if loaded.workflow.evaluator is None:
            raise UsageError(f"the workflow {path} names no evaluator", hint="add `evaluator` to it")
        names = ("evaluators", "evaluator", "data_configs")
        return {name: loaded.document[name] for name in names if name in loaded.document}, path.resolve().parent
    data = found.pop("data_configs", [])
    return {"evaluators": {"eval": found}, "evaluator": "eval", "data_configs": data}, path.resolve().parent


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
        row.append("" if goal is None else _goal(goal, score.unit))
        rows.append([*row, f"{max(one.n for one in same.values()):,}"])
    head = ["", *labels, *(["change", "judged"] if len(labels) > 1 else []), "goal", "n"]
    if not any(row[-2] for row in rows):
        head.pop(-2)
        rows = [[*row[:-2], row[-1]] for row in rows]
    click.echo(table(head, rows, right=(*range(1, 1 + len(labels)), len(head) - 1)))
    click.echo("(±: one standard error; judged the same within two of the difference)" if len(labels) > 1 else
               "(±: one standard error)")  # fmt: skip


def _goal(goal: Any, unit: str) -> str:
    from coldpress.units import quantity

    sign = click.style("met", fg="green") if goal.met else click.style("NOT MET", fg="red")
    return f"{goal.type} {goal.value:g} ({quantity(goal.bound, unit)}) {sign}"
