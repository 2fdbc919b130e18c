"""The config language of a search: what is searched, what each point is, and what is refused."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from coldpress.config.json_schema import workflow_json_schema
from coldpress.config.load import LoadedConfig, load_config
from coldpress.config.migrate import write_migrated
from coldpress.config.search_strategy import SamplerConfig, SearchStrategy
from coldpress.config.space import Space
from coldpress.errors import ConfigError, Problem
from coldpress.registry import PASSES

Problems = Callable[..., tuple[Problem, ...]]
Load = Callable[..., LoadedConfig]
Write = Callable[[str, str], Path]

LORA = {"type": "LoRA", "train_data_config": "train"}
QLORA = {"type": "QLoRA", "train_data_config": "train", "r": 4}


@pytest.fixture
def searched(today: Any) -> Any:
    """A search of three settings: the builder's block sizes."""
    today["search_strategy"] = True
    return today


def put(document: Any, path: str, value: Any) -> Any:
    *way, last = path.split(".")
    node = document
    for key in way:
        node = node[int(key) if isinstance(node, list) else key]
    node[int(last) if isinstance(node, list) else last] = value
    return document


def sizes(config: LoadedConfig) -> dict[str, int]:
    assert config.space is not None
    return {one.name: len(one.choices) for one in config.space.dimensions}


def choices(config: LoadedConfig, name: str) -> tuple[Any, ...]:
    assert config.space is not None
    (found,) = [one.choices for one in config.space.dimensions if one.name == name]
    return found


def params(config: LoadedConfig, name: str) -> Any:
    return config.workflow.passes[name].config


# ---- the strategy


def test_true_takes_the_defaults(searched: Any, load: Load) -> None:
    workflow = load(searched).workflow
    assert workflow.search_strategy is True
    assert workflow.strategy == SearchStrategy()


@pytest.mark.parametrize("value", [False, None])
def test_without_a_search_there_is_no_space(today: Any, load: Load, value: Any) -> None:
    today["search_strategy"] = value
    config = load(today)
    assert config.workflow.strategy is None
    assert config.space is None
    with pytest.raises(ValueError, match="no search"):
        config.at({})


@pytest.mark.parametrize(
    "value",
    [
        {"execution_order": "JOINT", "sampler": "Random", "max_samples": 5, "seed": 0},
        {"execution_order": "joint", "sampler": "random", "sampler_config": {"max_samples": 5, "seed": 0}},
        {"sampler": "random", "seed": 0, "sampler_config": {"max_samples": 5, "multivariate": True, "group": True}},
    ],
)
def test_flat_and_nested(searched: Any, load: Load, value: Any) -> None:
    searched["search_strategy"] = value
    config = load(searched)
    expected = SearchStrategy(sampler="random", sampler_config=SamplerConfig(max_samples=5, seed=0))
    assert config.workflow.strategy == expected
    assert config.document["search_strategy"]["sampler_config"] == {"max_samples": 5, "seed": 0}
    told = {str(rewrite) for rewrite in config.rewrites}
    if "max_samples" in value:
        assert "olive: search_strategy.max_samples -> search_strategy.sampler_config.max_samples" in told


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"search_algorithm": "exhaustive"}, ("sequential", 0, 1)),
        ({"search_algorithm": "tpe"}, ("tpe", 1, 1)),
        ({"search_algorithm": "random", "num_samples": 7}, ("random", 7, 1)),
        ({"search_algorithm": "nsgaII", "search_algorithm_config": {"num_samples": 3, "seed": 9}}, ("nsga2", 3, 9)),
        ({"search_algorithm": "random", "with_replacement": True, "seed": 2}, ("random", 1, 2)),
        ({"search_algorithm": None}, ("tpe", 0, 1)),
    ],
)
def test_the_names_and_defaults_before_0_8(local: Any, load: Load, value: Any, expected: Any) -> None:
    sub = {"name": "perplexity", "priority": 1}
    data = local["data_configs"][0]["name"]
    metric = {"name": "ppl", "type": "perplexity", "sub_types": [sub], "data_config": data}
    local["evaluators"] = {"tones": {"metrics": [metric]}}
    local["engine"]["evaluator"] = "tones"
    local["engine"]["search_strategy"] = {"output_model_num": 2, "max_time": 60, **value}
    config = load(local)
    strategy = config.workflow.strategy
    assert strategy is not None
    assert strategy.max_time == 60
    assert (strategy.sampler, strategy.sampler_config.max_samples, strategy.sampler_config.seed) == expected
    assert any(warning.path == "engine.search_strategy.output_model_num" for warning in config.warnings)
    if value.get("search_algorithm"):
        assert any(one.old == "engine.search_strategy.search_algorithm" for one in config.rewrites)
    assert load(json.loads(json.dumps(config.document))).workflow == config.workflow


