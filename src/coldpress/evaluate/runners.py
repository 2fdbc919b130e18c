"""Logits of a model for token sequences, whatever the model's form. Metrics and parity know only this.

Sequences are padded on the right, where a causal model never looks, so a sequence's logits do not depend on its batch.
Weights are held and multiplied in float32: what is compared is the model, not the precision it happens to run in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from coldpress.artifacts.base import Artifact, BaseQuantization, read_json
from coldpress.errors import CheckpointError, StepError
from coldpress.hardware import detect

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Logits = npt.NDArray[np.float32]

__all__ = ["LogitsRunner", "OnnxRunner", "TorchRunner", "in_batches", "open_runner"]

LOGITS_BYTES = 256 << 20
"""Of one batch; fewer sequences are run at a time when the vocabulary is large."""


class LogitsRunner(Protocol):
    """A causal language model that can be asked."""

    vocab_size: int
    context_length: int | None

    def logits(self, batch: Sequence[Sequence[int]]) -> list[Logits]:
        """[tokens, vocabulary] of each sequence; row i holds the scores of token i + 1."""
        ...

    def close(self) -> None:
        """Let go of the weights."""
        ...


@contextmanager
def open_runner(model: Artifact, *, trust_remote_code: bool = False) -> Iterator[LogitsRunner]:
    """The runner for a model, loaded from its files; raises CheckpointError."""
    runner: LogitsRunner
    if model.kind == "onnx":
        runner = OnnxRunner(model.model, execution_provider=model.execution_provider or "CPUExecutionProvider")
    else:
        runner = TorchRunner(
            model.model,
            adapter=model.adapter,
            base_quantization=model.base_quantization,
            trust_remote_code=trust_remote_code,
        )
    try:
        yield runner
    finally:
        runner.close()


def in_batches(
    runner: LogitsRunner, sequences: Sequence[Sequence[int]], batch_size: int
) -> Iterator[tuple[int, Logits]]:
    """(position in `sequences`, its logits), in order of length, so that little is padded."""
    order = sorted(range(len(sequences)), key=lambda place: len(sequences[place]), reverse=True)
    start = 0
    while start < len(order):
        longest = max(len(sequences[order[start]]), 1)
        rows = max(1, min(batch_size, LOGITS_BYTES // (4 * longest * max(runner.vocab_size, 1))))
        batch = order[start : start + rows]
        yield from zip(batch, runner.logits([sequences[place] for place in batch]), strict=True)
        start += rows


class TorchRunner:
    """A Hugging Face checkpoint, with its adapter if it has one, in float32 on the CPU."""

    def __init__(
        self,
        folder: Path,
        *,
        adapter: Path | None = None,
        base_quantization: BaseQuantization | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        from coldpress.nn.loading import load_adapter, load_dequantized, load_model

        if adapter is None or base_quantization is None:
            model = load_model(folder, dtype="float32", trust_remote_code=trust_remote_code)
        else:
            model = load_dequantized(folder, base_quantization, trust_remote_code=trust_remote_code)
        if adapter is not None:
            model = load_adapter(model, adapter)
        self._model = model.eval()
        config = read_json(folder / "config.json")
        self.vocab_size = int(config["vocab_size"])
        limit = config.get("max_position_embeddings")
        self.context_length = None if limit is None else int(limit)

    @property
    def model(self) -> Any:
        """The Transformers model itself, for generation."""
        return self._model

    def logits(self, batch: Sequence[Sequence[int]]) -> list[Logits]:
        import torch

        longest = max(len(ids) for ids in batch)
        padded = torch.tensor([[*ids, *([0] * (longest - len(ids)))] for ids in batch])
        with torch.inference_mode():
            out = self._model(input_ids=padded, use_cache=False).logits.float().numpy()
        return [out[row, : len(ids)] for row, ids in enumerate(batch)]

    def close(self) -> None:
        self._model = None


class OnnxRunner:
    """An ONNX Runtime GenAI model folder, run by plain ONNX Runtime with an empty cache."""

    def __init__(
        self, folder: Path, *, execution_provider: str = "CPUExecutionProvider", threads: int | None = None
    ) -> None:
        import onnxruntime

        genai = read_json(folder / "genai_config.json").get("model", {})
        graph = folder / str(genai.get("decoder", {}).get("filename", "model.onnx"))
        if execution_provider not in onnxruntime.get_available_providers():
            raise StepError(
                f"the model is built for {execution_provider}, which the installed ONNX Runtime does not have",
                hint=f"it has: {', '.join(onnxruntime.get_available_providers())}",
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or detect().threads
        options.log_severity_level = 3
        try:
            self._session: Any = onnxruntime.InferenceSession(str(graph), options, providers=[execution_provider])
        except _onnxruntime_errors() as error:
            raise CheckpointError(f"ONNX Runtime cannot load {graph}: {error}") from error
        self._inputs = {one.name: one for one in self._session.get_inputs()}
        self.vocab_size = int(genai.get("vocab_size") or self._session.get_outputs()[0].shape[-1])
        limit = genai.get("context_length")
        self.context_length = None if limit is None else int(limit)

    def logits(self, batch: Sequence[Sequence[int]]) -> list[Logits]:
        import numpy as np

        rows, longest = len(batch), max(len(ids) for ids in batch)
        ids = np.zeros((rows, longest), np.int64)
        mask = np.zeros((rows, longest), np.int64)
        for row, one in enumerate(batch):
            ids[row, : len(one)] = one
            mask[row, : len(one)] = 1
        feeds: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if "position_ids" in self._inputs:
            feeds["position_ids"] = np.broadcast_to(np.arange(longest, dtype=np.int64), (rows, longest)).copy()
        for name, one in self._inputs.items():
            if name.startswith("past_key_values."):
                dtype = {"tensor(float)": np.float32, "tensor(float16)": np.float16}[one.type]
                feeds[name] = np.zeros((rows, one.shape[1], 0, one.shape[3]), dtype)
        (out,) = self._session.run(["logits"], feeds)
        return [out[row, : len(one)].astype(np.float32, copy=False) for row, one in enumerate(batch)]

    def close(self) -> None:
        self._session = None


def _onnxruntime_errors() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises; its exceptions share no base class but Exception."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoSuchFile", "NotImplemented", "EPFail")
    found = [getattr(state, name) for name in names if hasattr(state, name)]
    return (RuntimeError, ValueError, OSError, *found)
