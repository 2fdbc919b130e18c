"""Dialect rules for `passes` and their training arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from coldpress.config.candidates import candidates_of
from coldpress.config.olive_passes import OLIVE_PASSES, RENAMED_PASSES
from coldpress.config.pass_tree import is_searched, pass_nodes
from coldpress.config.rewriting import Action, Custom, Drop, Rename, Rewriting, Rule, Version
from coldpress.config.rules_data import hoist_data_config
from coldpress.config.rules_workflow import name_evaluator, name_system
from coldpress.config.tree import Node, from_plain, join_path, plain, problem_at
from coldpress.registry import nearest

__all__ = ["DEFAULT", "RULES", "SEARCHABLE", "SIBLINGS", "TRAINING_PASSES", "builders_of_adapters"]

V07: Version = (0, 7)
DEFAULT, SEARCHABLE = "DEFAULT_VALUE", "SEARCHABLE_VALUES"
"""Olive's two magic words for a parameter."""
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
            "convert_attribute", "pack_inputs",
        )
    ),
}  # fmt: skip
"""Parameters of Olive's pass of the same name: one that ours has not is no typing error."""
_CONVERSIONS = (
    "onnxconversion", "optimumconversion", "orttransformersoptimization", "orttransformeroptimization",
    "onnxfloattofloat16",
)  # fmt: skip
"""What Olive makes an ONNX model with for which ModelBuilder then writes the metadata."""
_FILES = "large weights lie beside the graph, in one file"
_NO_MATTER: dict[str, str] = {
    "save_as_external_data": _FILES,
    "all_tensors_to_one_file": _FILES,
    "external_data_name": _FILES,
    "size_threshold": _FILES,
    "convert_attribute": _FILES,
    "pack_inputs": "each product's two matrices are inputs of their own",
}
"""Of these, those that change how a model is stored and not what it computes."""


def _one_builder(rw: Rewriting, rule: Rule, parent: Node, at: str) -> None:
    """Olive's conversion, its optimization and a builder of metadata are one builder here, in the first's place."""
    types = {name: (node.text("type") or "").lower() for name, node in parent.members.items()}
    names = [name.lower() for name, new in RENAMED_PASSES.items() if new == "ModelBuilder"]
    builders = [
        name
        for name, node in parent.members.items()
        if types[name] in ("modelbuilder", *names) and (flag := node.get("metadata_only")) and flag.value is True
    ]
    folded = [name for name, kind in types.items() if kind in _CONVERSIONS]
    if len(builders) != 1 or not folded:
        return
    (builder,) = builders
    del parent.members[builder].members["metadata_only"]
    first = next(name for name in parent.members if name in (builder, *folded))
    told = ", ".join(f"{at}.{name}" for name in folded)
    rw.told("passes.conversion", parent.members[folded[0]], f"{at}.{builder}, which builds the model: {told} dropped")
    kept: dict[str, Node] = {}
    for name, node in parent.members.items():
        if name == first:
            kept[builder] = parent.members[builder]
        if name != builder and name not in folded:
            kept[name] = node
    parent.value = kept


def _pass_types(rw: Rewriting, rule: Rule, parent: Node, at: str) -> None:
    """Each pass gets its registered name, or one error and no second look."""
    for name in list(parent.members):
        entry = parent.members[name]
        if entry.items and (len(entry.items) == 1 or not is_searched(rw.root)):
            entry = _only_one(rw, parent, name)
        if entry.items is None:
            if not _known_type(rw, entry, f"{at}.{name}"):
                del parent.members[name]
        elif entry.items:
            kept = [item for i, item in enumerate(entry.items) if _known_type(rw, item, f"{at}.{name}.{i}")]
            entry.value = list(kept)
            if not kept:
                del parent.members[name]


def _known_type(rw: Rewriting, entry: Node, at: str) -> bool:
    """Spell the type as it is registered; false where there is none of that name, which is told."""
    registered = {name.lower(): name for name in rw.passes}
    renamed = {old.lower(): new for old, new in RENAMED_PASSES.items()}
    foreign = {name.lower(): name for name in OLIVE_PASSES}
    node = entry.get("type")
    if entry.mapping is None or node is None or not isinstance(node.value, str):
        return True
    lowered = node.value.lower()
    if lowered in registered:
        node.value = registered[lowered]
        return True
    if lowered in renamed and renamed[lowered] in rw.passes:
        rw.told("pass.renamed", node, f"{at}.type = {renamed[lowered]}")
        node.value = renamed[lowered]
        return True
    if lowered in foreign:
        near = OLIVE_PASSES[foreign[lowered]]
        message = f"{foreign[lowered]} is an Olive pass that Coldpress does not have yet"
        hint = _instead(rw, entry, foreign[lowered], near)
    else:
        close = nearest(node.value, [*rw.passes, *RENAMED_PASSES, *OLIVE_PASSES])
        message = f"there is no pass of type {node.value!r}"
        hint = f"did you mean {close}?" if close else f"passes we have: {', '.join(rw.passes)}"
    rw.problems.append(problem_at(node, message, hint=hint))
    return False