def test_search_algorithm_tells_the_dialect(searched: Any, load: Load) -> None:
    searched["search_strategy"] = {"search_algorithm": "tpe"}
    searched["passes"]["ft"] = {"type": "LoRA", "lora_r": [8, 16], "train_data_config": "train"}
    config = load(searched)
    assert config.dialect == "0.7"
    assert choices(config, "ft.r") == (8, 16)


@pytest.mark.parametrize(
    ("value", "path", "message", "hint"),
    [
        (1, "", "must be true or false or a mapping, got 1", None),
        (0, "", "must be true or false or a mapping, got 0", None),
        ("true", "", "must be true or false or a mapping, got 'true'", "write true without quotes"),
        ([], "", "must be true or false or a mapping, got a list", None),
        ({"sampler": "tpx"}, "sampler", "must be one of sequential, random, tpe, nsga2, got 'tpx'", "tpe?"),
        ({"sampler": "qmc"}, "sampler", "qmc is a sampler of older Olives that Coldpress does not have", "nearest"),
        ({"samplr": "tpe"}, "samplr", "unknown key", "did you mean sampler?"),
        ({"sampler_config": 3, "seed": 1}, "sampler_config", "must be a mapping, got 3", None),
        ({"max_samples": True}, "max_samples", "must be a whole number, got true", None),
        ({"max_samples": "3"}, "max_samples", "must be a whole number, got '3'", "without quotes"),
        ({"max_samples": -1}, "max_samples", "must be at least 0, got -1", None),
        ({"seed": -1}, "seed", "must be at least 0, got -1", None),
        (
            {"max_samples": 3, "sampler_config": {"max_samples": 4}},
            "max_samples",
            "given twice: here and as search_strategy.sampler_config.max_samples",
            "keep one of them",
        ),
        ({"execution_order": "x"}, "execution_order", "must be one of joint, pass-by-pass, got 'x'", None),
        ({"max_iter": 0}, "max_iter", "must be at least 1, got 0", None),
        ({"max_time": 0}, "max_time", "must be more than 0, got 0", None),
        ({"stop_when_goals_met": 1}, "stop_when_goals_met", "must be true or false, got 1", None),
        ({"max_concurrent_trials": 0}, "max_concurrent_trials", "must be at least 1, got 0", None),
    ],
)  # fmt: skip
def test_a_wrong_strategy(
    searched: Any, problems_of: Problems, value: Any, path: str, message: str, hint: str | None
) -> None:
    searched["search_strategy"] = value
    (problem,) = problems_of(searched)
    assert problem.path == ".".join(["search_strategy", *([path] if path else [])])
    assert problem.message == message
    assert (hint or "") in (problem.hint or "")


# ---- who says which result is better


def test_a_search_needs_an_evaluator(searched: Any, load: Load, problems_of: Problems) -> None:
    del searched["evaluator"]
    (problem,) = problems_of(searched)
    assert problem.path == "search_strategy"
    assert problem.message == "a search compares results, and no evaluator measures them"
    assert problem.hint == "write evaluator: NAME (there are: tones), or search_strategy: false"
    searched["passes"]["ft"]["evaluator"] = "tones"
    (problem,) = problems_of(searched)
    searched["passes"]["build"]["evaluator"] = "tones"
    assert load(searched).space is not None, "the last pass's own"


def test_a_search_needs_a_priority_or_a_goal(searched: Any, load: Load, problems_of: Problems) -> None:
    sub = searched["evaluators"]["tones"]["metrics"][0]["sub_types"][0]
    del sub["priority"]
    (problem,) = problems_of(searched)
    assert problem.path == "search_strategy"
    assert "nothing in tones has a priority or a goal" in problem.message
    hint = "give one of evaluators.tones.metrics sub_types: [{name: ..., priority: 1}], or a goal there"
    assert problem.hint == hint
    sub["goal"] = {"type": "threshold", "value": 0.5}
    assert load(searched).space is not None


@pytest.mark.parametrize(("value", "message"), [("tone", "there is no evaluator"), (3, "must be a text, got 3")])
def test_an_evaluator_that_is_wrong_is_one_problem(
    searched: Any, problems_of: Problems, value: Any, message: str
) -> None:
    searched["evaluator"] = value
    (problem,) = problems_of(searched)
    assert problem.message.startswith(message)


# ---- what is searched


def test_lists_words_and_defaults(searched: Any, load: Load) -> None:
    searched["passes"]["ft"].update({"r": "SEARCHABLE_VALUES", "alpha": [8, 16.5], "lora_dropout": [0.1]})
    searched["passes"]["ft"]["training_args"] = {"learning_rate": [1e-4, 1e-3], "max_steps": 5}
    config = load(searched)
    assert sizes(config) == {
        "ft.r": 3, "ft.alpha": 2, "ft.training_args.learning_rate": 2, "build.int4_block_size": 3
    }  # fmt: skip
    assert config.space is not None
    assert config.space.size == 36
    (told,) = [one for one in config.rewrites if one.rule == "search.include_pass_params"]
    assert told.new == "searches build.int4_block_size (3); 36 settings in all"
    last = config.at(list(config.space.points())[-1])
    ft = params(last, "ft")
    assert (ft.r, ft.alpha, ft.lora_dropout, ft.training_args["learning_rate"]) == (64, 16.5, 0.1, 1e-3)
    assert ft.training_args["max_steps"] == 5
    assert ft.training_args["lr_scheduler_type"] == "constant", "the defaults of a training hold at every point"
    assert params(last, "build").int4_block_size == 128
    assert params(config, "ft").r == 16, "the workflow is that of the first values"


