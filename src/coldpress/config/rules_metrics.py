"""Dialect rules for `evaluators`: Olive's metrics of every year, and what of them has no effect here."""

from __future__ import annotations

from coldpress.config.metrics import METRIC_TYPES
from coldpress.config.rewriting import Custom, Drop, Refuse, Rewriting, Rule
from coldpress.config.rules_data import hoist_data_config
from coldpress.config.rules_model import forget
from coldpress.config.tree import Node, from_plain, join_path, plain, problem_at
from coldpress.registry import nearest

__all__ = ["RULES"]

_EVALUATORS = ("OnnxEvaluator", "PyTorchEvaluator")
_LACKING = {
    "openvinoevaluator": "OpenVINO models are not measured yet",
    "qnnevaluator": "QNN models are not measured",
    "mtebevaluator": "MTEB tasks are not run; nearest: a metric of type divergence with cosine_similarity",
    "custom": "an evaluator that a script registers is not run; use a metric of type custom",
}
_LOWERED = ("priority", "goal", "metric_config", "higher_is_better")
"""Keys of a sub type that Olive 0.2 had in the metric."""
_KEPT = (
    "user_script", "script_dir", "evaluate_func", "evaluate_func_kwargs", "metric_func", "metric_func_kwargs",
)  # fmt: skip
"""Keys of user_config that a custom metric has."""
_OF_SESSIONS = {
    "io_bind": "inputs and caches stay where they are in any case",
    "shared_kv_buffer": "the runner decides how the cache lies",
}
_OF_GRAPHS = ("input_names", "input_shapes", "input_types", "output_names")
_SPEECH = ("wer", "rtfx", "relaxed_accuracy", "word_sort_ratio")
"""Sub types of Olive's for speech and pictures."""
_CLASSES = "the data says how many classes there are"
_NO_EFFECT = ("top_k", "threshold", "multidim_average", "ignore_index", "validate_args")


def _evaluator_type(rw: Rewriting, rule: Rule, parent: Node, at: str) -> None:
    node = parent.members["type"]
    given = str(node.value)
    lowered = given.lower()
    if node.value is None or lowered in (name.lower() for name in _EVALUATORS):
        rw.drop(parent, "type", "the kind of model decides what runs it", rule=rule.name)
    elif lowered == "lmevaluator":
        node.value = "LMEvaluator"
    elif lowered in _LACKING:
        rw.refuse(parent, "type", f"{given}: {_LACKING[lowered]}", "remove the evaluator")
        parent.members.pop("tasks", None)
    else:
        close = nearest(given, ("LMEvaluator", *_EVALUATORS))
        rw.refuse(
            parent, "type", f"there is no evaluator called {given!r}", f"did you mean {close}?" if close else None
        )


def _tasks(rw: Rewriting, rule: Rule, parent: Node, at: str) -> None:
    """One task as a text is a list of one."""
    node = parent.members["tasks"]
    node.value = [from_plain(node.value, node.path, node, "file")]


def _metric_type(rw: Rewriting, rule: Rule, parent: Node, at: str) -> None:
    node = parent.members["type"]
    lowered = str(node.value).lower()
    if lowered in METRIC_TYPES:
        node.value = lowered
        return
    close = nearest(lowered, METRIC_TYPES)
    hint = f"did you mean {close}?" if close else f"one of: {', '.join(METRIC_TYPES)}"
    rw.refuse(parent, "type", f"there is no type of metric called {node.value!r}", hint)


def _one_sub_type(rw: Rewriting, rule: Rule, parent: Node, at: str) -> None:
    """Olive 0.1: `sub_type: avg`, with priority and goal beside it."""
    node = parent.members.pop("sub_type")
    if "sub_types" in parent.members:
        rw.problems.append(problem_at(node, "given beside sub_types", hint="keep one of them", at_key=True))
        return
    parent.members["sub_types"] = from_plain([{"name": node.value}], node.path, node, "file")
    rw.told(rule.name, node, join_path(at, "sub_types.0.name"))


def _lowered(rw: Rewriting, rule: Rule, parent: Node, at: str) -> None:
    """Olive 0.2: what belongs to a number stood in the metric."""
    node = parent.members[rule.key]
    subs = parent.get("sub_types")
    items = [item for item in (subs.items if subs is not None else None) or [] if item.mapping is not None]
    if len(items) != 1:
        rw.refuse(parent, rule.key, "belongs to a sub type", f"write it under each of sub_types that has a {rule.key}")
        return
    if rw.move(parent, rule.key, items[0], rule.key):
        rw.told(rule.name, node, join_path(at, f"sub_types.0.{rule.key}"))


def _backend(rw: Rewriting, rule: Rule, parent: Node, at: str) -> None:
    if (parent.text("type") or "").lower() != "accuracy" or parent.members["backend"].value is None:
        rw.drop(parent, "backend", "only accuracy has backends", rule=rule.name)


