"""Latency, speed, memory and time to load of real models: figures that agree with each other, both sides in turn."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coldpress.artifacts.base import Artifact
from coldpress.config.metrics import GenerationMetric, LatencyMetric, LoadTimeMetric, MemoryMetric
from coldpress.errors import PlanError, StepError
from coldpress.evaluate.bench import Bench
from coldpress.evaluate.measure import measure, refusal
from coldpress.evaluate.timing import Rounds
from coldpress.events import Message
from fakes.tiny_models import make_encoder

Benches = Callable[..., Bench]
QUICK = {"warmup_num": 1, "repeat_test_num": 12, "confidence": 0.9, "max_seconds": 20}


def timed(kind: str, *names: str, **options: Any) -> LatencyMetric:
    subs = [{"name": name, "metric_config": QUICK} for name in names]
    return LatencyMetric.model_validate({"name": "l", "type": kind, "sub_types": subs, **options})


def test_latency_of_two_models_in_turn(tiny_phi3: Path, tiny_onnx: Artifact, bench_of: Benches) -> None:
    names = ("avg", "min", "max", "p50", "p75", "p90", "p95", "p99", "p999")
    benches = {"input": bench_of(tiny_phi3), "built": bench_of(tiny_onnx)}
    found = measure(timed("latency", *names, prompt_tokens=20, batch_size=2), benches)
    for label, runner in (("input", "Transformers"), ("built", "ONNX Runtime")):
        figures = {one.sub_type: one for one in found[label]}
        values = [figures[name].value for name in ("min", "p50", "p75", "p90", "p95", "p99", "p999", "max")]
        assert values == sorted(values)
        assert values[0] > 0
        assert values[0] <= figures["avg"].value <= values[-1]
        one = figures["avg"]
        assert (one.unit, one.higher_is_better, one.standard_error is not None) == ("ms", False, True)
        assert one.n == one.details["rounds"] >= 12
        assert (one.details["runner"], one.details["batch_size"]) == (runner, 2)
        assert one.details["in_turn_with"] == ["built" if label == "input" else "input"]
        assert {"load", "load_before", "threads", "cpu_mhz", "warmup", "confidence_95"} <= set(one.details)
    assert found["input"][0].details["dtype"] == "bfloat16", "as its users run it"


def test_throughput_is_latency_the_other_way_up(tiny_onnx: Artifact, make_data: Any, bench_of: Benches) -> None:
    data = make_data([(f"text {number} {'y' * number}", "joy") for number in range(7)])
    bench = bench_of(tiny_onnx, data)
    (found,) = measure(timed("throughput", "avg", data_config="rows", batch_size=2), {"m": bench})["m"]
    assert (found.unit, found.higher_is_better) == ("sequences/s", True)
    assert found.details["batches"] == 3, "seven records, and the last one alone is another piece of work"
    assert found.value > 0


def test_rounds_beside_each_other_are_one_witness(
    tiny_onnx: Artifact, bench_of: Benches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of five equal rounds; of batches of one size the errors of both figures are the same share of them."""
    seconds = [1.0] * 5 + [2.0] * 5 + [1.5] * 5
    bench = bench_of(tiny_onnx)

    def shares(count: int) -> list[float | None]:
        rounds = Rounds({"m": seconds[:count]}, count, 0, True, {"m": 0.1}, 1.0, {"load": 0.0})
        monkeypatch.setattr("coldpress.evaluate.cost.alternate", lambda *_, **__: rounds)
        found = [measure(timed(kind, "avg"), {"m": bench})["m"][0] for kind in ("latency", "throughput")]
        return [None if one.standard_error is None else one.standard_error / one.value for one in found]

    assert shares(15) == pytest.approx([math.sqrt(2) * 2.5 / 15 / 1.5] * 2)
    assert shares(5) == [None, None], "of one block"