def test_only_what_the_file_lists(searched: Any, load: Load) -> None:
    searched["search_strategy"] = {"include_pass_params": False}
    searched["passes"]["ft"] = dict(LORA)
    config = load(searched)
    assert config.space == Space()
    assert config.at({}).workflow.passes == config.workflow.passes
    searched["passes"]["ft"]["r"] = "SEARCHABLE_VALUES"
    assert sizes(load(searched)) == {"ft.r": 3}


@pytest.mark.parametrize("change", [{"disable_search": True}, {"r": "DEFAULT_VALUE"}])
def test_a_pass_that_is_not_searched(searched: Any, load: Load, change: Any) -> None:
    searched["passes"]["ft"] = {**LORA, **change}
    config = load(searched)
    assert sizes(config) == {"build.int4_block_size": 3}
    assert params(config, "ft").r == 64
    assert config.document["passes"]["ft"]["r"] == "DEFAULT_VALUE", "so that today's language says it as well"
    assert "r" not in config.at({}).document["passes"]["ft"]


def test_a_rank_that_is_listed_under_its_older_name_is_searched(searched: Any, load: Load) -> None:
    searched["passes"]["ft"] = {**LORA, "lora_r": [8, 16], "disable_search": True}
    config = load(searched)
    assert choices(config, "ft.r") == (8, 16)
    assert not any("DEFAULT_VALUE" in line for line in map(str, config.rewrites))


def test_dimensions_stand_in_the_order_of_the_schema(searched: Any, load: Load) -> None:
    searched["passes"]["ft"] = {"bias": ["none", "all"], "training_args": {"seed": [1, 2]}, "alpha": [8, 16], **LORA}
    assert list(sizes(load(searched)))[:4] == ["ft.r", "ft.alpha", "ft.bias", "ft.training_args.seed"]


def test_an_adapter_that_is_there_already_has_its_rank(searched: Any, load: Load) -> None:
    searched["passes"]["ft"] = dict(LORA)
    assert "ft.r" in sizes(load(searched))
    searched["input_model"]["adapter_path"] = "some/adapter"
    assert "ft.r" not in sizes(load(searched))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"precision": "fp32"}, {}),
        ({"precision": "int8"}, {"build.int4_block_size": 3}),
        ({"precision": ["fp32", "fp16"]}, {"build.precision": 2}),
        ({"precision": ["fp32", "int4"]}, {"build.precision": 2, "build.int4_block_size": 3}),
        ({"precision": "SEARCHABLE_VALUES"}, {"build.precision": 2, "build.int4_block_size": 3}),
        ({"extra_options": {"block_size": 32}}, {}),
        ({"int4_block_size": 32}, {}),
    ],
)
def test_candidates_without_effect_are_not_searched(searched: Any, load: Load, change: Any, expected: Any) -> None:
    searched["passes"]["build"].update(change)
    assert sizes(load(searched)) == expected


def test_what_has_no_effect_at_a_point_is_left_out_there(searched: Any, load: Load) -> None:
    searched["passes"]["build"].update({"precision": ["fp32", "int4"], "int4_block_size": [64, 128]})
    config = load(searched)
    point = {"build.precision": 0, "build.int4_block_size": 1}
    assert config.at(point).document["passes"]["build"] == {"type": "ModelBuilder", "precision": "fp32"}
    assert config.at({**point, "build.precision": 1}).document["passes"]["build"]["int4_block_size"] == 128


@pytest.mark.parametrize(("value", "place"), [([32, 48], ".1"), ([48, 32], ".0"), (48, "")])
def test_values_are_checked_where_they_have_an_effect(
    searched: Any, problems_of: Problems, value: Any, place: str
) -> None:
    searched["passes"]["build"].update({"precision": ["fp32", "int4"], "int4_block_size": value})
    (problem,) = problems_of(searched)
    assert problem.path == f"passes.build.int4_block_size{place}"
    assert problem.message == "must be one of 16, 32, 64, 128, 256, got 48"


@pytest.mark.parametrize("value", [32, [32, 64], "SEARCHABLE_VALUES"])
def test_a_value_that_has_no_effect_at_any_setting(searched: Any, problems_of: Problems, value: Any) -> None:
    searched["passes"]["build"].update({"precision": ["fp32", "fp16"], "int4_block_size": value})
    (problem,) = problems_of(searched)
    assert problem.path == "passes.build.int4_block_size"
    assert problem.message == "has no effect at precision fp32, fp16, the values that are searched"
    assert problem.hint == "leave it out, or search precision int4, int8 as well"


