"""`coldpress finetune` and `build`: short verbs that write a workflow and run it."""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from coldpress.cli.data_options import data_config, text_options, text_settings
from coldpress.cli.documents import run_options, save_or_run, skeleton
from coldpress.errors import ColdpressError, UsageError
from coldpress.registry import PASSES

__all__ = ["build", "finetune"]

_METHODS = {
    "lora": "LoRA", "qlora": "QLoRA", "dora": "DoRA", "loftq": "LoftQ", "loha": "LoHa", "lokr": "LoKr",
    "full": "FullFinetune",
}  # fmt: skip
"""Method -> pass."""


def _share_or_count(text: str) -> float | int:
    try:
        return float(text) if "." in text else int(text)
    except ValueError as error:
        raise UsageError(f"--eval-size must be a share (0.1) or a count (200), got {text!r}") from error


@click.command()
@click.argument("model")
@click.option("-d", "--data", required=True, help="File of records (json, jsonl, csv, parquet, txt) or a hub data set.")
@click.option("--split", help="Split of the data to train on.")
@click.option("--eval-data", help="File of records for the evaluation loss and the accuracy.")
@click.option(
    "--eval-size",
    default="0.1",
    show_default=True,
    help="Held out of the data when there is no --eval-data: a share or a count; 0 for none.",
)
@text_options
@click.option("--method", type=click.Choice(list(_METHODS)), default="lora", show_default=True,
              help="What is trained; full: all weights.")  # fmt: skip
@click.option("-r", "--rank", type=click.IntRange(1), default=64, show_default=True, help="Rank of the adapter.")
@click.option("--alpha", type=float, default=None, help="Scale of the adapter; default: the rank.")
@click.option("--dropout", type=click.FloatRange(0, 1), default=0.05, show_default=True,
              help="Share of the adapter's inputs left out in training.")  # fmt: skip
@click.option("--target-modules", default="all-linear", show_default=True, help="Linear layers to adapt, with commas.")
@click.option("--epochs", type=float,
              help="Times that the data is gone through; default: 3, or as --max-steps says.")  # fmt: skip
@click.option("--max-steps", type=int, help="Stop after so many steps, whatever --epochs says.")
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Records of a batch.")
@click.option("--gradient-accumulation", type=click.IntRange(1), default=1, show_default=True,
              help="Batches of a step.")  # fmt: skip
@click.option("--learning-rate", type=float, help="Default: 2e-4 for adapters, 2e-5 for all weights.")
@click.option(
    "--seed", type=int, default=42, show_default=True, help="Of the order of records, the start, the dropout."
)
@click.option(
    "--device", type=click.Choice(["cpu", "gpu"]), default="cpu", show_default=True, help="Where it is trained."
)
@click.option("--no-merge", is_flag=True, help="Hand over the adapter instead of a merged checkpoint.")
@click.option(
    "--build", "precision", type=click.Choice(["fp32", "int8", "int4"]), help="Build an ONNX model of it too."
)
@run_options
def finetune(model: str, data: str, **options: Any) -> int:
    """Fine-tune MODEL (a checkpoint folder or hub id) on a file of records.

    Chat messages, ShareGPT and Alpaca records, prompts with completions are recognised by their columns; anything else
    takes --template or --text-field. `coldpress data --model MODEL --data FILE` shows what will be trained on.

    An adapter that MODEL has (the output folder of a fine-tuning) is trained further: what is not given follows it.
    """
    source = click.get_current_context().get_parameter_source
    given = {name for name in options if source(name) is not ParameterSource.DEFAULT}
    document = _finetune_workflow(model, data, options, given)
    return save_or_run(document, options["save_config"], options["trust_remote_code"], options["log_format"])


def _finetune_workflow(model: str, data: str, o: dict[str, Any], given: set[str]) -> dict[str, Any]:
    provider = "CPUExecutionProvider" if o["device"] == "cpu" else "CUDAExecutionProvider"
    document = skeleton(model, o["output_dir"], o["cache_dir"], o["trust_remote_code"], o["device"], provider)
    text = {"strategy": "line-by-line", "pad_to_max_len": False, **text_settings(o)}
    document["data_configs"] = [data_config("train_data", data, o["split"], text)]
    held_out = _share_or_count(o["eval_size"])
    begun = _method_of(model)
    method = o["method"] if begun is None or "method" in given else begun
    full = method == "full"
    step: dict[str, Any] = {
        "type": _METHODS[method],
        **_adapter_settings(o, None if begun is None else given, PASSES[_METHODS[method]].Config.model_fields),
        "train_data_config": "train_data",
        "training_args": _training_arguments(o, full=full),
    }
    if o["eval_data"] is not None:
        document["data_configs"].append(data_config("eval_data", o["eval_data"], None, text))
        step["eval_data_config"] = "eval_data"
    elif held_out:
        step["eval_dataset_size"] = held_out
    passes: dict[str, Any] = {method: step}
    if not full and (not o["no_merge"] or o["precision"]):
        passes["merge"] = {"type": "MergeAdapterWeights"}
    if o["precision"]:
        passes["build"] = {"type": "ModelBuilder", "precision": o["precision"]}
    document["passes"] = passes
    if o["eval_data"] is not None and o["label_col"]:
        _measure_accuracy(document, "eval_data")
        step["evaluator"] = "accuracy"
    return document


