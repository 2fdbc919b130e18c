"""Dialect rules for `data_configs`."""

from __future__ import annotations

from coldpress.config.rewriting import Custom, Drop, Refuse, Rename, Rewriting, Rule, Version
from coldpress.config.rules_model import RESOURCE_KEYS, forget, resource
from coldpress.config.tree import Node, from_plain, join_path, plain, problem_at
from coldpress.registry import nearest

__all__ = ["RULES", "hoist_data_config"]

V06: Version = (0, 6)

_CONTAINERS = (
    "DataContainer", "DummyDataContainer", "TransformersDummyDataContainer", "TransformersPromptDummyDataContainer",
    "TransformersTokenDummyDataContainer", "RawDataContainer", "ImageDataContainer",
)  # fmt: skip
_TASKS = ("text-generation", "text-generation-with-past")


def _data_types(rw: Rewriting, rule: Rule, parent: Node, at: str) -> None:
    """Only text through the datasets library is read; other containers are refused by name."""
    kept: list[Node] = []
    for item in parent.elements:
        node = item.get("type")
        if node is None or not isinstance(node.value, str) or node.value.lower() == "huggingfacecontainer":
            if node is not None and isinstance(node.value, str):
                node.value = "HuggingfaceContainer"
            kept.append(item)
            continue
        by_name = {name.lower(): name for name in _CONTAINERS}
        name = by_name.get(node.value.lower())
        if name is not None:
            message = f"{name} is an Olive data container that Coldpress does not have yet"
            hint = "nearest: HuggingfaceContainer, which reads local json, csv, parquet and text files too"
        else:
            close = nearest(node.value, ("HuggingfaceContainer", *_CONTAINERS))
            message = f"there is no data container called {node.value!r}"
            hint = f"did you mean {close or 'HuggingfaceContainer'}?"
        rw.problems.append(problem_at(node, message, hint=hint))
        rw.lost.add(f"data:{item.text('name')}")
    parent.value = list(kept)


def _below(parent: Node, key: str, place: Node) -> Node:
    node = parent.members.get(key)
    if node is None or node.mapping is None:
        node = from_plain({}, join_path(parent.path, key), place)
        parent.members[key] = node
    return node


_PARAMS = {
    "data_name": "load_dataset_config.data_name",
    "subset": "load_dataset_config.subset",
    "split": "load_dataset_config.split",
    "data_files": "load_dataset_config.data_files",
    "data_dir": "load_dataset_config.data_dir",
    "input_cols": "pre_process_data_config.input_cols",
    "label_cols": "pre_process_data_config.label_cols",
    "max_samples": "pre_process_data_config.max_samples",
    "batch_size": "dataloader_config.batch_size",
}
_COMPONENTS = {
    "load_dataset": "load_dataset_config",
    "pre_process_data": "pre_process_data_config",
    "post_process_data": "post_process_data_config",
    "dataloader": "dataloader_config",
}


def _params_config(rw: Rewriting, rule: Rule, parent: Node, at: str) -> None:
    """Olive 0.6.0's one block for all four components."""
    node = parent.members["params_config"]
    if node.mapping is None:
        rw.refuse(parent, "params_config", "must be a mapping")
        return
    del parent.members["params_config"]
    kwargs = node.mapping.pop("component_kwargs", None)
    for key in list(node.mapping):
        to = _PARAMS.get(key)
        child = node.mapping[key]
        if to is None and key not in ("model_name", "task", "trust_remote_code"):
            close = nearest(key, (*_PARAMS, "component_kwargs"))
            rw.refuse(node, key, "unknown key", f"did you mean {close}?" if close else f"known: {', '.join(_PARAMS)}")
            continue
        block, last = to.split(".") if to else ("pre_process_data_config", key)
        if rw.move(node, key, _below(parent, block, node), last):
            rw.told(rule.name, child, f"{join_path(at, block)}.{last}")
    if kwargs is not None:
        parent.members["component_kwargs"] = kwargs
        _component_kwargs(rw, rule, parent, at)


def _component_kwargs(rw: Rewriting, rule: Rule, parent: Node, at: str) -> None:
    """`{pre_process_data: {...}}`, and `components`' `{load_dataset: {name, type, params}}`."""
    key = "components" if rule.key == "components" else "component_kwargs"
    node = parent.members[key]
    if node.value is None:
        del parent.members[key]
        return
    if node.mapping is None:
        rw.refuse(parent, key, "must be a mapping")
        return
    del parent.members[key]
    for name in list(node.mapping):
        to = _COMPONENTS.get(name)
        if to is None:
            close = nearest(name, _COMPONENTS)
            rw.refuse(
                node, name, "unknown key", f"did you mean {close}?" if close else f"known: {', '.join(_COMPONENTS)}"
            )
            continue
        block = node.mapping[name]
        if block.mapping is None:
            rw.refuse(node, name, "must be a mapping")
            continue
        rw.unfold(block, "params")
        if key == "components":
            block.mapping.pop("name", None)
        target = _below(parent, to, block)
        for item in list(block.mapping):
            child = block.mapping[item]
            if rw.move(block, item, target, item):
                rw.told(f"data_config.{key}", child, f"{join_path(at, to)}.{item}")