def test_the_default_value_needs_no_effect(searched: Any, load: Load) -> None:
    searched["passes"]["build"].update({"precision": ["fp32", "fp16"], "disable_search": True})
    assert sizes(load(searched)) == {"build.precision": 2}


def test_a_parameter_that_takes_a_list_is_searched_by_lists(searched: Any, load: Load) -> None:
    searched["passes"]["ft"]["target_modules"] = ["q_proj", "v_proj"]
    assert "ft.target_modules" not in sizes(load(searched))
    searched["passes"]["ft"]["target_modules"] = [["q_proj"], ["q_proj", "v_proj"], "all-linear"]
    config = load(searched)
    assert choices(config, "ft.target_modules") == (["q_proj"], ["q_proj", "v_proj"], "all-linear")
    assert params(config.at({"ft.target_modules": 1}), "ft").target_modules == ("q_proj", "v_proj")


def test_data_is_searched_too(searched: Any, load: Load, problems_of: Problems) -> None:
    inline = {"load_dataset_config": {"params": {"data_name": "json", "data_files": "q.json"}}}
    searched["passes"]["ft"]["train_data_config"] = ["train", inline]
    config = load(searched)
    assert choices(config, "ft.train_data_config") == ("train", "ft_train_data")
    searched["passes"]["ft"]["train_data_config"] = ["train", "trian"]
    (problem,) = problems_of(searched)
    assert (problem.path, problem.hint) == ("passes.ft.train_data_config.1", "did you mean train?")


def test_duplicates_are_dropped_with_a_warning(searched: Any, load: Load) -> None:
    searched["passes"]["ft"]["alpha"] = [16, 16.0, 32]
    searched["passes"]["merge"] = [{"type": "MergeAdapterWeights"}, {"type": "mergeadapterweights", "config": {}}]
    config = load(searched)
    assert choices(config, "ft.alpha") == (16, 32)
    assert "merge" not in sizes(config)
    assert {warning.path for warning in config.warnings} == {"passes.ft.alpha.1", "passes.merge.1"}


@pytest.mark.parametrize(
    ("parameter", "support", "expected"),
    [("r", {"type": "Categorical", "support": [8, 16]}, (8, 16)), ("r", {"type": "categorical", "support": [8]}, None)],
)
def test_olives_written_out_search_parameters(
    searched: Any, load: Load, parameter: str, support: Any, expected: Any
) -> None:
    searched["passes"]["ft"][parameter] = {"olive_parameter_type": "SearchParameter", **support}
    config = load(searched)
    assert config.document["passes"]["ft"]["r"] == support["support"]
    if expected:
        assert choices(config, "ft.r") == expected


@pytest.mark.parametrize(
    ("old", "value", "today_key", "expected"),
    [
        ("evaluation_strategy", ["no", "steps"], "eval_strategy", ("no", "steps")),
        ("warmup_ratio", [0.0, 0.1], "warmup_steps", (0.0, 0.1)),
        ("optim", ["adamw_hf", "adafactor"], "optim", ("adamw_torch", "adafactor")),
        ("optim", ["paged_adamw_32bit", "adafactor"], "optim", ("adamw_torch", "adafactor")),
    ],
)
def test_older_training_arguments(
    searched: Any, load: Load, old: str, value: Any, today_key: str, expected: tuple[Any, ...]
) -> None:
    searched["passes"]["ft"].update({"training_args": {old: value}, "eval_dataset_size": 0.1})
    assert choices(load(searched), f"ft.training_args.{today_key}") == expected


# ---- alternatives


def test_alternatives_are_read_like_a_single_pass(searched: Any, load: Load) -> None:
    nested = {
        "type": "qlora",
        "config": {"train_data_config": "train", "r": [4, 8], "training_args": {"no_cuda": True}},
    }
    searched["passes"]["ft"] = [dict(LORA), nested, {**LORA, "r": 2, "double_quant": True}]
    config = load(searched)
    assert choices(config, "ft") == ("LoRA", "QLoRA", "LoRA 2")
    assert sizes(config) == {"ft": 3, "ft[LoRA].r": 3, "ft[QLoRA].r": 2, "build.int4_block_size": 3}
    assert config.space is not None
    assert config.space.size == (3 + 2 + 1) * 3
    assert [warning.path for warning in config.warnings] == ["passes.ft.2.double_quant"]
    told = {str(rewrite) for rewrite in config.rewrites}
    old = "passes.ft.1.config.training_args.no_cuda"
    assert f"transformers-4: {old} -> passes.ft.1.training_args.use_cpu" in told
    second = config.at({"ft": 1, "ft[QLoRA].r": 1})
    assert (second.workflow.passes["ft"].type, params(second, "ft").r) == ("QLoRA", 8)
    assert params(second, "ft").training_args["use_cpu"] is True
    assert params(second, "ft").training_args["optim"] == "adamw_torch", "QLoRA's own default, on the CPU"
    assert params(config.at({"ft": 2}), "ft").r == 2
    assert params(config, "ft").r == 16


