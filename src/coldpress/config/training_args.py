"""The training arguments of Transformers as a table: names, types, allowed values, defaults.

The table stands in `training_args.json`, made from the installed Transformers by `python -m
coldpress.config.training_args`, so that a check imports no framework. Transformers itself accepts some wrong values
(`train_sampling_strategy="zzz"`) without a word; here they are errors.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from coldpress.config.reporters import REPORTERS, reporters_asked
from coldpress.registry import nearest

__all__ = [
    "ArgumentProblem",
    "TrainingArgument",
    "check_training_args",
    "generate_table",
    "main",
    "refused_arguments",
    "training_arguments",
]

_FILE = "training_args.json"

_NO_HUB = "nothing is uploaded", "remove it; upload the finished model with the hub's own tools"
_NO_CLUSTER = "several processes train by DDP or FSDP, through accelerate", "remove it"
_NO_TRACKER = "a Trackio server in the cloud is not used", "remove it; report_to: trackio writes locally"
_OURS = "checkpoints lie in the cache, the result in the workflow's output_dir", "remove it"

_REFUSED: dict[str, tuple[str, str]] = {
    "output_dir": _OURS,
    "resume_from_checkpoint": ("training continues from its own last checkpoint only", "remove it"),
    **dict.fromkeys(
        (
            "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push",
            "hub_revision", "push_to_hub_model_id", "push_to_hub_organization", "push_to_hub_token",
        ),
        _NO_HUB,
    ),
    **dict.fromkeys(
        (
            "deepspeed", "fsdp_min_num_params", "fsdp_transformer_layer_cls_to_wrap", "parallelism_config",
            "local_rank",
        ),
        _NO_CLUSTER,
    ),
    "ddp_static_graph": ("processes differ in how often they run the model within a step", "remove it"),
    **dict.fromkeys(("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"), _NO_TRACKER),
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), ("the pass decides what is run", "remove it")),
}  # fmt: skip
"""Arguments that make no sense here: why, and what to do. Their default, null and false change nothing and pass."""

_BOUNDS: dict[str, tuple[float, float]] = {
    "per_device_train_batch_size": (1, 1 << 20),
    "per_device_eval_batch_size": (1, 1 << 20),
    "gradient_accumulation_steps": (1, 1 << 20),
    "learning_rate": (0, 100),
    "num_train_epochs": (0, 1e9),
    "max_steps": (-1, 1e12),
    "warmup_steps": (0, 1e12),
    "weight_decay": (0, 1e6),
    "adam_beta1": (0, 1),
    "adam_beta2": (0, 1),
    "adam_epsilon": (0, 1),
    "max_grad_norm": (0, 1e12),
    "label_smoothing_factor": (0, 1),
    "logging_steps": (0, 1e12),
    "eval_steps": (0, 1e12),
    "save_steps": (0, 1e12),
    "save_total_limit": (1, 1e9),
    "seed": (0, (1 << 32) - 1),
    "data_seed": (0, (1 << 32) - 1),
    "dataloader_num_workers": (0, 4096),
    "dataloader_prefetch_factor": (1, 1 << 20),
    "eval_accumulation_steps": (1, 1e12),
    "eval_delay": (0, 1e12),
    "torch_empty_cache_steps": (1, 1e12),
}
"""Smallest and largest value that means anything."""

_VALUES: dict[str, tuple[str, ...]] = {"include_num_input_tokens_seen": ("all", "non_padding", "no")}
"""Choices that Transformers names in its help only."""


@dataclass(frozen=True)
class TrainingArgument:
    """One argument: what JSON types it takes, which values, what it is where nobody says."""

    name: str
    types: tuple[str, ...]
    values: tuple[str, ...] = ()
    default: Any = None
    help: str = ""


_OWN = TrainingArgument(
    "logging_dir",
    ("str", "null"),
    help="Folder for what report_to's services write, relative to the config file; null: logs/STEP in output_dir.",
)
"""Transformers 5 has no such argument any more; here it still says where."""
_TYPES: dict[str, set[str]] = {"fsdp": {"bool", "null", "str"}}
"""Types that Transformers takes and does not declare."""

_FSDP_WORDS = ("full_shard", "shard_grad_op", "auto_wrap")
"""Of the older text form of fsdp."""

_FSDP_OPTIONS: dict[str, tuple[Any, ...]] = {
    "version": (2, "2"),
    "reshard_after_forward": (True, False),
    "state_dict_type": ("FULL_STATE_DICT", "SHARDED_STATE_DICT"),
    "auto_wrap_policy": ("TRANSFORMER_BASED_WRAP",),
    "transformer_layer_cls_to_wrap": (),
}
"""Keys of fsdp_config and their values, where these are few. Weights are gathered a block at a time: a block is called
as a module, while layers inside are computed by code that reads their weights."""

_FEW = 12
"""Allowed values that a message lists."""

_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "list": "a list of texts",
    "dict": "a mapping",
    "null": "null",
}


@dataclass(frozen=True)
class ArgumentProblem:
    """What is wrong with one argument."""

    name: str
    message: str
    hint: str | None = None
    at_key: bool = False
    """Whether the name is wrong rather than the value."""


@cache
def training_arguments() -> Mapping[str, TrainingArgument]:
    """The table, by name."""
    raw = json.loads(files("coldpress.config").joinpath(_FILE).read_text(encoding="utf-8"))
    table = {
        name: TrainingArgument(name, tuple(row["types"]), tuple(row.get("values", ())), row["default"], row["help"])
        for name, row in raw["arguments"].items()
    }
    return {**table, _OWN.name: _OWN}


def refused_arguments() -> frozenset[str]:
    """Names that Transformers knows and a workflow has no use for."""
    return frozenset(_REFUSED)


def check_training_args(args: Mapping[str, Any], legacy: Iterable[str] = ()) -> list[ArgumentProblem]:
    """Everything wrong with the names and values; `legacy` are older names that may be meant by a misspelt one."""
    table = training_arguments()
    problems: list[ArgumentProblem] = []
    for name, value in args.items():
        argument = table.get(name)
        if argument is None:
            if name in _REFUSED:
                problems.append(ArgumentProblem(name, *_REFUSED[name], at_key=True))
                continue
            close = nearest(name, [*(known for known in table if known not in _REFUSED), *legacy])
            hint = f"did you mean {close}?" if close else "Transformers has no such training argument"
            problems.append(ArgumentProblem(name, "unknown training argument", hint, at_key=True))
        elif name in _REFUSED and value not in (None, False, "", argument.default):
            problems.append(ArgumentProblem(name, *_REFUSED[name], at_key=True))
        else:
            problem = _report_to(value) if name == "report_to" else _check_value(argument, value)
            problems.extend([problem] if problem else [])
    if not problems:
        problems.extend(_check_together(args))
    return problems


def _report_to(value: Any) -> ArgumentProblem | None:
    listed = isinstance(value, list) and all(isinstance(name, str) for name in value)
    if value is not None and not isinstance(value, str) and not listed:
        return ArgumentProblem("report_to", f"must be a service or a list of services, got {_shown(value)}")
    names = reporters_asked(value)
    if isinstance(value, list) and "none" in value and names:
        return ArgumentProblem("report_to", f"none and {', '.join(names)} exclude each other", "keep one")
    unknown = [name for name in names if name not in REPORTERS]
    if not unknown:
        return None
    message = f"must be none or among {', '.join(REPORTERS)}, got {', '.join(map(repr, unknown))}"
    if unknown == ["all"]:
        return ArgumentProblem("report_to", message, "name the services: nothing is told to one that nobody named")
    close = nearest(unknown[0], REPORTERS)
    return ArgumentProblem("report_to", message, f"did you mean {close}?" if close else None)


def _check_value(argument: TrainingArgument, value: Any) -> ArgumentProblem | None:
    name = argument.name
    if type(value) is type(argument.default) and value == argument.default:
        return None
    kind = _json_type(value)
    accepted = {*argument.types, *(("int",) if "float" in argument.types else ())}
    if "float" in accepted or "int" in accepted:
        accepted.discard("str")
    if argument.values and isinstance(value, str):
        if value in argument.values:
            return None
        close = _nearest_value(value, argument)
        few = len(argument.values) <= _FEW
        must = (
            f"must be one of {', '.join(argument.values)}" if few else f"must be one of {len(argument.values)} values"
        )
        hint = f"did you mean {close}?" if close else None if few else f"one of: {', '.join(argument.values)}"
        return ArgumentProblem(name, f"{must}, got {value!r}", hint)
    if kind not in accepted:
        words = " or ".join(_WORDS[item] for item in argument.types if item != "null" and item in accepted)
        if argument.values:
            words = f"one of {', '.join(argument.values)}"
        return ArgumentProblem(name, f"must be {words}, got {_shown(value)}", _quotes(value, accepted))
    if name in _BOUNDS and isinstance(value, (int, float)) and not isinstance(value, bool):
        low, high = _BOUNDS[name]
        if not low <= value <= high:
            return ArgumentProblem(name, f"must be from {low:g} to {high:g}, got {value}")
    if name == "max_steps" and value == 0:
        return ArgumentProblem(name, "must be a positive number of steps, or -1 to count epochs, got 0")
    return None


def _nearest_value(value: str, argument: TrainingArgument) -> str | None:
    """`adamw` is the beginning of the default rather than the end of `grokadamw`."""
    begins = sorted((choice for choice in argument.values if choice.startswith(value)), key=len)
    if argument.default in begins:
        return str(argument.default)
    return begins[0] if value and begins else nearest(value, argument.values)


def _quotes(value: Any, accepted: set[str]) -> str | None:
    """A number or a truth value that was written as a text."""
    if not isinstance(value, str):
        return None
    if "bool" in accepted and value.lower() in ("true", "false", "yes", "no", "on", "off"):
        return f"write {'true' if value.lower() in ('true', 'yes', 'on') else 'false'} without quotes"
    try:
        float(value)
    except ValueError:
        return None
    return "without quotes" if {"int", "float"} & accepted else None


def _check_together(args: Mapping[str, Any]) -> list[ArgumentProblem]:
    """What Transformers would refuse, or silently decide, once the model is loaded."""
    problems = _check_fsdp(args)
    if args.get("bf16") and args.get("fp16"):
        problems.append(ArgumentProblem("fp16", "bf16 and fp16 exclude each other", "keep one"))
    if args.get("load_best_model_at_end"):
        pair = args.get("eval_strategy", "no"), args.get("save_strategy", "steps")
        if pair[1] != "best" and pair[0] != pair[1]:
            message = f"needs eval_strategy ({pair[0]}) and save_strategy ({pair[1]}) to be the same"
            problems.append(ArgumentProblem("load_best_model_at_end", message))
    return problems


def _check_fsdp(args: Mapping[str, Any]) -> list[ArgumentProblem]:
    text, config = args.get("fsdp"), args.get("fsdp_config")
    words = text.split() if isinstance(text, str) else []
    odd = [word for word in words if word not in _FSDP_WORDS]
    if odd:
        message = f"must be true (or of {', '.join(_FSDP_WORDS)}), got {text!r}"
        return [ArgumentProblem("fsdp", message, "write true, and what it shall do in fsdp_config")]
    if isinstance(config, str):
        return [ArgumentProblem("fsdp_config", "must be a mapping, got a text", "give the content of that file")]
    problems = []
    for key, value in (config or {}).items():
        name = str(key).removeprefix("fsdp_")
        if name == "activation_checkpointing":
            message = "fsdp_config.activation_checkpointing draws dropout anew when it computes again"
            problems.append(ArgumentProblem("fsdp_config", message, "set gradient_checkpointing instead"))
        elif name not in _FSDP_OPTIONS:
            message = f"fsdp_config.{key} is not supported; known: {', '.join(_FSDP_OPTIONS)}"
            problems.append(ArgumentProblem("fsdp_config", message, "leave it out"))
        elif _FSDP_OPTIONS[name] and value not in _FSDP_OPTIONS[name]:
            must = ", ".join(_shown(choice) for choice in _FSDP_OPTIONS[name])
            problems.append(ArgumentProblem("fsdp_config", f"{key} must be one of {must}, got {_shown(value)}"))
    return problems


def _json_type(value: Any) -> str:
    if value is None:
        return "null"
    for kind, name in ((bool, "bool"), (int, "int"), (float, "float"), (str, "str"), (list, "list")):
        if isinstance(value, kind):
            return name
    return "dict"


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (dict, list)):
        return "a mapping" if isinstance(value, dict) else "a list"
    return "null" if value is None else repr(value)


def generate_table() -> dict[str, Any]:
    """The table of the installed Transformers."""
    import dataclasses

    import transformers

    rows: dict[str, Any] = {}
    for item in dataclasses.fields(transformers.TrainingArguments):
        if item.init:
            rows[item.name] = _row(item)
    return {"transformers": transformers.__version__, "arguments": rows}


def _row(item: Any) -> dict[str, Any]:
    import dataclasses
    import enum
    import typing

    types: set[str] = set()
    values: list[str] = []
    open_list = [item.type]
    names = {int: "int", float: "float", bool: "bool", str: "str", type(None): "null", dict: "dict", list: "list"}
    while open_list:
        kind = open_list.pop()
        origin = typing.get_origin(kind)
        if isinstance(kind, type) and issubclass(kind, enum.Enum):
            values.extend(str(member.value) for member in kind)
            types.add("str")
        elif kind in names:
            types.add(names[kind])
        elif kind is None:
            types.add("null")
        elif origin in (dict, list):
            types.add(names[origin])
            element = typing.get_args(kind)[-1]
            if isinstance(element, type) and issubclass(element, enum.Enum):
                values.extend(str(member.value) for member in element)
        elif origin is typing.Literal:
            types.add("bool")
        elif typing.get_args(kind):
            open_list.extend(typing.get_args(kind))
        else:
            types.add("dict")
    default = item.default
    if default is dataclasses.MISSING:
        default = item.default_factory() if item.default_factory is not dataclasses.MISSING else None
    default = default.value if isinstance(default, enum.Enum) else default
    text = " ".join(item.metadata.get("help", "").split())
    row: dict[str, Any] = {"types": sorted(_TYPES.get(item.name, types)), "default": default, "help": text}
    choices = item.metadata.get("choices") or _VALUES.get(item.name) or values
    if choices:
        row["values"] = sorted({str(getattr(choice, "value", choice)) for choice in choices})
    return row


def main() -> None:
    """Write the table beside this file."""
    from pathlib import Path

    target = Path(__file__).with_name(_FILE)
    target.write_text(json.dumps(generate_table(), indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