def _component_type(rw: Rewriting, rule: Rule, parent: Node, at: str) -> None:
    node = parent.members["type"]
    plain_names = (
        "huggingface_dataset", "text_generation_huggingface_pre_process", "huggingface_pre_process",
        "text_generation", "skip_post_process",
    )  # fmt: skip
    if node.value is None or node.value in plain_names:
        rw.drop(parent, "type", "there is one way to do it", rule=rule.name)
    else:
        hint = "use text_template, text_cols or chat_template"
        if rule.level == "load_dataset":
            hint = "remove it: data_name, or data_files, says what is loaded"
        rw.refuse(parent, "type", f"there is no component called {node.value!r}", hint)


def _dataset_type(rw: Rewriting, rule: Rule, parent: Node, at: str) -> None:
    node = parent.members["dataset_type"]
    if node.value == "corpus":
        rw.drop(parent, "dataset_type", "every data set is a corpus", rule=rule.name)
    elif node.value == "pair":
        hint = (
            "nearest: a text_template with prompt and answer, label_col for the answer and completion_only_loss: true"
        )
        rw.refuse(parent, "dataset_type", "data sets of pairs are gone since Olive 0.7", hint)
    else:
        rw.refuse(parent, "dataset_type", f"must be corpus, got {node.value!r}")


def _text_cols(rw: Rewriting, rule: Rule, parent: Node, at: str) -> None:
    node = parent.members[rule.key]
    if isinstance(node.value, str):
        node.value = [from_plain(node.value, node.path, node, "file")]
    if rule.key != "text_cols" and rw.move(parent, rule.key, parent, "text_cols"):
        rw.told(rule.name, node, join_path(at, "text_cols"))


def _label_cols(rw: Rewriting, rule: Rule, parent: Node, at: str) -> None:
    node = parent.members["label_cols"]
    names = plain(node)
    if isinstance(names, list) and len(names) == 1 and node.items is not None:
        node.value = node.items[0].value
    if isinstance(node.value, str):
        if rw.move(parent, "label_cols", parent, "label_col"):
            rw.told(rule.name, node, join_path(at, "label_col"))
    else:
        rw.refuse(parent, "label_cols", "must name one column")


def _nothing(rw: Rewriting, rule: Rule, parent: Node, at: str) -> None:
    """A null where Olive means: not given."""
    if rule.key == "joiner":
        parent.members["joiner"].value = ""
    else:
        parent.members["chat_template"].value = False


def _data_files(rw: Rewriting, rule: Rule, parent: Node, at: str) -> None:
    node = parent.members["data_files"]
    given = node.get("type")
    if given is None:
        return
    kinds = [kind for kind in RESOURCE_KEYS if kind != "azureml_client"]
    kind = str(given.value).lower()
    if kind in kinds:
        resource(rw, node, kind)
        return
    close = nearest(kind, kinds)
    hint = f"did you mean {close}?" if close else f"one of: {', '.join(kinds)}"
    rw.refuse(node, "type", f"there is no resource of type {given.value!r}", hint)
    rw.refuse_silently(parent, "data_files")


def _dataloader(rw: Rewriting, rule: Rule, parent: Node, at: str) -> None:
    """Batches belong to the pass or the metric."""
    node = parent.members["dataloader_config"]
    if node.mapping is not None:
        rw.unfold(node, "params")
    keys = sorted((node.mapping or {}).keys() - {"type"})
    if keys in ([], ["batch_size"]):
        why = "the batch size stands in training_args of the pass, or in the metric"
        rw.drop(parent, "dataloader_config", why, rule=rule.name, warn=bool(keys))
    else:
        rw.refuse(parent, "dataloader_config", f"no effect here: {', '.join(keys)}", "remove it")


def _post_process(rw: Rewriting, rule: Rule, parent: Node, at: str) -> None:
    node = parent.members["post_process_data_config"]
    if not node.value or plain(node) == {"type": "text_generation_post_process"}:
        rw.drop(parent, "post_process_data_config", "answers are scored by their likelihood", rule=rule.name)
    else:
        rw.refuse(parent, "post_process_data_config", "answers are scored by their likelihood", "remove it")


def hoist_data_config(rw: Rewriting, rule: Rule, parent: Node, at: str) -> None:
    """A data config written where it is used gets a name and moves to `data_configs`."""
    node = parent.members[rule.key]
    data = rw.root.members.setdefault("data_configs", from_plain([], "data_configs", node))
    if data.items is None:
        return
    name = node.text("name")
    taken = {item.text("name") for item in data.items}
    if name is None:
        base = f"{at.split('.')[1]}_{rule.key.removesuffix('_config')}" if "." in at else rule.key
        name = "".join(letter if letter.isalnum() else "_" for letter in base)
    wanted, count = name, 2
    while name in taken:
        name, count = f"{wanted}_{count}", count + 1
    given = node.members.pop("name", None)
    node.value = {"name": from_plain(name, node.path, given or node), **node.members}
    parent.members[rule.key] = from_plain(name, node.path, node)
    for block in ("load_dataset_config", "pre_process_data_config"):
        below = node.get(block)
        if below is not None:
            rw.unfold(below, "params")
    data.items.append(node)
    rw.told(f"inline.{rule.key}", node, f"data_configs.{len(data.items) - 1}, named {name}")