def test_without_a_search_the_first_alternative_is_used(today: Any, load: Load) -> None:
    today["passes"]["build"] = [today["passes"]["build"], {"type": "OnnxConversion"}]
    config = load(today)
    assert params(config, "build").precision == "int4"
    (warning,) = config.warnings
    assert warning.path == "passes.build"
    assert warning.message == "2 alternatives, and search_strategy is off: the first is used"
    assert warning.hint == "search_strategy: true compares them"


def test_systems_of_alternatives(searched: Any, load: Load) -> None:
    gpu = {"type": "LocalSystem", "accelerators": [{"device": "gpu"}]}
    searched["passes"]["ft"] = [dict(LORA), {**QLORA, "host": gpu}]
    config = load(searched)
    assert config.at({"ft": 1}).workflow.passes["ft"].host == "ft_1_host"
    assert params(config.at({"ft": 1}), "ft").training_args["optim"] == "paged_adamw_32bit"
    assert config.workflow.passes["ft"].host is None


def test_a_builder_before_one_that_takes_the_adapter_out(searched: Any) -> None:
    passes = {name: PASSES[name].Config for name in PASSES}
    build = {"type": "ModelBuilder", "precision": "int4", "profile": "fast"}
    searched["passes"] = {
        "build": [build, {**build, "profile": "balanced"}],
        "last": [{"type": "ExtractAdapters"}, {"type": "MergeAdapterWeights"}],
    }
    config = load_config(searched, passes=passes)
    for index, adapter in enumerate(["inputs", "merge"]):
        for builder in (0, 1):
            at = config.at({"build": builder, "last": index})
            assert params(at, "build").adapter == adapter
    searched["passes"]["last"] = {"type": "ExtractAdapters"}
    config = load_config(searched, passes=passes)
    assert {one["adapter"] for one in config.document["passes"]["build"]} == {"inputs"}


# ---- points


def everything(today: Any) -> Any:
    today["search_strategy"] = {"sampler": "random", "seed": 3}
    today["passes"]["ft"] = [
        {**LORA, "config": {"training_args": {"learning_rate": [1e-4, 1e-3], "evaluation_strategy": "no"}}},
        {**QLORA, "alpha": [8, 16], "target_modules": [["q_proj"], None]},
    ]
    today["passes"]["build"]["precision"] = ["fp32", "int4", "int8"]
    return today


def test_every_point_is_a_workflow_and_its_document_reproduces_it(today: Any, load: Load) -> None:
    config = load(everything(today))
    assert config.space is not None
    again = load(json.loads(json.dumps(config.document)))
    assert again.space == config.space
    assert again.workflow == config.workflow
    seen = set()
    for point in config.space.points():
        at = config.at(point)
        assert at.space is None
        assert at.workflow.search_strategy is False
        assert at.workflow.strategy is None
        assert load(json.loads(json.dumps(at.document))).workflow == at.workflow
        assert list(at.document) == list(config.document)
        seen.add(json.dumps(at.document))
    # int4_block_size has no effect at fp32, so three points are one workflow there.
    assert config.space.size == (2 * 3 + 2 * 2) * 9
    assert len(seen) == (2 * 3 + 2 * 2) * 7
    assert config.at(next(config.space.points())).workflow.passes == config.workflow.passes


def test_a_point_of_the_first_steps_takes_the_first_choice_of_the_others(today: Any, load: Load) -> None:
    config = load(everything(today))
    assert config.space is not None
    first = list(config.space.of_step("ft").points())[-1]
    at = config.at(first)
    assert at.workflow.passes["ft"].type == "QLoRA"
    assert params(at, "build").precision == "fp32"
    assert config.at({"ft": 1}).workflow.passes["ft"].config.model_dump()["alpha"] == 8


def test_points_do_not_change_each_other_or_the_config(today: Any, load: Load) -> None:
    config = load(everything(today))
    assert config.space is not None
    points = list(config.space.points())
    before = json.dumps(config.document)
    forth = [config.at(point).workflow for point in points]
    back = [config.at(point).workflow for point in reversed(points)]
    assert forth == back[::-1]
    fresh = load(everything(today))
    assert [fresh.at(point).workflow for point in reversed(points)] == back
    assert json.dumps(config.document) == before


def test_eval_strategy_follows_the_data_of_the_point(searched: Any, load: Load) -> None:
    searched["passes"]["ft"].update({"eval_data_config": [None, "train"], "training_args": {"eval_strategy": "steps"}})
    config = load(searched)
    for _ in range(2):
        assert params(config.at({"ft.eval_data_config": 0}), "ft").training_args["eval_strategy"] == "no"
        assert params(config.at({"ft.eval_data_config": 1}), "ft").training_args["eval_strategy"] == "steps"


