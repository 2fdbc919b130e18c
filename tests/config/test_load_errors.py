"""Whatever is wrong with a file: one problem for each root cause, at its line, in the user's spelling."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from coldpress.errors import ConfigError, Problem

Problems = Callable[..., tuple[Problem, ...]]
Write = Callable[..., Path]


def renamed(document: Any, path: str, new: str) -> Any:
    """The document with the last key of `path` renamed, in its place."""
    *way, last = path.split(".")
    node = document
    for key in way:
        node = node[int(key) if isinstance(node, list) else key]
    members = [(new if key == last else key, value) for key, value in node.items()]
    node.clear()
    node.update(members)
    return document


def changed(document: Any, path: str, value: Any) -> Any:
    *way, last = path.split(".")
    node = document
    for key in way:
        node = node[int(key) if isinstance(node, list) else key]
    node[int(last) if isinstance(node, list) else last] = value
    return document


@pytest.mark.parametrize(
    ("path", "typo", "meant"),
    [
        ("input_model", "input_modle", "input_model"),
        ("input_model.type", "typ", "type"),
        ("input_model.model_path", "model_pth", "model_path"),
        ("systems", "system", "systems"),
        ("systems.box.type", "typ", "type"),
        ("systems.box.accelerators", "accelerator", "accelerators"),
        ("systems.box.accelerators.0.device", "devic", "device"),
        ("systems.box.accelerators.0.execution_providers", "execution_provider", "execution_providers"),
        ("data_configs", "data_config", "data_configs"),
        ("data_configs.0.name", "nmae", "name"),
        ("data_configs.0.load_dataset_config", "load_dataset_cfg", "load_dataset_config"),
        ("data_configs.0.load_dataset_config.data_name", "dataname", "data_name"),
        ("data_configs.0.pre_process_data_config", "pre_proces_data_config", "pre_process_data_config"),
        ("data_configs.0.pre_process_data_config.max_seq_len", "max_seq_length", "max_seq_len"),
        ("evaluators", "evaluator_s", "evaluators"),
        ("evaluators.tones.metrics", "metric", "metrics"),
        ("evaluators.tones.metrics.0.name", "nam", "name"),
        ("evaluators.tones.metrics.0.sub_types", "sub_type", "sub_types"),
        ("evaluators.tones.metrics.0.sub_types.0.priority", "prio", "priority"),
        ("passes", "pases", "passes"),
        ("passes.ft.type", "typ", "type"),
        ("passes.ft.r", "rr", "r"),
        ("passes.ft.train_data_config", "train_data_cfg", "train_data_config"),
        ("passes.ft.training_args", "training_arg", "training_args"),
        ("passes.ft.training_args.max_steps", "max_step", "max_steps"),
        ("passes.build.precision", "precison", "precision"),
        ("host", "hots", "host"),
        ("evaluator", "evaluatr", "evaluator"),
        ("output_dir", "outputdir", "output_dir"),
    ],
)
def test_misspelt_key_of_today(today: Any, problems_of: Problems, path: str, typo: str, meant: str) -> None:
    (problem,) = problems_of(renamed(today, path, typo))
    assert problem.path == ".".join([*path.split(".")[:-1], typo])
    assert problem.message in ("unknown key", "unknown training argument")
    assert problem.hint == f"did you mean {meant}?"


@pytest.mark.parametrize(
    ("path", "typo", "meant"),
    [
        ("input_model.config", "confg", "config"),
        ("input_model.config.hf_config", "hf_confg", "hf_config"),
        ("input_model.config.hf_config.model_name", "model_nam", "model_name"),
        ("input_model.config.hf_config.model_loading_args", "model_loadin_args", "model_loading_args"),
        ("input_model.config.hf_config.model_loading_args.trust_remote_code", "trust_remote_cod", "trust_remote_code"),
        ("systems.local_system.config", "configs", "config"),
        ("data_configs.0.load_dataset_config.params", "param", "params"),
        ("data_configs.0.pre_process_data_config.params.corpus_strategy", "corpus_strateg", "corpus_strategy"),
        ("data_configs.0.pre_process_data_config.params.source_max_len", "source_maxlen", "source_max_len"),
        ("passes.lora.config", "confi", "config"),
        ("passes.lora.config.lora_alpha", "lora_alfa", "lora_alpha"),
        ("passes.lora.config.training_args.evaluation_strategy", "evaluation_strateg", "evaluation_strategy"),
        ("passes.lora.config.training_args.group_by_length", "group_by_lenght", "group_by_length"),
        ("engine", "engin", "engine"),
        ("engine.host", "hst", "host"),
        ("engine.execution_providers", "execution_provider", "execution_providers"),
    ],
)
def test_misspelt_key_of_an_old_dialect(local: Any, problems_of: Problems, path: str, typo: str, meant: str) -> None:
    (problem,) = problems_of(renamed(local, path, typo))
    assert problem.path == ".".join([*path.split(".")[:-1], typo])
    assert problem.hint == f"did you mean {meant}?"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("input_model", 3, "must be a mapping, got 3"),
        ("input_model.type", "HfModle", "there is no model of type 'HfModle'"),
        ("input_model.type", "ONNXModel", "ONNXModel is an Olive input that Coldpress does not read yet"),
        ("input_model.model_path", 3, "must be a text or a mapping, got 3"),
        ("input_model.model_path", "", "must not be empty"),
        (
            "input_model.load_kwargs",
            {"torch_dtype": "float31"},
            "must be one of auto, float32, float16, bfloat16, got 'float31'",
        ),
        ("input_model.load_kwargs", {"trust_remote_code": "true"}, "must be true or false, got 'true'"),
        ("input_model.task", "text-generatoin", "there is no task called 'text-generatoin'"),
        ("systems", [], "must be a mapping, got a list"),
        ("systems.box", None, "must be a mapping, got null"),
        ("systems.box.type", "LocalSytem", "there is no system of type 'LocalSytem'"),
        ("systems.box.accelerators", "gpu", "must be a list, got 'gpu'"),
        ("systems.box.accelerators.0.device", "npu", "models for a device of kind npu are not made"),
        ("systems.box.accelerators.0.memory", "8 potatoes", "must be a size such as 8GB, got '8 potatoes'"),
        ("systems.box.hf_token", "yes", "must be true or false, got 'yes'"),
        ("data_configs", {}, "must be a list, got a mapping"),
        ("data_configs.0", "x", "must be a mapping, got 'x'"),
        ("data_configs.0.name", "a b", "must have letters, digits and _ only, got 'a b'"),
        ("data_configs.0.load_dataset_config.data_files", 7, "must be a text or a list or a mapping, got 7"),
        ("data_configs.0.pre_process_data_config.max_seq_len", 0, "must be at least 1, got 0"),
        ("data_configs.0.pre_process_data_config.max_seq_len", "64", "must be a whole number, got '64'"),
        ("data_configs.0.pre_process_data_config.max_seq_len", 64.5, "must be a whole number, got 64.5"),
        ("data_configs.0.pre_process_data_config.max_seq_len", [64], "must be a whole number, got a list"),
        ("data_configs.0.pre_process_data_config.chat_template", 7, "must be true or false or a text, got 7"),
        ("data_configs.0.pre_process_data_config.pad_to_max_len", 1, "must be true or false, got 1"),
        ("evaluators.tones.metrics", [], "must not be empty"),
        ("evaluators.tones.metrics.0.type", "accurcy", "there is no type of metric called 'accurcy'"),
        ("passes", [], "must be a mapping of names to passes"),
        ("passes.ft", 3, "must be a mapping with the key type"),
        ("passes.ft", [], "has no pass: the list is empty"),
        ("passes.ft.type", 3, "must be the name of a pass"),
        ("passes.ft.r", "abc", "must be a whole number, got 'abc'"),
        ("passes.ft.r", True, "must be a whole number, got true"),
        ("passes.ft.r", 0, "must be at least 1, got 0"),
        ("passes.ft.target_modules", "all", "must be a list or all-linear, got 'all'"),
        ("passes.ft.training_args", [], "must be a mapping of training arguments"),
        ("passes.build.precision", "int5", "must be one of fp32, fp16, bf16, int8, int4, got 'int5'"),
        ("passes.build.int4_block_size", 48, "must be one of 16, 32, 64, 128, 256, got 48"),
        ("log_severity_level", 9, "must be at most 4, got 9"),
        ("clean_cache", "no", "must be true or false, got 'no'"),
        ("parity", {"max_kl": -1}, "must be more than 0, got -1"),
        ("workflow_id", "a/b", "must have letters, digits, dots, _ and - only, got 'a/b'"),
    ],
)
def test_wrong_value_in_plain_words(today: Any, problems_of: Problems, path: str, value: Any, message: str) -> None:
    (problem,) = problems_of(changed(today, path, value))
    below = next(iter(value)) if isinstance(value, dict) and value else None
    assert problem.path == (f"{path}.{below}" if below else path)
    assert problem.message == message
    assert "pydantic" not in str(problem)


def test_a_wrong_element_is_told_at_the_element(today: Any, problems_of: Problems) -> None:
    (problem,) = problems_of(changed(today, "passes.ft.target_modules", ["a", 1]))
    assert (problem.path, problem.message) == ("passes.ft.target_modules.1", "must be a text, got 1")


def test_numbers_and_truth_in_quotes_are_told_so(today: Any, problems_of: Problems) -> None:
    today["passes"]["ft"]["r"] = "8"
    today["clean_cache"] = "yes"
    today["passes"]["ft"]["training_args"] = {"max_steps": "5", "bf16": "off"}
    hints = {problem.path: problem.hint for problem in problems_of(today)}
    assert hints == {
        "passes.ft.r": "without quotes",
        "clean_cache": "write true without quotes",
        "passes.ft.training_args.max_steps": "without quotes",
        "passes.ft.training_args.bf16": "write false without quotes",
    }


def test_all_problems_in_one_go_in_file_order(local: Any, problems_of: Problems, write: Write) -> None:
    changed(local, "passes.lora.config.lora_r", "abc")
    changed(local, "passes.builder.config.precision", "int3")
    renamed(local, "data_configs.0.load_dataset_config.params.split", "splt")
    renamed(local, "input_model.config.hf_config.task", "tsk")
    changed(local, "engine.host", "nowhere")
    path = write(json.dumps(local, indent=4))
    text = path.read_text().splitlines()
    problems = problems_of(path)
    assert [problem.path for problem in problems] == [
        "input_model.config.hf_config.tsk",
        "data_configs.0.load_dataset_config.params.splt",
        "passes.lora.config.lora_r",
        "passes.builder.config.precision",
        "engine.host",
    ]
    for problem in problems:
        assert problem.file == str(path)
        assert problem.line is not None
        assert f'"{problem.path.rpartition(".")[2]}"' in text[problem.line - 1]
    error = ConfigError(problems)
    assert str(error).splitlines()[0].startswith(f"{path}:7: input_model.config.hf_config.tsk: unknown key")
    assert error.exit_code == 2


def test_an_unknown_pass_is_one_problem(today: Any, problems_of: Problems) -> None:
    today["passes"]["x"] = {"type": "Lorra", "foo": 1, "bar": 2, "host": "nowhere", "train_data_config": "nothing"}
    (problem,) = problems_of(today)
    assert problem.path == "passes.x.type"
    assert problem.hint == "did you mean LoRA?"


def test_a_missing_key_is_told_under_its_mapping(today: Any, problems_of: Problems) -> None:
    del today["passes"]["ft"]["train_data_config"]
    del today["passes"]["build"]["type"]
    del today["data_configs"][0]["load_dataset_config"]["data_name"]
    problems = problems_of(today)
    assert {problem.path for problem in problems} == {
        "passes.ft.train_data_config",
        "passes.build.type",
        "data_configs.0.load_dataset_config.data_name",
    }
    assert all(problem.message.endswith("is missing") for problem in problems)


def test_names_that_exist_nowhere(today: Any, problems_of: Problems) -> None:
    today["host"] = "bx"
    today["target"] = "bx"
    today["evaluator"] = "tone"
    today["passes"]["ft"]["train_data_config"] = "trian"
    today["evaluators"]["tones"]["metrics"][0]["data_config"] = "zzz"
    today["passes"]["merge"]["host"] = "elsewhere"
    today["parity"] = {"data_config": "qqq"}
    found = {problem.path: problem for problem in problems_of(today)}
    assert found["host"].message == "there is no system called 'bx' (named by target as well)"
    assert found["host"].hint == "did you mean box?"
    assert found["evaluator"].hint == "did you mean tones?"
    assert found["passes.ft.train_data_config"].hint == "did you mean train?"
    assert found["evaluators.tones.metrics.0.data_config"].hint == "there are: train"
    assert found["passes.merge.host"].message == "there is no system called 'elsewhere'"
    assert "parity.data_config" in found
    assert len(found) == 6


def test_a_broken_definition_is_not_reported_again_where_it_is_used(today: Any, problems_of: Problems) -> None:
    today["systems"]["box"]["type"] = "Docker"
    today["data_configs"][0]["type"] = "DummyDataContainer"
    assert [problem.path for problem in problems_of(today)] == ["systems.box.type", "data_configs.0.type"]


def test_definitions_that_nothing_uses_are_fine(today: Any, load: Any) -> None:
    today["systems"]["spare"] = {"type": "AzureML", "aml_compute": "c"}
    today["data_configs"].append({"name": "more", "load_dataset_config": {"data_name": "json"}})
    assert set(load(today).workflow.systems) == {"box", "spare"}


def test_two_data_configs_of_one_name(today: Any, problems_of: Problems) -> None:
    today["data_configs"] *= 2
    (problem,) = problems_of(today)
    assert (problem.path, problem.message) == ("data_configs.1.name", "two data configs are called 'train'")


def test_a_whole_mapping_in_the_wrong_place_is_one_problem(today: Any, problems_of: Problems) -> None:
    today["input_model"]["load_kwargs"] = {"qa": 1, "qb": 1, "qc": 1, "qd": 1, "qe": 1, "qf": 1}
    (problem,) = problems_of(today)
    assert problem.path == "input_model.load_kwargs"
    assert problem.message == "unknown keys: qa, qb, qc, qd, qe, qf"


@pytest.mark.parametrize(
    ("key", "value", "path", "what"),
    [
        ("strategy", "join-sliding-window", "strategy", "needs stride"),
        ("strategy", "join-random", "strategy", "needs max_samples"),
        ("text_template", "{phrase", "text_template", "not a template"),
        ("text_template", "no column", "text_template", "names no column"),
        ("text_template", "{} x", "text_template", "{} names no column"),
        ("text_template", "{a}{b|loss}", "text_template", "under join all of the text carries loss"),
        ("completion_only_loss", True, "completion_only_loss", "needs whole records in a sequence"),
    ],
)
def test_values_that_contradict_each_other(
    today: Any, problems_of: Problems, key: str, value: Any, path: str, what: str
) -> None:
    today["data_configs"][0]["pre_process_data_config"][key] = value
    problems = problems_of(today)
    assert {problem.path for problem in problems} == {f"data_configs.0.pre_process_data_config.{path}"}
    assert what in problems[0].message


@pytest.mark.parametrize(
    ("block", "path", "what"),
    [
        ({"text_template": "{a}{b|loss}", "completion_only_loss": False}, "completion_only_loss", "marks an answer"),
        ({"text_field": "a", "completion_only_loss": True}, "completion_only_loss", "needs label_col"),
        ({"format": "text", "completion_only_loss": True}, "completion_only_loss", "needs label_col"),
        ({"drop_short_sequences": True}, "drop_short_sequences", "does not go with pack"),
        ({"format": "sharegpt", "text_template": "{a}"}, "text_template", "does not go with format sharegpt"),
        ({"format": "alpaca", "text_cols": ["a"]}, "text_cols", "does not go with format alpaca"),
        ({"format": "text", "chat_template": True}, "chat_template", "does not go with format text"),
        ({"use_attention_mask": False, "pad_to_max_len": True}, "use_attention_mask", "would be attended to"),
        ({"format": "chatml"}, "format", "must be one of"),
        ({"assistant_turns": "first"}, "assistant_turns", "must be one of"),
    ],
)
def test_packs_and_formats_that_contradict(
    today: Any, problems_of: Problems, block: dict[str, Any], path: str, what: str
) -> None:
    del today["evaluators"], today["evaluator"]
    today["data_configs"][0]["pre_process_data_config"] = {"strategy": "pack", **block}
    (problem,) = problems_of(today)
    assert problem.path == f"data_configs.0.pre_process_data_config.{path}"
    assert what in problem.message


@pytest.mark.parametrize(
    "block",
    [
        {"completion_only_loss": True},
        {"completion_only_loss": None, "format": None, "assistant_turns": None},
        {"format": "alpaca", "completion_only_loss": True, "chat_template": True},
        {"text_template": "{a b}{c|loss}", "completion_only_loss": True},
        {"text_template": "{a}{c:d|loss}"},
        {"format": "text", "text_field": "a", "label_col": "a", "completion_only_loss": True},
    ],
)
def test_packs_and_formats_that_go_together(today: Any, load: Any, block: dict[str, Any]) -> None:
    del today["evaluators"], today["evaluator"]
    today["data_configs"][0]["pre_process_data_config"] = {"strategy": "pack", **block}
    read = load(today).workflow.data_configs[0].pre_process_data_config
    assert (read.strategy, read.format) == ("pack", block.get("format") or "auto")


def test_a_marked_answer_under_join_is_for_metrics_alone(today: Any, load: Any) -> None:
    """They take the answer's place from it, whatever the strategy."""
    block = {
        **today["data_configs"][0],
        "name": "measured",
        "pre_process_data_config": {"text_template": "{a}{b|loss}"},
    }
    today["data_configs"].append(block)
    assert load(today).workflow.data_configs[-1].pre_process_data_config.strategy == "join"


