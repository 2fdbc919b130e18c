"""Secrets are refused and never shown; placeholders are listed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from coldpress.config.load import LoadedConfig
from coldpress.config.secrets import looks_secret
from coldpress.errors import ConfigError, Problem

Problems = Callable[..., tuple[Problem, ...]]
Load = Callable[..., LoadedConfig]

TOKEN = "hf_" + "aBcD" * 8


@pytest.mark.parametrize(
    ("where", "key", "value"),
    [
        ("input_model.load_kwargs", "token", TOKEN),
        ("input_model.load_kwargs", "use_auth_token", TOKEN),
        ("data_configs.0.load_dataset_config", "token", TOKEN),
        ("passes.ft.training_args", "hub_token", TOKEN),
        ("systems.box", "hf_token", TOKEN),
        ("azureml_client", "client_secret", "s3cr3t-value"),
        ("cache_config", "account_key", "q" * 40),
        ("cache_config", "connection_string", "DefaultEndpointsProtocol=https;AccountKey=abcdef=="),
        ("passes.ft", "password", "letmein"),
        ("", "api_key", "sk-" + "x" * 30),
        ("passes.ft.training_args", "run_name", TOKEN),
        ("data_configs.0.load_dataset_config", "data_files", "https://x.blob/y?sv=1&sig=abcdefgh"),
        ("data_configs.0.load_dataset_config", "data_files", ["a.json", TOKEN]),
    ],
)
def test_a_secret_is_refused_and_not_shown(today: Any, problems_of: Problems, where: str, key: str, value: Any) -> None:
    node = today
    for step in where.split(".") if where else ():
        node = node[int(step)] if isinstance(node, list) else node.setdefault(step, {})
    node[key] = value
    problems = problems_of(today)
    shown = str(ConfigError(problems))
    assert "stands in the file; secrets come from the environment" in shown
    assert any(f"{where}.{key}".strip(".") in problem.path for problem in problems)
    for secret in value if isinstance(value, list) else [value]:
        if secret != "a.json":
            assert secret not in shown


def test_a_secret_on_the_command_line_is_not_shown(today: Any, problems_of: Problems) -> None:
    problems = problems_of(today, f"input_model.load_kwargs.token={TOKEN}", f"host={TOKEN}")
    assert TOKEN not in str(ConfigError(problems))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("pad_token", "<|endoftext|>"),
        ("eos_token", "</s>"),
        ("max_new_tokens", "5"),
        ("hf_token", "yes"),
        ("tokenizer", "a" * 40),
        ("monkey", "banana-banana"),
        ("keyvault_name", "my-vault-name"),
        ("password", ""),
        ("token", "<your token here>"),
    ],
)
def test_what_is_no_secret(key: str, value: str) -> None:
    assert not looks_secret(key, value)


@pytest.mark.parametrize(
    "value",
    [
        "Your Azure Compute Name",
        "your-compute",
        "<compute name>",
        "{{ compute }}",
        "${COMPUTE}",
        "TODO",
        "xxx",
        "changeme",
    ],
)
def test_placeholders_are_listed(today: Any, load: Load, value: str) -> None:
    today["systems"]["aml"] = {"type": "AzureML", "aml_compute": value}
    (problem,) = load(today).placeholders
    assert problem.path == "systems.aml.aml_compute"


def test_templates_are_no_placeholders(today: Any, load: Load) -> None:
    block = today["data_configs"][0]["pre_process_data_config"]
    block.update({"chat_template": "{{ messages }}", "joiner": "..."})
    assert load(today).placeholders == ()
