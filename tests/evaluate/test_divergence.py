"""A model against the one it came from: distributions of causal models, embeddings of encoders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coldpress.artifacts.base import Artifact
from coldpress.config.metrics import DivergenceMetric
from coldpress.data.tokenizer import Tokenizer
from coldpress.errors import PlanError
from coldpress.evaluate.bench import Bench
from coldpress.evaluate.divergence import compare, cosines, measure
from coldpress.evaluate.runners import TorchRunner, open_runner
from fakes.tiny_models import export_encoder, make_checkpoint, make_encoder

Benches = Callable[..., Bench]


def metric(*names: str, **options: Any) -> DivergenceMetric:
    subs = [{"name": name} for name in names]
    return DivergenceMetric.model_validate({"name": "d", "type": "divergence", "sub_types": subs, **options})


def test_the_same_model_in_another_form(tiny_phi3: Path, tiny_onnx: Artifact, bench_of: Benches) -> None:
    bench = bench_of(tiny_onnx, reference=Artifact.load(tiny_phi3))
    kl, agreement = measure(metric("kl", "top1_agreement", tokens=200), bench)
    assert (kl.unit, kl.higher_is_better, agreement.unit, agreement.higher_is_better) == (
        "nats/token", False, "share", True,
    )  # fmt: skip
    assert 0 <= kl.value < 1e-6
    assert agreement.value > 0.99
    assert kl.n == agreement.n >= 200


def test_another_model_and_its_errors(tiny_phi3: Path, tmp_path: Path, bench_of: Benches) -> None:
    other = make_checkpoint(tmp_path / "other", seed=1)
    kl, agreement = measure(
        metric("kl", "top1_agreement", tokens=400), bench_of(other, reference=Artifact.load(tiny_phi3))
    )
    assert kl.value > 0.1
    assert agreement.value < 0.5
    assert kl.standard_error is not None
    assert 0 < kl.standard_error < kl.value


def test_errors_are_those_of_sequences(tiny_phi3: Path, tmp_path: Path) -> None:
    """Four sequences, each four times: as sure as each once."""
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 256, length).tolist() for length in (10, 20, 40, 80)]
    first, second = TorchRunner(tiny_phi3), TorchRunner(make_checkpoint(tmp_path / "other", seed=1))
    once = compare(first, second, sequences)
    assert once.kl_error > 0
    many = compare(first, second, sequences * 4)
    assert many.kl == pytest.approx(once.kl)
    assert many.kl_error == pytest.approx(once.kl_error / 2, rel=1e-3)
    assert many.top1_error == pytest.approx(once.top1_error / 2, rel=1e-3)


def test_the_reference_itself_is_not_measured(tiny_phi3: Path, bench_of: Benches) -> None:
    assert measure(metric("kl"), bench_of(tiny_phi3, reference=Artifact.load(tiny_phi3))) == []
    with pytest.raises(PlanError, match="compares a model with the one it came from, and there is none"):
        measure(metric("kl"), bench_of(tiny_phi3))


def test_another_tokenizer(tiny_phi3: Path, tmp_path: Path, bench_of: Benches) -> None:
    import json

    other = make_checkpoint(tmp_path / "other")
    text = json.loads((other / "tokenizer.json").read_text())
    vocabulary = text["model"]["vocab"]
    text["model"]["vocab"] = {token: 255 - number for token, number in vocabulary.items()}
    (other / "tokenizer.json").write_text(json.dumps(text))
    with pytest.raises(PlanError, match="have different tokenizers") as caught:
        measure(metric("kl"), bench_of(other, reference=Artifact.load(tiny_phi3)))
    assert "bits_per_byte" in str(caught.value.hint)


def test_embeddings(tmp_path: Path, tokenizer: Tokenizer, make_data: Any, bench_of: Benches) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    first = Artifact.load(make_encoder(tmp_path / "first"))
    graph = Artifact.load(export_encoder(first.path, tmp_path / "graph"))
    other = Artifact.load(make_encoder(tmp_path / "other", seed=1))
    texts = ["one text", "another, longer one", "x"]
    data = make_data([(text, None) for text in texts], text_template=None, text_field="text", label_col=None)
    asked = metric("cosine_similarity", data_config="rows")
    (same,) = measure(asked, bench_of(graph, data, reference=first))
    assert (same.n, same.higher_is_better) == (3, True)
    assert same.value == pytest.approx(1, abs=1e-5)
    (far,) = measure(asked, bench_of(other, data, reference=first))
    ids = [list(one.ids) for one in tokenizer.backend.encode_batch(texts)]
    vectors = []
    for model in (first, other):
        with open_runner(model, needs=("encoding",)) as runner:
            vectors.append(np.stack([runner.encode([one])[0] for one in ids]).astype(np.float64))
    a, b = vectors
    expected = [float(x @ y / np.sqrt((x @ x) * (y @ y))) for x, y in zip(a, b, strict=True)]
    assert far.value == pytest.approx(np.mean(expected), abs=1e-5)
    assert far.standard_error == pytest.approx(np.std(expected) / 3**0.5, abs=1e-5)
    (bundled,) = measure(metric("cosine_similarity"), bench_of(other, reference=first))
    assert bundled.n > 10
    with pytest.raises(PlanError, match="no model has both"):
        measure(metric("cosine_similarity", "kl"), bench_of(graph, data, reference=first))


def test_cosines() -> None:
    a = np.array([[1, 0], [3, 4], [1, 1]], np.float32)
    b = np.array([[2, 0], [4, -3], [-1, -1]], np.float32)
    np.testing.assert_allclose(cosines(a, b), [1, 0, -1], atol=1e-12)