def _instead(rw: Rewriting, entry: Node, name: str, near: str) -> str:
    """What to do about a pass that is not there: often the file's own builder does it."""
    bits = entry.get("bits")
    if near.endswith("int4") and bits is not None and bits.value == 8:
        near = near.replace("int4", "int8")
    builders = [node.path for _, node in pass_nodes(rw.root) if (node.text("type") or "").lower() == "modelbuilder"]
    if near.startswith("ModelBuilder") and builders:
        if name == "SelectiveMixedPrecision":
            near = "ModelBuilder with int4_algo_config k_quant_mixed keeps more bits where they matter"
        elif "precision" in near:
            near += " quantizes while it builds"
        return f"remove it: {near}, and {builders[0]} is one"
    if near:
        return f"nearest: {near}"
    return f"remove it, nothing here does the same; passes we have: {', '.join(rw.passes)}"


def _only_one(rw: Rewriting, parent: Node, name: str) -> Node:
    """A list of one pass is the pass; of alternatives, a workflow without a search takes the first, as Olive does."""
    entry = parent.members[name]
    items = entry.elements
    if len(items) == 1:
        rw.told("pass.list", entry, f"passes.{name}")
    else:
        message = f"{len(items)} alternatives, and search_strategy is off: the first is used"
        rw.warnings.append(problem_at(entry, message, hint="search_strategy: true compares them", at_key=True))
    parent.members[name] = items[0]
    return items[0]


def _extracted(rw: Rewriting, rule: Rule, parent: Node, at: str) -> None:
    """ExtractAdapters takes the adapter from the graph, so a builder before it must not merge it.

    Where a search decides whether there is one, `builders_of_adapters` is asked again at each point.
    """
    builders: list[tuple[str, Node]] = []
    for name, entry in parent.members.items():
        nodes = [(f"{at}.{name}", entry)]
        if entry.items is not None:
            nodes = [(f"{at}.{name}.{i}", item) for i, item in enumerate(entry.items)]
        if nodes and all(node.text("type") == "ExtractAdapters" for _, node in nodes):
            for where, builder in builders:
                rw.default("ModelBuilder.adapter", builder, "adapter", "inputs", where)
        builders = [one for one in nodes if one[1].text("type") == "ModelBuilder"] or builders


def builders_of_adapters(entries: Mapping[str, Node]) -> list[str]:
    """Steps whose builder must leave the adapter an input and does not say so."""
    found: list[str] = []
    builder: str | None = None
    for name, entry in entries.items():
        if entry.text("type") == "ModelBuilder":
            builder = name
        elif entry.text("type") == "ExtractAdapters" and builder is not None:
            found += [builder] if entries[builder].get("adapter") is None else []
    return found


def _disable_search(rw: Rewriting, rule: Rule, parent: Node, at: str) -> None:
    """Olive up to v0.7: none of the pass's own candidates is tried."""
    node = parent.members["disable_search"]
    if node.value not in (True, False, None):
        rw.refuse(parent, "disable_search", f"must be true or false, got {node.value!r}")
        return
    kind = parent.text("type") or ""
    if node.value is not True or not is_searched(rw.root) or kind not in rw.passes:
        why = "off" if not node.value else "there is no search"
        rw.drop(parent, "disable_search", why, rule=rule.name)
        return
    older = {action.to: old for old, action, *_ in _FAMILY if isinstance(action, Rename)}
    for key, candidates in candidates_of(rw.passes[kind]).items():
        if candidates.by_default and key not in parent.members and older.get(key) not in parent.members:
            parent.members[key] = parent.child(key, DEFAULT)
            rw.told(rule.name, node, f"{join_path(at, key)} = {DEFAULT}")
    rw.drop(parent, "disable_search", "only what is listed is searched", rule=rule.name)


