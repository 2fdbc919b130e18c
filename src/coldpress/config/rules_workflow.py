"""Dialect rules for the top level (and Olive's `engine` block) and for systems."""

from __future__ import annotations

from collections.abc import Callable

from coldpress.config.rewriting import Action, Custom, Drop, Refuse, Rewriting, Rule, Version
from coldpress.config.tree import Node, from_plain, join_path, plain, problem_at
from coldpress.registry import nearest

__all__ = ["EXECUTION_PROVIDERS", "FINISH_RULES", "RULES", "name_evaluator", "name_system"]

V06: Version = (0, 6)
V07: Version = (0, 7)
V09: Version = (0, 9)

EXECUTION_PROVIDERS = (
    "CPUExecutionProvider", "CUDAExecutionProvider", "DmlExecutionProvider", "TensorrtExecutionProvider",
    "NvTensorRTRTXExecutionProvider", "ROCMExecutionProvider", "MIGraphXExecutionProvider", "OpenVINOExecutionProvider",
    "QNNExecutionProvider", "VitisAIExecutionProvider", "WebGpuExecutionProvider", "JsExecutionProvider",
    "CoreMLExecutionProvider", "XnnpackExecutionProvider",
)  # fmt: skip

_GPU_PROVIDER = "CUDAExecutionProvider"
_OF_GPUS = (
    "CUDAExecutionProvider", "DmlExecutionProvider", "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider",
    "ROCMExecutionProvider", "MIGraphXExecutionProvider", "WebGpuExecutionProvider", "JsExecutionProvider",
)  # fmt: skip
"""Providers that name the device where a config does not."""
_SYSTEMS = {"localsystem": "LocalSystem", "azureml": "AzureML"}
_OTHER_SYSTEMS = {
    "docker": "Docker", "pythonenvironment": "PythonEnvironment", "isolatedort": "IsolatedORT",
    "azurend12ssystem": "AzureND12SSystem", "azurend24rssystem": "AzureND24RSSystem",
    "azurend24ssystem": "AzureND24SSystem", "azurend40s_v2system": "AzureND40s_v2System",
    "surfaceprosystem1796": "SurfaceProSystem1796", "distributedsystem": "Distributed",
}  # fmt: skip


def _off(node: Node) -> bool:
    return node.value in (None, False) or node.value in ({}, [])


def _on(node: Node) -> bool:
    return not _off(node)


def _is_mapping(node: Node) -> bool:
    return bool(node.mapping)


def name_system(rw: Rewriting, rule: Rule, parent: Node, at: str) -> None:
    """`host: {...}`: the mapping becomes a named system, its name takes its place."""
    node = parent.members[rule.key]
    systems = rw.root.members.setdefault("systems", from_plain({}, "systems", node))
    if systems.mapping is None:
        return
    wanted = rule.key if rule.level == "workflow" else f"{at.removeprefix('passes.').replace('.', '_')}_{rule.key}"
    name = _free_name(wanted, systems.mapping)
    systems.mapping[name] = node
    rw.unfold(node, "config")
    parent.members[rule.key] = from_plain(name, node.path, node)
    rw.told(rule.name, node, f"systems.{name}")


def name_evaluator(rw: Rewriting, rule: Rule, parent: Node, at: str) -> None:
    node = parent.members[rule.key]
    evaluators = rw.root.members.setdefault("evaluators", from_plain({}, "evaluators", node))
    if evaluators.mapping is None:
        return
    name = _free_name("evaluator", evaluators.mapping)
    evaluators.mapping[name] = node
    rw.unfold(node, "type_args")
    parent.members[rule.key] = from_plain(name, node.path, node)
    rw.told(rule.name, node, f"evaluators.{name}")


def _free_name(wanted: str, taken: dict[str, Node]) -> str:
    name, count = wanted, 2
    while name in taken:
        name, count = f"{wanted}_{count}", count + 1
    return name


