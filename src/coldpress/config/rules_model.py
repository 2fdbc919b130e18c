"""Dialect rules for `input_model`: from `PyTorchModel` with `hf_config` to `HfModel`."""

from __future__ import annotations

import re

from coldpress.config.rewriting import Custom, Drop, Refuse, Rename, Rewriting, Rule, Version
from coldpress.config.tree import Node, from_plain, join_path, problem_at
from coldpress.registry import nearest

__all__ = ["RESOURCE_KEYS", "RULES", "forget", "resource"]

V06: Version = (0, 6)

_CLIENT = (
    "subscription_id", "resource_group", "workspace_name", "aml_config_path", "read_timeout", "max_operation_retries",
    "operation_retry_interval", "default_auth_params", "keyvault_name",
)  # fmt: skip
_RETRY = ("max_download_retries", "download_retry_interval")
RESOURCE_KEYS: dict[str, tuple[str, ...]] = {
    "azureml_registry_model": ("registry_name", "name", "version", "azureml_client", *_RETRY),
    "azureml_model": ("name", "version", "azureml_client", *_RETRY),
    "azureml_datastore": ("datastore_name", "relative_path", "azureml_client", *_RETRY),
    "azureml_job_output": ("job_name", "output_name", "relative_path", "azureml_client", *_RETRY),
    "azureml_client": _CLIENT,
}
"""What the coordinates of an Azure ML resource, and of a workspace, may be called."""

_REQUIRED: dict[str, tuple[str, ...]] = {
    "azureml_registry_model": ("registry_name", "name", "version"),
    "azureml_model": ("name", "version"),
    "azureml_datastore": ("datastore_name", "relative_path"),
    "azureml_job_output": ("job_name", "output_name", "relative_path"),
}

_OTHER_MODELS = (
    "ONNXModel", "CompositeModel", "DiffusersModel", "DistributedHfModel", "DistributedOnnxModel", "OpenVINOModel",
    "QNNModel", "QairtModel", "QairtPreparedModel", "TensorFlowModel", "SNPEModel", "DistributedPyTorchModel",
    "OptimumModel", "CompositePyTorchModel", "CompositeOnnxModel",
)  # fmt: skip
_REGISTRY_URL = re.compile(r"azureml://registries/([^/]+)/models/([^/]+)/versions/([^/]+)/?$")
_FORMATS = ("pytorch.mlflow", "pytorch.huggingface")


def forget(rw: Rewriting, rule: Rule, parent: Node, at: str) -> None:
    """A null means: not given."""
    del parent.members[rule.key]


def _type(rw: Rewriting, rule: Rule, parent: Node, at: str) -> None:
    node = parent.members["type"]
    kind = str(node.value).lower()
    if kind == "hfmodel":
        node.value = "HfModel"
    elif kind == "pytorchmodel" and parent.get("hf_config") is not None:
        rw.told(rule.name, node, f"{join_path(at, 'type')} = HfModel")
        node.value = "HfModel"
    elif kind == "pytorchmodel" and (typo := _misspelt_block(parent)) is not None:
        block, name = typo
        rw.problems.append(problem_at(block, "unknown key", hint=f"did you mean {name}?", at_key=True))
        _forget_model(rw)
    elif kind == "pytorchmodel":
        message = "PyTorchModel without hf_config is a model made by a Python script, which is not read"
        _unreadable(rw, node, message, "use HfModel with model_path, a Hugging Face checkpoint")
    elif kind in {name.lower() for name in _OTHER_MODELS}:
        name = next(name for name in _OTHER_MODELS if name.lower() == kind)
        message = f"{name} is an Olive input that Coldpress does not read yet"
        _unreadable(rw, node, message, "nearest: HfModel, the checkpoint it was made from")
    else:
        close = nearest(str(node.value), ("HfModel", "PyTorchModel"))
        _unreadable(rw, node, f"there is no model of type {node.value!r}", f"did you mean {close or 'HfModel'}?")


def _unreadable(rw: Rewriting, node: Node, message: str, hint: str) -> None:
    """One error for the whole model; its keys belong to a type we do not read."""
    rw.problems.append(problem_at(node, message, hint=hint))
    _forget_model(rw)


def _forget_model(rw: Rewriting) -> None:
    rw.root.members.pop("input_model").value = {}
    rw.root.damaged = True


