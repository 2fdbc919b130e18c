"""Sequence classifiers: a language model with a head that gives a text one of some classes.

    decoder      model.*  score.weight [labels, hidden]              read at a text's last token
    bert         bert.*   classifier.{weight, bias}                  behind bert.pooler, at the first token
    roberta ...  roberta.*  classifier.dense, classifier.out_proj    at the first token

A checkpoint becomes a classifier of Transformers' class `...ForSequenceClassification`: the weights of its base under
the names that they have there, a head of its own, and without the head that it predicts words with.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from coldpress.artifacts.tensors import TensorInfo, TensorSource, numpy_dtype
from coldpress.errors import PlanError
from coldpress.registry import nearest

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = [
    "CLASSIFICATION",
    "GENERATION",
    "ClassifierLayout",
    "ClassifierTensors",
    "classifier_config",
    "classifier_infos",
    "classifier_layout",
    "is_classifier",
    "labels_of",
    "longest_text",
]

GENERATION, CLASSIFICATION = "text-generation", "text-classification"
"""What a model is for, as `input_model.task` says it."""
Dimension = Literal["labels", "hidden"]
Shapes = Mapping[str, tuple[Dimension, ...]]
_SQUARE: tuple[Dimension, ...] = ("hidden", "hidden")
_WIDE: tuple[Dimension, ...] = ("hidden",)
_OUT: tuple[Dimension, ...] = ("labels", "hidden")
_TWO_LAYERS: Shapes = {
    "classifier.dense.weight": _SQUARE,
    "classifier.dense.bias": _WIDE,
    "classifier.out_proj.weight": _OUT,
    "classifier.out_proj.bias": ("labels",),
}


@dataclass(frozen=True)
class ClassifierLayout:
    """Where a family's classifier has what."""

    prefix: str
    """Before the names of the base model's weights."""
    head: Shapes = field(default_factory=lambda: {"score.weight": _OUT})
    pooler: Shapes = field(default_factory=dict)
    """Weights of the base that only a classifier uses, so that a checkpoint may lack them."""
    dropped: tuple[str, ...] = ("lm_head.",)
    """How the names of weights begin that a classifier does not use."""
    encoder: bool = False
    """It sees a whole text at once, between the tokenizer's CLS and SEP."""
    after_padding: bool = False
    """Its positions count from behind the padding's id, so that it has fewer than its config says."""

    @property
    def labels_name(self) -> str:
        """The matrix that has a row for each class."""
        return next(name for name, shape in self.head.items() if shape == _OUT)

    @property
    def head_modules(self) -> tuple[str, ...]:
        """The topmost modules of the head."""
        return tuple(dict.fromkeys(name.partition(".")[0] for name in self.head))


_DECODER = ClassifierLayout("model")
_ROBERTA = ClassifierLayout(
    "roberta", _TWO_LAYERS, {}, ("lm_head.", "roberta.pooler."), encoder=True, after_padding=True
)
_LAYOUTS: Mapping[str, ClassifierLayout] = {
    **dict.fromkeys(("gemma", "gemma2", "llama", "mistral", "olmo2", "phi", "phi3", "qwen2", "qwen3",
                     "smollm3", "stablelm", "starcoder2"), _DECODER),
    "bert": ClassifierLayout(
        "bert",
        {"classifier.weight": _OUT, "classifier.bias": ("labels",)},
        {"bert.pooler.dense.weight": _SQUARE, "bert.pooler.dense.bias": _WIDE},
        ("cls.",),
        encoder=True,
    ),
    "distilbert": ClassifierLayout(
        "distilbert",
        {"pre_classifier.weight": _SQUARE, "pre_classifier.bias": _WIDE, "classifier.weight": _OUT,
         "classifier.bias": ("labels",)},
        {},
        ("vocab_",),
        encoder=True,
    ),
    "electra": ClassifierLayout("electra", _TWO_LAYERS, {}, ("generator_", "discriminator_"), encoder=True),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
}  # fmt: skip


def is_classifier(config: Mapping[str, Any]) -> bool:
    """Whether config.json is that of a sequence classifier."""
    found = config.get("architectures")
    return bool(isinstance(found, list) and found and str(found[0]).endswith("ForSequenceClassification"))


