"""Dialect rules for `passes` and their training arguments."""

from __future__ import annotations

from collections.abc import Callable

from pydantic import BaseModel

from coldpress.config.check import takes_list
from coldpress.config.olive_passes import OLIVE_PASSES, RENAMED_PASSES
from coldpress.config.rewriting import Action, Custom, Drop, Rename, Rewriting, Rule, Version
from coldpress.config.rules_data import hoist_data_config
from coldpress.config.rules_workflow import name_evaluator, name_system
from coldpress.config.tree import Node, from_plain, join_path, problem_at
from coldpress.registry import nearest

__all__ = ["RULES", "SIBLINGS", "TRAINING_PASSES"]

V07: Version = (0, 7)
TRAINING_PASSES = ("LoRA", "DoRA", "QLoRA", "LoftQ", "LoHa", "LoKr", "FullFinetune")

SIBLINGS: dict[str, str] = {
    "lora_dropout": "LoRA and its kin",
    "double_quant": "QLoRA",
    "quant_type": "QLoRA",
    "compute_dtype": "QLoRA and LoftQ",
    "save_quant_config": "QLoRA and LoftQ",
    "loftq_iter": "LoftQ",
    "rank_dropout": "LoHa and LoKr",
    "module_dropout": "LoHa and LoKr",
    "init_weights": "LoHa and LoKr",
    "decompose_both": "LoKr",
    "decompose_factor": "LoKr",
    "rank_dropout_scale": "LoKr",
}
"""Parameters of the LoRA family, and whose they are."""


_OF_LORA = ("use_dora", "use_rslora", "init_lora_weights", "bias")
"""Parameters of LoRA and its kin that change what comes out, so that nobody drops them."""

_LACKING: dict[str, frozenset[str]] = {
    "ModelBuilder": frozenset(
        (
            "metadata_only", "search", "int4_accuracy_level", "int4_block_size", "int4_is_symmetric",
            "int4_op_types_to_quantize", "int4_nodes_to_exclude", "int4_algo_config", "use_qdq", "use_8bits_moe",
            "use_webgpu_fp32", "use_cuda_bf16", "include_hidden_states", "exclude_embeds", "exclude_lm_head",
            "enable_cuda_graph", "extra_options", "include_prompt_templates",
        )
    ),
    "MergeAdapterWeights": frozenset(),
    "ExtractAdapters": frozenset(
        (
            "save_as_external_data", "all_tensors_to_one_file", "external_data_name", "size_threshold",
            "convert_attribute",
        )
    ),
}  # fmt: skip
"""Parameters of Olive's pass of the same name: one that ours has not is no typing error."""


def _pass_types(rw: Rewriting, rule: Rule, parent: Node, at: str) -> None:
    """Each pass gets its registered name, or one error and no second look."""
    registered = {name.lower(): name for name in rw.passes}
    renamed = {old.lower(): new for old, new in RENAMED_PASSES.items()}
    foreign = {name.lower(): name for name in OLIVE_PASSES}
    for name in list(parent.members):
        entry = parent.members[name]
        if entry.items:
            _alternatives(rw, parent, name)
            entry = parent.members.get(name, entry)
        node = entry.get("type")
        if entry.mapping is None or node is None or not isinstance(node.value, str):
            continue
        lowered = node.value.lower()
        if lowered in registered:
            node.value = registered[lowered]
            continue
        if lowered in renamed and renamed[lowered] in rw.passes:
            rw.told("pass.renamed", node, f"{at}.{name}.type = {renamed[lowered]}")
            node.value = renamed[lowered]
            continue
        del parent.members[name]
        if lowered in foreign:
            near = OLIVE_PASSES[foreign[lowered]]
            message = f"{foreign[lowered]} is an Olive pass that Coldpress does not have yet"
            hint = f"nearest: {near}" if near else f"passes we have: {', '.join(rw.passes)}"
        else:
            close = nearest(node.value, [*rw.passes, *RENAMED_PASSES, *OLIVE_PASSES])
            message = f"there is no pass of type {node.value!r}"
            hint = f"did you mean {close}?" if close else f"passes we have: {', '.join(rw.passes)}"
        rw.problems.append(problem_at(node, message, hint=hint))