def _misspelt_block(parent: Node) -> tuple[Node, str] | None:
    """A mapping whose key looks like `config` or `hf_config`."""
    for key, node in parent.members.items():
        close = nearest(key, ("config", "hf_config"))
        if node.mapping is not None and close is not None:
            return node, close
    return None


def _hf_config(rw: Rewriting, rule: Rule, parent: Node, at: str) -> None:
    """The block is opened; its rows are rules of the level `hf_config`."""
    node = parent.members["hf_config"]
    if node.mapping is None:
        rw.refuse(parent, "hf_config", "must be a mapping")
        return
    if parent.text("type") is None and parent.get("type") is None:
        parent.members["type"] = parent.child("type", "HfModel")
    for row in RULES:
        if row.level == "hf_config" and row.fires(node):
            rw.apply(row, node, at)
    name = node.get("model_name")
    if name is not None and parent.get("model_path") is not None:
        path = parent.members["model_path"]
        if name.origin == "file" and path.origin == "override":
            node.mapping.pop("model_name")
        else:
            rw.drop(
                node,
                "model_name",
                f"{join_path(at, 'model_path')} says where the checkpoint lies",
                rule="hf_config.model_name",
            )
    moved = {"model_name": "model_path", "task": "task", "load_kwargs": "load_kwargs", "adapter_path": "adapter_path"}
    del parent.members["hf_config"]
    for key in list(node.mapping):
        to = moved.get(key)
        child = node.mapping[key]
        if to is None:
            close = nearest(key, ("model_name", "task", "from_pretrained_args", "model_loading_args"))
            hint = f"did you mean {close}?" if close else "known: model_name, task, from_pretrained_args"
            rw.refuse(node, key, "unknown key", hint)
            parent.damaged = True
        elif rw.move(node, key, parent, to) and key != "load_kwargs":
            rw.told(f"hf_config.{key}", child, join_path(at, to))


def _load_kwargs(rw: Rewriting, rule: Rule, parent: Node, at: str) -> None:
    """`from_pretrained_args`, still older `model_loading_args`."""
    node = parent.members[rule.key]
    if node.value is None:
        del parent.members[rule.key]
        return
    if node.mapping is None:
        rw.refuse(parent, rule.key, "must be a mapping")
        return
    rw.unfold(node, "extra_args")
    for key, item in node.mapping.items():
        rw.told(rule.name, item, f"{join_path(at, 'load_kwargs')}.{key}")
    rw.move(parent, rule.key, parent, "load_kwargs")


def _model_class(rw: Rewriting, rule: Rule, parent: Node, at: str) -> None:
    node = parent.members["model_class"]
    if isinstance(node.value, str) and node.value.endswith(("ForCausalLM", "AutoModelForCausalLM")):
        rw.drop(parent, "model_class", "config.json of the checkpoint names it", rule=rule.name)
    else:
        rw.refuse(parent, "model_class", f"only causal language models are read, got {node.value!r}")


def _model_path(rw: Rewriting, rule: Rule, parent: Node, at: str) -> None:
    """Olive's resource paths: a local one is its path, an Azure ML one keeps its coordinates under `config`."""
    node = parent.members[rule.key]
    if isinstance(node.value, str):
        match = _REGISTRY_URL.match(node.value)
        if match:
            registry, name, version = match.groups()
            config = {"registry_name": registry, "name": name, "version": version}
            rw.told(rule.name, node, f"{join_path(at, rule.key)} of type azureml_registry_model")
            parent.members[rule.key] = from_plain(
                {"type": "azureml_registry_model", "config": config}, node.path, node, "file"
            )
        elif node.value.startswith("azureml://"):
            rw.refuse(parent, rule.key, "this Azure ML address is not read", "use a mapping of type azureml_datastore")
        return
    if node.mapping is None:
        return
    kind = node.text("type")
    lowered = (kind or "").lower()
    if lowered in ("file", "folder", "string_name", "local_file", "local_folder"):
        rw.unfold(node, "config")
        path = node.get("path") or node.get("name")
        if path is None:
            rw.refuse(parent, rule.key, "a path is missing", "write the path itself")
            return
        rw.told(rule.name, node, join_path(at, rule.key))
        parent.members[rule.key] = path
    elif lowered in RESOURCE_KEYS and lowered != "azureml_client":
        resource(rw, node, lowered)


