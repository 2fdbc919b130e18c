"""Logits do not depend on the batch, the adapter counts, and ONNX says what torch says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coldpress.artifacts.base import Artifact, BaseQuantization
from coldpress.errors import CheckpointError, StepError
from coldpress.evaluate.runners import OnnxRunner, TorchRunner, in_batches, open_runner

SEQUENCES = [[256, 1, 2, 3, 4, 5, 6], [256, 7], [256, 8, 9, 10], [256, 11, 12, 13, 14, 15]]


def alone(runner: Any) -> list[Any]:
    return [runner.logits([one])[0] for one in SEQUENCES]


def test_batches_do_not_matter(tiny_phi3: Path) -> None:
    runner = TorchRunner(tiny_phi3)
    assert (runner.vocab_size, runner.context_length) == (260, 128)
    expected = alone(runner)
    assert [one.shape for one in expected] == [(len(ids), 260) for ids in SEQUENCES]
    for size in (1, 2, 4):
        found = dict(in_batches(runner, SEQUENCES, size))
        assert sorted(found) == [0, 1, 2, 3]
        for place, logits in found.items():
            # 1e-4: float32 products of another shape sum in another order.
            np.testing.assert_allclose(logits, expected[place], atol=1e-4)


def test_large_vocabularies_run_fewer_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wide:
        vocab_size = 1000
        context_length = None
        batches: list[int] = []  # noqa: RUF012 - a fake

        def logits(self, batch: Any) -> list[Any]:
            self.batches.append(len(batch))
            return [np.zeros((len(ids), 1)) for ids in batch]

        def close(self) -> None: ...

    monkeypatch.setattr("coldpress.evaluate.runners.LOGITS_BYTES", 4 * 1000 * 10)
    runner = Wide()
    assert [place for place, _ in in_batches(runner, [[1] * 5, [1] * 5, [1] * 5, [1] * 30], 8)] == [3, 0, 1, 2]
    assert runner.batches == [1, 2, 1]


def make_adapter(folder: Path, base: Path) -> Path:
    import peft
    import torch

    from coldpress.nn.loading import load_model

    torch.manual_seed(0)
    model = peft.get_peft_model(
        load_model(base, dtype="float32"), peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    for name, value in model.named_parameters():
        if "lora_B" in name:
            value.data.normal_(std=0.2)
    model.save_pretrained(folder)
    return folder


def test_the_adapter_and_the_quantized_base_count(tiny_phi3: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    adapter = make_adapter(tmp_path / "adapter", tiny_phi3)
    plain = Artifact.load(tiny_phi3)
    quantization = BaseQuantization("nf4", True, "bfloat16")
    tuned = Artifact(path=adapter, kind="checkpoint", model=tiny_phi3, adapter=adapter)
    quantized = Artifact(
        path=adapter, kind="checkpoint", model=tiny_phi3, adapter=adapter, base_quantization=quantization
    )
    found = []
    for artifact in (plain, tuned, quantized):
        with open_runner(artifact) as runner:
            found.append(runner.logits(SEQUENCES[:1])[0])
    base, with_adapter, on_four_bits = found
    assert np.abs(base - with_adapter).max() > 0.1
    assert np.abs(with_adapter - on_four_bits).max() > 0.1
    assert np.abs(with_adapter - on_four_bits).mean() < np.abs(base - on_four_bits).mean()


def build(source: Path, target: Path) -> Artifact:
    from coldpress.config.schema import Accelerator
    from coldpress.hardware import detect
    from coldpress.passes.base import Context
    from coldpress.passes.model_builder import ModelBuilder

    (target / "out").mkdir(parents=True)
    context = Context("build", target / "out", target, detect(), Accelerator(), {}, lambda event: None)
    made = ModelBuilder()
    return made.run(made.Config(precision="fp32"), Artifact.load(source), context)


def test_onnx_says_what_torch_says(tiny_phi3: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    built = build(tiny_phi3, tmp_path / "onnx")
    with open_runner(built) as runner, open_runner(Artifact.load(tiny_phi3)) as reference:
        assert runner.vocab_size == 260
        expected = alone(reference)
        for place, logits in in_batches(runner, SEQUENCES, 4):
            # 1e-3: float32, kernels of another library.
            np.testing.assert_allclose(logits, expected[place], atol=1e-3)


def test_onnx_errors(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    (tmp_path / "genai_config.json").write_text('{"model": {"decoder": {"filename": "model.onnx"}}}')
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(CheckpointError, match="ONNX Runtime cannot load"):
        OnnxRunner(tmp_path)
    with pytest.raises(StepError, match="built for NoSuchExecutionProvider"):
        OnnxRunner(tmp_path, execution_provider="NoSuchExecutionProvider")
