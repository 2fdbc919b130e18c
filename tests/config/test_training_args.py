from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from importlib.resources import files
from typing import Any

import pytest

from coldpress.config.defaults import OLIVE_0_6_TRAINING_DEFAULTS, QLORA_TRAINING_DEFAULTS, TODAY_TRAINING_DEFAULTS
from coldpress.config.training_args import check_training_args, training_arguments


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
def test_the_table_is_that_of_the_installed_transformers() -> None:
    stored = json.loads(files("coldpress.config").joinpath("training_args.json").read_text(encoding="utf-8"))
    code = "import json, coldpress.config.training_args as t; print('@' + json.dumps(t.generate_table()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    made = json.loads(done.stdout.rsplit("@", 1)[1])
    if made["transformers"].split(".")[:2] != stored["transformers"].split(".")[:2]:
        pytest.skip(f"the table is of {stored['transformers']}, installed is {made['transformers']}")
    assert made == stored


def test_defaults_of_every_dialect_are_valid() -> None:
    for table in (
        TODAY_TRAINING_DEFAULTS,
        {**TODAY_TRAINING_DEFAULTS, **QLORA_TRAINING_DEFAULTS},
        OLIVE_0_6_TRAINING_DEFAULTS,
    ):
        assert check_training_args(table) == []


def test_transformers_own_defaults_are_valid() -> None:
    defaults = {name: row.default for name, row in training_arguments().items()}
    assert check_training_args(defaults) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 1),
        ("learning_rate", 0.0),
        ("warmup_steps", 0.03),
        ("warmup_steps", 10),
        ("max_steps", -1),
        ("num_train_epochs", 0.5),
        ("eval_steps", 0.2),
        ("optim", "adamw_torch"),
        ("optim", "paged_adamw_8bit"),
        ("lr_scheduler_type", "cosine_with_restarts"),
        ("lr_scheduler_kwargs", {"num_cycles": 2}),
        ("train_sampling_strategy", "group_by_length"),
        ("report_to", "none"),
        ("report_to", []),
        ("report_to", ["none"]),
        ("report_to", "tensorboard"),
        ("report_to", ["tensorboard", "mlflow"]),
        ("logging_dir", "runs/today"),
        ("gradient_checkpointing_kwargs", {"use_reentrant": False}),
        ("data_seed", None),
        ("label_names", ["labels"]),
        ("include_num_input_tokens_seen", True),
        ("include_num_input_tokens_seen", "non_padding"),
        ("save_strategy", "best"),
        ("push_to_hub", False),
        ("deepspeed", None),
        ("fsdp", True),
        ("fsdp", "full_shard auto_wrap"),
        ("fsdp_config", {"fsdp_transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "reshard_after_forward": False}),
        ("ddp_backend", "gloo"),
        ("ddp_timeout", 60),
        ("ddp_find_unused_parameters", False),
        ("log_level", "info"),
    ],
)
def test_accepted(name: str, value: Any) -> None:
    assert check_training_args({name: value}) == []


@pytest.mark.parametrize(
    ("name", "value", "message", "hint"),
    [
        ("max_step", 3, "unknown training argument", "did you mean max_steps?"),
        ("zzzzzz", 3, "unknown training argument", "Transformers has no such training argument"),
        ("max_steps", "3", "must be a whole number, got '3'", "without quotes"),
        ("max_steps", 3.5, "must be a whole number, got 3.5", None),
        ("max_steps", True, "must be a whole number, got true", None),
        ("max_steps", 0, "must be a positive number of steps, or -1 to count epochs, got 0", None),
        ("max_steps", None, "must be a whole number, got null", None),
        ("learning_rate", "1e-4", "must be a number, got '1e-4'", "without quotes"),
        ("learning_rate", -1, "must be from 0 to 100, got -1", None),
        ("bf16", "yes", "must be true or false, got 'yes'", "write true without quotes"),
        ("bf16", 1, "must be true or false, got 1", None),
        ("per_device_train_batch_size", 0, "must be from 1 to 1.04858e+06, got 0", None),
        ("adam_beta2", 1.5, "must be from 0 to 1, got 1.5", None),
        ("optim", "adamw", "must be one of 41 values, got 'adamw'", "did you mean adamw_torch_fused?"),
        ("optim", 3, None, None),
        ("lr_scheduler_type", "cosin", None, "did you mean cosine?"),
        ("eval_strategy", "step", "must be one of epoch, no, steps, got 'step'", "did you mean steps?"),
        (
            "train_sampling_strategy",
            "zzz",
            "must be one of batch_rebalance, group_by_length, random, sequential, got 'zzz'",
            None,
        ),
        ("report_to", "tensorbord", None, "did you mean tensorboard?"),
        ("report_to", ["mlflow", "none"], "none and mlflow exclude each other", "keep one"),
        ("report_to", "all", None, "name the services"),
        ("report_to", True, "must be a service or a list of services, got true", None),
        ("report_to", [1], "must be a service or a list of services, got a list", None),
        ("logging_dir", 3, "must be a text, got 3", None),
        ("deepspeed", True, "several processes train by DDP or FSDP, through accelerate", "remove it"),
        ("fsdp", "full_shard offload", None, "write true"),
        ("fsdp", 1, "must be true or false or a text, got 1", None),
        ("fsdp_config", "file.json", "must be a mapping, got a text", "give the content"),
        ("fsdp_config", {"cpu_offload": True}, None, "leave it out"),
        ("fsdp_config", {"fsdp_version": 1}, "fsdp_version must be one of 2, '2', got 1", None),
        ("fsdp_config", {"activation_checkpointing": True}, None, "set gradient_checkpointing"),
        ("fsdp_config", {"state_dict_type": "FULL"}, None, None),
        ("ddp_backend", "glo", None, "did you mean gloo?"),
        ("ddp_static_graph", True, None, "remove it"),
        ("push_to_hub", True, "nothing is uploaded", None),
        ("hub_model_id", "a/b", "nothing is uploaded", None),
        ("output_dir", "x", "checkpoints lie in the cache, the result in the workflow's output_dir", "remove it"),
        ("lr_scheduler_kwargs", [1], None, None),
    ],
)
def test_refused(name: str, value: Any, message: str | None, hint: str | None) -> None:
    (problem,) = check_training_args({name: value})
    assert problem.name == name
    if message is not None:
        assert problem.message == message
    if hint is not None:
        assert problem.hint is not None
        assert problem.hint.startswith(hint)


@pytest.mark.parametrize(
    "args",
    [
        {"bf16": True, "fp16": True},
        {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "epoch"},
        {"load_best_model_at_end": True},
    ],
)
def test_arguments_that_exclude_each_other(args: dict[str, Any]) -> None:
    assert len(check_training_args(args)) == 1


def test_all_problems_are_told() -> None:
    assert len(check_training_args({"a_a": 1, "max_steps": "x", "optim": "zz", "fsdp": 3})) == 4