def test_padding_without_a_mask(today: Any, problems_of: Problems) -> None:
    block = today["data_configs"][0]["pre_process_data_config"]
    block.update({"strategy": "line-by-line", "use_attention_mask": False})
    (problem,) = problems_of(today)
    assert problem.path.endswith("use_attention_mask")


# ---- files that cannot be read


def test_missing_file_suggests_its_neighbour(tmp_path: Path, problems_of: Problems) -> None:
    (tmp_path / "config.json").write_text("{}")
    (problem,) = problems_of(tmp_path / "confg.json")
    assert problem.message == "there is no such file"
    assert problem.file == str(tmp_path / "confg.json")
    assert "config.json" in str(problem.hint)


def test_missing_folder(tmp_path: Path, problems_of: Problems) -> None:
    (problem,) = problems_of(tmp_path / "no" / "config.json")
    assert "there is no folder" in str(problem.hint)


def test_a_folder(tmp_path: Path, problems_of: Problems) -> None:
    (problem,) = problems_of(tmp_path)
    assert problem.message == "is a folder, not a file"


@pytest.mark.skipif(os.name == "nt" or (hasattr(os, "geteuid") and os.geteuid() == 0), reason="root reads everything")
def test_an_unreadable_file(write: Write, problems_of: Problems) -> None:
    path = write("{}")
    path.chmod(0)
    (problem,) = problems_of(path)
    assert "cannot be read" in problem.message