def test_a_point_takes_milliseconds(today: Any, load: Load) -> None:
    config = load(everything(today))
    assert config.space is not None
    points = list(config.space.points())
    start = time.perf_counter()
    for point in points:
        config.at(point)
    assert (time.perf_counter() - start) / len(points) < 0.01


def test_lines_of_a_point(write: Write, load: Load) -> None:
    text = """input_model: {model_path: some/model}
data_configs:
  - {name: train, load_dataset_config: {data_name: json, data_files: a.json}}
evaluators:
  e: {metrics: [{name: p, type: perplexity, data_config: train, sub_types: [{name: perplexity, priority: 1}]}]}
evaluator: e
search_strategy: true
passes:
  ft:
    - type: LoRA
      train_data_config: train
    - type: QLoRA
      train_data_config: train
      r:
        - 4
        - 8
"""
    config = load(write(text, "config.yaml"))
    assert config.line_of("passes.ft.1.r.1") == 16
    at = config.at({"ft": 1, "ft[QLoRA].r": 1})
    assert at.line_of("passes.ft.type") == 12
    assert at.line_of("passes.ft.r") == 16
    assert at.line_of("passes.ft.lora_dropout") == 12, "what is nearest above it"
    assert config.at({}).line_of("passes.ft.r") == 10, "a default of the search stands where its pass does"
    assert at.line_of("evaluators.e") == 5


def test_settings_that_do_not_go_together_are_told_with_their_place(
    searched: Any, load: Load, write: Write, problems_of: Problems
) -> None:
    searched["passes"]["ft"]["training_args"] = {"bf16": [False, True], "fp16": [False, True]}
    path = write(json.dumps(searched, indent=1), "config.json")
    config = load(path)
    with pytest.raises(ConfigError) as caught:
        config.at({"ft.training_args.bf16": 1, "ft.training_args.fp16": 1})
    (problem,) = caught.value.problems
    assert problem.path == "passes.ft.training_args.fp16.1"
    assert problem.message == "bf16 and fp16 exclude each other"
    assert problem.file == str(path)
    assert "true" in path.read_text().splitlines()[(problem.line or 0) - 1]
    assert config.at({"ft.training_args.bf16": 1}).workflow.passes
    searched["passes"]["ft"]["training_args"] = {"bf16": [False, True], "fp16": True}
    (problem,) = problems_of(searched)
    assert problem.path == "passes.ft.training_args.fp16", "no setting takes bf16: true"


def test_what_is_no_point_of_the_space(searched: Any, load: Load) -> None:
    with pytest.raises(ValueError, match=r"no dimension 'ft\.r'"):
        load(searched).at({"ft.r": 0})


def test_overrides_ask_for_a_search(searched: Any, load: Load) -> None:
    searched["search_strategy"] = False
    config = load(searched, "search_strategy=true", "passes.ft.r=[2,4]", "passes.build.precision=fp32")
    assert sizes(config) == {"ft.r": 2}


@pytest.mark.parametrize("name", ["new.json", "new.yaml"])
def test_migrate_writes_a_search_in_todays_language(searched: Any, load: Load, tmp_path: Path, name: str) -> None:
    searched["search_strategy"] = {"search_algorithm": "random", "num_samples": 5, "seed": 2}
    searched["passes"]["ft"] = [
        {"type": "LoRA", "config": {"lora_r": [8, 16], "train_data_config": "train"}},
        {"type": "QLoRA", "config": {"lora_r": 8, "train_data_config": "train"}, "disable_search": True},
    ]
    old = load(searched)
    write_migrated(old, tmp_path / name)
    new = load(tmp_path / name)
    assert new.dialect == "today"
    assert (new.workflow, new.space) == (old.workflow, old.space)
    assert new.document == old.document
    assert [rewrite.rule for rewrite in new.rewrites] == ["search.include_pass_params"]


# ---- what is refused

WAY = "write search_strategy: true, or one value"


@pytest.mark.parametrize(
    ("path", "value"),
    [("passes.ft.r", [8, 16]), ("passes.ft.r", [8]), ("passes.ft.training_args.learning_rate", [1e-4, 1e-3])],
)
def test_a_list_without_a_search(today: Any, problems_of: Problems, path: str, value: Any) -> None:
    (problem,) = problems_of(put(today, path, value))
    assert (problem.path, problem.hint) == (path, WAY)
    assert problem.message == "a list of values to try is a search, and search_strategy is off"


@pytest.mark.parametrize("path", ["passes.ft.r", "passes.build.precision", "passes.ft.training_args.learning_rate"])
def test_the_word_without_a_search(today: Any, problems_of: Problems, path: str) -> None:
    (problem,) = problems_of(put(today, path, "SEARCHABLE_VALUES"))
    assert (problem.path, problem.hint) == (path, WAY)
    assert problem.message == "SEARCHABLE_VALUES asks for a search, and search_strategy is off"


