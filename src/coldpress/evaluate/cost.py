"""The metrics of cost: latency and throughput of batches, speed of generation, memory and time to load.

They take all models at once: what is compared is measured in turn, in one session (`timing`). Memory and load times
come from processes of their own (`probe`), started in turn as well. A checkpoint runs in the type that it is stored in,
as its users run it, not in the float32 in which quality is measured.
"""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coldpress.config.metrics import (
    Fresh,
    GenerationMetric,
    LatencyMetric,
    LoadTimeMetric,
    MemoryMetric,
    RunnerChoice,
    Timing,
)
from coldpress.data.prepare import texts_of
from coldpress.data.templates import encode
from coldpress.errors import DataError, PlanError, StepError
from coldpress.evaluate.abilities import Needs
from coldpress.evaluate.answers import read_texts
from coldpress.evaluate.bench import Bench
from coldpress.evaluate.encoders import config_of, is_encoder
from coldpress.evaluate.predictions import read_by_head
from coldpress.evaluate.runners import runner_names
from coldpress.evaluate.statistics import bootstrap_error, mean_error, quantile, ratio_error
from coldpress.evaluate.texts import bundled_tokens
from coldpress.evaluate.timing import Rounds, alternate, blocks, machine_state
from coldpress.events import Progress
from coldpress.scores import Measurement

__all__ = ["Written", "measure_generation", "measure_latency", "measure_load_time", "measure_memory"]