_OPTIONAL = (
    "strategy", "corpus_strategy", "max_seq_len", "pad_to_max_len", "padding_side", "message_col",
    "format", "assistant_turns",
)  # fmt: skip
"""Keys whose null means: not given, as in Olive."""

_FUNCTION = Refuse("Python given by a config is not run", "use text_template, text_cols or chat_template")
_SCRIPT = Drop("Python given by a config is not run; a component that needs it is an error of its own", warn=True)
_PAIR = Refuse("data sets of pairs are gone since Olive 0.7", "use text_template, label_col and completion_only_loss")
_TOKEN = Drop("the token comes from the environment, HF_TOKEN")
_OWN = "the tokenizer and the task are the model's own"


def _null(node: Node) -> bool:
    return node.value is None


RULES: tuple[Rule, ...] = (
    Rule("data_configs", "*", Custom(_data_types)),
    Rule("data_config", "params_config", Custom(_params_config), V06),
    Rule("data_config", "component_kwargs", Custom(_component_kwargs), V06),
    Rule("data_config", "components", Custom(_component_kwargs), V06),
    Rule("data_config", "dataloader_config", Custom(_dataloader)),
    Rule("data_config", "post_process_data_config", Custom(_post_process)),
    Rule("data_config", "user_script", Drop("null"), None, _null),
    Rule("data_config", "user_script", _SCRIPT),
    Rule("data_config", "script_dir", Drop("null"), None, _null),
    Rule("data_config", "script_dir", _SCRIPT),
    *(Rule("data_config", key, Custom(forget), None, _null) for key in ("type", "pre_process_data_config")),
    *(Rule("pre_process", key, Custom(forget), None, _null) for key in _OPTIONAL),
    Rule("load_dataset", "type", Custom(_component_type)),
    Rule("load_dataset", "data_files", Custom(_data_files)),
    Rule("load_dataset", "token", _TOKEN, None, lambda n: n.value in (None, True, False)),
    Rule("load_dataset", "use_auth_token", _TOKEN, None, lambda n: n.value in (None, True, False)),
    Rule("load_dataset", "user_script", _SCRIPT),
    Rule("load_dataset", "script_dir", _SCRIPT),
    Rule("load_dataset", "col_filters", Drop("empty"), None, lambda n: not n.value),
    Rule("load_dataset", "col_filters", Refuse("rows are not chosen by their values", "keep those rows in the file")),
    Rule("load_dataset", "name", Rename("subset"), dialect="datasets"),
    Rule("load_dataset", "trust_remote_code", Drop("null"), None, _null),
    Rule("pre_process", "type", Custom(_component_type)),
    Rule("pre_process", "dataset_type", Custom(_dataset_type), V06),
    Rule("pre_process", "corpus_strategy", Rename("strategy"), V06),
    Rule("pre_process", "source_max_len", Rename("max_seq_len"), V06),
    Rule("pre_process", "target_max_len", _PAIR, V06),
    Rule("pre_process", "pair_format", _PAIR, V06),
    Rule("pre_process", "ignore_source_in_labels", _PAIR, V06),
    Rule("pre_process", "use_eos_token_as_pad_token", Drop("padding carries no loss, whichever token it is"), V06),
    Rule("pre_process", "text_formatting_func", _FUNCTION, None, lambda n: n.value is not None),
    Rule("pre_process", "text_formatting_func", Drop("null"), None, _null),
    Rule("pre_process", "user_script", _SCRIPT, None, lambda n: n.value is not None),
    Rule("pre_process", "user_script", Drop("null"), None, _null),
    Rule("pre_process", "script_dir", _SCRIPT, None, lambda n: n.value is not None),
    Rule("pre_process", "script_dir", Drop("null"), None, _null),
    Rule("pre_process", "text_cols", Custom(_text_cols), None, lambda n: isinstance(n.value, str)),
    Rule("pre_process", "input_cols", Custom(_text_cols)),
    Rule("pre_process", "label_cols", Custom(_label_cols)),
    Rule("pre_process", "model_name", Drop(_OWN, warn=True)),
    Rule("pre_process", "trust_remote_code", Drop("input_model.load_kwargs says it")),
    Rule("pre_process", "task", Drop(_OWN), None, lambda n: n.value is None or n.value in _TASKS),
    Rule("pre_process", "task", Refuse("the one task we have is text-generation")),
    Rule("pre_process", "joiner", Custom(_nothing), None, _null),
    Rule("pre_process", "chat_template", Custom(_nothing), None, _null),
)  # fmt: skip