LIST = "list the values to try"
KNOWN = "those of r, alpha, training_args.learning_rate are known"


@pytest.mark.parametrize(
    ("path", "value", "place", "message", "hint"),
    [
        ("ft.r", ["x", 8], "ft.r.0", "must be a whole number, got 'x'", None),
        ("ft.r", [8, "x"], "ft.r.1", "must be a whole number, got 'x'", None),
        ("ft.r", [8, 0], "ft.r.1", "must be at least 1, got 0", None),
        ("ft.r", [8, True], "ft.r.1", "must be a whole number, got true", None),
        ("ft.r", [8, None], "ft.r.1", "must be a whole number, got null", None),
        ("ft.r", [[8]], "ft.r.0", "must be a whole number, got a list", None),
        ("ft.r", [], "ft.r", "an empty list: there is nothing to try", f"{LIST}, or leave it out"),
        ("ft.r", [8, "DEFAULT_VALUE"], "ft.r.1", "DEFAULT_VALUE stands for a whole parameter", "list the values"),
        ("ft.r", ["SEARCHABLE_VALUES"], "ft.r.0", "SEARCHABLE_VALUES stands for a whole", "list the values"),
        ("ft.rr", [8, 16], "ft.rr", "unknown key", "did you mean r?"),
        ("ft.rr", "SEARCHABLE_VALUES", "ft.rr", "unknown key", "did you mean r?"),
        ("ft.bias", "SEARCHABLE_VALUES", "ft.bias", f"there are no candidates for bias; {KNOWN}", LIST),
        ("ft.train_data_config", "SEARCHABLE_VALUES", "ft.train_data_config", "there are no candidates", LIST),
        ("ft.training_args.seed", "SEARCHABLE_VALUES", "ft.training_args.seed", "there are no candidates", LIST),
        ("merge.x", "SEARCHABLE_VALUES", "merge.x", "unknown key", None),
        ("ft.training_args.max_step", [1, 2], "ft.training_args.max_step", "unknown training arg", "max_steps"),
        ("ft.training_args.max_steps", [5, "x"], "ft.training_args.max_steps.1", "must be a whole number", None),
        ("ft.training_args.max_steps", [], "ft.training_args.max_steps", "an empty list", LIST),
        ("ft.training_args", [{}, {"seed": 1}], "ft.training_args", "must be a mapping", "argument by argument"),
        ("ft.training_args.group_by_length", [True, False], "ft.training_args.group_by_length", "a list of values;",
         "list the values of train_sampling_strategy instead"),
        ("ft.type", ["LoRA", "QLoRA"], "ft.type", "must be the name of a pass", "alternatives are a list of passes"),
        ("ft.host", ["box"], "ft.host", "must be a text, got a list", None),
        ("ft.disable_search", "x", "ft.disable_search", "must be true or false, got 'x'", None),
        ("ft.r", {"olive_parameter_type": "SearchParameter", "type": "Conditional"}, "ft.r",
         "a search parameter of type 'Conditional' is not read", LIST),
        ("ft", [], "ft", "has no pass: the list is empty", "name one pass"),
        ("ft", [LORA, 3], "ft.1", "must be a mapping with the key type", None),
        ("ft", [LORA, [LORA]], "ft.1", "must be a mapping with the key type", None),
        ("ft", [LORA, {"r": 3}], "ft.1.type", "the key type is missing", "passes: LoRA"),
        ("ft", [LORA, {"type": "Gptq"}], "ft.1.type", "Gptq is an Olive pass that", "remove it: ModelBuilder"),
        ("ft", [LORA, {"type": "LoRo"}], "ft.1.type", "there is no pass of type 'LoRo'", "did you mean LoRA?"),
        ("ft", [LORA, {**QLORA, "rr": 1}], "ft.1.rr", "unknown key", "did you mean r?"),
        ("ft", [LORA, {**QLORA, "r": [4, "y"]}], "ft.1.r.1", "must be a whole number, got 'y'", None),
        ("ft", [{**LORA, "r": "x"}, QLORA], "ft.0.r", "must be a whole number, got 'x'", None),
        ("ft", [LORA, {**QLORA, "host": "bax"}], "ft.1.host", "there is no system called 'bax'", "did you mean box?"),
        ("ft", [LORA, {**QLORA, "train_data_config": "trai"}], "ft.1.train_data_config", "there is no data", "train?"),
        ("ft", [LORA, {"type": "QLoRA"}], "ft.1.train_data_config", "the key train_data_config is missing", None),
    ],
)  # fmt: skip
def test_what_cannot_be_searched(
    searched: Any, problems_of: Problems, path: str, value: Any, place: str, message: str, hint: str | None
) -> None:
    (problem,) = problems_of(put(searched, f"passes.{path}", value))
    assert problem.path == f"passes.{place}"
    assert problem.message.startswith(message)
    assert (hint or "") in (problem.hint or "")


