"""Encoders: a text in, one embedding or one score a class out; on Transformers and on ONNX Runtime.

    hidden    [rows, tokens, size]    of the last layer, padding masked
    pooling   mean: masked mean over tokens; cls: the first token; max: masked maximum; last: the last valid token
    out       [rows, size], divided by its length where the folder's modules.json normalizes

Which pooling a model was trained with stands beside its weights (sentence-transformers: `1_Pooling/config.json`); a
graph may hold it already (`sentence_embedding`). Where neither says, it is the mean, and not the last token, which
for a BERT is the embedding of a separator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from coldpress.artifacts.base import Artifact, read_json
from coldpress.artifacts.classifiers import is_classifier, labels_of
from coldpress.config.metrics import RunnerChoice
from coldpress.errors import CheckpointError
from coldpress.evaluate.abilities import Ability
from coldpress.evaluate.onnx_session import open_session

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]

__all__ = ["OnnxEncoder", "Pooling", "TorchEncoder", "config_of", "is_encoder", "pooled"]

Pooling = Literal["mean", "cls", "max", "last"]
_MODES: Mapping[str, Pooling] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "last",
}
_HIDDEN = ("last_hidden_state", "token_embeddings", "hidden_states")


def is_encoder(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a model that reads a text and continues none."""
    names = [str(name) for name in config.get("architectures") or ()]
    return bool(names) and not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)


def config_of(model: Artifact) -> dict[str, Any]:
    """config.json of a model, that of its adapter where it makes a classifier of it; empty where there is none."""
    return model.config() if (model.model / "config.json").is_file() else {}


class TorchEncoder:
    """A checkpoint of Transformers without a language head, in float32 on the CPU."""

    name = "Transformers"
    kind: RunnerChoice = "transformers"

    def __init__(self, folder: Path, *, trust_remote_code: bool = False, dtype: str = "float32") -> None:
        from coldpress.nn.encoders import load_encoder

        config = read_json(folder / "config.json")
        self.labels = _labels(config)
        self._model = load_encoder(
            folder, classifier=bool(self.labels), dtype=dtype, trust_remote_code=trust_remote_code
        )
        self._pooling, self._normalized = _pooling(folder)
        self.context_length = _context(folder, config)

    @property
    def abilities(self) -> frozenset[Ability]:
        return frozenset(("classification",) if self.labels else ("encoding",))

    @property
    def dtype(self) -> str:
        return str(next(self._model.parameters()).dtype).removeprefix("torch.")

    def _run(self, batch: Sequence[Sequence[int]]) -> tuple[Any, Any]:
        import torch

        ids, mask = _padded(batch)
        with torch.inference_mode():
            return self._model(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)), mask

    def encode(self, batch: Sequence[Sequence[int]]) -> Floats:
        out, mask = self._run(batch)
        return pooled(out.last_hidden_state.float().numpy(), mask, self._pooling, normalized=self._normalized)

    def classify(self, batch: Sequence[Sequence[int]]) -> Floats:
        out, _ = self._run(batch)
        scores: Floats = out.logits.float().numpy()
        return scores

    def forward(self, batch: Sequence[Sequence[int]]) -> None:
        """Read texts, for the time it takes."""
        if self.labels:
            self.classify(batch)
        else:
            self.encode(batch)

    def close(self) -> None:
        self._model = None