def test_every_batch_is_run(
    tiny_onnx: Artifact, make_data: Any, bench_of: Benches, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_data([("x" * number, "joy") for number in range(1, 16)])
    bench = bench_of(tiny_onnx, data)
    seen = []
    runner = bench.runner(("generation",), None, "auto")
    forward = runner.forward

    def watch(batch: Any) -> None:
        seen.append([len(ids) for ids in batch])
        forward(batch)

    monkeypatch.setattr(runner, "forward", watch)
    measure(timed("latency", "avg", data_config="rows"), {"m": bench})
    assert {length for batch in seen for length in batch} == {6 + number for number in range(1, 16)}


def test_latency_of_an_encoder(tmp_path: Path, make_data: Any, bench_of: Benches) -> None:
    data = make_data([("one", None), ("two words", None)], text_template=None, text_field="text", label_col=None)
    bench = bench_of(make_encoder(tmp_path / "bert"), data)
    (found,) = measure(timed("latency", "p50", data_config="rows"), {"m": bench})["m"]
    assert found.value > 0
    assert found.details["batches"] == 2


def test_generation(tiny_phi3: Path, tiny_onnx: Artifact, bench_of: Benches) -> None:
    times = [f"time_{kind}_token_{part}" for kind in ("to_first", "per_output") for part in ("p50", "p90", "p99")]
    names = [*times, "prefill_tokens_per_second", "decode_tokens_per_second"]
    metric = GenerationMetric.model_validate(
        {"name": "g", "type": "generation", "prompt_tokens": 16, "new_tokens": 6,
         "sub_types": [{"name": name, "metric_config": QUICK} for name in names]}
    )  # fmt: skip
    found = measure(metric, {"input": bench_of(tiny_phi3), "built": bench_of(tiny_onnx)})
    for label, runner in (("input", "Transformers"), ("built", "ONNX Runtime GenAI")):
        figures = {one.sub_type: one for one in found[label]}
        assert list(figures) == names
        for kind in ("to_first", "per_output"):
            values = [figures[f"time_{kind}_token_{part}"].value for part in ("p50", "p90", "p99")]
            assert values == sorted(values)
            assert values[0] > 0
        rounds = figures["decode_tokens_per_second"].n
        assert rounds >= 12
        assert figures["time_to_first_token_p50"].n == rounds
        assert figures["time_per_output_token_p50"].n == 5 * rounds, "six tokens have five gaps"
        decode = figures["decode_tokens_per_second"]
        assert (decode.unit, decode.higher_is_better) == ("tokens/s", True)
        assert decode.details["runner"] == runner
        assert decode.details["prompt_tokens"] == 16
        # The slowest tokens are no faster than the mean, nor the quickest ones slower.
        assert 1e3 / figures["time_per_output_token_p99"].value <= decode.value * 1.01


def test_prompts_of_the_data_end_where_the_answer_begins(
    tiny_onnx: Artifact, make_data: Any, bench_of: Benches
) -> None:
    metric = GenerationMetric.model_validate(
        {"name": "g", "type": "generation", "data_config": "rows", "new_tokens": 2,
         "sub_types": [{"name": "prefill_tokens_per_second", "metric_config": QUICK}]}
    )  # fmt: skip
    (found,) = measure(metric, {"m": bench_of(tiny_onnx, make_data([("abc", "joy")]))})["m"]
    assert found.details["prompt_tokens"] == 5, "<s> a b c ="
    long = metric.model_copy(update={"new_tokens": 200})
    with pytest.raises(PlanError, match="200 new tokens do not fit into a context of 128"):
        measure(long, {"m": bench_of(tiny_onnx, make_data([("abc", "joy")]))})


def test_a_figure_that_is_not_sure_is_said(tiny_onnx: Artifact, bench_of: Benches, told: list[Any]) -> None:
    unsure = {"warmup_num": 0, "repeat_test_num": 2, "confidence": 1e-9, "max_seconds": 0.01}
    metric = LatencyMetric.model_validate(
        {"name": "l", "type": "latency", "prompt_tokens": 8, "sub_types": [{"name": "avg", "metric_config": unsure}]}
    )
    (found,) = measure(metric, {"m": bench_of(tiny_onnx)})["m"]
    assert found.details["confidence_reached"] is False
    warnings = [event.text for event in told if isinstance(event, Message)]
    assert len(warnings) == 1
    assert "wider than asked for" in warnings[0]


def test_memory_and_time_to_load(tiny_phi3: Path, tiny_onnx: Artifact, bench_of: Benches) -> None:
    once = {"repeat_test_num": 1}
    memory = MemoryMetric.model_validate(
        {"name": "m", "type": "memory", "prompt_tokens": 16,
         "sub_types": [{"name": name, "metric_config": once} for name in ("peak_rss", "peak_anonymous")]}
    )  # fmt: skip
    found = measure(memory, {"input": bench_of(tiny_phi3), "built": bench_of(tiny_onnx)})
    for label in ("input", "built"):
        rss, anonymous = found[label]
        assert rss.value > anonymous.value > 1e6
        assert (rss.unit, rss.higher_is_better, rss.n, rss.standard_error) == ("bytes", False, 1, None)
    assert found["input"][0].value > 2 * found["built"][0].value, "torch alone is larger than GenAI with this model"
    assert found["built"][0].details["runner"] == "ONNX Runtime GenAI"
    load = LoadTimeMetric.model_validate(
        {"name": "t", "type": "load_time", "prompt_tokens": 16, "runner": "onnxruntime",
         "sub_types": [{"name": name, "metric_config": {"repeat_test_num": 2}} for name in ("load", "first_answer")]}
    )  # fmt: skip
    first, second = measure(load, {"m": bench_of(tiny_onnx)})["m"]
    assert 0 < first.value < second.value
    assert first.details["runner"] == "ONNX Runtime"
    assert first.standard_error is not None


def test_a_process_that_fails_is_told(tmp_path: Path, tiny_phi3: Path, bench_of: Benches) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(tiny_phi3, broken)
    (broken / "model.safetensors").write_bytes(b"short")
    metric = MemoryMetric(name="m", type="memory")
    with pytest.raises(StepError, match=r"a process that loads .*broken ended with 1\n  \| "):
        measure(metric, {"m": bench_of(broken)})


def test_memory_of_a_gpu_is_what_nvidia_smi_says(
    tmp_path: Path, tiny_onnx: Artifact, bench_of: Benches, monkeypatch: pytest.MonkeyPatch
) -> None:
    from coldpress.hardware import detect

    metric = MemoryMetric.model_validate(
        {"name": "m", "type": "memory", "prompt_tokens": 8,
         "sub_types": [{"name": "peak_vram", "metric_config": {"repeat_test_num": 1}}]}
    )  # fmt: skip
    detect.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "this machine has none that nvidia-smi lists" in (refusal(metric, None) or ("", ""))[0]
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\ncase $1 in --query-gpu*) echo 'Fake 1, 1000';; *) echo \"$PPID, 300\"; echo '1, 500';; esac\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    detect.cache_clear()
    assert refusal(metric, None) is None
    (found,) = measure(metric, {"m": bench_of(tiny_onnx)})["m"]
    detect.cache_clear()
    assert found.value == 300 << 20, "of its own process, not of another one"
    assert os.name == "posix"
