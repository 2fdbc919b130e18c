"""Sequence classifiers on Transformers: the scores of the classes that they give to texts.

The model runs whole on the CPU, in float32 unless its stored type is asked for: Transformers' own class for it, with
its adapter put on by PEFT. Encoders read a text between CLS and SEP, decoders are asked at its last token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from coldpress.artifacts.base import Artifact
from coldpress.artifacts.classifiers import classifier_layout, is_classifier, labels_of, longest_text
from coldpress.config.metrics import RunnerChoice
from coldpress.data.tokenizer import Tokenizer
from coldpress.errors import CheckpointError, PlanError
from coldpress.evaluate.abilities import Ability

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Scores = npt.NDArray[np.float32]

__all__ = ["ClassifierRunner", "ends_of", "has_layout", "with_ends"]


class ClassifierRunner:
    """A classifier that can be asked."""

    name = "Transformers"
    kind: RunnerChoice = "transformers"
    abilities: frozenset[Ability] = frozenset(("classification",))

    def __init__(self, model: Artifact, *, trust_remote_code: bool = False, dtype: str = "float32") -> None:
        from coldpress.nn.loading import load_adapter, load_dequantized, load_model

        config = model.config()
        if not is_classifier(config):
            raise CheckpointError(
                f"{model.path} does not say which classes it has", hint="its config.json should have id2label"
            )
        options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "classifier": config}
        if model.base_quantization is None:
            loaded = load_model(model.model, dtype=dtype, **options)
        else:
            loaded = load_dequantized(model.model, model.base_quantization, **options)
        if model.adapter is not None:
            loaded = load_adapter(loaded, model.adapter)
        self._model = loaded.eval()
        pad = config.get("pad_token_id")
        self._pad = pad if isinstance(pad, int) else 0
        self.context_length = longest_text(config)
        self.labels = labels_of(config)

    def classify(self, batch: Sequence[Sequence[int]]) -> Scores:
        """[sequences, classes], before the softmax."""
        import torch

        from coldpress.nn.threads import tick

        tick()
        longest = max(len(ids) for ids in batch)
        gaps = [longest - len(ids) for ids in batch]
        ids = torch.tensor([[*one, *([self._pad] * gap)] for one, gap in zip(batch, gaps, strict=True)])
        mask = torch.tensor([[1] * (longest - gap) + [0] * gap for gap in gaps])
        with torch.inference_mode():
            found: Scores = self._model(input_ids=ids, attention_mask=mask).logits.float().numpy()
        return found

    @property
    def dtype(self) -> str:
        return str(next(self._model.parameters()).dtype).removeprefix("torch.")

    def encode(self, batch: Sequence[Sequence[int]]) -> Scores:
        raise PlanError("a classifier has no embeddings of its own", hint="ask for its classes")

    def forward(self, batch: Sequence[Sequence[int]]) -> None:
        """Read texts, for the time it takes."""
        self.classify(batch)

    def close(self) -> None:
        self._model = None


def ends_of(tokenizer: Tokenizer) -> tuple[int | None, int | None]:
    """The ids of CLS and SEP, where a tokenizer has them."""
    known = tokenizer.special_tokens or {}

    def number(name: str) -> int | None:
        found = None if name not in known else tokenizer.backend.token_to_id(known[name])
        return None if found is None else int(found)

    return number("cls_token"), number("sep_token")


def has_layout(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a family whose classifiers are known weight by weight."""
    try:
        classifier_layout(config)
    except PlanError:
        return False
    return True


def with_ends(model: Artifact, ids: Sequence[int], first: int | None, last: int | None) -> list[int]:
    """Token ids between CLS and SEP, where the model is an encoder that wants them and they are not there."""
    if not classifier_layout(model.config()).encoder:
        return list(ids)
    inner = [one for one in ids if one not in (first, last)]
    return [*([] if first is None else [first]), *inner, *([] if last is None else [last])]
