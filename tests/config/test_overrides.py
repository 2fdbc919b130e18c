from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coldpress.config.load import LoadedConfig
from coldpress.errors import Problem

Problems = Callable[..., tuple[Problem, ...]]
Load = Callable[..., LoadedConfig]


@pytest.fixture
def seed(seed_dir: Path) -> Path:
    return seed_dir / "olive-config.local.json"


def lora(config: LoadedConfig) -> Any:
    return config.workflow.passes["lora"].config


@pytest.mark.parametrize(
    "path", ["passes.lora.r", "passes.lora.config.lora_r", "passes.lora.lora_r", "passes.lora.config.r"]
)
def test_any_spelling_of_a_key_wins_over_the_file(seed: Path, load: Load, path: str) -> None:
    config = load(seed, f"{path}=8")
    assert lora(config).r == 8
    assert config.dialect == "0.6"
    assert lora(config).lora_dropout == 0.1


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("host=local_system", lambda w: w.host == "local_system"),
        ("engine.log_severity_level=3", lambda w: w.log_severity_level == 3),
        ("log_severity_level=3", lambda w: w.log_severity_level == 3),
        ("input_model.model_path=a/b", lambda w: w.input_model.model_path == "a/b"),
        ("input_model.config.hf_config.model_name=a/b", lambda w: w.input_model.model_path == "a/b"),
        ("output_dir=3", None),
        ('output_dir="3"', lambda w: w.output_dir == "3"),
        ("passes.lora.training_args.max_steps=3", lambda w: w.passes["lora"].config.training_args["max_steps"] == 3),
        ("passes.lora.training_args.max_steps=3", lambda w: w.passes["lora"].config.training_args["seed"] == 0),
        ('passes.lora.target_modules=["a"]', lambda w: w.passes["lora"].config.target_modules == ("a",)),
        ("passes.lora.type=QLoRA", lambda w: w.passes["lora"].type == "QLoRA"),
        (
            'passes.builder={"type": "ModelBuilder", "precision": "int8"}',
            lambda w: w.passes["builder"].config.precision == "int8",
        ),
        (
            "data_configs.dataset_default_train.pre_process_data_config.max_seq_len=99",
            lambda w: w.data_configs[0].pre_process_data_config.max_seq_len == 99,
        ),
        (
            "data_configs.0.load_dataset_config.params.data_files=b=c.json",
            lambda w: w.data_configs[0].load_dataset_config.data_files == "b=c.json",
        ),
        ("systems.local_system.accelerators.0.device=cpu", None),
        ("parity.enabled=false", lambda w: w.parity.enabled is False),
        ("workflow_id=NaN", lambda w: w.workflow_id == "NaN"),
    ],
)
def test_values(
    seed: Path, load: Load, problems_of: Problems, override: str, read: Callable[[Any], bool] | None
) -> None:
    if read is None:
        assert problems_of(seed, override)[0].file == "command line"
    else:
        assert read(load(seed, override).workflow)


def test_a_later_override_wins(seed: Path, load: Load) -> None:
    assert lora(load(seed, "passes.lora.r=8", "passes.lora.r=9")).r == 9


def test_an_override_is_checked_like_the_file(seed: Path, problems_of: Problems) -> None:
    found = {
        problem.path: problem for problem in problems_of(seed, "passes.lora.rr=8", "passes.lora.alpha=abc", "hots=x")
    }
    assert set(found) == {"passes.lora.rr", "passes.lora.alpha", "hots"}
    assert all(problem.file == "command line" and problem.line is None for problem in found.values())
    assert found["passes.lora.rr"].hint == "did you mean r?"
    assert found["passes.lora.alpha"].message == "must be a number, got 'abc'"


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("x", "not of the form key.path=value"),
        ("=3", "not of the form key.path=value"),
        ("a..b=3", "not of the form key.path=value"),
        ("data_configs.foo.name=3", "there is no element 'foo'"),
        ("data_configs.3.name=x", "there is no element '3'"),
        ("data_configs.-1.name=x", "there is no element '-1'"),
        ("engine.host.x=1", "engine.host is a single value"),
    ],
)
def test_overrides_that_cannot_be_set(seed: Path, problems_of: Problems, override: str, what: str) -> None:
    (problem,) = problems_of(seed, override)
    assert what in problem.message
    assert problem.file == "command line"


def test_problems_of_file_and_command_line_come_together(local: Any, problems_of: Problems) -> None:
    local["passes"]["lora"]["config"]["lora_r"] = "x"
    assert len(problems_of(local, "passes.builder.precision=int9", "y")) == 3


def test_deep_json_is_a_text_not_a_crash(seed: Path, problems_of: Problems) -> None:
    assert problems_of(seed, "passes.lora.r=" + "[" * 100_000)
