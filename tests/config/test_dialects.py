"""Older Olive configs: which dialect a file speaks, what each old form becomes, what is refused by name."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coldpress.config.load import LoadedConfig
from coldpress.errors import Problem

Problems = Callable[..., tuple[Problem, ...]]
Load = Callable[..., LoadedConfig]

CLIENT = {"subscription_id": "s", "resource_group": "g", "workspace_name": "w"}


def reported(config: LoadedConfig) -> set[str]:
    return {str(rewrite) for rewrite in config.rewrites}


def at(document: Any, path: str) -> Any:
    for key in path.split("."):
        document = document[int(key) if isinstance(document, list) else key]
    return document


def params(config: LoadedConfig, name: str) -> Any:
    return config.workflow.passes[name].config


# ---- the seed


def test_the_seed_loads_clean(seed_file: Path, load: Load) -> None:
    config = load(seed_file)
    assert config.dialect == "0.6"
    assert config.workflow.input_model.load_kwargs.trust_remote_code is True
    assert config.workflow.search_strategy is False
    assert config.workflow.output_dir == "../model-cache/models/phi3-finetuned"
    assert config.workflow.log_severity_level == 0


def test_every_rule_that_fired_on_the_seed_is_told_once(seed_dir: Path, load: Load) -> None:
    config = load(seed_dir / "olive-config.local.json")
    lines = [str(rewrite) for rewrite in config.rewrites]
    assert len(lines) == len(set(lines))
    block = "data_configs.0.pre_process_data_config"
    expected = {
        ("input_model.config.hf_config.model_name", "input_model.model_path"),
        (
            "input_model.config.hf_config.model_loading_args.trust_remote_code",
            "input_model.load_kwargs.trust_remote_code",
        ),
        ("systems.local_system.config.accelerators.0", "systems.local_system.accelerators.0.device"),
        ("engine.execution_providers", "systems.local_system.accelerators.0.execution_providers"),
        (f"{block}.params.corpus_strategy", f"{block}.strategy"),
        (f"{block}.params.source_max_len", f"{block}.max_seq_len"),
        ("passes.lora.config.lora_r", "passes.lora.r"),
        ("passes.lora.config.lora_alpha", "passes.lora.alpha"),
    }
    assert {f"olive-0.6: {old} -> {new}" for old, new in expected} <= set(lines)
    arguments = "passes.lora.config.training_args"
    assert f"transformers-4: {arguments}.evaluation_strategy -> passes.lora.training_args.eval_strategy" in lines
    assert any(f"transformers-4: {arguments}.group_by_length -> " in line for line in lines)
    source = (seed_dir / "olive-config.local.json").read_text().splitlines()
    by_old = {rewrite.old: rewrite for rewrite in config.rewrites}
    for name in ("lora_r", "lora_alpha", "training_args.evaluation_strategy"):
        line = by_old[f"passes.lora.config.{name}"].line
        assert line is not None
        assert f'"{name.rpartition(".")[2]}"' in source[line - 1]


def test_what_the_seed_becomes(seed_dir: Path, load: Load) -> None:
    workflow = load(seed_dir / "olive-config.local.json").workflow
    assert workflow.input_model.model_path == "model-cache/microsoft/phi-3-mini"
    accelerator = workflow.systems["local_system"].accelerators[0]
    assert (accelerator.device, accelerator.execution_providers) == ("cpu", ("CPUExecutionProvider",))
    data = workflow.data_configs[0]
    assert data.load_dataset_config.data_files == "dataset/dataset-classification.json"
    block = data.pre_process_data_config
    assert (block.strategy, block.max_seq_len, block.pad_to_max_len, block.use_attention_mask) == (
        "join",
        2048,
        False,
        False,
    )
    lora: Any = workflow.passes["lora"].config
    assert (lora.r, lora.alpha, lora.lora_dropout, lora.eval_dataset_size) == (64, 64, 0.1, 0.3)
    assert lora.training_args == {
        "seed": 0,
        "data_seed": 42,
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": 4,
        "gradient_checkpointing": False,
        "learning_rate": 0.0001,
        "num_train_epochs": 3,
        "max_steps": 10,
        "logging_steps": 10,
        "eval_strategy": "steps",
        "eval_steps": 187,
        "train_sampling_strategy": "group_by_length",
        "adam_beta2": 0.999,
        "max_grad_norm": 0.3,
        "optim": "adamw_torch",
        "lr_scheduler_type": "constant",
        "warmup_steps": 0.03,
        "report_to": "none",
    }


def test_double_quant_under_lora_is_a_warning_and_under_qlora_a_value(seed_dir: Path, load: Load) -> None:
    config = load(seed_dir / "olive-config.local.json")
    (warning,) = [warning for warning in config.warnings if "double_quant" in warning.path]
    assert warning.message == "double_quant belongs to QLoRA and has no effect in LoRA; dropped"
    assert warning.line == 59
    assert params(load(seed_dir / "olive-config.local.qlora.json"), "qlora").double_quant is True


def test_the_azure_seed_keeps_its_coordinates_and_lists_placeholders(seed_dir: Path, load: Load) -> None:
    path = seed_dir / "olive-config.azure-data.azure-model.json"
    config = load(path)
    model: Any = config.workflow.input_model.model_path
    assert (model.type, model.config["version"]) == ("azureml_registry_model", "11")
    files: Any = config.workflow.data_configs[0].load_dataset_config.data_files
    assert files.type == "azureml_datastore"
    for system in config.workflow.systems.values():
        assert system.accelerators[0].device == "gpu"
        assert system.accelerators[0].execution_providers == ("CUDAExecutionProvider",)
    source = path.read_text().splitlines()
    assert len(config.placeholders) == 8
    for problem in config.placeholders:
        assert problem.line is not None
        assert "Your " in source[problem.line - 1]
        assert "still a placeholder" in problem.message
    assert params(config, "lora").training_args["optim"] == "paged_adamw_32bit"


# ---- which dialect


def test_todays_file_speaks_today(today: Any, load: Load) -> None:
    config = load(today)
    assert (config.dialect, config.rewrites, config.warnings) == ("today", (), ())


@pytest.mark.parametrize(
    ("where", "key", "value", "dialect"),
    [
        ("passes.ft", "lora_r", 8, "0.7"),
        ("passes.ft", "use_ort_trainer", False, "0.7"),
        ("", "azureml_client", CLIENT, "0.9"),
        ("", "pass_flows", [["ft", "merge", "build"]], "0.7"),
    ],
)
def test_the_newest_version_in_which_every_key_is_valid(
    today: Any, load: Load, where: str, key: str, value: Any, dialect: str
) -> None:
    del today["passes"]["ft"]["r"]
    (at(today, where) if where else today)[key] = value
    assert load(today).dialect == dialect


@pytest.mark.parametrize(
    ("where", "key", "value", "other"),
    [
        ("data_configs.0.pre_process_data_config", "corpus_strategy", "join", "passes.ft.r"),
        ("data_configs.0.pre_process_data_config", "source_max_len", 3, "passes.ft.r"),
        ("passes.ft", "lora_alpha", 3, "passes.ft.r"),
        ("systems.box", "accelerators", ["gpu"], "passes.ft.r"),
    ],
)
def test_mixed_dialects_are_refused_with_the_keys_that_clash(
    today: Any, problems_of: Problems, where: str, key: str, value: Any, other: str, tmp_path: Path
) -> None:
    at(today, where)[key] = value
    path = tmp_path / "mixed.json"
    path.write_text(json.dumps(today, indent=1))
    source = path.read_text().splitlines()
    (problem,) = problems_of(path)
    assert problem.message.startswith("the file mixes dialects: up to Olive 0.")
    assert f"{where}.{key} (line " in problem.message
    assert f"{other} (line " in problem.message
    assert problem.line is not None
    line = int(problem.message.split(f"{where}.{key} (line ")[1].split(")")[0])
    assert f'"{key}"' in source[line - 1]


def test_nesting_and_transformers_names_tell_nothing(today: Any, load: Load) -> None:
    today["engine"] = {key: today.pop(key) for key in ("host", "target", "evaluator", "search_strategy", "output_dir")}
    for entry in (*today["passes"].values(), today["input_model"], *today["systems"].values()):
        entry["config"] = {key: entry.pop(key) for key in list(entry) if key != "type"}
    block = today["data_configs"][0]
    for key in ("load_dataset_config", "pre_process_data_config"):
        block[key] = {"params": block[key]}
    today["passes"]["ft"]["config"]["training_args"]["evaluation_strategy"] = "no"
    config = load(today)
    assert config.dialect == "today"
    assert [str(rewrite).split(":")[0] for rewrite in config.rewrites] == ["transformers-4"]


# ---- a dialect's defaults


def test_olive_0_6_defaults_are_written_out_and_told(local: Any, load: Load) -> None:
    lora = local["passes"]["lora"]["config"]
    for key in ("training_args", "lora_dropout", "eval_dataset_size"):
        del lora[key]
    del at(local, "data_configs.0.pre_process_data_config.params")["corpus_strategy"]
    config = load(local)
    assert params(config, "lora").lora_dropout == 0.0
    assert params(config, "lora").training_args == {
        "data_seed": 42,
        "optim": "adamw_torch",
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": 16,
        "max_steps": 10000,
        "learning_rate": 2e-4,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0.03,
        "logging_steps": 10,
        "eval_strategy": "no",
        "train_sampling_strategy": "group_by_length",
        "report_to": "none",
    }
    block = config.workflow.data_configs[0].pre_process_data_config
    assert (block.strategy, block.joiner) == ("line-by-line", "")
    assert config.document["passes"]["lora"]["training_args"]["max_steps"] == 10000
    told = "\n".join(reported(config))
    for key in (
        "max_steps = 10000",
        "gradient_accumulation_steps = 16",
        "strategy = line-by-line",
        "lora_dropout = 0.0",
    ):
        assert key in told
    assert any("paged_adamw_32bit needs a GPU" in warning.message for warning in config.warnings)


def test_todays_defaults(today: Any, load: Load) -> None:
    lora = params(load(today), "ft")
    assert lora.lora_dropout == 0.05
    assert lora.training_args == {
        "max_steps": 5,
        "learning_rate": 2e-4,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0.03,
        "report_to": "none",
        "eval_strategy": "no",
    }
    today["passes"]["ft"]["eval_dataset_size"] = 0.1
    assert params(load(today), "ft").training_args["eval_strategy"] == "steps"


@pytest.mark.parametrize(("device", "optim"), [("cpu", "adamw_torch"), ("gpu", "paged_adamw_32bit")])
def test_qlora_optimizer_by_device(today: Any, load: Load, device: str, optim: str) -> None:
    today["passes"]["ft"] = {"type": "QLoRA", "train_data_config": "train"}
    today["systems"]["box"]["accelerators"] = [{"device": device, "execution_providers": ["CPUExecutionProvider"]}]
    assert params(load(today), "ft").training_args["optim"] == optim


def test_a_paged_optimizer_on_the_cpu_is_replaced_with_a_word(today: Any, load: Load) -> None:
    today["passes"]["ft"]["training_args"]["optim"] = "paged_adamw_32bit"
    config = load(today)
    assert params(config, "ft").training_args["optim"] == "adamw_torch"
    assert [warning.path for warning in config.warnings] == ["passes.ft.training_args.optim"]


def test_evaluation_without_data_is_a_warning(today: Any, load: Load) -> None:
    today["passes"]["ft"]["training_args"]["eval_strategy"] = "epoch"
    config = load(today)
    assert params(config, "ft").training_args["eval_strategy"] == "no"
    assert "nothing to evaluate on" in config.warnings[0].message


# ---- the rows of what a 2024 tutorial may say


def test_pytorch_model_with_a_script(today: Any, problems_of: Problems) -> None:
    today["input_model"] = {"type": "PyTorchModel", "config": {"model_loader": "f", "model_script": "a.py"}}
    (problem,) = problems_of(today)
    assert problem.path == "input_model.type"
    assert "HfModel" in str(problem.hint)


@pytest.mark.parametrize("form", ["PyTorch.EntireModel", "PyTorch.TorchScript", "SNPE.DLC", "PyTorch.SliceGPT"])
def test_model_file_formats_we_do_not_read(local: Any, problems_of: Problems, form: str) -> None:
    local["input_model"]["config"]["model_file_format"] = form
    (problem,) = problems_of(local)
    assert problem.path == "input_model.config.model_file_format"


def test_hf_config_rows(local: Any, load: Load, problems_of: Problems) -> None:
    hf = local["input_model"]["config"]["hf_config"]
    hf["feature"] = "causal-lm"
    hf["model_class"] = "AutoModelForCausalLM"
    hf["model_loading_args"] = {
        "torch_dtype": "fp16",
        "device_map": "auto",
        "extra_args": {"attn_implementation": "eager"},
    }
    config = load(local)
    kwargs = config.workflow.input_model.load_kwargs
    assert (kwargs.torch_dtype, kwargs.attn_implementation) == ("float16", "eager")
    assert any(warning.path.endswith("device_map") for warning in config.warnings)
    hf["model_class"] = "WhisperModel"
    hf["components"] = [{"name": "a"}]
    hf["dataset"] = {"data_name": "x"}
    assert {problem.path.rpartition(".")[2] for problem in problems_of(local)} == {
        "model_class",
        "components",
        "dataset",
    }


@pytest.mark.parametrize(
    "kind", ["IsolatedORT", "AzureND12SSystem", "SurfaceProSystem1796", "Docker", "PythonEnvironment"]
)
def test_systems_we_lack_are_refused_by_name_even_unused(today: Any, problems_of: Problems, kind: str) -> None:
    today["systems"]["other"] = {"type": kind, "config": {"anything": 1}}
    (problem,) = problems_of(today)
    assert problem.path == "systems.other.type"
    assert problem.message == f"{kind} is an Olive system that Coldpress does not have yet"


def test_azureml_system_and_client(today: Any, load: Load, problems_of: Problems) -> None:
    today["systems"]["aml"] = {
        "type": "AzureML",
        "config": {"aml_compute": "c", "aml_docker_config": {"base_image": "i"}},
    }
    today["azureml_client"] = CLIENT
    system: Any = load(today).workflow.systems["aml"]
    assert system.azureml_client_config.workspace_name == "w"
    today["azureml_client"] = {**CLIENT, "workspace": "w"}
    (problem,) = problems_of(today)
    assert (problem.path, problem.hint) == ("azureml_client.workspace", "did you mean workspace_name?")
    del today["azureml_client"]
    today["systems"]["aml"]["config"]["aml_docker_config"] = {"base_imag": "i"}
    (problem,) = problems_of(today)
    assert problem.path == "systems.aml.config.aml_docker_config.base_imag"


@pytest.mark.parametrize("providers", [["CUDAExecutionProvider", "CPUExecutionProvider"]])
def test_two_providers_or_two_accelerators(local: Any, problems_of: Problems, providers: list[str]) -> None:
    local["engine"]["execution_providers"] = providers
    (problem,) = problems_of(local)
    assert problem.path == "engine.execution_providers"
    assert "a model is built for one" in problem.message
    local["engine"]["execution_providers"] = providers[:1]
    local["systems"]["local_system"]["config"]["accelerators"] = ["gpu", "cpu"]
    (problem,) = problems_of(local)
    assert problem.path == "systems.local_system.config.accelerators"


def test_an_unknown_provider_gets_its_neighbour(today: Any, problems_of: Problems) -> None:
    today["systems"]["box"]["accelerators"][0]["execution_providers"] = ["CpuExecutionProvider"]
    (problem,) = problems_of(today)
    assert problem.hint == "did you mean CPUExecutionProvider?"


def test_a_gpu_without_a_provider_is_not_made_a_cpu(today: Any, load: Load) -> None:
    today["systems"]["box"]["accelerators"] = [{"device": "GPU"}]
    config = load(today)
    accelerator = config.workflow.systems["box"].accelerators[0]
    assert (accelerator.device, accelerator.execution_providers) == ("gpu", ("CUDAExecutionProvider",))
    assert config.rewrites


def test_engine_providers_without_systems(local: Any, load: Load) -> None:
    del local["systems"]
    del local["engine"]["host"]
    del local["engine"]["target"]
    local["engine"]["execution_providers"] = ["CUDAExecutionProvider"]
    workflow = load(local).workflow
    assert workflow.host == workflow.target == "local_system"
    assert workflow.systems["local_system"].accelerators[0].device == "gpu"


def test_engine_providers_that_contradict_an_accelerator(local: Any, problems_of: Problems) -> None:
    local["systems"]["local_system"]["config"]["accelerators"] = [
        {"device": "cpu", "execution_providers": ["OpenVINOExecutionProvider"]}
    ]
    (problem,) = problems_of(local)
    assert problem.path == "engine.execution_providers"
    assert "contradicts" in problem.message


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("azureml_registry_model", {"registry_name": "r", "name": "n", "version": 3}),
        ("azureml_model", {"azureml_client": CLIENT, "name": "n", "version": "3"}),
        ("azureml_datastore", {"azureml_client": CLIENT, "datastore_name": "d", "relative_path": "p"}),
        ("azureml_job_output", {"azureml_client": CLIENT, "job_name": "j", "output_name": "o", "relative_path": "p"}),
    ],
)
@pytest.mark.parametrize("nested", [True, False])
def test_azureml_paths(today: Any, load: Load, problems_of: Problems, kind: str, config: Any, nested: bool) -> None:
    today["input_model"]["model_path"] = {"type": kind, **({"config": config} if nested else config)}
    path: Any = load(today).workflow.input_model.model_path
    assert path.type == kind
    assert set(path.config) == set(config)
    last = list(config)[-1]
    broken = copy.deepcopy(today)
    inner = at(broken, "input_model.model_path" + (".config" if nested else ""))
    inner[last + "x"] = inner.pop(last)
    (problem,) = problems_of(broken)
    assert problem.hint == f"did you mean {last}?"


@pytest.mark.parametrize(
    ("value", "result"),
    [
        ({"type": "folder", "path": "a/b"}, "a/b"),
        ({"type": "file", "config": {"path": "a/b"}}, "a/b"),
        ({"type": "string_name", "name": "org/m"}, "org/m"),
    ],
)
def test_local_resource_paths_are_their_path(today: Any, load: Load, value: Any, result: str) -> None:
    today["input_model"]["model_path"] = value
    assert load(today).workflow.input_model.model_path == result


def test_registry_address(today: Any, load: Load, problems_of: Problems) -> None:
    today["input_model"]["model_path"] = "azureml://registries/azureml/models/Phi-3/versions/4"
    path: Any = load(today).workflow.input_model.model_path
    assert path.config == {"registry_name": "azureml", "name": "Phi-3", "version": "4"}
    today["input_model"]["model_path"] = "azureml://datastores/x/paths/y"
    assert "not read" in problems_of(today)[0].message


def test_params_config_and_component_kwargs(local: Any, load: Load, problems_of: Problems) -> None:
    local["data_configs"] = [
        {
            "name": "dataset_default_train",
            "type": "HuggingfaceContainer",
            "params_config": {
                "data_name": "json",
                "data_files": "x.json",
                "split": "train",
                "input_cols": ["phrase"],
                "batch_size": 4,
                "component_kwargs": {"pre_process_data": {"corpus_strategy": "join", "source_max_len": 64}},
            },
        }
    ]
    config = load(local)
    data = config.workflow.data_configs[0]
    assert (data.load_dataset_config.data_files, data.load_dataset_config.split) == ("x.json", "train")
    assert data.pre_process_data_config.text_cols == ("phrase",)
    assert data.pre_process_data_config.max_seq_len == 64
    where = "data_configs.0.params_config"
    assert f"olive-0.6: {where}.data_name -> data_configs.0.load_dataset_config.data_name" in reported(config)
    assert any("batch size" in warning.message for warning in config.warnings)
    local["data_configs"][0]["params_config"]["splt"] = "x"
    (problem,) = problems_of(local)
    assert (problem.path, problem.hint) == (f"{where}.splt", "did you mean split?")


def test_components(local: Any, load: Load) -> None:
    local["data_configs"][0] = {
        "name": "dataset_default_train",
        "type": "HuggingfaceContainer",
        "components": {
            "load_dataset": {"name": "a", "type": "huggingface_dataset", "params": {"data_name": "json"}},
            "pre_process_data": {
                "type": "text_generation_huggingface_pre_process",
                "params": {"source_max_len": 10, "text_cols": "text"},
            },
        },
    }
    data = load(local).workflow.data_configs[0]
    assert data.load_dataset_config.data_name == "json"
    assert data.pre_process_data_config.text_cols == ("text",)
    assert data.pre_process_data_config.strategy == "line-by-line"


def test_data_configs_as_a_mapping(local: Any, load: Load) -> None:
    data = local["data_configs"][0]
    local["data_configs"] = {data.pop("name"): data}
    assert load(local).workflow.data_configs[0].name == "dataset_default_train"


def test_pairs_are_refused(local: Any, problems_of: Problems) -> None:
    at(local, "data_configs.0.pre_process_data_config.params")["dataset_type"] = "pair"
    (problem,) = problems_of(local)
    assert "completion_only_loss" in str(problem.hint)


def test_data_root(local: Any, load: Load) -> None:
    local["data_root"] = "/data/"
    files = load(local).workflow.data_configs[0].load_dataset_config.data_files
    assert files == "/data/dataset/dataset-classification.json"


def test_inline_data_configs_get_a_name(today: Any, load: Load, problems_of: Problems) -> None:
    inline = {"load_dataset_config": {"params": {"data_name": "json", "data_files": "q.json"}}}
    today["passes"]["ft"]["train_data_config"] = inline
    config = load(today)
    assert params(config, "ft").train_data_config == "ft_train_data"
    assert config.workflow.data_configs[1].load_dataset_config.data_files == "q.json"
    inline["load_dataset_config"]["params"]["data_nam"] = "x"
    (problem,) = problems_of(today)
    assert problem.path == "passes.ft.train_data_config.load_dataset_config.params.data_nam"


@pytest.mark.parametrize("key", ["host", "target"])
def test_inline_systems_get_a_name(today: Any, load: Load, key: str) -> None:
    today[key] = {"type": "localsystem", "config": {"accelerators": [{"device": "cpu"}]}}
    workflow = load(today).workflow
    assert workflow.systems[str(getattr(workflow, key))].accelerators[0].device == "cpu"


def test_inline_host_of_a_pass_and_inline_evaluator(today: Any, load: Load) -> None:
    today["passes"]["ft"]["host"] = {"type": "LocalSystem", "accelerators": [{"device": "gpu"}]}
    today["evaluator"] = today.pop("evaluators")["tones"]
    workflow = load(today).workflow
    assert workflow.systems["ft_host"].accelerators[0].execution_providers == ("CUDAExecutionProvider",)
    assert workflow.passes["ft"].host == "ft_host"
    assert workflow.evaluators[str(workflow.evaluator)].metrics[0].name == "tone"


@pytest.mark.parametrize("value", [False, None])
def test_no_search(today: Any, load: Load, value: Any) -> None:
    today["search_strategy"] = value
    assert not load(today).workflow.search_strategy


def test_default_value_is_left_out_and_a_list_of_one_pass_is_the_pass(today: Any, load: Load) -> None:
    today["passes"]["ft"]["r"] = "DEFAULT_VALUE"
    today["passes"]["build"] = [{"type": "ModelBuilder", "config": {"precision": "int8"}}]
    config = load(today)
    assert params(config, "ft").r == 64
    assert params(config, "build").precision == "int8"


def test_pass_leftovers(today: Any, load: Load) -> None:
    today["passes"]["ft"].update({"disable_search": True, "clean_run_cache": True, "output_name": "x"})
    config = load(today)
    assert {warning.path for warning in config.warnings} == {"passes.ft.clean_run_cache", "passes.ft.output_name"}
    assert any("disable_search" in line for line in reported(config))


def test_lora_leftovers(local: Any, load: Load, problems_of: Problems) -> None:
    lora = local["passes"]["lora"]["config"]
    lora.update({"bias": "none", "use_ort_trainer": True, "ortmodule_onnx_opset_version": 16, "allow_tf32": True})
    lora.update({"device_map": "auto", "loftq_iter": 1})
    config = load(local)
    paths = {warning.path.rpartition(".")[2] for warning in config.warnings}
    assert {"use_ort_trainer", "loftq_iter", "double_quant"} <= paths
    lora["bias"] = "some"
    (problem,) = problems_of(local)
    assert problem.path == "passes.lora.config.bias"


def test_what_olives_lora_family_says_of_layers_that_we_do_not_have(today: Any, load: Load) -> None:
    today["passes"]["ft"].update(
        {"use_effective_conv2d": True, "rank_pattern": {"o_proj": 2}, "rank_dropout": 0.1, "decompose_both": True}
    )
    config = load(today)
    assert params(config, "ft").rank_pattern == {"o_proj": 2}
    paths = {warning.path.rpartition(".")[2] for warning in config.warnings}
    assert {"rank_dropout", "decompose_both"} <= paths, "they belong to LoHa and LoKr"
    assert any("use_effective_conv2d" in line for line in reported(config))


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("text-classification", "text-classification"),
        ("sequence-classification", "text-classification"),
        ("text-generation-with-past", "text-generation"),
    ],
)
def test_tasks_and_their_other_names(today: Any, load: Load, given: str, meant: str) -> None:
    today["input_model"]["task"] = given
    config = load(today)
    assert config.workflow.input_model.task == meant
    assert any("task" in line for line in reported(config)) == (given != meant)


def test_loha_with_options_that_it_does_not_have(today: Any, load: Load, problems_of: Problems) -> None:
    """One that would do nothing is dropped with a word; one that would change the result is an error."""
    today["passes"]["ft"] = {"type": "loha", "r": 4, "rank_dropout": 0.1, "train_data_config": "train",
                             "lora_dropout": 0.1, "decompose_both": True, "use_effective_conv2d": True}  # fmt: skip
    config = load(today)
    paths = {warning.path.rpartition(".")[2] for warning in config.warnings}
    assert paths == {"lora_dropout", "decompose_both"}
    today["passes"]["ft"]["use_dora"] = True
    (problem,) = problems_of(today)
    assert problem.path == "passes.ft.use_dora"
    assert problem.message == "use_dora belongs to LoRA, DoRA, QLoRA and LoftQ; LoHa has nothing like it"


def test_a_misspelt_task(today: Any, problems_of: Problems) -> None:
    today["input_model"]["task"] = "text-clasification"
    (problem,) = problems_of(today)
    assert problem.hint == "did you mean text-classification?"


def test_a_name_given_twice(local: Any, problems_of: Problems) -> None:
    params_ = at(local, "data_configs.0.pre_process_data_config.params")
    params_["input_cols"] = ["a"]
    (problem,) = problems_of(local)
    assert problem.path.endswith("input_cols")
    assert "given twice: here and as data_configs.0.pre_process_data_config.params.text_cols" in problem.message


@pytest.mark.parametrize(
    ("key", "value", "path"),
    [
        ("packaging_config", {"type": "Zipfile"}, "packaging_config"),
        ("packaging_config", [{"type": "AzureMLModels"}], "packaging_config"),
        ("auto_optimizer_config", {"precisions": ["fp16"]}, "auto_optimizer_config"),
        ("workflow_host", "aml", "workflow_host"),
        ("builds", {"a": {}}, "builds"),
        ("enable_shared_cache", True, "enable_shared_cache"),
        ("cache_config", {"account_name": "a"}, "cache_config.account_name"),
        ("cache_dir", ["a", "https://x.blob"], "cache_dir"),
        ("pass_flows", [["ft"], ["merge"]], "pass_flows"),
        ("pass_flows", [["fft"]], "pass_flows"),
    ],
)
def test_top_level_keys_that_are_refused(today: Any, problems_of: Problems, key: str, value: Any, path: str) -> None:
    del today["passes"]["ft"]["r"]
    today[key] = value
    (problem,) = problems_of(today)
    assert problem.path == path
    assert problem.message != "unknown key"


@pytest.mark.parametrize(
    ("key", "value", "warned"),
    [
        ("log_to_file", "x.log", True),
        ("log_to_file", False, False),
        ("plot_pareto_frontier", True, False),
        ("no_artifacts", True, False),
        ("ort_log_severity_level", 3, True),
        ("clean_evaluation_cache", False, False),
        ("packaging_config", None, False),
        ("cache_config", {"cache_dir": "c"}, False),
        ("disable_telemetry", True, False),
        ("systems", None, False),
    ],
)
def test_top_level_keys_without_effect(today: Any, load: Load, key: str, value: Any, warned: bool) -> None:
    if key == "systems":
        del today["host"]
        del today["target"]
    today[key] = value
    config = load(today)
    assert bool(config.warnings) is warned
    assert config.dialect == "today"


def test_output_name_is_told(local: Any, load: Load) -> None:
    local["engine"]["output_name"] = "phi3"
    assert any(warning.path == "engine.output_name" for warning in load(local).warnings)


def test_one_pass_flow_orders_the_passes(local: Any, load: Load) -> None:
    local["pass_flows"] = [["builder", "lora"]]
    assert list(load(local).workflow.passes) == ["builder", "lora"]


# ---- passes


@pytest.mark.parametrize(
    ("kind", "near"),
    [
        ("Gptq", "ModelBuilder with precision int4"),
        ("OnnxConversion", "ModelBuilder builds the ONNX model"),
        ("OnnxQuantization", "ModelBuilder with precision int8"),
        ("OrtPerfTuning", "passes we have"),
        ("OnnxModelOptimizer", "ModelBuilder"),
        ("OnnxIOFloat16ToFloat32", "ModelBuilder"),
        ("OnnxMatMul4Quantizer", "int4"),
        ("InsertBeamSearch", "ModelBuilder"),
        ("QuantizationAwareTraining", "int8"),
        ("PyTorchTensorParallel", "passes we have"),
        ("SNPEConversion", "passes we have"),
        ("VitisAIQuantization", "int8"),
        ("SDLoRA", "LoRA"),
        ("OnnxDiscrepancyCheck", "parity check"),
    ],
)
def test_passes_we_lack_are_refused_by_name_with_what_comes_nearest(
    today: Any, problems_of: Problems, kind: str, near: str
) -> None:
    today["passes"]["x"] = {"type": kind.lower(), "config": {"foo": 1}}
    (problem,) = problems_of(today)
    assert problem.path == "passes.x.type"
    assert problem.message == f"{kind} is an Olive pass that Coldpress does not have yet"
    assert near in str(problem.hint)


def test_a_renamed_pass(today: Any, load: Load) -> None:
    today["passes"]["build"] = {"type": "GenAIModelExporter", "config": {"precision": "int4", "metadata_only": False}}
    config = load(today)
    assert config.workflow.passes["build"].type == "ModelBuilder"
    assert "olive: passes.build.type -> passes.build.type = ModelBuilder" in reported(config)


def test_a_parameter_of_olives_that_ours_lacks(today: Any, problems_of: Problems) -> None:
    today["passes"]["build"]["metadata_only"] = True
    (problem,) = problems_of(today)
    assert problem.message == "metadata_only is a parameter of Olive's ModelBuilder that Coldpress does not have"


@pytest.mark.parametrize(("kind", "is_now"), [("lora", "LoRA"), ("QLORA", "QLoRA")])
def test_types_match_in_any_case(today: Any, load: Load, kind: str, is_now: str) -> None:
    today["passes"]["ft"]["type"] = kind
    today["input_model"]["type"] = "hfmodel"
    today["data_configs"][0]["type"] = "huggingfacecontainer"
    workflow = load(today).workflow
    assert (workflow.passes["ft"].type, workflow.input_model.type) == (is_now, "HfModel")


def test_legacy_training_arguments(today: Any, load: Load) -> None:
    today["passes"]["ft"]["training_args"] = {
        "evaluation_strategy": "no", "warmup_ratio": 0.1, "overwrite_output_dir": True, "logging_dir": "x",
        "no_cuda": True, "output_dir": "o", "save_safetensors": True, "per_gpu_train_batch_size": 2,
        "optim": "adamw_hf", "do_train": True, "deepspeed": None, "extra_args": {"seed": 1},
        "half_precision_backend": "auto", "report_to": ["none"], "resume_from_checkpoint": True,
        "dispatch_batches": True, "adafactor": False, "local_rank": -1, "group_by_length": False,
    }  # fmt: skip
    config = load(today)
    document = config.document["passes"]["ft"]["training_args"]
    assert document == {
        "eval_strategy": "no",
        "warmup_steps": 0.1,
        "use_cpu": True,
        "per_device_train_batch_size": 2,
        "optim": "adamw_torch",
        "seed": 1,
        "report_to": ["none"],
        "accelerator_config": {"dispatch_batches": True},
        "train_sampling_strategy": "random",
    }
    assert [warning.path for warning in config.warnings] == ["passes.ft.training_args.output_dir"]


@pytest.mark.parametrize(
    ("report_to", "kept"),
    [(None, False), ("none", False), (["none"], False), ("tensorboard", True), (["mlflow", "tensorboard"], True)],
)
def test_a_logging_dir_is_kept_for_those_who_log(today: Any, load: Load, report_to: Any, kept: bool) -> None:
    arguments = {"logging_dir": "runs", **({} if report_to is None else {"report_to": report_to})}
    today["passes"]["ft"]["training_args"] = arguments
    config = load(today)
    assert config.document["passes"]["ft"]["training_args"].get("logging_dir") == ("runs" if kept else None)
    assert any("report_to names no service" in str(one) for one in config.rewrites) == (not kept)


def test_warmup_steps_win_over_the_ratio(today: Any, load: Load) -> None:
    today["passes"]["ft"]["training_args"] = {"warmup_ratio": 0.1, "warmup_steps": 5}
    config = load(today)
    assert params(config, "ft").training_args["warmup_steps"] == 5
    assert config.warnings[0].path.endswith("warmup_ratio")


# ---- what real files hold


def test_hf_model_beside_the_data_configs_of_0_6(today: Any, load: Load) -> None:
    """As Olive's main had it in the summer of 2024, and AI Toolkit's templates after it."""
    pre = today["data_configs"][0]["pre_process_data_config"]
    for key in ("strategy", "max_seq_len"):
        pre.pop(key, None)
    for key in ("r", "alpha"):
        today["passes"]["ft"].pop(key, None)
    pre |= {"corpus_strategy": "join", "dataset_type": "corpus", "source_max_len": 96}
    config = load(today)
    assert config.dialect == "0.6"
    block = config.workflow.data_configs[0].pre_process_data_config
    assert (block.strategy, block.max_seq_len) == ("join", 96)


def test_a_clash_names_the_keys_of_today(today: Any, problems_of: Problems) -> None:
    today["data_configs"][0]["pre_process_data_config"]["corpus_strategy"] = "join"
    (problem,) = problems_of(today)
    assert problem.hint == "write all of them in one dialect: corpus_strategy is strategy today"


def test_data_configs_as_a_mapping_are_found_by_their_keys(local: Any, load: Load) -> None:
    (config,) = local["data_configs"]
    name = config["name"]
    local["data_configs"] = {name: {**config, "name": "what stands in it"}}
    assert [one.name for one in load(local).workflow.data_configs] == [name]


def test_scripts_that_nothing_needs(today: Any, local: Any, load: Load, problems_of: Problems) -> None:
    today["data_configs"][0]["user_script"] = "own.py"
    today["input_model"]["model_script"] = "own.py"
    warned = {problem.path for problem in load(today).warnings}
    assert {"data_configs.0.user_script", "input_model.model_script"} <= warned
    today["data_configs"][0]["load_dataset_config"]["type"] = "my_loader"
    (problem,) = problems_of(today)
    assert (problem.path, problem.hint) == (
        "data_configs.0.load_dataset_config.type",
        "remove it: data_name, or data_files, says what is loaded",
    )
    local["input_model"]["config"] |= {"model_script": "own.py", "model_loader": "make"}
    assert {problem.path.split(".")[-1] for problem in problems_of(local)} == {"model_script", "model_loader"}


@pytest.mark.parametrize("provider", ["CUDA", "Dml", "WebGpu"])
def test_a_provider_of_gpus_says_the_device(today: Any, load: Load, provider: str) -> None:
    accelerator = {"execution_providers": [f"{provider}ExecutionProvider"]}
    today["systems"]["box"]["accelerators"] = [accelerator]
    assert load(today).workflow.systems["box"].accelerators[0].device == "gpu"
    today["systems"]["box"]["accelerators"] = [{**accelerator, "device": "cpu"}]
    assert load(today).workflow.systems["box"].accelerators[0].device == "cpu"


def test_a_quantizer_before_a_builder(today: Any, problems_of: Problems) -> None:
    """The builder quantizes; with as many bits as the pass that has to go."""
    build = today["passes"].pop("build")
    today["passes"] |= {"rtn": {"type": "Rtn", "bits": 8}, "mixed": {"type": "SelectiveMixedPrecision"}, "build": build}
    rtn, mixed = problems_of(today)
    assert "ModelBuilder with precision int8 quantizes while it builds, and passes.build is one" in str(rtn.hint)
    assert "int4_algo_config k_quant_mixed" in str(mixed.hint)
    del today["passes"]["build"]
    assert problems_of(today)[0].hint == "nearest: ModelBuilder with precision int8"
