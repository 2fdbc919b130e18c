"""What each dialect takes for granted where a file is silent.

Up to v0.6 Olive trained with its own arguments, one line a sequence; since then Transformers' own defaults hold, except
for the few that Olive still sets. Values that differ from today's are written into the document; the rest is filled in
after the check, so that a pass sees every value that it will use.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coldpress.config.pass_tree import pass_nodes
from coldpress.config.rewriting import Rewriting
from coldpress.config.rules_passes import TRAINING_PASSES
from coldpress.config.tree import Node, from_plain, join_path, problem_at
from coldpress.errors import Problem

__all__ = [
    "FULL_TRAINING_DEFAULTS",
    "OLIVE_0_6_TRAINING_DEFAULTS",
    "QLORA_TRAINING_DEFAULTS",
    "TODAY_TRAINING_DEFAULTS",
    "has_eval_data",
    "host_device",
    "mend_training",
    "training_defaults",
    "write_defaults",
]

TODAY_TRAINING_DEFAULTS: Mapping[str, Any] = {
    "learning_rate": 2e-4,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0.03,
    "report_to": "none",
}
"""Where Olive's LoRA family departs from Transformers today. `warmup_steps` below 1 is a share of all steps. Olive's
gradient_checkpointing is left out: it changes nothing that is learned, and is chosen by the memory there is."""

QLORA_TRAINING_DEFAULTS: Mapping[str, Any] = {"optim": "paged_adamw_32bit"}
"""What QLoRA adds."""

FULL_TRAINING_DEFAULTS: Mapping[str, Any] = {"learning_rate": 2e-5}
"""Where training all weights departs from training an adapter, which takes ten times larger steps."""

OLIVE_0_6_TRAINING_DEFAULTS: Mapping[str, Any] = {
    "seed": 42,
    "data_seed": 42,
    "optim": "paged_adamw_32bit",
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 16,
    "max_steps": 10000,
    "weight_decay": 0.0,
    "learning_rate": 2e-4,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0.03,
    "logging_steps": 10,
    "eval_strategy": "no",
    "train_sampling_strategy": "group_by_length",
    "report_to": "none",
}
"""Olive 0.6's own training arguments, under today's names."""

_TRANSFORMERS: Mapping[str, Any] = {"seed": 42, "weight_decay": 0.0, "eval_strategy": "no"}
_PAGED = {"paged_adamw_32bit": "adamw_torch", "paged_adamw": "adamw_torch"}


def training_defaults(kind: str, has_eval_data: bool, device: str) -> dict[str, Any]:
    """What a pass trains with today where its `training_args` are silent."""
    values = dict(TODAY_TRAINING_DEFAULTS)
    values["eval_strategy"] = "steps" if has_eval_data else "no"
    values.update(FULL_TRAINING_DEFAULTS if kind == "FullFinetune" else {})
    if kind == "QLoRA":
        values.update(QLORA_TRAINING_DEFAULTS)
        if device == "cpu":
            values["optim"] = _PAGED[values["optim"]]
    return values


def host_device(root: Node, host: str | None = None) -> str:
    """cpu or gpu: what the steps run on, as far as the file says it."""
    name = host or root.text("host")
    accelerators = root.get("systems", name, "accelerators") if name else None
    first = accelerators.items[0] if accelerators is not None and accelerators.items else None
    return (first.text("device") if first is not None else None) or "cpu"


def has_eval_data(entry: Node) -> bool:
    return any((node := entry.get(key)) is not None and node.value for key in ("eval_data_config", "eval_dataset_size"))


def write_defaults(rw: Rewriting) -> None:
    """Write the file's dialect out where it differs from today's, and mend what the machine cannot do."""
    for at, entry in pass_nodes(rw.root):
        kind = entry.text("type")
        if kind not in TRAINING_PASSES:
            continue
        device = host_device(rw.root, entry.text("host"))
        if rw.dialect == "0.6":
            if "lora_dropout" in rw.passes[kind].model_fields:
                rw.default("defaults", entry, "lora_dropout", 0.0, at)
            arguments = entry.members.setdefault("training_args", entry.child("training_args", {}))
            _old_training(rw, arguments, kind, has_eval_data(entry), device, at)
        rw.warnings += mend_training(entry, device)
    if rw.dialect == "0.6":
        _old_data(rw)


def _old_training(rw: Rewriting, arguments: Node, kind: str, evaluates: bool, device: str, at: str) -> None:
    if arguments.mapping is None:
        return
    today = {**_TRANSFORMERS, **training_defaults(kind, evaluates, "gpu")}
    for key, value in OLIVE_0_6_TRAINING_DEFAULTS.items():
        if key == "optim" and device == "cpu":
            if "optim" not in arguments.mapping:
                rw.default("defaults", arguments, key, _PAGED[value], join_path(at, "training_args"))
                where = arguments.mapping["optim"]
                message = f"Olive 0.6's {value} needs a GPU; {_PAGED[value]}, the same arithmetic, is used on the CPU"
                rw.warnings.append(problem_at(where, message))
        elif key not in today or today[key] != value:
            rw.default("defaults", arguments, key, value, join_path(at, "training_args"))


def mend_training(entry: Node, device: str) -> list[Problem]:
    """Replace what the machine or the data cannot do, in lists of values too, and say so."""
    arguments = entry.get("training_args")
    if arguments is None or arguments.mapping is None:
        return []
    warnings = []
    optim, strategy = arguments.get("optim"), arguments.get("eval_strategy")
    for one in (optim.items or [optim]) if optim is not None and device == "cpu" else ():
        if isinstance(one.value, str) and one.value in _PAGED:
            better = _PAGED[one.value]
            message = f"{one.value} needs a GPU; {better}, the same arithmetic, is used on the CPU"
            warnings.append(problem_at(one, message))
            one.value = better
    if strategy is not None and not has_eval_data(entry):
        for place, one in enumerate(strategy.items or [strategy]):
            if one.value in ("steps", "epoch"):
                message = "there is nothing to evaluate on (eval_data_config, eval_dataset_size); no is used"
                warnings.append(problem_at(one, message))
                never = from_plain("no", one.path, one, one.origin)
                if one is strategy:
                    arguments.mapping["eval_strategy"] = never
                else:
                    strategy.elements[place] = never
    steps, epochs = arguments.get("max_steps"), arguments.get("num_train_epochs")
    if steps is not None and epochs is not None and isinstance(steps.value, int) and steps.value > 0:
        message = f"max_steps = {steps.value} ends the training; num_train_epochs has no effect"
        warnings.append(problem_at(epochs, message, at_key=True))
    return warnings


def _old_data(rw: Rewriting) -> None:
    data = rw.root.get("data_configs")
    for index, config in enumerate((data.items if data else None) or []):
        if config.mapping is None:
            continue
        at = f"data_configs.{index}.pre_process_data_config"
        block = config.mapping.get("pre_process_data_config")
        if block is None:
            block = from_plain({}, join_path(config.path, "pre_process_data_config"), config)
            config.mapping["pre_process_data_config"] = block
        if block.mapping is None:
            continue
        if "max_seq_len" not in block.mapping:
            message = "source_max_len is missing, which Olive 0.6 did not allow; 1024, today's default, is used"
            rw.warnings.append(problem_at(block, message))
        rw.default("defaults", block, "strategy", "line-by-line", at)
        rw.default("defaults", block, "joiner", "", at)