Found = dict[str, list[Measurement]]
"""Measurements of each model."""
_QUANTILES = {"p50": 0.5, "p75": 0.75, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p999": 0.999}
_PROBE_SECONDS = 600.0


@dataclass(frozen=True)
class Written:
    """One prompt continued."""

    prompt: int
    """Its tokens."""
    first: float
    """Seconds to the first new token."""
    gaps: tuple[float, ...]
    """Seconds between one new token and the next."""

    @property
    def seconds(self) -> float:
        return self.first + sum(self.gaps)


# -- batches ----------------------------------------------------------------------------------------------------------


def measure_latency(metric: LatencyMetric, benches: Mapping[str, Bench]) -> Found:
    """Milliseconds a batch, or sequences a second: each model runs all batches of the data, in turn with the others."""
    timing = _timing(metric)
    sides, counts = {}, {}
    for label, bench in benches.items():
        runner = _runner(bench, metric.runner)
        batches = _batches(metric, bench, runner)
        sides[label] = _timed(runner.forward, batches)
        counts[label] = [len(batch) for batch in batches]
    pieces = min(len(each) for each in counts.values())
    rounds = alternate(sides, lambda seconds: seconds, timing, pieces=pieces, on_round=_reporter(benches, timing))
    _say(rounds, metric, benches)
    return {
        label: [_spread(sub.name, metric, rounds, label, counts[label], bench) for sub in metric.sub_types]
        for label, bench in benches.items()
    }


def _timed(run: Callable[[Any], Any], work: Sequence[Any]) -> Callable[[int], float]:
    def one(piece: int) -> float:
        started = time.perf_counter()
        run(work[piece])
        return time.perf_counter() - started

    return one


def _batches(metric: LatencyMetric, bench: Bench, runner: Any) -> list[list[list[int]]]:
    """Texts of the data, or of the bundled text, in file order."""
    limit = runner.context_length
    if metric.data_config is None:
        texts = _bundled(bench, min(metric.prompt_tokens, limit or metric.prompt_tokens))
    else:
        texts = [ids[:limit] for ids in _texts(metric.data_config, bench)]
    size = metric.batch_size
    found = [texts[start : start + size] for start in range(0, len(texts), size)]
    if len(found) > 1 and len(found[-1]) < size:
        found.pop()  # a smaller last batch is another piece of work
    return found


def _texts(name: str, bench: Bench) -> list[list[int]]:
    """Tokens of each record; of an encoder's with its own special tokens."""
    config, tokenizer = bench.data(name), bench.tokenizer()
    if is_encoder(config_of(bench.model)):
        _, words, _ = read_texts(config, tokenizer)
        return read_by_head(words, config, tokenizer, bench.model)
    rendered = texts_of(config, tokenizer).rendered
    return [one.ids for one in encode(rendered, config.pre_process_data_config, tokenizer)]


def _bundled(bench: Bench, length: int, pieces: int = 16) -> list[list[int]]:
    ids = bundled_tokens(bench.tokenizer())
    step = max(1, min(length, (len(ids) - length) // max(pieces - 1, 1)))
    found = [ids[start : start + length] for start in range(0, max(len(ids) - length, 0) + 1, step)][:pieces]
    if not found:
        raise DataError(f"the bundled text has {len(ids)} tokens, fewer than {length}", hint="name a data_config")
    return found


def _spread(
    name: str, metric: LatencyMetric, rounds: Rounds, label: str, counts: Sequence[int], bench: Bench
) -> Measurement:
    import numpy as np

    seconds = np.array(rounds.samples[label])
    together = blocks(len(seconds))
    details = {**rounds.details(label), "batch_size": metric.batch_size, "batches": len(counts), **_how(bench, metric)}
    if metric.type == "latency":
        values, unit, better = 1e3 * seconds, "ms", False
    else:
        sizes = np.array([counts[number % len(counts)] for number in range(len(seconds))])
        values, unit, better = sizes / seconds, "sequences/s", True
    if name == "avg":
        value, error = mean_error(values.tolist(), together)
        if better:  # sequences over seconds, not the mean of their quotients
            value, error = ratio_error(*_by_block(sizes.tolist(), seconds.tolist()))
    else:
        summary = {"min": np.min, "max": np.max}.get(name) or (lambda part: quantile(part, _QUANTILES[name]))
        value = float(summary(values))
        rng = np.random.default_rng(metric.seed)
        error = bootstrap_error(lambda rows: float(summary(values[rows])), len(values), rng, clusters=together)
    return Measurement(name, value, unit, better, len(values), error, details)


# -- generation -------------------------------------------------------------------------------------------------------


def measure_generation(metric: GenerationMetric, benches: Mapping[str, Bench]) -> Found:
    """Time to the first token, time a token and both speeds: prompts continued by each model in turn."""
    timing = _timing(metric)
    sides, pieces = {}, 1 << 30
    for label, bench in benches.items():
        runner = _runner(bench, metric.runner or "onnxruntime-genai")
        prompts = _prompts(metric, bench, runner)
        pieces = min(pieces, len(prompts))
        sides[label] = _written(runner, prompts, metric.new_tokens)
    rounds = alternate(sides, lambda one: one.seconds, timing, pieces=pieces, on_round=_reporter(benches, timing))
    _say(rounds, metric, benches)
    found = {}
    for label, bench in benches.items():
        details = {**rounds.details(label), "new_tokens": metric.new_tokens, **_how(bench, metric)}
        found[label] = [_speed(sub.name, metric, rounds.samples[label], details) for sub in metric.sub_types]
    return found


def _written(runner: Any, prompts: Sequence[Sequence[int]], new: int) -> Callable[[int], Written]:
    def one(piece: int) -> Written:
        began = time.perf_counter()
        times = [began, *(time.perf_counter() for _ in runner.stream(prompts[piece], new))]
        first, *gaps = (after - before for before, after in itertools.pairwise(times))
        return Written(len(prompts[piece]), first, tuple(gaps))

    return one


def _prompts(metric: GenerationMetric, bench: Bench, runner: Any) -> list[list[int]]:
    limit = runner.context_length
    room = None if limit is None else limit - metric.new_tokens
    if room is not None and room < 1:
        raise PlanError(
            f"{metric.new_tokens} new tokens do not fit into a context of {limit}", hint="set new_tokens lower"
        )
    if metric.data_config is None:
        return _bundled(bench, min(metric.prompt_tokens, room or metric.prompt_tokens))
    config, tokenizer = bench.data(metric.data_config), bench.tokenizer()
    rendered = texts_of(config, tokenizer).rendered
    encoded = encode(rendered, config.pre_process_data_config, tokenizer)
    prompts = [one.ids[: one.answer_start][-room:] if room else one.ids[: one.answer_start] for one in encoded]
    return [ids for ids in prompts if ids]


def _speed(name: str, metric: GenerationMetric, samples: Sequence[Written], details: Mapping[str, Any]) -> Measurement:
    import numpy as np

    together = blocks(len(samples))
    rng = np.random.default_rng(metric.seed)
    prompts = [float(one.prompt) for one in samples]
    details = {**details, "prompt_tokens": round(sum(prompts) / len(prompts), 1)}
    if name == "prefill_tokens_per_second":
        value, error = ratio_error(*_by_block(prompts, [one.first for one in samples]))
        return Measurement(name, value, "tokens/s", True, len(samples), error, details)
    if name == "decode_tokens_per_second":
        counts, seconds = [float(len(one.gaps)) for one in samples], [sum(one.gaps) for one in samples]
        value, error = ratio_error(*_by_block(counts, seconds))
        return Measurement(name, value, "tokens/s", True, len(samples), error, details)
    kind, _, part = name.rpartition("_")
    of_each = [[one.first] if kind == "time_to_first_token" else list(one.gaps) for one in samples]

    def value_of(rows: Any) -> float:
        return 1e3 * quantile([gap for row in rows for gap in of_each[row]], _QUANTILES[part])

    error = bootstrap_error(value_of, len(samples), rng, clusters=together, resamples=200)
    return Measurement(name, value_of(range(len(samples))), "ms", False, sum(map(len, of_each)), error, details)


def _by_block(numerators: Sequence[float], denominators: Sequence[float]) -> tuple[list[float], list[float]]:
    """Sums over each block of rounds."""
    places = blocks(len(numerators))
    sums = [[0.0, 0.0] for _ in range(places[-1] + 1)]
    for place, a, b in zip(places, numerators, denominators, strict=True):
        sums[place][0] += a
        sums[place][1] += b
    return [a for a, _ in sums], [b for _, b in sums]


# -- processes of their own -------------------------------------------------------------------------------------------


def measure_memory(metric: MemoryMetric, benches: Mapping[str, Bench]) -> Found:
    """Highest memory of a process that loads a model and runs a prompt."""
    probes = _probes(metric, benches, metric.new_tokens)
    return _of_probes(metric, probes, "bytes")


def measure_load_time(metric: LoadTimeMetric, benches: Mapping[str, Bench]) -> Found:
    """Seconds until a model is loaded, and until it has run a prompt, in a process of its own."""
    return _of_probes(metric, _probes(metric, benches, 1), "s")


def _probes(metric: Any, benches: Mapping[str, Bench], new_tokens: int) -> dict[str, list[dict[str, Any]]]:
    asked = [sub.metric_config for sub in metric.sub_types if sub.metric_config is not None] or [Fresh()]
    repeats = max(one.repeat_test_num for one in asked)
    found: dict[str, list[dict[str, Any]]] = {label: [] for label in benches}
    for number in range(repeats):
        for label, bench in benches.items():
            found[label].append(_probe(metric, bench, new_tokens))
            bench.emit(Progress(bench.step, number + 1, repeats, "processes"))
    return found


def _probe(metric: Any, bench: Bench, new_tokens: int) -> dict[str, Any]:
    asked = metric.runner or "onnxruntime-genai"
    task = {
        "path": str(bench.model.path),
        "record": bench.model.record(),
        "runner": asked if asked in runner_names(bench.model) else None,
        "prompt": _bundled(bench, metric.prompt_tokens, 1)[0],
        "new_tokens": new_tokens,
        "trust_remote_code": bench.trust_remote_code,
    }
    command = [sys.executable, "-m", "coldpress.evaluate.probe"]
    try:
        done = subprocess.run(
            command, input=json.dumps(task), capture_output=True, text=True, timeout=_PROBE_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise StepError(f"a process that loads {bench.model.path} took more than {_PROBE_SECONDS:.0f} s") from error
    if done.returncode != 0:
        tail = "".join(f"\n  | {line}" for line in done.stderr.strip().splitlines()[-5:])
        raise StepError(f"a process that loads {bench.model.path} ended with {done.returncode}{tail}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _of_probes(metric: Any, probes: Mapping[str, Sequence[Mapping[str, Any]]], unit: str) -> Found:
    found: Found = {}
    for label, each in probes.items():
        others = [name for name in probes if name != label]
        details = {**machine_state(), "runner": each[0]["runner"], **({"in_turn_with": others} if others else {})}
        found[label] = []
        for sub in metric.sub_types:
            value, error = mean_error([float(one[sub.name]) for one in each])
            found[label].append(Measurement(sub.name, value, unit, False, len(each), error, details))
    return found


# -- both -------------------------------------------------------------------------------------------------------------


def _timing(metric: LatencyMetric | GenerationMetric) -> Timing:
    """The most that any sub type asks for: all are taken from the same runs."""
    asked = [sub.metric_config for sub in metric.sub_types if sub.metric_config is not None] or [Timing()]
    return Timing(
        warmup_num=max(one.warmup_num for one in asked),
        repeat_test_num=max(one.repeat_test_num for one in asked),
        sleep_num=max(one.sleep_num for one in asked),
        confidence=min(one.confidence for one in asked),
        max_seconds=max(one.max_seconds for one in asked),
    )


def _runner(bench: Bench, choice: RunnerChoice | None) -> Any:
    needs: Needs = () if is_encoder(config_of(bench.model)) else ("generation",)
    return bench.runner(needs, choice, "auto")


def _how(bench: Bench, metric: LatencyMetric | GenerationMetric) -> dict[str, Any]:
    choice = metric.runner if metric.type != "generation" else metric.runner or "onnxruntime-genai"
    runner = _runner(bench, choice)
    return {"runner": runner.name, **({"dtype": runner.dtype} if hasattr(runner, "dtype") else {})}


def _reporter(benches: Mapping[str, Bench], timing: Timing) -> Callable[[float], None]:
    bench = next(iter(benches.values()))

    def report(seconds: float) -> None:
        bench.emit(Progress(bench.step, round(min(seconds, timing.max_seconds), 1), timing.max_seconds, "s at most"))

    return report


def _say(rounds: Rounds, metric: LatencyMetric | GenerationMetric, benches: Mapping[str, Bench]) -> None:
    """A warning where the time was up before the figures were as narrow as asked for."""
    if not rounds.narrow:
        widths = ", ".join(
            f"{label} ±{width:.0%}" if math.isfinite(width) else f"{label} unknown"
            for label, width in rounds.interval.items()
        )
        next(iter(benches.values())).warn(
            f"{metric.name}: after {rounds.rounds} rounds in {rounds.seconds:.0f} s the 95 % intervals are {widths}, "
            f"wider than asked for (load of the machine {rounds.machine['load']:g}); raise max_seconds, or measure "
            "when it is quiet"
        )