def _extracted(rw: Rewriting, rule: Rule, parent: Node, at: str) -> None:
    """ExtractAdapters takes the adapter from the graph, so a builder before it must not merge it."""
    builder: tuple[str, Node] | None = None
    for name, entry in parent.members.items():
        kind = entry.text("type")
        if kind == "ModelBuilder":
            builder = (name, entry)
        elif kind == "ExtractAdapters" and builder is not None:
            rw.default("ModelBuilder.adapter", builder[1], "adapter", "inputs", f"{at}.{builder[0]}")


def _alternatives(rw: Rewriting, parent: Node, name: str) -> None:
    """Olive's list of passes under one name: alternatives for a search."""
    entry = parent.members[name]
    items = entry.items or []
    if len(items) == 1:
        rw.told("pass.list", entry, f"passes.{name}")
        parent.members[name] = items[0]
        rw.unfold(items[0], "config")
        return
    rw.searched.append(entry)
    del parent.members[name]


def _parameters(rw: Rewriting, rule: Rule, parent: Node, at: str) -> None:
    """Olive's two magic words, and parameters that belong to another pass of the family."""
    kind = parent.text("type")
    known = set(rw.passes[kind].model_fields) if kind is not None and kind in rw.passes else set()
    for key in list(parent.members):
        node = parent.members[key]
        if node.value == "DEFAULT_VALUE" and key not in ("type", "host", "evaluator"):
            rw.drop(parent, key, "the default", rule="pass.DEFAULT_VALUE")
        elif node.value == "SEARCHABLE_VALUES" or _list_of_values(node, key, rw.passes.get(kind or "")):
            rw.searched.append(node)
            del parent.members[key]
            parent.damaged = True
        elif key in SIBLINGS and key not in known and kind in TRAINING_PASSES:
            why = f"{key} belongs to {SIBLINGS[key]} and has no effect in {kind}; dropped"
            rw.drop(parent, key, why, rule="pass.sibling", warn=True)
        elif key in _OF_LORA and key not in known and kind in TRAINING_PASSES:
            rw.refuse(parent, key, f"{key} belongs to LoRA, DoRA, QLoRA and LoftQ; {kind} has nothing like it")
        elif kind in _LACKING and key in _LACKING[kind] and key not in known:
            if node.value in (None, False):
                rw.drop(parent, key, "off", rule=f"{kind}.{key}")
            else:
                rw.refuse(parent, key, f"{key} is a parameter of Olive's {kind} that Coldpress does not have")
        elif key.endswith("data_config") and node.mapping is not None:
            hoist_data_config(rw, Rule(rule.level, key, rule.action), parent, at)
        elif key == "training_args" and node.value is None:
            node.value = {}
        elif key == "training_args":
            rw.unfold(node, "extra_args")


def _list_of_values(node: Node, key: str, model: type[BaseModel] | None) -> bool:
    """Olive's list of candidates, where the parameter itself takes one plain value."""
    return model is not None and node.items is not None and key != "training_args" and not takes_list(model, key)


def _text_or_none(node: Node) -> bool:
    return node.value is None


def _true(node: Node) -> bool:
    return node.value is True


_TF32 = Drop("TF32 is set in training_args.tf32")
_MAP = Drop("Coldpress places the weights itself")
_ORT = "ONNX Runtime training is gone; Transformers' Trainer is used"
_FAMILY: tuple[tuple[str, Action, Version | None, Callable[[Node], bool] | None], ...] = (
    ("lora_r", Rename("r"), V07, None),
    ("lora_alpha", Rename("alpha"), V07, None),
    ("use_ort_trainer", Drop(_ORT), V07, lambda node: not node.value),
    ("use_ort_trainer", Drop(_ORT, warn=True), V07, _true),
    ("ortmodule_onnx_opset_version", Drop(_ORT), V07, None),
    ("allow_tf32", _TF32, None, None),
    ("device_map", _MAP, None, None),
    ("ephemeral_gpu_offload", _MAP, None, None),
    ("use_effective_conv2d", Drop("the layers of a language model are linear, none is a convolution"), None, None),
)


