"""Logits do not depend on the batch, the adapter counts, and ONNX says what torch says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coldpress.artifacts.base import Artifact, BaseQuantization
from coldpress.errors import CheckpointError, StepError, UnsupportedModelError
from coldpress.evaluate.runners import LayerwiseRunner, OnnxRunner, TorchRunner, in_batches, open_runner

SEQUENCES = [[256, 1, 2, 3, 4, 5, 6], [256, 7], [256, 8, 9, 10], [256, 11, 12, 13, 14, 15]]


def alone(runner: Any) -> list[Any]:
    return [runner.logits([one])[0] for one in SEQUENCES]


@pytest.mark.parametrize("kind", [TorchRunner, LayerwiseRunner])
def test_batches_do_not_matter(kind: Any, tiny_phi3: Path) -> None:
    runner = kind(tiny_phi3)
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


def test_few_tokens_at_a_time_through_a_block(tiny_phi3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coldpress.evaluate.runners.BLOCK_TOKENS", 12)
    runner = LayerwiseRunner(tiny_phi3)
    seen: list[tuple[int, ...]] = []
    through = runner._model.through_blocks

    def watch(batches: Any, on_block: Any = None) -> Any:
        seen.extend(tuple(ids.shape) for ids in batches)
        return through(batches, on_block)

    monkeypatch.setattr(runner._model, "through_blocks", watch)
    assert [place for place, _ in in_batches(runner, SEQUENCES, 8)] == [0, 3, 2, 1]
    assert seen == [(1, 7), (2, 6), (1, 2)]


def test_which_models_run_block_by_block(tiny_phi3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(model: Artifact, **options: Any) -> type:
        with open_runner(model, **options) as runner:
            return type(runner)

    plain = Artifact.load(tiny_phi3)
    assert chosen(plain) is TorchRunner
    assert chosen(plain, blocks="always") is LayerwiseRunner
    monkeypatch.setattr("coldpress.evaluate.runners.WHOLE_SHARE", 1e-9)
    assert chosen(plain) is LayerwiseRunner
    adapter = make_adapter(tmp_path / "adapter", tiny_phi3)
    assert chosen(Artifact(path=adapter, kind="checkpoint", model=tiny_phi3, adapter=adapter)) is LayerwiseRunner
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": "olora"}))
    assert chosen(Artifact(path=adapter, kind="checkpoint", model=tiny_phi3, adapter=adapter)) is TorchRunner


def test_a_model_without_blocks_is_loaded_whole_where_it_fits(tiny_phi3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise UnsupportedModelError("no list of decoder blocks")

    monkeypatch.setattr("coldpress.nn.layerwise._find_blocks", refuse)
    with open_runner(Artifact.load(tiny_phi3), blocks="always") as runner:
        assert isinstance(runner, TorchRunner)
    monkeypatch.setattr("coldpress.evaluate.runners.WHOLE_SHARE", 1e-9)
    with pytest.raises(UnsupportedModelError, match="no list"), open_runner(Artifact.load(tiny_phi3)):
        pass


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
    record = {"model": {"vocab_size": 5, "decoder": {"filename": "model.onnx"}}}
    (tmp_path / "genai_config.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"model\.onnx is missing"):
        OnnxRunner(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    runner = OnnxRunner(tmp_path)
    with pytest.raises(CheckpointError, match="ONNX Runtime cannot load"):
        runner.logits([[1]])
    with pytest.raises(StepError, match="built for NoSuchExecutionProvider"):
        OnnxRunner(tmp_path, execution_provider="NoSuchExecutionProvider")


def save_bigram(path: Path, table: Any, *, last: bool, metadata: dict[str, str]) -> None:
    """A graph over `weights.data` beside it: the logits are the row of each token, or of the last one only."""
    ir = pytest.importorskip("onnx_ir")
    from onnx_ir import tape

    batch = ir.Shape(["batch", "tokens"])
    inputs = [ir.val(name, ir.DataType.INT64, batch) for name in ("input_ids", "attention_mask")]
    stored = ir.ExternalTensor(
        "weights.data", 0, table.nbytes, ir.DataType.FLOAT, shape=ir.Shape(table.shape), name="table",
        base_dir=path.parent,
    )  # fmt: skip
    weight = ir.val("table", ir.DataType.FLOAT, ir.Shape(table.shape), const_value=stored)
    nodes, weights = tape.Tape(), [weight]
    logits = nodes.op("Gather", [weight, inputs[0]])
    if last:
        weights.append(ir.val("last", ir.DataType.INT64, ir.Shape([1]), const_value=ir.tensor([-1], name="last")))
        logits = nodes.op("Gather", [logits, weights[1]], attributes={"axis": 1})
    logits.name, logits.dtype, logits.shape = "logits", ir.DataType.FLOAT, ir.Shape(["batch", "rows", table.shape[1]])
    graph = ir.Graph(inputs, [logits], nodes=nodes.nodes, initializers=weights, opset_imports={"": 21}, name="bigram")
    model = ir.Model(graph, ir_version=10)
    model.metadata_props.update(metadata)
    ir.save(model, path)


def test_a_graph_of_the_last_position_names_another_one(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    table = np.random.default_rng(0).standard_normal((7, 7), np.float32)
    (tmp_path / "weights.data").write_bytes(table.tobytes())
    record = {"model": {"vocab_size": 7, "decoder": {"filename": "model.onnx"}}}
    (tmp_path / "genai_config.json").write_text(json.dumps(record))
    named = {"coldpress.evaluation_graph": "evaluation.onnx"}
    save_bigram(tmp_path / "model.onnx", table, last=True, metadata=named)
    runner = OnnxRunner(tmp_path)
    with pytest.raises(CheckpointError, match=r"'evaluation\.onnx' for all of them, which is missing"):
        runner.logits([[1, 2]])
    save_bigram(tmp_path / "evaluation.onnx", table, last=False, metadata={})
    first, second = runner.logits([[3, 1, 6], [5]])
    np.testing.assert_array_equal(first, table[[3, 1, 6]])
    np.testing.assert_array_equal(second, table[[5]])
    outside = {"coldpress.evaluation_graph": "../evaluation.onnx"}
    save_bigram(tmp_path / "model.onnx", table, last=True, metadata=outside)
    with pytest.raises(CheckpointError, match="outside its own folder"):
        OnnxRunner(tmp_path).logits([[1, 2]])