def test_all_problems_of_all_alternatives_at_once(searched: Any, problems_of: Problems) -> None:
    searched["passes"]["ft"] = [{**LORA, "r": ["x", 0, 8]}, {**QLORA, "alpha": [1, "y"], "quant_typ": "nf4"}]
    paths = {problem.path for problem in problems_of(searched)}
    assert paths == {"passes.ft.0.r.0", "passes.ft.0.r.1", "passes.ft.1.alpha.1", "passes.ft.1.quant_typ"}


def test_names_that_say_two_things(searched: Any, problems_of: Problems) -> None:
    searched["passes"]["a"] = [LORA, QLORA]
    searched["passes"]["a[LoRA]"] = dict(LORA)
    found = problems_of(searched)
    assert {problem.path for problem in found} == {"passes.a.0", "passes.a[LoRA]"}
    assert all(problem.hint == "rename the step" for problem in found)


def test_flows_are_refused_with_the_way_out(searched: Any, problems_of: Problems) -> None:
    searched["passes"].pop("ft")
    searched["pass_flows"] = [["merge"], ["merge", "build"]]
    (problem,) = problems_of(searched)
    assert problem.path == "pass_flows"
    assert problem.message == "2 flows: a search goes over alternatives, not over flows"
    assert "alternatives, a list of passes under one name" in (problem.hint or "")


# ---- the real passes, the schema


def real() -> Mapping[str, Any]:
    return {name: PASSES[name].Config for name in PASSES}


def test_olives_own_candidates(searched: Any) -> None:
    searched["passes"]["ft"] = dict(LORA)
    config = load_config(searched, passes=real())
    assert config.space is not None
    assert {one.name: one.choices for one in config.space.dimensions} == {
        "ft.r": (16, 32, 64),
        "build.int4_block_size": (32, 64, 128),
        "build.int4_is_symmetric": (True, False),
        "build.int4_algo_config": ("rtn", "k_quant", "k_quant_mixed", "k_quant_last"),
    }
    searched["systems"]["box"]["accelerators"] = [{"device": "gpu", "execution_providers": ["DmlExecutionProvider"]}]
    assert "build.int4_is_symmetric" not in sizes(load_config(searched, passes=real())), "it wants zero points"
    for change in ({"profile": "fast"}, {"extra_options": {"block_size": 32}}, {"precision": "fp32"}):
        searched["passes"]["build"] = {"type": "ModelBuilder", "precision": "int4", **change}
        assert sizes(load_config(searched, passes=real())) == {"ft.r": 3}


@pytest.mark.parametrize("name", [name for name in PASSES if getattr(PASSES[name].Config, "searchable", None)])
def test_every_candidate_of_the_real_passes_is_valid(searched: Any, name: str) -> None:
    entry = {"type": name, **({"precision": "int4"} if name == "ModelBuilder" else {"train_data_config": "train"})}
    for key in PASSES[name].Config.searchable:
        *way, last = key.split(".")
        below: Any = entry
        for step in way:
            below = below.setdefault(step, {})
        below[last] = "SEARCHABLE_VALUES"
    searched["passes"] = {"one": entry}
    config = load_config(searched, passes=real())
    assert sizes(config) == {f"one.{key}": len(one.values) for key, one in PASSES[name].Config.searchable.items()}


def test_the_example_of_the_docs(searched: Any) -> None:
    page = (Path(__file__).parents[2] / "docs" / "config.md").read_text(encoding="utf-8")
    _, example, after = page.split("## Search")[1].split("```", 2)
    searched.update(json.loads(example.removeprefix("json")))
    searched["evaluators"] = {"quality": searched["evaluators"]["tones"]}
    config = load_config(searched, passes=real())
    assert config.space is not None
    assert config.workflow.strategy is not None
    said = f"search: {config.workflow.strategy.sampler} over {config.space.size} settings: {config.space}"
    assert said in after


def test_the_schema_takes_a_search(today: Any, load: Load, passes: Any) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(workflow_json_schema(passes))
    document = load(everything(today)).document
    document["passes"]["ft"][1]["r"] = "SEARCHABLE_VALUES"
    document["passes"]["ft"][0]["training_args"]["max_steps"] = "DEFAULT_VALUE"
    assert list(validator.iter_errors(document)) == []
    for path, value in (
        ("passes.ft.1.r", ["x"]),
        ("passes.ft.1.r", []),
        ("passes.ft.1.r", "SEARCHABLE"),
        ("passes.ft.1.rr", 1),
        ("passes.ft", []),
        ("passes.ft.0.training_args.learning_rate", ["x"]),
        ("passes.build.precision", ["int5"]),
        ("search_strategy.sampler", "tpx"),
        ("search_strategy.samplr", "tpe"),
        ("search_strategy", 1),
    ):
        wrong = put(json.loads(json.dumps(document)), path, value)
        assert list(validator.iter_errors(wrong)), path