def _cache_config(rw: Rewriting, rule: Rule, parent: Node, at: str) -> None:
    """Olive ignores the flat cache keys where this block stands, so the block wins."""
    node = parent.members["cache_config"]
    del parent.members["cache_config"]
    for key in list(node.members):
        if key in ("cache_dir", "clean_cache", "clean_evaluation_cache", "enable_shared_cache"):
            moved = node.members.pop(key)
            parent.members[key] = moved
            rw.told(rule.name, moved, key)
        elif key in ("account_name", "container_name", "update_shared_cache"):
            rw.refuse(node, key, "a shared cache is not built; the cache is a local folder")
        else:
            known = ("cache_dir", "clean_cache", "clean_evaluation_cache", "enable_shared_cache")
            close = nearest(key, known)
            rw.refuse(node, key, "unknown key", f"did you mean {close}?" if close else f"known: {', '.join(known)}")


def _cache_dir_list(rw: Rewriting, rule: Rule, parent: Node, at: str) -> None:
    node = parent.members["cache_dir"]
    if len(node.elements) == 1 and isinstance(node.elements[0].value, str):
        rw.told(rule.name, node, "cache_dir")
        parent.members["cache_dir"] = node.elements[0]
    else:
        rw.refuse(parent, "cache_dir", "several cache folders: a shared cache is not built", "keep the local folder")


def _data_mapping(rw: Rewriting, rule: Rule, parent: Node, at: str) -> None:
    """`data_configs: {name: {...}}`: the names move into the elements of a list."""
    node = parent.members["data_configs"]
    elements: list[Node] = []
    for name, item in node.members.items():
        if item.mapping is not None:  # Olive finds it by its key, whatever name stands in it
            item.value = {**item.mapping, "name": from_plain(name, item.path, item)}
        elements.append(item)
    rw.told(rule.name, node, "data_configs, a list")
    node.value = list(elements)


def _pass_flows(rw: Rewriting, rule: Rule, parent: Node, at: str) -> None:
    """One flow says which passes run, in which order; several are a search."""
    node, passes = parent.members["pass_flows"], parent.get("passes")
    flows = plain(node)
    if not isinstance(flows, list) or not all(isinstance(flow, list) for flow in flows):
        rw.refuse(parent, "pass_flows", "must be a list of lists of pass names")
        return
    if len(flows) > 1:
        hint = "write what differs between them as alternatives, a list of passes under one name, or keep one flow"
        rw.refuse(parent, "pass_flows", f"{len(flows)} flows: a search goes over alternatives, not over flows", hint)
        return
    if passes is not None and passes.mapping is not None and flows:
        absent = [name for name in flows[0] if not isinstance(name, str) or name not in passes.mapping]
        if absent:
            names = ", ".join(map(str, absent))
            rw.refuse(parent, "pass_flows", f"there is no pass called {names}", _known(passes.mapping))
            return
        passes.value = {name: passes.mapping[name] for name in flows[0]}
    rw.drop(parent, "pass_flows", "the order of passes says it", rule=rule.name)


def _known(mapping: dict[str, Node]) -> str:
    return f"there are: {', '.join(mapping)}" if mapping else "there are none"


def _spread_providers(rw: Rewriting, rule: Rule, parent: Node, at: str) -> None:
    """Engine-level execution providers move to the accelerators, which is where they have stood since."""
    node = parent.members[rule.key]
    value = plain(node)
    providers = [value] if isinstance(value, str) else value
    if not isinstance(providers, list) or not providers or not all(isinstance(item, str) for item in providers):
        rw.refuse(parent, rule.key, 'must be a list with one execution provider, such as ["CPUExecutionProvider"]')
        return
    systems = parent.members.setdefault("systems", from_plain({}, "systems", node))
    if systems.mapping is not None and not systems.mapping and not rw.lost:
        device = "cpu" if providers[0] == "CPUExecutionProvider" else "gpu"
        made = {"type": "LocalSystem", "accelerators": [{"device": device}]}
        systems.mapping["local_system"] = from_plain(made, "systems.local_system", node)
        for key in ("host", "target"):
            parent.members.setdefault(key, from_plain("local_system", key, node))
    del parent.members[rule.key]
    for name, system in (systems.mapping or {}).items():
        target = f"systems.{name}.accelerators"
        if system.mapping is None:
            continue
        if system.get("accelerators") is None:
            device = "cpu" if providers[0] == "CPUExecutionProvider" else "gpu"
            path = join_path(system.path, "accelerators")
            system.mapping["accelerators"] = from_plain([{"device": device}], path, node)
        for index, accelerator in enumerate(system.mapping["accelerators"].items or []):
            if accelerator.mapping is None:
                continue
            own = accelerator.get("execution_providers")
            if own is None or own.value is None:
                accelerator.mapping["execution_providers"] = node
                rw.told(rule.name, node, f"{target}.{index}.execution_providers")
            elif plain(own) != providers:
                rw.problems.append(
                    problem_at(
                        node, f"contradicts {own.path} on line {own.line}", hint="keep the one of the accelerator"
                    )
                )