def _parameters(rw: Rewriting, rule: Rule, parent: Node, at: str) -> None:
    """Olive's magic words and objects for a search, and parameters that belong to another pass of the family."""
    kind = parent.text("type") or ""
    known = set(rw.passes[kind].model_fields) if kind in rw.passes else set()
    declared = candidates_of(rw.passes[kind]) if kind in rw.passes else {}
    for key in list(parent.members):
        node = parent.members[key]
        _search_parameter(rw, parent, key, at)
        if key not in parent.members:
            continue
        if node.value == DEFAULT and key not in ("type", "host", "evaluator"):
            if not (is_searched(rw.root) and key in declared and declared[key].by_default):
                rw.drop(parent, key, "the default", rule="pass.DEFAULT_VALUE")
        elif key in SIBLINGS and key not in known and kind in TRAINING_PASSES:
            why = f"{key} belongs to {SIBLINGS[key]} and has no effect in {kind}; dropped"
            rw.drop(parent, key, why, rule="pass.sibling", warn=True)
        elif key in _OF_LORA and key not in known and kind in TRAINING_PASSES:
            rw.refuse(parent, key, f"{key} belongs to LoRA, DoRA, QLoRA and LoftQ; {kind} has nothing like it")
        elif kind in _LACKING and key in _LACKING[kind] and key not in known:
            if node.value in (None, False):
                rw.drop(parent, key, "off", rule=f"{kind}.{key}")
            elif key in _NO_MATTER:
                rw.drop(parent, key, _NO_MATTER[key], rule=f"{kind}.{key}", warn=True)
            else:
                rw.refuse(parent, key, f"{key} is a parameter of Olive's {kind} that Coldpress does not have")
        elif key.endswith("data_config"):
            _inline_data(rw, rule, parent, key, at)
        elif key == "training_args" and node.value is None:
            node.value = {}
        elif key == "training_args":
            rw.unfold(node, "extra_args")


def _inline_data(rw: Rewriting, rule: Rule, parent: Node, key: str, at: str) -> None:
    """A data config written where it is used, or in a list of several to try."""
    node, hoist = parent.members[key], Rule(rule.level, key, rule.action)
    if node.mapping is not None:
        hoist_data_config(rw, hoist, parent, at)
    for index, item in enumerate(node.items or []):
        if item.mapping is not None:
            holder = from_plain({}, parent.path, parent)
            holder.members[key] = item
            hoist_data_config(rw, hoist, holder, at)
            node.elements[index] = holder.members[key]


def _search_parameter(rw: Rewriting, parent: Node, key: str, at: str) -> None:
    """What Olive writes out for a parameter that is searched: a list of values, or values that depend on others."""
    node = parent.members[key]
    if node.text("olive_parameter_type") != "SearchParameter":
        return
    kind, support = (node.text("type") or "").lower(), node.get("support")
    if kind == "boolean" and support is None:
        support = from_plain([True, False], node.path, node, node.origin)
    if kind in ("categorical", "boolean") and support is not None and support.items is not None:
        node.value = support.value
        rw.told("pass.SearchParameter", node, f"{join_path(at, key)}, a list of values")
        return
    message = f"a search parameter of type {node.text('type')!r} is not read"
    rw.refuse(parent, key, message, "list the values to try; alternatives of the pass say what depends on what")


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
    if node.items is not None:
        hint = f"list the values of {key} instead: {value} and others"
        rw.refuse(parent, rule.key, f"a list of values; this switch became a value of {key}", hint)
    elif node.value is True:
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
    wrong = [item for item in node.items or [node] if not _is_share(item.value)]
    if wrong:
        rw.refuse(parent, "warmup_ratio", f"must be a number from 0 to below 1, got {plain(wrong[0])!r}")
    elif steps is not None and steps.value:
        why = "warmup_steps wins over warmup_ratio; dropped"
        rw.drop(parent, "warmup_ratio", why, rule=rule.name, warn=True)
    else:
        if steps is not None:
            del parent.members["warmup_steps"]
        if rw.move(parent, "warmup_ratio", parent, "warmup_steps"):
            rw.told(rule.name, node, join_path(at, "warmup_steps"), dialect=rule.dialect)


def _is_share(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1


def _old_optimizer(rw: Rewriting, rule: Rule, parent: Node, at: str) -> None:
    node = parent.members["optim"]
    rw.told(rule.name, node, f"{join_path(at, 'optim')} = adamw_torch", dialect=rule.dialect)
    for item in node.items or [node]:
        if item.value == _OLD_ADAMW:
            item.value = "adamw_torch"


def _is_old_optimizer(node: Node) -> bool:
    return any(item.value == _OLD_ADAMW for item in node.items or [node])


_OLD_ADAMW = "adamw_hf"


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
    _training("optim", Custom(_old_optimizer), _is_old_optimizer),
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
    Rule("passes", "*", Custom(_one_builder)),
    Rule("passes", "*", Custom(_pass_types)),
    Rule("passes", "*", Custom(_extracted)),
    Rule("pass", "disable_search", Custom(_disable_search)),
    Rule("pass", "clean_run_cache", Drop("clean_cache forgets the whole workflow", warn=True), None, _true),
    Rule("pass", "clean_run_cache", Drop("off")),
    Rule("pass", "output_name", Drop("the step's result lies in the cache under its key", warn=True)),
    Rule("pass", "host", Custom(name_system), None, lambda node: node.mapping is not None),
    Rule("pass", "evaluator", Custom(name_evaluator), None, lambda node: node.mapping is not None),
    Rule("pass", "*", Custom(_parameters)),
    *(Rule(f"pass:{name}", *row) for name in TRAINING_PASSES for row in _FAMILY),
    *_TRAINING,
)  # fmt: skip