def _group_by_length(rw: Rewriting, rule: Rule, parent: Node, at: str) -> None:
    _choose(rw, rule, parent, at, "train_sampling_strategy", "group_by_length")


def _adafactor(rw: Rewriting, rule: Rule, parent: Node, at: str) -> None:
    _choose(rw, rule, parent, at, "optim", "adafactor")


def _choose(rw: Rewriting, rule: Rule, parent: Node, at: str, key: str, value: str) -> None:
    """A switch that became one value of a choice."""
    node = parent.members[rule.key]
    if node.value is True:
        told = from_plain(value, node.path, node, node.origin)
        parent.members[rule.key] = told
        if rw.move(parent, rule.key, parent, key):
            rw.told(rule.name, node, f"{join_path(at, key)} = {value}", dialect=rule.dialect)
    elif node.value in (False, None):
        if key == "train_sampling_strategy" and node.value is False and key not in parent.members:
            parent.members[key] = parent.child(key, "random")
        rw.drop(parent, rule.key, "off", rule=rule.name, dialect=rule.dialect)
    else:
        rw.refuse(parent, rule.key, f"must be true or false, got {node.value!r}")


def _warmup_ratio(rw: Rewriting, rule: Rule, parent: Node, at: str) -> None:
    """A ratio is written as `warmup_steps` below 1; given steps win over it, as they always did."""
    node = parent.members["warmup_ratio"]
    steps = parent.get("warmup_steps")
    if isinstance(node.value, bool) or not isinstance(node.value, (int, float)) or not 0 <= node.value < 1:
        rw.refuse(parent, "warmup_ratio", f"must be a number from 0 to below 1, got {node.value!r}")
    elif steps is not None and steps.value:
        why = "warmup_steps wins over warmup_ratio; dropped"
        rw.drop(parent, "warmup_ratio", why, rule=rule.name, warn=True)
    else:
        if steps is not None:
            del parent.members["warmup_steps"]
        if rw.move(parent, "warmup_ratio", parent, "warmup_steps"):
            rw.told(rule.name, node, join_path(at, "warmup_steps"), dialect=rule.dialect)


def _old_optimizer(rw: Rewriting, rule: Rule, parent: Node, at: str) -> None:
    node = parent.members["optim"]
    rw.told(rule.name, node, f"{join_path(at, 'optim')} = adamw_torch", dialect=rule.dialect)
    node.value = "adamw_torch"


def _accelerator_config(rw: Rewriting, rule: Rule, parent: Node, at: str) -> None:
    node = parent.members[rule.key]
    if node.value is None:
        del parent.members[rule.key]
        return
    target = parent.members.setdefault("accelerator_config", parent.child("accelerator_config", {}))
    if target.mapping is not None and rw.move(parent, rule.key, target, rule.key):
        rw.told(rule.name, node, f"{join_path(at, 'accelerator_config')}.{rule.key}", dialect=rule.dialect)


def _logging_dir(rw: Rewriting, rule: Rule, parent: Node, at: str) -> None:
    """Gone from Transformers; here it is where the services of `report_to` write, and else it has no effect."""
    asked = parent.get("report_to")
    services = [] if asked is None else [item.value for item in asked.items or [asked]]
    if not any(service not in (None, "none") for service in services):
        rw.drop(parent, "logging_dir", "report_to names no service", rule=rule.name)


_T4 = "transformers-4"
_STORE = Drop("checkpoints lie in the cache, the result in the workflow's output_dir", warn=True)
_RESUMES = Drop("training continues from its own last checkpoint")
_AUTOMATIC = Drop("it is set by the machine")