def _spread_client(rw: Rewriting, rule: Rule, parent: Node, at: str) -> None:
    """The workspace moves to each system and each resource that lies in it."""
    node = parent.members.pop(rule.key)
    used = False
    systems = parent.get("systems")
    for name, system in (systems.mapping if systems and systems.mapping else {}).items():
        if system.text("type") == "AzureML" and system.mapping is not None:
            if "azureml_client_config" not in system.mapping:
                system.mapping["azureml_client_config"] = node
                rw.told(rule.name, node, f"systems.{name}.azureml_client_config")
            used = True
    for resource, where in _resources(rw.root, ""):
        config = resource.get("config")
        if config is not None and config.mapping is not None and resource.text("type") != "azureml_registry_model":
            if "azureml_client" not in config.mapping:
                config.mapping["azureml_client"] = node
                rw.told(rule.name, node, f"{where}.config.azureml_client")
            used = True
    if not used:
        rw.warnings.append(problem_at(node, "nothing in this file lies in Azure ML; not used", at_key=True))


def _resources(node: Node, at: str) -> list[tuple[Node, str]]:
    if node.mapping is not None:
        if (node.text("type") or "").startswith("azureml_"):
            return [(node, at)]
        return [found for key, item in node.mapping.items() for found in _resources(item, join_path(at, key))]
    return [found for i, item in enumerate(node.items or []) for found in _resources(item, join_path(at, i))]


def _data_root(rw: Rewriting, rule: Rule, parent: Node, at: str) -> None:
    """Relative data paths get the folder in front."""
    node = parent.members.pop("data_root")
    if not isinstance(node.value, str) or node.value.startswith("azureml://"):
        message = (
            "must be a local folder" if not isinstance(node.value, str) else "data in Azure ML needs a data config"
        )
        rw.problems.append(problem_at(node, message, hint="use data_files of type azureml_datastore"))
        return
    root = node.value.rstrip("/\\")
    data = parent.get("data_configs")
    for index, config in enumerate((data.items if data else None) or []):
        for key in ("data_files", "data_dir"):
            files = config.get("load_dataset_config", key)
            if files is not None:
                _prefix(files, root)
                rw.told(rule.name, node, f"data_configs.{index}.load_dataset_config.{key}")


def _prefix(node: Node, root: str) -> None:
    if isinstance(node.value, str):
        if not node.value.startswith(("/", "\\")) and "://" not in node.value and node.value[1:2] != ":":
            node.value = f"{root}/{node.value}"
    elif node.items is not None:
        for item in node.items:
            _prefix(item, root)
    elif node.mapping is not None and node.text("type") is None:
        for item in node.mapping.values():
            _prefix(item, root)


def _system_types(rw: Rewriting, rule: Rule, parent: Node, at: str) -> None:
    """One kind of system runs here and one is known; the others are refused by name."""
    for name in list(parent.members):
        system = parent.members[name]
        node = system.get("type")
        if system.mapping is None or node is None or not isinstance(node.value, str):
            continue
        lowered = node.value.lower()
        if lowered in _SYSTEMS:
            node.value = _SYSTEMS[lowered]
            continue
        if lowered in _OTHER_SYSTEMS:
            message = f"{_OTHER_SYSTEMS[lowered]} is an Olive system that Coldpress does not have yet"
            hint = "nearest: LocalSystem; AzureML is read, but not run yet"
        else:
            close = nearest(node.value, _SYSTEMS.values())
            message, hint = f"there is no system of type {node.value!r}", f"did you mean {close or 'LocalSystem'}?"
        rw.problems.append(problem_at(node, message, hint=hint))
        rw.lost.add(name)
        del parent.members[name]