@pytest.mark.parametrize("text", ["", " \n\t\n", "\ufeff"])
def test_an_empty_file(write: Write, problems_of: Problems, text: str) -> None:
    (problem,) = problems_of(write(text))
    assert problem.message == "the file is empty"


@pytest.mark.parametrize(
    ("text", "name"), [("[]", "a.json"), ("- a\n", "a.yaml"), ("3", "a.json"), ("# only\n", "a.yml")]
)
def test_not_a_mapping(write: Write, problems_of: Problems, text: str, name: str) -> None:
    (problem,) = problems_of(write(text, name))
    assert problem.message == "a config must be a mapping of keys to values"


def test_not_utf8(tmp_path: Path, problems_of: Problems) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'{\n"a": "\xff"}')
    (problem,) = problems_of(path)
    assert (problem.line, problem.message) == (2, "not UTF-8 text")
    path.write_text('{"a": 1}', encoding="utf-16")
    assert "UTF-16" in problems_of(path)[0].message


def test_a_byte_order_mark_is_no_matter(write: Write, today: Any, load: Any) -> None:
    path = write("\ufeff" + json.dumps(today))
    assert load(path).line_of("input_model") == 1


def test_repeated_keys_and_other_problems_come_together(write: Write, problems_of: Problems) -> None:
    text = '{"input_model": {"type": "HfModel", "model_path": "a",\n"model_path": "b"},\n"hots": 1}'
    problems = problems_of(write(text))
    assert [(problem.line, problem.path) for problem in problems] == [(2, "input_model.model_path"), (3, "hots")]


