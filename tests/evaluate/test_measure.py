"""What becomes of a metric's numbers, and which process may measure them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from coldpress.artifacts.base import Artifact
from coldpress.config.metrics import METRIC_TYPES, Metric
from coldpress.config.schema import DataConfig
from coldpress.errors import PlanError, StepError
from coldpress.evaluate.bench import Bench
from coldpress.evaluate.measure import in_turn, measure, needs_torch, refusal
from coldpress.evaluate.session import evaluate_models
from coldpress.events import Message

Benches = Callable[..., Bench]
USER: dict[str, Any] = {"user_config": {"user_script": "s.py", "evaluate_func": "f"}, "sub_types": [{"name": "n"}]}


def metric(kind: str, **options: Any) -> Any:
    data = {"data_config": "rows"} if kind in ("accuracy", "perplexity") else {}
    more = {"custom": USER, "lm_eval": {"tasks": ["t.yaml"]}}.get(kind, {})
    return TypeAdapter(Metric).validate_python({"name": kind, "type": kind, **data, **more, **options})


def test_every_type_has_a_place() -> None:
    costs = {kind for kind in METRIC_TYPES if in_turn(metric(kind))}
    assert costs == {"latency", "throughput", "generation", "memory", "load_time"}
    torch = {kind for kind in METRIC_TYPES if needs_torch(metric(kind), {"onnx"})}
    assert torch == {"custom", "lm_eval"}
    assert all(needs_torch(metric(kind), {"onnx", "checkpoint"}) for kind in METRIC_TYPES)
    assert needs_torch(metric("accuracy", sub_types=[{"name": "auroc"}]), {"onnx"})


def test_a_number_that_is_none_fails(tiny_phi3: Path, bench_of: Benches, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coldpress.evaluate.size.files_to_run", lambda model: [Nan()])
    with pytest.raises(StepError, match=r"size_on_disk\.bytes of .* is not a number") as caught:
        measure(metric("size_on_disk"), {"m": bench_of(tiny_phi3)})
    assert "complete and finite" in str(caught.value.hint)


class Nan:
    """A file without a size."""

    st_size = math.nan

    def stat(self) -> Nan:
        return self


def test_the_direction_that_is_known_wins(tiny_phi3: Path, bench_of: Benches, told: list[Any]) -> None:
    asked = metric("size_on_disk", sub_types=[{"name": "bytes", "higher_is_better": True}])
    (found,) = measure(asked, {"m": bench_of(tiny_phi3)})["m"]
    assert not found.higher_is_better
    (warning,) = [event.text for event in told if isinstance(event, Message)]
    assert warning.startswith("size_on_disk.bytes is better where it is lower")
    right = metric("size_on_disk", sub_types=[{"name": "bytes", "higher_is_better": False}])
    measure(right, {"m": bench_of(tiny_phi3)})
    assert len(told) == 1


def test_the_users_direction_counts_where_nobody_else_knows(tiny_phi3: Path, tmp_path: Path, bench_of: Benches) -> None:
    (tmp_path / "s.py").write_text("def f(*_): return 1.0\n")
    user = {"user_config": {"user_script": str(tmp_path / "s.py"), "evaluate_func": "f"}}
    for better in (True, False):
        asked = metric("custom", **user, sub_types=[{"name": "n", "higher_is_better": better}])
        (found,) = measure(asked, {"m": bench_of(tiny_phi3)})["m"]
        assert found.higher_is_better is better


def test_refusals_by_config_alone() -> None:
    bert = {"architectures": ["BertModel"]}
    classifier = {"architectures": ["BertForSequenceClassification"]}
    decoder = {"architectures": ["Phi3ForCausalLM"]}
    cosine = metric("divergence", sub_types=[{"name": "cosine_similarity"}])
    for kind in METRIC_TYPES:
        assert refusal(metric(kind), decoder) is None
    assert refusal(cosine, decoder) is not None
    assert refusal(cosine, bert) is None
    refused = {kind for kind in METRIC_TYPES if refusal(metric(kind), bert) is not None}
    assert refused == {"accuracy", "perplexity", "divergence", "generation", "lm_eval"}
    assert refusal(metric("accuracy"), classifier) is None
    assert refusal(metric("accuracy", sub_types=[{"name": "exact_match"}]), classifier) is not None
    assert refusal(metric("accuracy", sub_types=[{"name": "perplexity"}]), classifier) is not None


def test_models_at_hand(tiny_phi3: Path, tiny_onnx: Artifact, make_data: Any) -> None:
    data: DataConfig = make_data([(f"t{number}", ("joy", "sad")[number % 2]) for number in range(8)])
    models = {"before": Artifact.load(tiny_phi3), "after": tiny_onnx}
    relative = {"name": "accuracy_score", "goal": {"type": "max-degradation", "value": 0.0}}
    absolute = {"name": "bytes", "goal": {"type": "threshold", "value": 1}}
    metrics = [metric("accuracy", sub_types=[relative]), metric("size_on_disk", sub_types=[absolute])]
    scores = evaluate_models(models, metrics, {"rows": data})
    assert [(score.model, score.metric) for score in scores] == [
        ("before", "accuracy"), ("after", "accuracy"), ("before", "size_on_disk"), ("after", "size_on_disk"),
    ]  # fmt: skip
    met = {(score.model, score.metric): None if score.goal is None else score.goal.met for score in scores}
    assert met == {
        ("before", "accuracy"): None, ("after", "accuracy"): True,
        ("before", "size_on_disk"): None, ("after", "size_on_disk"): False,
    }  # fmt: skip
    (alone,) = evaluate_models({"one": tiny_onnx}, metrics[1:], {})
    assert alone.goal is not None
    with pytest.raises(PlanError, match=r"accuracy: a goal compares with another model, and there is one only"):
        evaluate_models({"one": tiny_onnx}, metrics, {"rows": data})