def _accelerators(rw: Rewriting, rule: Rule, parent: Node, at: str) -> None:
    """`["gpu"]` becomes `[{"device": "gpu"}]`."""
    node = parent.members["accelerators"]
    if node.value is None:
        del parent.members["accelerators"]
        return
    if node.items is None:
        return
    if len(node.items) > 1 and parent.text("type") == "AzureML":
        message = f"{len(node.items)} accelerators: a model is built for one device and one execution provider"
        rw.problems.append(problem_at(node, message, hint="keep one; run once for each target"))
        node.items[1:] = []
    for place, item in enumerate(node.items):
        if isinstance(item.value, str):
            rw.told(rule.name, item, f"{at}.accelerators.{place}.device")
            item.value = {"device": from_plain(item.value, item.path, item)}


def _old_device(rw: Rewriting, rule: Rule, parent: Node, at: str) -> None:
    """`device: gpu` on the system itself, older than accelerators."""
    node = parent.members["device"]
    if parent.get("accelerators") is not None:
        rw.refuse(parent, "device", "the accelerators name the device", "remove it")
        return
    del parent.members["device"]
    accelerator = from_plain({}, node.path, node)
    accelerator.members["device"] = node
    parent.members["accelerators"] = from_plain([], node.path, node)
    parent.members["accelerators"].elements.append(accelerator)
    rw.told(rule.name, node, f"{at}.accelerators.0.device")


def _device(rw: Rewriting, rule: Rule, parent: Node, at: str) -> None:
    node = parent.members["device"]
    if isinstance(node.value, str):
        node.value = node.value.lower()
    if node.value in ("npu", "vpu", "intel_myriad"):
        rw.refuse(parent, "device", f"models for a device of kind {node.value} are not made", "cpu or gpu")


def _providers(rw: Rewriting, rule: Rule, parent: Node, at: str) -> None:
    node = parent.members["execution_providers"]
    if node.value is None:
        del parent.members["execution_providers"]
        return
    if isinstance(node.value, str):
        node.value = [from_plain(node.value, node.path, node)]
    for item in node.items or []:
        if item.items is not None:
            rw.refuse(parent, "execution_providers", "an execution provider from a library of its own is not supported")
            return
    if node.items is not None and len(node.items) > 1:
        names = ", ".join(str(item.value) for item in node.items)
        message = f"{len(node.items)} execution providers ({names}): a model is built for one"
        rw.problems.append(problem_at(node, message, hint="keep the one it must run on"))
        node.items[1:] = []
    for item in node.items or []:
        if isinstance(item.value, str) and item.value not in EXECUTION_PROVIDERS:
            close = nearest(item.value, EXECUTION_PROVIDERS)
            hint = f"did you mean {close}?" if close else f"known: {', '.join(EXECUTION_PROVIDERS)}"
            rw.problems.append(problem_at(item, f"there is no execution provider called {item.value!r}", hint=hint))


def _provider_defaults(rw: Rewriting, rule: Rule, parent: Node, at: str) -> None:
    """A gpu without an execution provider must not silently become a model for the CPU, nor one's provider a cpu."""
    for name, system in (parent.mapping or {}).items():
        accelerators = system.get("accelerators")
        for index, item in enumerate((accelerators.items if accelerators else None) or []):
            where = f"systems.{name}.accelerators.{index}"
            if item.text("device") == "gpu":
                rw.default(rule.name, item, "execution_providers", [_GPU_PROVIDER], where)
            providers = item.get("execution_providers")
            if any(one.value in _OF_GPUS for one in (providers.items if providers else None) or []):
                rw.default(rule.name, item, "device", "gpu", where)


def _forget(rw: Rewriting, rule: Rule, parent: Node, at: str) -> None:
    """A null means: not given."""
    del parent.members[rule.key]


