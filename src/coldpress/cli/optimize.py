"""`coldpress optimize`: from a model and what it must keep to, the workflow, the space, the search and its winner."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from coldpress.cli.data_options import data_config, text_options, text_settings
from coldpress.cli.documents import run_options, save_or_run, skeleton
from coldpress.data.sources import BUNDLED_TEXT
from coldpress.errors import UsageError
from coldpress.registry import nearest

__all__ = ["optimize"]

_TARGETS: Mapping[str, tuple[str, str]] = {
    "cpu": ("cpu", "CPUExecutionProvider"),
    "cuda": ("gpu", "CUDAExecutionProvider"),
    "directml": ("gpu", "DmlExecutionProvider"),
    "webgpu": ("gpu", "WebGpuExecutionProvider"),
}
"""Name -> device and execution provider."""
_FLOATS: Mapping[str, tuple[str, ...]] = {
    "cpu": ("fp32",), "cuda": ("fp16", "bf16"), "directml": ("fp16",), "webgpu": ("fp16",),
}  # fmt: skip
"""Precisions of the target that quantize nothing."""
_COSTS: Mapping[str, tuple[str, str]] = {
    "decode-latency": ("generation", "time_per_output_token_p50"),
    "prompt-latency": ("generation", "time_to_first_token_p50"),
    "size": ("size_on_disk", "bytes"),
    "memory": ("memory", "peak_rss"),
    "load-time": ("load_time", "load"),
}
"""Objective -> type of metric and its number; `quality` is what the data can show."""
_OBJECTIVES = (*_COSTS, "quality")
_TIMED_SECONDS = 20
"""For the speed of one candidate and the input in turn."""


def _finite(context: click.Context, option: click.Parameter, value: float | None) -> float | None:
    """`inf` and `nan` are floats too."""
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} is no number that anything can be held against")
    return value


@click.command()
@click.argument("model")
@click.option("--target", default="cpu", show_default=True, help=f"What it must run on: {', '.join(_TARGETS)}.")
@click.option("--adapter", help="A PEFT adapter that belongs on top of MODEL.")
@click.option("-d", "--data", help="Text or records to measure quality on; default: a text that comes with Coldpress.")
@click.option("--split", help="Split of the data, with slicing: train[:200].")
@text_options
@click.option("--max-quality-loss", default="1%", show_default=True, metavar="PERCENT",
              help="Points of accuracy where --answer names it, else growth of perplexity.")  # fmt: skip
@click.option("--max-size", metavar="SIZE", help="Of the model's files: 600MB, 1.5GB.")
@click.option("--max-memory", metavar="SIZE", help="Highest resident memory while it answers.")
@click.option("--max-decode-latency", metavar="MS", type=click.FloatRange(0, min_open=True),
              callback=_finite, help="Milliseconds for each new token, median.")  # fmt: skip
@click.option("--objective", "objectives", multiple=True, metavar="NAME",
              help=f"What to make best, the first weighs most: {', '.join(_OBJECTIVES)}.")  # fmt: skip
@click.option("--trials", type=click.IntRange(1), default=16, show_default=True, help="Settings that are measured.")
@click.option("--max-time", type=click.FloatRange(0, min_open=True), metavar="MINUTES", callback=_finite,
              help="No trial begins later.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=1, show_default=True, help="Seed of the sampler.")
@run_options
def optimize(model: str, **options: Any) -> int:
    """Find the best form of MODEL (a checkpoint folder or hub id) for a target: smaller, faster, and still good.

    Precisions, block sizes and algorithms are searched; what misses a limit is out, what is left is ranked by the
    objective. Exit code 3 when nothing keeps to the limits: the nearest is handed over then.
    """
    document = _document(model, options)
    return save_or_run(document, options["save_config"], options["trust_remote_code"], options["log_format"])


def _document(model: str, o: Mapping[str, Any]) -> dict[str, Any]:
    target = o["target"].lower()
    if target not in _TARGETS:
        close = nearest(target, _TARGETS)
        hint = f"did you mean {close}?" if close else f"targets: {', '.join(_TARGETS)}"
        raise UsageError(f"there is no target called {o['target']!r}", hint=hint)
    _refuse(model)
    document = skeleton(model, o["output_dir"], o["cache_dir"], o["trust_remote_code"], *_TARGETS[target])
    if o["adapter"] is not None:
        document["input_model"]["adapter_path"] = o["adapter"]
    document["data_configs"] = [_data(o)]
    document["evaluators"] = {"limits": {"metrics": _metrics(o)}}
    document["evaluator"] = "limits"
    document["passes"] = {"build": _alternatives(target)}
    strategy: dict[str, Any] = {
        "sampler": "tpe",
        "sampler_config": {"max_samples": o["trials"], "seed": o["seed"]},
        "include_pass_params": False,
    }
    if o["max_time"] is not None:
        strategy["max_time"] = 60 * o["max_time"]
    document["search_strategy"] = strategy
    return document


def _refuse(model: str) -> None:
    """Say at once what has no form to choose: whatever ModelBuilder does not build. A hub id is looked at later."""
    from coldpress.artifacts.base import Artifact
    from coldpress.artifacts.classifiers import is_classifier
    from coldpress.evaluate.encoders import is_encoder

    if not Path(model).is_dir():
        return
    found = Artifact.load(Path(model))
    if found.kind == "onnx":
        raise UsageError(f"{model} is an ONNX model already", hint="give the checkpoint that it was built from")
    config = found.describe().config
    if is_encoder(config) or is_classifier(config):
        kind = next(iter(config.get("architectures") or ["an encoder"]))
        raise UsageError(
            f"{model} is no decoder that generates text ({kind}), and ModelBuilder builds only those",
            hint="`coldpress eval` measures it as it is",
        )


def _alternatives(target: str) -> list[dict[str, Any]]:
    """Forms that a model can take, each with what matters to it."""
    int4 = {
        "int4_block_size": [32, 64, 128],
        "int4_is_symmetric": [True, False],
        "int4_algo_config": ["rtn", "k_quant", "k_quant_last", "k_quant_mixed"],
    }
    int8: dict[str, Any] = {"int4_block_size": [32, 128]}
    if target == "cpu":  # profiles are of the CPU
        int4["profile"] = ["balanced", "fast"]
        int8["profile"] = ["balanced", "fast"]
    return [
        {"type": "ModelBuilder", "precision": "int4", **int4},
        {"type": "ModelBuilder", "precision": "int8", **int8},
        *({"type": "ModelBuilder", "precision": one} for one in _FLOATS[target]),
    ]


def _data(o: Mapping[str, Any]) -> dict[str, Any]:
    if o["data"] is None:
        if o["label_col"] or o["text_template"]:
            raise UsageError("--answer and --template say how records of --data are read, and there is no --data")
        return data_config("data", BUNDLED_TEXT, None, {"max_seq_len": 512})
    text = {"strategy": "line-by-line", "pad_to_max_len": False, **text_settings(o)}
    if Path(o["data"]).suffix.lower() == ".txt" and o["strategy"] is None:
        text = {**text, "strategy": "join", "joiner": "\n"}
    return data_config("data", o["data"], o["split"], text)


def _metrics(o: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every number that is limited or made better, once, with its goal and its rank."""
    objectives = [name.lower() for name in o["objectives"]] or ["decode-latency"]
    unknown = next((name for name in objectives if name not in _OBJECTIVES), None)
    if unknown is not None:
        close = nearest(unknown, _OBJECTIVES)
        hint = f"did you mean {close}?" if close else f"objectives: {', '.join(_OBJECTIVES)}"
        raise UsageError(f"there is no objective called {unknown!r}", hint=hint)
    quality = ("accuracy", "accuracy_score") if o["label_col"] else ("perplexity", "perplexity")
    wanted = {**_COSTS, "quality": quality}
    numbers: dict[tuple[str, str], dict[str, Any]] = {("size_on_disk", "bytes"): {}, quality: _quality_goal(o)}
    for option, name in (("max_size", "size"), ("max_memory", "memory")):
        if o[option] is not None:
            limit = _size("--" + option.replace("_", "-"), o[option])
            numbers[wanted[name]] = {"goal": {"type": "threshold", "value": limit}}
    if o["max_decode_latency"] is not None:
        numbers[wanted["decode-latency"]] = {"goal": {"type": "threshold", "value": o["max_decode_latency"]}}
    for rank, name in enumerate(dict.fromkeys(objectives), 1):
        numbers.setdefault(wanted[name], {})["priority"] = rank
    return _grouped(numbers)