class OnnxEncoder:
    """A graph that reads texts: inputs `input_ids`, `attention_mask` and, where it has them, `token_type_ids`."""

    name = "ONNX Runtime"
    kind: RunnerChoice = "onnxruntime"

    def __init__(self, folder: Path, *, execution_provider: str = "CPUExecutionProvider") -> None:
        graph = _graph(folder)
        config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
        self._session = open_session(graph, execution_provider)
        self._inputs = [one.name for one in self._session.get_inputs()]
        self._outputs = [one.name for one in self._session.get_outputs()]
        self.labels = _labels(config) if "logits" in self._outputs else ()
        self._pooling, self._normalized = _pooling(folder)
        self.context_length = _context(folder, config)
        unknown = sorted({*self._inputs} - {"input_ids", "attention_mask", "token_type_ids"})
        if unknown or not ({*self._outputs} & {"logits", "sentence_embedding", *_HIDDEN}):
            raise CheckpointError(
                f"{graph} is no encoder that can be run: its inputs are {', '.join(self._inputs)}, "
                f"its outputs {', '.join(self._outputs)}",
                hint="an encoder takes input_ids and attention_mask and yields logits, last_hidden_state or "
                "sentence_embedding",
            )

    @property
    def abilities(self) -> frozenset[Ability]:
        found: list[Ability] = ["classification"] if self.labels else []
        if {*self._outputs} & {"sentence_embedding", *_HIDDEN}:
            found.append("encoding")
        return frozenset(found)

    def _run(self, output: str, batch: Sequence[Sequence[int]]) -> tuple[Any, Any]:
        import numpy as np

        ids, mask = _padded(batch)
        given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        (out,) = self._session.run([output], {name: given[name] for name in self._inputs})
        return out.astype(np.float32, copy=False), mask

    def encode(self, batch: Sequence[Sequence[int]]) -> Floats:
        if "sentence_embedding" in self._outputs:
            found: Floats = self._run("sentence_embedding", batch)[0]
            return found
        hidden, mask = self._run(next(name for name in _HIDDEN if name in self._outputs), batch)
        return pooled(hidden, mask, self._pooling, normalized=self._normalized)

    def classify(self, batch: Sequence[Sequence[int]]) -> Floats:
        scores: Floats = self._run("logits", batch)[0]
        return scores

    def forward(self, batch: Sequence[Sequence[int]]) -> None:
        """Read texts, for the time it takes."""
        if self.labels:
            self.classify(batch)
        else:
            self.encode(batch)

    def close(self) -> None:
        self._session = None


def pooled(hidden: Floats, mask: Any, pooling: Pooling, *, normalized: bool) -> Floats:
    """One vector a row, [rows, size], of hidden states [rows, tokens, size] with mask [rows, tokens]."""
    import numpy as np

    keep = mask[:, :, None].astype(np.float32)
    if pooling == "mean":
        out = (hidden * keep).sum(axis=1) / keep.sum(axis=1)
    elif pooling == "max":
        out = np.where(keep > 0, hidden, -np.inf).max(axis=1)
    else:
        place = 0 if pooling == "cls" else mask.sum(axis=1) - 1
        out = hidden[np.arange(len(hidden)), place]
    if normalized:
        out = out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-12)
    return np.asarray(out, np.float32)


def _padded(batch: Sequence[Sequence[int]]) -> tuple[Any, Any]:
    import numpy as np

    longest = max(len(ids) for ids in batch)
    ids = np.zeros((len(batch), longest), np.int64)
    mask = np.zeros_like(ids)
    for row, one in enumerate(batch):
        ids[row, : len(one)] = one
        mask[row, : len(one)] = 1
    return ids, mask


def _labels(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the classes, where the model has a head for them."""
    return labels_of(config) if is_classifier(config) else ()


def _pooling(folder: Path) -> tuple[Pooling, bool]:
    """How the folder's embeddings are made, and whether they are divided by their length."""
    mode: Pooling = "mean"
    beside = folder / "1_Pooling" / "config.json"
    if beside.is_file():
        config = read_json(beside)
        asked = [name for key, name in _MODES.items() if config.get(key)]
        if config.get("pooling_mode") in _MODES.values():
            asked = [config["pooling_mode"]]
        if len(asked) != 1:
            raise CheckpointError(
                f"{beside} asks for {' and '.join(asked) or 'no known'} pooling; one of {', '.join(_MODES.values())} "
                "can be done",
            )
        mode = asked[0]
    modules = folder / "modules.json"
    normalized = modules.is_file() and "models.Normalize" in modules.read_text(encoding="utf-8")
    return mode, normalized


def _context(folder: Path, config: Mapping[str, Any]) -> int | None:
    """Tokens of the longest text: what sentence-transformers was told, else the positions that there are."""
    beside = folder / "sentence_bert_config.json"
    told = read_json(beside).get("max_seq_length") if beside.is_file() else None
    limit = told or config.get("max_position_embeddings")
    return None if limit is None else int(limit)


def _graph(folder: Path) -> Path:
    """The one graph of a folder, or model.onnx of several; raises CheckpointError."""
    found = sorted(folder.glob("*.onnx"))
    if len(found) == 1:
        return found[0]
    if (folder / "model.onnx") in found:
        return folder / "model.onnx"
    raise CheckpointError(
        f"{folder} has {len(found)} .onnx files, and none is called model.onnx",
        hint="give a folder with the graph as model.onnx, and its config.json and tokenizer beside it",
    )