def resource(rw: Rewriting, node: Node, kind: str) -> None:
    """Gather flat coordinates under `config` and check their names."""
    node.members["type"].value = kind
    flat = [key for key in node.members if key not in ("type", "config")]
    config = node.members.setdefault("config", from_plain({}, node.path, node))
    if config.mapping is None:
        return
    for key in flat:
        rw.move(node, key, config, key)
    _known_keys(rw, config, RESOURCE_KEYS[kind], kind)
    for key in _REQUIRED[kind]:
        if key not in config.mapping and not config.damaged:
            where = problem_at(config, f"the key {key} is missing", path=join_path(config.path, key), at_key=True)
            rw.problems.append(where)
    client = config.get("azureml_client")
    if client is not None and client.mapping is not None:
        _known_keys(rw, client, _CLIENT, "azureml_client")
    version = config.get("version")
    if version is not None and type(version.value) is int:
        version.value = str(version.value)


def _known_keys(rw: Rewriting, node: Node, known: tuple[str, ...], what: str) -> None:
    for key in list(node.mapping or {}):
        if key not in known:
            close = nearest(key, known)
            hint = f"did you mean {close}?" if close else f"{what} has: {', '.join(known)}"
            rw.refuse(node, key, "unknown key", hint)


def _file_format(rw: Rewriting, rule: Rule, parent: Node, at: str) -> None:
    node = parent.members["model_file_format"]
    if node.value is None or str(node.value).lower() in _FORMATS:
        rw.drop(parent, "model_file_format", "the model's folder shows its format", rule=rule.name)
    else:
        hint = "save the model with save_pretrained and give its folder"
        rw.refuse(parent, "model_file_format", f"models stored as {node.value} are not read", hint)


def _dtype(rw: Rewriting, rule: Rule, parent: Node, at: str) -> None:
    node = parent.members[rule.key]
    if isinstance(node.value, str):
        short = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "half": "float16", "float": "float32"}
        name = node.value.removeprefix("torch.")
        node.value = short.get(name, name)
    if rule.key == "dtype" and rw.move(parent, "dtype", parent, "torch_dtype"):
        rw.told(rule.name, node, join_path(at, "torch_dtype"), dialect=rule.dialect)
    elif node.value is None and parent.mapping is not None:
        parent.members.pop(rule.key, None)


_TASKS = ("text-generation", "text-classification")
_TASK_NAMES = {
    "text-generation-with-past": "text-generation",
    "sequence-classification": "text-classification",
}
"""Other names of a task."""


def _task(rw: Rewriting, rule: Rule, parent: Node, at: str) -> None:
    """Two tasks are trained; `-with-past` variants name the same model."""
    node = parent.members["task"]
    if node.value is None:
        del parent.members["task"]
    elif isinstance(node.value, str) and node.value in _TASK_NAMES:
        rw.told(rule.name, node, f"{join_path(at, 'task')} = {_TASK_NAMES[node.value]}")
        node.value = _TASK_NAMES[node.value]
    elif isinstance(node.value, str) and node.value not in _TASKS:
        close = nearest(node.value, (*_TASKS, *_TASK_NAMES))
        hint = f"did you mean {_TASK_NAMES.get(close, close)}?" if close else f"the tasks we have: {', '.join(_TASKS)}"
        rw.refuse(parent, "task", f"there is no task called {node.value!r}", hint)


_LOADER = Refuse("Python given by a config is not run", "use HfModel with model_path, a Hugging Face checkpoint")


def _script(rw: Rewriting, rule: Rule, parent: Node, at: str) -> None:
    """A script that gives inputs of the graph, say, is not missed; one that makes the model is."""
    node = parent.members[rule.key]
    if node.value is None:
        rw.drop(parent, rule.key, "null", rule=rule.name)
    elif parent.get("model_path") is not None and parent.get("model_loader") is None:
        why = f"{join_path(at, 'model_path')} gives the model, and Python given by a config is not run"
        rw.drop(parent, rule.key, why, rule=rule.name, warn=True)
    else:
        rw.refuse(parent, rule.key, _LOADER.why, _LOADER.hint)


_MEMORY = Drop("Coldpress places the weights itself", warn=True)
_IO = Drop("the ONNX builder knows the inputs and outputs from the architecture", warn=True)


def _hub_secret(node: Node) -> bool:
    return not isinstance(node.value, str)