def _user_config(rw: Rewriting, rule: Rule, parent: Node, at: str) -> None:
    """A custom metric has its functions here; Olive 0.6 had data and batches here. Other keys are told their fate."""
    node = parent.members["user_config"]
    custom = (parent.text("type") or "").lower() == "custom"
    if node.mapping is None:
        if node.value is not None:
            rw.refuse(parent, "user_config", "must be a mapping")
        elif not custom:
            rw.drop(parent, "user_config", "null", rule=rule.name)
        return
    _func_kwargs(rw, node, at)
    for key in list(node.mapping):
        child = node.mapping[key]
        if custom and key in _KEPT:
            continue
        if key in ("batch_size", "data_config"):
            if rw.move(node, key, parent, key):
                rw.told(f"user_config.{key}", child, join_path(at, key))
        elif child.value in (None, False) or plain(child) in ({}, []):
            node.mapping.pop(key)
        elif key in _OF_SESSIONS:
            rw.drop(node, key, _OF_SESSIONS[key], rule=f"user_config.{key}", warn=True)
        elif key in _OF_GRAPHS:
            rw.drop(node, key, "the model's graph names its inputs", rule=f"user_config.{key}", warn=True)
        elif key in ("inference_settings", "run_kwargs"):
            hint = "set session_options in the model's genai_config.json"
            rw.refuse(node, key, "a metric runs the model as it is, with the settings that it has", hint)
        elif key in _KEPT:
            rw.refuse(node, key, "only a metric of type custom runs the user's functions", "use type: custom")
        else:
            hint = "name a data config in data_config; its label_col holds the answer"
            rw.refuse(node, key, "data and answers made by a Python script are gone since Olive 0.7", hint)
    if node.damaged:
        parent.damaged = True
    if not custom:
        del parent.members["user_config"]


def _func_kwargs(rw: Rewriting, node: Node, at: str) -> None:
    """Olive 0.6: `func_kwargs: {evaluate_func: {...}}`."""
    old = node.members.get("func_kwargs")
    if old is None or old.mapping is None:
        return
    for key in list(old.mapping):
        child = old.mapping[key]
        if f"{key}_kwargs" not in _KEPT:
            rw.refuse(old, key, f"no function called {key} is run", "evaluate_func and metric_func are")
        elif rw.move(old, key, node, f"{key}_kwargs"):
            rw.told("user_config.func_kwargs", child, join_path(at, f"user_config.{key}_kwargs"))
    node.damaged = node.damaged or old.damaged
    del node.members["func_kwargs"]


def _sub_type_name(rw: Rewriting, rule: Rule, parent: Node, at: str) -> None:
    name = parent.text("name")
    if name in _SPEECH:
        rw.refuse(parent, "name", f"{name} is of speech or pictures, which are not measured", "nearest: exact_match")


def _metric_config(rw: Rewriting, rule: Rule, parent: Node, at: str) -> None:
    """Arguments of torchmetrics for figures that are computed here."""
    node = parent.members["metric_config"]
    if not node.value:
        del parent.members["metric_config"]
        return
    if node.mapping is None or parent.text("name") not in ("accuracy_score", "precision", "recall", "f1_score"):
        return
    for key in list(node.mapping):
        child = node.mapping[key]
        if key == "task" and child.value == "binary" and "positive" not in node.mapping:
            why = "two classes are averaged (macro); for the figure of one write average: binary and positive"
            rw.drop(node, key, why, rule="metric_config.task", warn=True)
        elif key in ("task", "num_classes", "num_labels"):
            rw.drop(node, key, _CLASSES, rule=f"metric_config.{key}")
        elif key in _NO_EFFECT or (parent.text("name") == "accuracy_score" and key == "average"):
            rw.drop(
                node,
                key,
                "it changes nothing where every record has one answer",
                rule=f"metric_config.{key}",
                warn=True,
            )
    if not node.mapping:
        del parent.members["metric_config"]


_REGISTERED = Refuse("an evaluator that a script registers is not run", "use type: custom in a metric")
_MODEL_ARGS = Refuse("the model is loaded as the workflow says", "use load_kwargs of input_model")


def _null(node: Node) -> bool:
    return node.value is None


RULES: tuple[Rule, ...] = (
    Rule("evaluator", "type", Custom(_evaluator_type)),
    Rule("evaluator", "name", Drop("its key names it")),
    Rule("evaluator", "user_script", Drop("null"), None, _null),
    Rule(
        "evaluator",
        "user_script",
        _REGISTERED,
    ),
    Rule("evaluator", "script_dir", Drop("null"), None, _null),
    Rule(
        "evaluator",
        "script_dir",
        _REGISTERED,
    ),
    Rule("evaluator", "tasks", Custom(_tasks), None, lambda n: isinstance(n.value, str)),
    Rule("evaluator", "device", Drop("the target's accelerator says it")),
    Rule("evaluator", "execution_provider", Drop("the target's accelerator says it")),
    Rule("evaluator", "provider_options", Drop("empty"), None, lambda n: not n.value),
    Rule("evaluator", "provider_options", Drop("options of a provider are those of the model", warn=True)),
    Rule("evaluator", "model_args", Drop("null"), None, lambda n: not n.value),
    Rule("evaluator", "model_args", _MODEL_ARGS),
    Rule("evaluator", "sample_log_num", Drop("single answers are not logged", warn=True)),
    Rule("evaluator", "sample_log_dir", Drop("single answers are not logged", warn=True)),
    Rule("metric", "type", Custom(_metric_type)),
    Rule("metric", "sub_type", Custom(_one_sub_type), None, lambda n: isinstance(n.value, str)),
    *(Rule("metric", key, Custom(_lowered)) for key in _LOWERED),
    Rule("metric", "backend", Custom(_backend)),
    Rule("metric", "user_config", Custom(_user_config)),
    Rule("metric", "data_config", Custom(hoist_data_config), None, lambda n: n.mapping is not None),
    Rule("metric", "data_config", Custom(forget), None, _null),
    Rule("metric", "sample_log_num", Drop("single answers are not logged", warn=True)),
    Rule("metric", "sample_log_dir", Drop("single answers are not logged", warn=True)),
    Rule("sub_type", "name", Custom(_sub_type_name)),
    Rule("sub_type", "goal", Custom(forget), None, _null),
    Rule("sub_type", "higher_is_better", Custom(forget), None, _null),
    Rule("sub_type", "metric_config", Custom(_metric_config)),
)