def labels_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the classes of a classifier's config.json, by index."""
    names = config.get("id2label")
    if not isinstance(names, Mapping):  # Transformers leaves out what it fills in
        return ("LABEL_0", "LABEL_1")
    return tuple(str(names[key]) for key in sorted(names, key=int))


def classifier_config(config: Mapping[str, Any], labels: Sequence[str], pad_id: int | None = None) -> dict[str, Any]:
    """config.json of the classifier that a checkpoint with `config` becomes. `pad_id`: what a decoder pads with."""
    named = config.get("architectures") or [str(config.get("model_type", "")).capitalize()]
    made = {
        **config,
        "architectures": [re.sub(r"(Model|For[A-Z]\w*)$", "", str(named[0])) + "ForSequenceClassification"],
        "id2label": {str(index): label for index, label in enumerate(labels)},
        "label2id": {label: index for index, label in enumerate(labels)},
        "problem_type": "single_label_classification",
    }
    if pad_id is not None and not classifier_layout(config).encoder:
        made["pad_token_id"] = pad_id  # the last token before padding is the one that is looked at
    return made


def classifier_layout(config: Mapping[str, Any]) -> ClassifierLayout:
    """The row of config.json's model type; raises PlanError."""
    kind = str(config.get("model_type"))
    if kind not in _LAYOUTS:
        close = nearest(kind, _LAYOUTS)
        raise PlanError(
            f"there is no row for classifiers of the model type {kind!r}",
            hint=f"there are: {', '.join(sorted(_LAYOUTS))}" + (f"; the nearest is {close}" if close else ""),
        )
    return _LAYOUTS[kind]


def longest_text(config: Mapping[str, Any]) -> int | None:
    """Tokens that a classifier can read; None where its config says nothing."""
    limit = config.get("max_position_embeddings")
    if not isinstance(limit, int):
        return None
    return limit - int(config.get("pad_token_id") or 0) - 1 if classifier_layout(config).after_padding else limit


def classifier_infos(
    config: Mapping[str, Any], stored: Iterable[TensorInfo], dtype: str, labels: int = 0
) -> dict[str, tuple[TensorInfo, str | None]]:
    """The classifier's tensors by name, with their names in the checkpoint; None is one that is new, of type `dtype`.

    `labels` counts the classes; where it is 0, not known yet, so are the sizes of the head. Raises PlanError.
    """
    layout = classifier_layout(config)
    found: dict[str, tuple[TensorInfo, str | None]] = {}
    own = (f"{layout.prefix}.", *layout.head)
    for info in stored:
        name = info.name if info.name.startswith(own) else f"{layout.prefix}.{info.name}"
        if info.name.startswith(layout.dropped) or name.startswith(layout.dropped) or name.endswith("position_ids"):
            continue
        found[name] = (TensorInfo(name, info.dtype, info.shape, info.nbytes), info.name)
    sizes = {"labels": labels, "hidden": int(config.get("hidden_size") or config.get("dim") or 0)}
    for name, shape in {**layout.pooler, **layout.head}.items():
        if name not in found:
            found[name] = (TensorInfo.of(name, dtype, [sizes[one] for one in shape]), None)
    return found


class ClassifierTensors:
    """A checkpoint's weights under the names of its classifier; a TensorSource. What is new reads as zeros."""

    def __init__(self, base: TensorSource, config: Mapping[str, Any], dtype: str, labels: int = 0) -> None:
        self._base = base
        self._infos = classifier_infos(config, base.infos(), dtype, labels)

    def __contains__(self, name: object) -> bool:
        return name in self._infos

    def infos(self) -> Iterator[TensorInfo]:
        return (info for info, _ in self._infos.values())

    def info(self, name: str) -> TensorInfo:
        return self._infos[name][0]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
        import numpy as np

        info, stored = self._infos[name]
        if stored is not None:
            return self._base.read(stored, start, stop)
        rows = len(range(*slice(start, stop).indices(info.shape[0])))
        return np.zeros((rows, *info.shape[1:]), numpy_dtype(info.dtype))