def test_a_mapping_of_strange_values(today: Any, problems_of: Problems, load: Any) -> None:
    today["output_dir"] = Path("there")
    assert load(today).workflow.output_dir == "there"
    today["output_dir"] = {1, 2}
    assert "could not be written as JSON" in problems_of(today)[0].message


def test_content_decides_where_the_name_does_not(write: Write, today: Any, load: Any) -> None:
    assert load(write(json.dumps(today), "workflow")).workflow.output_dir == "out"
    text = "input_model:\n  type: HfModel\n  model_path: a/b\n"
    assert load(write(text, "workflow.txt")).workflow.input_model.model_path == "a/b"


def test_remarks_are_left_out(today: Any, load: Any) -> None:
    today["// why"] = "x"
    today["passes"]["ft"]["_comment"] = ["y"]
    today["input_model"]["$comment"] = "z"
    today["$schema"] = "./coldpress.schema.json"
    document: Mapping[str, Any] = load(today).document
    assert "why" not in json.dumps(document)
    assert "_comment" not in json.dumps(document)
    assert "$schema" not in document


@pytest.mark.parametrize("of_a_pass", [False, True])
def test_accuracy_needs_an_answer(today: Any, write: Write, problems_of: Problems, of_a_pass: bool) -> None:
    del today["data_configs"][0]["pre_process_data_config"]["label_col"]
    if of_a_pass:
        del today["evaluator"]
        today["passes"]["ft"]["evaluator"] = "tones"
    text = json.dumps(today, indent=1)
    (problem,) = problems_of(write(text))
    assert problem.path == "evaluators.tones.metrics.0.data_config"
    assert problem.file.endswith("config.json")
    assert text.splitlines()[(problem.line or 0) - 1].strip() == '"data_config": "train"'
    assert "the data config train names no answer" in problem.message
    assert "label_col" in (problem.hint or "")


def test_accuracy_on_chats_or_unused_needs_none(today: Any, load: Callable[..., Any]) -> None:
    block = today["data_configs"][0]["pre_process_data_config"]
    del block["label_col"]
    load({**today, "evaluator": None})
    del block["text_template"]
    block["chat_template"] = True
    load(today)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("input", "cannot be called input"),
        ("../up", "no name for a step"),
        ("/tmp/there", "no name for a step"),
        ("..", "no name for a step"),
        ("a\x00b", "no name for a step"),
        ("long" * 60, "no name for a step"),
    ],
)
def test_names_of_steps(name: str, message: str, today: Any, problems_of: Problems) -> None:
    today["passes"] = {name: today["passes"]["ft"]}
    (problem,) = problems_of(today)
    assert message in problem.message