RULES: tuple[Rule, ...] = (
    Rule("model", "type", Custom(_type)),
    Rule("model", "load_kwargs", Custom(forget), None, lambda node: node.value is None),
    Rule("model", "adapter_path", Custom(forget), None, lambda node: node.value is None),
    Rule("model", "model_path", Custom(_model_path)),
    Rule("model", "adapter_path", Custom(_model_path)),
    Rule("model", "hf_config", Custom(_hf_config), V06),
    Rule("model", "model_file_format", Custom(_file_format)),
    Rule("model", "from_pretrained_args", Custom(_load_kwargs)),
    Rule("model", "model_loading_args", Custom(_load_kwargs)),
    Rule("model", "name", Drop("the workflow names itself"), V06),
    Rule("model", "is_file", Drop("the path shows it"), V06),
    Rule("model", "is_aml_model", Refuse("a model in Azure ML is a mapping", "use type azureml_model"), V06),
    Rule("model", "task", Custom(_task)),
    Rule("model", "model_script", Custom(_script)),
    Rule("model", "script_dir", Custom(_script)),
    Rule("model", "model_loader", Drop("null"), None, lambda node: node.value is None),
    Rule("model", "model_loader", _LOADER),
    Rule("model", "io_config", _IO),
    Rule("model", "dummy_inputs_func", _IO),
    Rule("model", "generative", Drop("every model read here generates")),
    Rule("model", "model_attributes", Drop("the checkpoint's config.json is read instead", warn=True)),
    Rule("model", "test_model_path", Refuse("random test models are not made", "give a small checkpoint")),
    Rule("model", "test_model_config", Refuse("random test models are not made", "give a small checkpoint")),
    Rule("hf_config", "from_pretrained_args", Custom(_load_kwargs), V06),
    Rule("hf_config", "model_loading_args", Custom(_load_kwargs), V06),
    Rule("hf_config", "feature", Drop("the task says it"), V06),
    Rule("hf_config", "model_class", Custom(_model_class), V06),
    Rule("hf_config", "components", Refuse("models in components are not read"), V06, lambda n: bool(n.value)),
    Rule("hf_config", "components", Drop("empty"), V06, lambda n: not n.value),
    Rule("hf_config", "config", Drop("config.json of the checkpoint is read", warn=True), V06),
    Rule("hf_config", "dataset", Refuse("data stands in data_configs", "move it there and name it in the pass"), V06),
    Rule("load_kwargs", "torch_dtype", Custom(_dtype)),
    Rule("load_kwargs", "dtype", Custom(_dtype), dialect="transformers-5"),
    Rule("load_kwargs", "_attn_implementation", Rename("attn_implementation"), dialect="transformers"),
    Rule("load_kwargs", "sliding_window", Drop("null"), None, lambda node: node.value is None),
    Rule("load_kwargs", "device_map", _MEMORY),
    Rule("load_kwargs", "max_memory", _MEMORY),
    Rule("load_kwargs", "low_cpu_mem_usage", _MEMORY),
    Rule("load_kwargs", "offload_folder", _MEMORY),
    Rule("load_kwargs", "cache_dir", Drop("the environment says where the hub's files are kept, HF_HOME", warn=True)),
    Rule("load_kwargs", "local_files_only", Drop("the environment says it, HF_HUB_OFFLINE=1", warn=True)),
    Rule("load_kwargs", "subfolder", Refuse("the checkpoint must be a folder of its own", "give its path")),
    Rule("load_kwargs", "variant", Refuse("variants of a checkpoint are not read", "give a plain folder")),
    Rule("load_kwargs", "use_safetensors", Drop("only safetensors are read")),
    Rule("load_kwargs", "extra_args", Drop("empty"), None, lambda node: not node.value),
    Rule("load_kwargs", "use_cache", Drop("it has no effect on weights")),
    Rule("load_kwargs", "quantization_method", Drop("null"), None, lambda node: node.value is None),
    Rule("load_kwargs", "quantization_config", Drop("null"), None, lambda node: node.value is None),
    Rule(
        "load_kwargs", "quantization_method",
        Refuse("the checkpoint is not quantized while it is loaded", "use the pass QLoRA: quant_type, double_quant"),
    ),
    Rule(
        "load_kwargs", "quantization_config",
        Refuse("the checkpoint is not quantized while it is loaded", "use the pass QLoRA: quant_type, double_quant"),
    ),
    Rule("load_kwargs", "token", Drop("the token comes from the environment, HF_TOKEN"), None, _hub_secret),
    Rule("load_kwargs", "use_auth_token", Drop("the token comes from the environment, HF_TOKEN"), None, _hub_secret),
)  # fmt: skip