def _training(key: str, action: Action, when: Callable[[Node], bool] | None = None) -> Rule:
    return Rule("training_args", key, action, None, when, _T4)


_TRAINING: tuple[Rule, ...] = (
    _training("evaluation_strategy", Rename("eval_strategy")),
    _training("group_by_length", Custom(_group_by_length)),
    _training("warmup_ratio", Custom(_warmup_ratio)),
    _training("optim", Custom(_old_optimizer), lambda node: node.value == "adamw_hf"),
    _training("adafactor", Custom(_adafactor)),
    _training("no_cuda", Rename("use_cpu")),
    _training("per_gpu_train_batch_size", Rename("per_device_train_batch_size")),
    _training("per_gpu_eval_batch_size", Rename("per_device_eval_batch_size")),
    _training("split_batches", Custom(_accelerator_config)),
    _training("dispatch_batches", Custom(_accelerator_config)),
    _training("overwrite_output_dir", Drop("finished steps are kept in the cache and never overwritten")),
    _training("output_dir", Drop("null"), _text_or_none),
    _training("output_dir", _STORE),
    _training("logging_dir", Custom(_logging_dir)),
    _training("save_safetensors", Drop("adapters are always written as safetensors"), lambda n: n.value is not False),
    _training("save_safetensors", Drop("adapters are always written as safetensors", warn=True)),
    _training("use_mps_device", _AUTOMATIC),
    _training("jit_mode_eval", Drop("gone from Transformers")),
    _training("use_ipex", Drop("gone from Transformers")),
    _training("half_precision_backend", Drop("torch is the only backend left")),
    _training("fp16_backend", Drop("torch is the only backend left")),
    _training("fp16_opt_level", Drop("torch is the only backend left")),
    _training("include_tokens_per_second", Drop("tokens per second are always shown")),
    _training("include_inputs_for_metrics", Drop("no metric runs inside the training")),
    _training("past_index", Drop("gone from Transformers")),
    _training("use_legacy_prediction_loop", Drop("gone from Transformers")),
    _training("mp_parameters", Drop("gone from Transformers")),
    _training("ray_scope", Drop("there is no search inside the training")),
    _training("torchdynamo", Drop("gone from Transformers: torch_compile_backend")),
    _training("tpu_num_cores", Drop("gone from Transformers")),
    _training("tpu_metrics_debug", Drop("gone from Transformers")),
    _training("use_module_with_loss", Drop(_ORT)),
    _training("do_train", Drop("the pass trains")),
    _training("do_eval", Drop("eval_strategy says it")),
    _training("do_predict", Drop("the evaluator measures the result")),
    _training("local_rank", Drop("it is set by the launcher")),
    _training("resume_from_checkpoint", _RESUMES, lambda node: not isinstance(node.value, str)),
    _training("deepspeed", Drop("off"), lambda n: not n.value),
    _training("fsdp", Drop("off"), lambda n: not n.value),
)  # fmt: skip

RULES: tuple[Rule, ...] = (
    Rule("passes", "*", Custom(_pass_types)),
    Rule("passes", "*", Custom(_extracted)),
    Rule("pass", "disable_search", Drop("there is no search")),
    Rule("pass", "clean_run_cache", Drop("clean_cache forgets the whole workflow", warn=True), None, _true),
    Rule("pass", "clean_run_cache", Drop("off")),
    Rule("pass", "output_name", Drop("the step's result lies in the cache under its key", warn=True)),
    Rule("pass", "host", Custom(name_system), None, lambda node: node.mapping is not None),
    Rule("pass", "evaluator", Custom(name_evaluator), None, lambda node: node.mapping is not None),
    Rule("pass", "*", Custom(_parameters)),
    *(Rule(f"pass:{name}", *row) for name in TRAINING_PASSES for row in _FAMILY),
    *_TRAINING,
)  # fmt: skip