def _grouped(numbers: Mapping[tuple[str, str], Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Metrics of the config language, each with its numbers."""
    found: dict[str, list[dict[str, Any]]] = {}
    for (kind, name), more in numbers.items():
        timing = {"metric_config": {"max_seconds": _TIMED_SECONDS}} if kind == "generation" else {}
        found.setdefault(kind, []).append({"name": name, **more, **timing})
    data = {"data_config": "data"}
    return [
        {"name": kind, "type": kind, "sub_types": subs, **(data if kind in ("accuracy", "perplexity") else {})}
        for kind, subs in found.items()
    ]


def _quality_goal(o: Mapping[str, Any]) -> dict[str, Any]:
    text = o["max_quality_loss"].strip()
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*%?", text)
    if found is None:
        raise UsageError(f"--max-quality-loss is a number of percent such as 1%, not {text!r}")
    percent = float(found[1])
    if o["label_col"]:
        if percent > 100:
            raise UsageError(f"--max-quality-loss is {percent:g} points of accuracy, and there are 100")
        return {"goal": {"type": "max-degradation", "value": percent / 100}}
    return {"goal": {"type": "percent-max-degradation", "value": percent}}


def _size(option: str, text: str) -> int:
    from coldpress.units import parse_size

    try:
        size = parse_size(text)
    except ValueError as error:
        raise UsageError(f"{option}: {error}", hint="600MB, 1.5GB") from error
    if size <= 0:
        raise UsageError(f"{option} must be more than nothing, got {text!r}")
    return size