_NO_REPORT = "run.json is always written"
_Row = tuple[str, Action, Version | None, Callable[[Node], bool] | None]
_ROWS: tuple[_Row, ...] = (
    ("$schema", Drop("an editor's help"), None, None),
    ("data_configs", Custom(_data_mapping), V06, _is_mapping),
    ("host", Custom(name_system), None, _is_mapping),
    ("target", Custom(name_system), None, _is_mapping),
    ("evaluator", Custom(name_evaluator), None, _is_mapping),
    ("cache_config", Drop("empty"), None, _off),
    ("cache_config", Custom(_cache_config), None, _is_mapping),
    ("cache_dir", Custom(_cache_dir_list), None, lambda node: node.items is not None),
    ("enable_shared_cache", Drop("the cache is a local folder"), None, _off),
    ("enable_shared_cache", Refuse("a shared cache is not built; the cache is a local folder"), None, _on),
    ("clean_evaluation_cache", Drop("scores are kept with the model they belong to"), None, None),
    ("packaging_config", Drop("the model folder in output_dir is complete"), None, _off),
    (
        "packaging_config",
        Refuse("packaging is not built", "nearest: the folder in output_dir, which is complete and can be copied"),
        None,
        _on,
    ),
    ("ort_log_severity_level", Drop("ONNX Runtime reports through Coldpress's own messages", warn=True), None, None),
    ("ort_py_log_severity_level", Drop("ONNX Runtime reports through Coldpress's own messages", warn=True), None, None),
    ("log_to_file", Drop("nothing to do"), None, _off),
    ("log_to_file", Drop("there is no log file; redirect the output instead", warn=True), None, _on),
    ("plot_pareto_frontier", Drop("off"), None, _off),
    ("plot_pareto_frontier", Drop("report.html shows the frontier of a search"), None, _on),
    ("no_artifacts", Drop(_NO_REPORT), None, None),
    ("disable_telemetry", Drop("there is no telemetry"), None, None),
    ("output_name", Drop("output_dir alone says where the model goes", warn=True), V06, None),
    ("auto_optimizer_config", Drop("empty"), V09, _off),
    (
        "auto_optimizer_config",
        Refuse("the automatic choice of passes is not built", "nearest: list the passes, LoRA to ModelBuilder"),
        V09,
        _on,
    ),
    ("workflow_host", Drop("empty"), V09, _off),
    ("workflow_host", Refuse("the whole workflow runs where it is started", "nearest: host"), V09, _on),
    ("builds", Refuse("one file describes one workflow", "write one file for each build"), None, None),
    ("max_concurrent_builds", Refuse("one file describes one workflow"), None, None),
    ("pass_flows", Drop("empty"), V07, _off),
    ("pass_flows", Custom(_pass_flows), V07, _on),
)  # fmt: skip


def _rows(level: str, rows: tuple[_Row, ...]) -> tuple[Rule, ...]:
    return tuple(Rule(level, key, action, until, when) for key, action, until, when in rows)


_OPTIONAL = ("systems", "data_configs", "evaluators", "passes", "output_dir", "cache_dir", "workflow_id", "clean_cache")
"""Keys whose null Olive takes for: not given."""

RULES: tuple[Rule, ...] = (
    *(Rule("workflow", key, Custom(_forget), None, lambda node: node.value is None) for key in _OPTIONAL),
    *_rows("workflow", _ROWS),
    Rule("systems", "*", Custom(_system_types)),
    Rule("system", "device", Custom(_old_device), V06),
    Rule("system", "accelerators", Custom(_accelerators), V06, lambda node: _has_text(node)),
    Rule("system", "accelerators", Custom(_accelerators), None, lambda node: not _has_text(node)),
    Rule("system", "olive_managed_env", Drop("nothing to do"), None, _off),
    Rule(
        "system",
        "olive_managed_env",
        Refuse("Coldpress installs nothing by itself", "prepare the environment"),
        V09,
        _on,
    ),
    Rule("system", "requirements_file", Refuse("Coldpress installs nothing by itself", "prepare the environment"), V09),
    Rule("system", "local_docker_config", Refuse("Docker is not built yet", "nearest: LocalSystem"), V09),
    Rule("accelerator", "device", Custom(_device)),
    Rule("accelerator", "execution_providers", Custom(_providers)),
)

FINISH_RULES: tuple[Rule, ...] = (
    Rule("workflow", "execution_providers", Custom(_spread_providers), V06),
    Rule("workflow", "azureml_client", Custom(_spread_client), V09),
    Rule("workflow", "azureml_client_config", Custom(_spread_client), V06),
    Rule("workflow", "data_root", Drop("empty"), V06, _off),
    Rule("workflow", "data_root", Custom(_data_root), V06, _on),
    Rule("systems", "*", Custom(_provider_defaults)),
)
"""These touch several places, so they come after the others."""


def _has_text(node: Node) -> bool:
    return any(isinstance(item.value, str) for item in node.items or [])