def _method_of(model: str) -> str | None:
    """The method that trains the adapter of a model further; None where it has none. What is no model the plan says."""
    from coldpress.artifacts.base import Artifact

    try:
        artifact = Artifact.load(Path(model).expanduser())
        adapter = artifact.describe().adapter
    except ColdpressError:
        return None
    if adapter is None:
        return None
    if artifact.base_quantization is not None:
        return "qlora"
    return next((method for method, kind in _METHODS.items() if kind == adapter.kind), "lora")


def _adapter_settings(o: Mapping[str, Any], only: Container[str] | None, known: Container[str]) -> dict[str, Any]:
    """Parameters of a new adapter that its pass has; `only` of the options named there, to go on with another one."""
    targets = o["target_modules"]
    values = {
        "r": ("rank", o["rank"]),
        "alpha": ("alpha", o["rank"] if o["alpha"] is None else o["alpha"]),
        "lora_dropout": ("dropout", o["dropout"]),
        "target_modules": (
            "target_modules",
            targets if targets == "all-linear" else [name.strip() for name in targets.split(",")],
        ),
    }
    return {
        name: value for name, (option, value) in values.items() if name in known and (only is None or option in only)
    }


def _training_arguments(o: Mapping[str, Any], *, full: bool) -> dict[str, Any]:
    epochs = 3.0 if o["epochs"] is None and o["max_steps"] is None else o["epochs"]
    arguments: dict[str, Any] = {
        **({} if epochs is None else {"num_train_epochs": epochs}),
        "per_device_train_batch_size": o["batch_size"],
        "gradient_accumulation_steps": o["gradient_accumulation"],
        "learning_rate": (2e-5 if full else 2e-4) if o["learning_rate"] is None else o["learning_rate"],
        "seed": o["seed"],
    }
    if o["max_steps"] is not None:
        arguments["max_steps"] = o["max_steps"]
    return arguments


def _measure_accuracy(document: dict[str, Any], data: str) -> None:
    document["evaluators"] = {"accuracy": {"metrics": [{"name": "accuracy", "type": "accuracy", "data_config": data}]}}
    document["evaluator"] = "accuracy"


@click.command()
@click.argument("model")
@click.option(
    "-p", "--precision", type=click.Choice(["fp32", "fp16", "bf16", "int8", "int4"]), default="int4", show_default=True,
    help="Of the weights.",
)  # fmt: skip
@click.option(
    "--profile",
    type=click.Choice(["fast", "balanced", "accurate"]),
    default="balanced",
    show_default=True,
    help="What to trade: `coldpress plan` says what it comes to, docs/profiles.md what it costs.",
)
@click.option(
    "--block-size", type=click.Choice(["16", "32", "64", "128", "256"]), help="Weights that share a scale (int4)."
)
@click.option("--asymmetric", is_flag=True, help="Zero points as well as scales (int4).")
@click.option(
    "--accuracy-level", type=click.Choice(["1", "2", "3", "4"]), help="Arithmetic of int4 products: 1 fp32, 4 int8."
)
@click.option("--exclude-embeds", is_flag=True, help="Leave the embedding out of the model.")
@click.option("--exclude-lm-head", is_flag=True, help="Leave the output head out of the model.")
@click.option("--prune-lm-head", is_flag=True, help="Logits of the last token only: faster prompts.")
@click.option("--adapter", help="A PEFT adapter to add to the weights while they are read.")
@click.option("--provider", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True,
              help="Execution provider that it is built for.")  # fmt: skip
@click.option("--no-proof", is_flag=True, help="Skip the comparison with the checkpoint.")
@run_options
def build(model: str, **options: Any) -> int:
    """Build an ONNX model for ONNX Runtime GenAI from MODEL (a checkpoint folder or hub id)."""
    cpu = options["provider"] == "cpu"
    provider = "CPUExecutionProvider" if cpu else "CUDAExecutionProvider"
    document = skeleton(
        model,
        options["output_dir"],
        options["cache_dir"],
        options["trust_remote_code"],
        "cpu" if cpu else "gpu",
        provider,
    )
    if options["adapter"] is not None:
        document["input_model"]["adapter_path"] = options["adapter"]
    chosen: dict[str, Any] = {"type": "ModelBuilder", "precision": options["precision"]}
    if options["block_size"] is not None:
        chosen["int4_block_size"] = int(options["block_size"])
    if options["asymmetric"]:
        chosen["int4_is_symmetric"] = False
    if options["accuracy_level"] is not None:
        chosen["int4_accuracy_level"] = int(options["accuracy_level"])
    for name in ("exclude_embeds", "exclude_lm_head", "prune_lm_head"):
        if options[name]:
            chosen[name] = True
    if options["profile"] != "balanced":
        chosen["profile"] = options["profile"]
    if options["no_proof"]:
        chosen["parity"] = {"enabled": False}
    document["passes"] = {"build": chosen}
    return save_or_run(document, options["save_config"], options["trust_remote_code"], options["log_format"])
