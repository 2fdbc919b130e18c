"""Evaluators: Olive's language of every year, and what is wrong with a metric or a goal before anything runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from coldpress.config.load import LoadedConfig
from coldpress.config.metrics import (
    AccuracyMetric,
    CustomMetric,
    GenerationMetric,
    LatencyMetric,
    LmEvalMetric,
    SizeMetric,
    Timing,
)
from coldpress.errors import Problem

Load = Callable[..., LoadedConfig]
Problems = Callable[..., Sequence[Problem]]

OLIVE = [
    {"name": "acc", "type": "accuracy", "backend": "torch_metrics", "data_config": "train", "sub_types": [
        {"name": "accuracy_score", "priority": 1, "goal": {"type": "max-degradation", "value": 0.02},
         "metric_config": {"task": "multiclass", "num_classes": 4}},
        {"name": "f1_score", "metric_config": {"average": "weighted"}},
        {"name": "auroc", "metric_config": {"task": "multiclass", "num_classes": 4}},
        {"name": "perplexity"}]},
    {"name": "lat", "type": "latency", "data_config": "train", "sub_types": [
        {"name": "avg", "priority": 2, "goal": {"type": "percent-min-improvement", "value": 20}},
        {"name": "p95", "metric_config": {"warmup_num": 5, "repeat_test_num": 30, "sleep_num": 0}}]},
    {"name": "thr", "type": "throughput", "data_config": "train", "sub_types": [{"name": "avg"}]},
    {"name": "size", "type": "size_on_disk", "sub_types": [{"name": "bytes"}]},
    {"name": "own", "type": "custom", "sub_types": [{"name": "n", "higher_is_better": False}],
     "user_config": {"user_script": "s.py", "evaluate_func": "f", "evaluate_func_kwargs": {"a": 1}}},
]  # fmt: skip


def with_metrics(today: Any, *metrics: Any) -> Any:
    today["evaluators"]["tones"]["metrics"] = list(metrics)
    return today


def metrics_of(config: LoadedConfig) -> tuple[Any, ...]:
    return config.workflow.evaluators["tones"].measured


def test_olives_metrics_as_they_are(today: Any, load: Load) -> None:
    config = load(with_metrics(today, *OLIVE))
    accuracy, latency, throughput, size, own = metrics_of(config)
    assert isinstance(accuracy, AccuracyMetric)
    assert [sub.name for sub in accuracy.sub_types] == ["accuracy_score", "f1_score", "auroc", "perplexity"]
    assert accuracy.sub_types[0].goal.value == 0.02
    assert accuracy.sub_types[0].metric_config is None, "the data says how many classes there are"
    assert accuracy.sub_types[2].metric_config == {"task": "multiclass", "num_classes": 4}
    assert isinstance(latency, LatencyMetric)
    assert latency.sub_types[1].metric_config == Timing(warmup_num=5, repeat_test_num=30, sleep_num=0)
    assert (throughput.type, size.type) == ("throughput", "size_on_disk")
    assert isinstance(own, CustomMetric)
    assert own.user_config.evaluate_func_kwargs == {"a": 1}
    assert own.sub_types[0].higher_is_better is False
    assert not config.warnings
    again = load(json.loads(json.dumps(config.document)))
    assert metrics_of(again) == metrics_of(config), "what migrate writes reads the same"


def test_a_metric_of_olive_0_1_and_0_2(today: Any, load: Load) -> None:
    goal = {"type": "threshold", "value": 50}
    metric = {
        "name": "lat", "type": "Latency", "sub_type": "p90", "priority": 1, "goal": goal,
        "metric_config": {"warmup_num": 1}, "higher_is_better": False, "user_config": {"batch_size": 4},
    }  # fmt: skip
    config = load(with_metrics(today, metric))
    (latency,) = metrics_of(config)
    (sub,) = latency.sub_types
    assert (sub.name, sub.priority, sub.goal.value, sub.higher_is_better) == ("p90", 1, 50, False)
    assert (sub.metric_config.warmup_num, latency.batch_size) == (1, 4)
    at = "evaluators.tones.metrics.0"
    assert [str(rewrite) for rewrite in config.rewrites if "evaluators" in rewrite.old] == [
        "olive: evaluators.tones.metrics.0.sub_type -> evaluators.tones.metrics.0.sub_types.0.name",
        "olive: evaluators.tones.metrics.0.priority -> evaluators.tones.metrics.0.sub_types.0.priority",
        "olive: evaluators.tones.metrics.0.goal -> evaluators.tones.metrics.0.sub_types.0.goal",
        "olive: evaluators.tones.metrics.0.metric_config -> evaluators.tones.metrics.0.sub_types.0.metric_config",
        f"olive: {at}.higher_is_better -> {at}.sub_types.0.higher_is_better",
        "olive: evaluators.tones.metrics.0.user_config.batch_size -> evaluators.tones.metrics.0.batch_size",
    ]


def test_what_belongs_to_one_of_several_sub_types(today: Any, problems_of: Problems) -> None:
    metric = {"name": "l", "type": "latency", "priority": 1, "sub_types": [{"name": "avg"}, {"name": "max"}]}
    (problem,) = problems_of(with_metrics(today, metric))
    assert (problem.path, problem.message) == ("evaluators.tones.metrics.0.priority", "belongs to a sub type")


def test_what_user_config_once_held(today: Any, load: Load, problems_of: Problems) -> None:
    metric = today["evaluators"]["tones"]["metrics"][0]
    metric["user_config"] = {"batch_size": 4, "dataloader_func": None, "io_bind": True, "input_names": ["a"]}
    config = load(today)
    assert metrics_of(config)[0].batch_size == 4
    assert [warning.path.rpartition(".")[2] for warning in config.warnings] == ["io_bind", "input_names"]
    metric["user_config"] = {
        "data_dir": "d", "dataloader_func": "f", "post_processing_func": "g", "inference_settings": {"onnx": {"x": 1}},
        "evaluate_func": "f",
    }  # fmt: skip
    assert {problem.path.rpartition(".")[2] for problem in problems_of(today)} == set(metric["user_config"])
    old = {**OLIVE[-1], "user_config": {"user_script": "s.py", "evaluate_func": "f",
                                        "func_kwargs": {"evaluate_func": {"a": 2}}}}  # fmt: skip
    assert metrics_of(load(with_metrics(today, old)))[0].user_config.evaluate_func_kwargs == {"a": 2}


def test_tasks_of_lm_eval_as_an_evaluator(today: Any, load: Load, problems_of: Problems) -> None:
    today["evaluators"]["tones"] = {
        "type": "lmevaluator", "tasks": ["arc_easy", "size_on_disk"], "model_class": "ortgenai", "batch_size": 2,
        "limit": 0.5, "num_fewshot": 3, "device": "cpu", "bootstrap_iters": 10,
    }  # fmt: skip
    tasks, size = metrics_of(load(today))
    assert isinstance(tasks, LmEvalMetric)
    assert (tasks.tasks, tasks.runner, tasks.batch_size) == (("arc_easy",), "onnxruntime-genai", 2)
    assert (tasks.limit, tasks.num_fewshot, tasks.bootstrap_iters, tasks.max_length) == (0.5, 3, 10, None)
    assert isinstance(size, SizeMetric)
    today["evaluators"]["tones"] = {"type_args": {"tasks": "arc_easy"}, "type": "LMEvaluator"}
    assert metrics_of(load(today))[0].tasks == ("arc_easy",)
    today["evaluators"]["tones"] = {"type": "LMEvaluator", "tasks": ["a"], "limit": 0}
    assert [p.message for p in problems_of(today)] == ["must be at least 1, got 0"]
    today["evaluators"]["tones"] = {"tasks": ["a"], "limit": 3}
    assert [p.message for p in problems_of(today)] == ["tasks, limit belong to an evaluator of type LMEvaluator"]
    today["evaluators"]["tones"] = {"type": "LMEvaluator"}
    assert [p.message for p in problems_of(today)] == ["an LMEvaluator needs tasks"]


@pytest.mark.parametrize("kind", ["OpenVINOEvaluator", "MTEBEvaluator", "QNNEvaluator", "custom", "OnnxEvalutor"])
def test_evaluators_we_lack(today: Any, problems_of: Problems, kind: str) -> None:
    today["evaluators"]["tones"]["type"] = kind
    (problem,) = problems_of(today)
    assert problem.path == "evaluators.tones.type"
    assert problem.hint == ("did you mean OnnxEvaluator?" if kind == "OnnxEvalutor" else "remove the evaluator")


def test_the_evaluators_of_a_kind_of_model(today: Any, load: Load) -> None:
    today["evaluators"]["tones"]["type"] = "OnnxEvaluator"
    assert load(today).workflow.evaluators["tones"].type is None


def test_ours(today: Any, load: Load) -> None:
    config = load(
        with_metrics(
            today,
            {"name": "ppl", "type": "perplexity", "data_config": "train", "window": 64, "stride": 16},
            {"name": "kl", "type": "divergence"},
            {"name": "gen", "type": "generation"},
            {"name": "mem", "type": "memory", "sub_types": [{"name": "peak_rss", "goal": goal("threshold", 1e9)}]},
            {"name": "load", "type": "load_time"},
            {"name": "lm", "type": "lm_eval", "tasks": ["t.yaml"], "sub_types": [{"name": "t.acc"}]},
        )
    )  # fmt: skip
    found = metrics_of(config)
    assert [metric.type for metric in found] == [
        "perplexity", "divergence", "generation", "memory", "load_time", "lm_eval",
    ]  # fmt: skip
    assert isinstance(found[2], GenerationMetric)
    assert [sub.name for sub in found[2].sub_types] == ["time_to_first_token_p50", "decode_tokens_per_second"]


# -- bad input --------------------------------------------------------------------------------------------------------


def goal(kind: str, value: float) -> dict[str, Any]:
    return {"type": kind, "value": value}


def one(kind: str, name: str, asked: Any = None, **rest: Any) -> dict[str, Any]:
    data = {} if kind in ("size_on_disk", "memory", "load_time") else {"data_config": "train"}
    sub = {"name": name, **({"goal": asked} if asked else {}), **rest}
    return {"name": f"{kind} {name}", "type": kind, "sub_types": [sub], **data}


@pytest.mark.parametrize(
    ("kind", "name", "hint"),
    [
        ("accuracy", "acuracy_score", "did you mean accuracy_score?"),
        ("accuracy", "f1", "did you mean f1_score?"),
        ("accuracy", "matthews_corcoef", "did you mean matthews_corrcoef?"),
        ("latency", "p98", "did you mean p99?"),
        ("generation", "time_to_first_token", "did you mean time_to_first_token_p99?"),
        ("size_on_disk", "byte", "did you mean bytes?"),
        ("perplexity", "perplexty", "did you mean perplexity?"),
        ("divergence", "kls", "did you mean kl?"),
    ],
)
def test_an_unknown_sub_type_gets_the_nearest(
    today: Any, problems_of: Problems, kind: str, name: str, hint: str
) -> None:
    (problem,) = problems_of(with_metrics(today, one(kind, name)))
    assert problem.path == "evaluators.tones.metrics.0.sub_types.0.name"
    assert problem.hint == hint


def test_an_unknown_type_or_key_of_a_metric(today: Any, problems_of: Problems) -> None:
    (problem,) = problems_of(with_metrics(today, {**one("latency", "avg"), "type": "latencies"}))
    assert problem.hint == "did you mean latency?"
    (problem,) = problems_of(with_metrics(today, {**one("latency", "avg"), "windw": 3}))
    assert problem.message == "unknown key"
    (problem,) = problems_of(with_metrics(today, {**one("perplexity", "loss"), "windw": 3}))
    assert problem.hint == "did you mean window?"
    (problem,) = problems_of(with_metrics(today, one("accuracy", "f1_score", metric_config={"avrage": "macro"})))
    assert (problem.message, problem.hint) == ("unknown key", "did you mean average?")
    (problem,) = problems_of(with_metrics(today, one("accuracy", "f1_score", metric_config={"average": "binary"})))
    assert problem.message == "binary needs positive: the answer whose figure it is"
    (problem,) = problems_of(with_metrics(today, one("accuracy", "wer")))
    assert "speech" in problem.message


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (one("accuracy", "accuracy_score", goal("threshold", 90)), "at most 1, so no model reaches 90"),
        (one("accuracy", "f1_score", goal("threshold", 1.01)), "at most 1, so no model reaches 1.01"),
        (one("latency", "avg", goal("threshold", 0)), "never as low as 0"),
        (one("size_on_disk", "bytes", goal("threshold", -5)), "never as low as -5"),
        (one("perplexity", "perplexity", goal("threshold", 0.9)), "never as low as 0.9"),
        (one("accuracy", "accuracy_score", goal("max-degradation", 2)), "cannot change by 2"),
        (one("accuracy", "accuracy_score", goal("max-degradation", -0.1)), "max-degradation must not be negative"),
        (one("latency", "avg", goal("percent-min-improvement", 100)), "cannot fall by 100 percent"),
        (one("divergence", "kl", goal("max-degradation", 0.1)), "measured against the input model already"),
    ],
)
def test_goals_that_no_model_can_reach(today: Any, problems_of: Problems, metric: Any, message: str) -> None:
    (problem,) = problems_of(with_metrics(today, metric))
    assert message in problem.message
    assert problem.path.startswith("evaluators.tones.metrics.0.sub_types.0.goal")


def test_a_share_in_percent_is_told_how_to_write_it(today: Any, problems_of: Problems) -> None:
    (problem,) = problems_of(with_metrics(today, one("accuracy", "accuracy_score", goal("threshold", 90))))
    assert problem.hint == "accuracy_score is a share: write 0.9 for 90 %"
    (problem,) = problems_of(with_metrics(today, one("accuracy", "accuracy_score", goal("max-degradation", 2))))
    assert problem.hint == "accuracy_score is a share: write 0.02 for 2 points"


@pytest.mark.parametrize(
    "metric",
    [
        one("accuracy", "accuracy_score", goal("threshold", 1)),
        one("latency", "avg", goal("threshold", 0.001)),
        one("latency", "avg", goal("percent-max-degradation", 300)),
        one("throughput", "avg", goal("percent-min-improvement", 300)),
        one("accuracy", "cohen_kappa", goal("threshold", -0.2)),
    ],
)
def test_goals_at_the_border(today: Any, load: Load, metric: Any) -> None:
    load(with_metrics(today, metric))


def test_thresholds_that_exclude_each_other(today: Any, load: Load, problems_of: Problems) -> None:
    subs = [
        {"name": "accuracy_score", "higher_is_better": True, "goal": goal("threshold", 0.9)},
        {"name": "accuracy_score", "higher_is_better": False, "goal": goal("threshold", 0.5)},
    ]
    metric = {"name": "a", "type": "accuracy", "data_config": "train", "sub_types": subs}
    (problem,) = problems_of(with_metrics(today, metric))
    assert "accuracy_score must be 0.9 or more and 0.5 or less" in problem.message
    assert problem.path == "evaluators.tones.metrics.0.sub_types.1.goal"
    subs[1]["goal"] = goal("threshold", 0.95)
    load(with_metrics(today, metric))
    other = {**metric, "name": "b", "sub_types": [{**subs[1], "goal": goal("threshold", 0.2)}]}
    (problem,) = problems_of(with_metrics(today, {**metric, "sub_types": subs[:1]}, other))
    assert problem.path == "evaluators.tones.metrics.1.sub_types.0.goal", "also over two metrics of the same data"


def test_a_goal_without_a_baseline(today: Any, load: Load, problems_of: Problems) -> None:
    relative = one("accuracy", "accuracy_score", goal("max-degradation", 0.02))
    absolute = one("latency", "avg", goal("threshold", 20))
    today["evaluate_input_model"] = False
    (problem,) = problems_of(with_metrics(today, relative, absolute))
    assert problem.path == "evaluators.tones.metrics.0.sub_types.0.goal.type"
    assert "compares with the input model, which is not measured" in problem.message
    today["evaluator"] = None
    load(today)
    today["passes"]["merge"]["evaluator"] = "tones"
    assert len(problems_of(today)) == 1
    today["evaluate_input_model"] = True
    load(today)


def test_names_and_priorities_that_occur_twice(today: Any, problems_of: Problems) -> None:
    first = one("latency", "avg", priority=1)
    (problem,) = problems_of(with_metrics(today, first, {**one("latency", "p90"), "name": "latency avg"}))
    assert problem.message == "two metrics of this evaluator are called 'latency avg'"
    (problem,) = problems_of(with_metrics(today, first, one("latency", "p90", priority=1)))
    assert (problem.message, problem.hint) == ("two numbers of this evaluator have priority 1", "rank them 1, 2, 3 ...")


def test_custom_metrics_that_name_no_function(today: Any, problems_of: Problems) -> None:
    metric = {"name": "own", "type": "custom", "sub_types": [{"name": "n"}], "user_config": {"user_script": "s.py"}}
    for user, message in (
        ({"user_script": "s.py"}, "and none is given"),
        ({"user_script": "s.py", "evaluate_func": "f", "metric_func": "g"}, "and both are given"),
        ({"evaluate_func": "f"}, "evaluate_func needs user_script"),
        ({"user_script": "s.py", "metric_func": "g"}, "metric_func needs data_config"),
    ):
        (problem,) = problems_of(with_metrics(today, {**metric, "user_config": user}))
        assert message in problem.message


def test_a_metric_of_answers_needs_data_with_answers(today: Any, load: Load, problems_of: Problems) -> None:
    del today["data_configs"][0]["pre_process_data_config"]["label_col"]
    (problem,) = problems_of(with_metrics(today, one("accuracy", "f1_score")))
    assert "names no answer, so accuracy has nothing to compare with" in problem.message
    load(with_metrics(today, one("accuracy", "perplexity"), one("latency", "avg")))
    custom = {**OLIVE[-1], "data_config": "train", "user_config": {"user_script": "s.py", "metric_func": "g"}}
    (problem,) = problems_of(with_metrics(today, custom))
    assert "names no answer, so custom has nothing to compare with" in problem.message


def test_a_stride_as_long_as_its_window(today: Any, problems_of: Problems) -> None:
    (problem,) = problems_of(with_metrics(today, {**one("perplexity", "loss"), "window": 64, "stride": 64}))
    assert problem.message == "stride 64 leaves no context in a window of 64"


@pytest.mark.parametrize("kind", ["memory", "load_time", "size_on_disk"])
def test_a_metric_without_data_says_so(kind: str, today: Any, problems_of: Problems) -> None:
    today["evaluators"]["tones"] = {"metrics": [{"name": "m", "type": kind, "data_config": "lost"}]}
    problem = next(one for one in problems_of(today) if one.message == "unknown key")
    assert problem.hint == "this metric takes no data"
    today["evaluators"]["tones"] = {"metrics": [{"name": "m", "type": kind, "answer_by": "likelihood"}]}
    (problem,) = problems_of(today)
    assert str(problem.hint).startswith("known here: name, type, sub_types"), "not what other metrics have"
