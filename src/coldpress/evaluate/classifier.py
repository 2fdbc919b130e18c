"""Scores of the classes that a sequence classifier gives to texts, for the proof of a merge.

The model runs whole, in float32 on the CPU: Transformers' own class for it, with its adapter put on by PEFT.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from coldpress.artifacts.base import Artifact
from coldpress.artifacts.classifiers import classifier_layout, is_classifier, longest_text
from coldpress.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Scores = npt.NDArray[np.float32]

__all__ = ["ClassifierRunner", "with_ends"]


class ClassifierRunner:
    """A classifier that can be asked."""

    def __init__(self, model: Artifact, *, trust_remote_code: bool = False) -> None:
        from coldpress.nn.loading import load_adapter, load_dequantized, load_model

        config = model.config()
        if not is_classifier(config):
            raise CheckpointError(
                f"{model.path} does not say which classes it has", hint="its config.json should have id2label"
            )
        options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "classifier": config}
        if model.base_quantization is None:
            loaded = load_model(model.model, dtype="float32", **options)
        else:
            loaded = load_dequantized(model.model, model.base_quantization, **options)
        if model.adapter is not None:
            loaded = load_adapter(loaded, model.adapter)
        self._model = loaded.eval()
        pad = config.get("pad_token_id")
        self._pad = pad if isinstance(pad, int) else 0
        self.context_length = longest_text(config)

    def scores(self, batch: Sequence[Sequence[int]]) -> Scores:
        """[sequences, classes], before the softmax."""
        import torch

        longest = max(len(ids) for ids in batch)
        gaps = [longest - len(ids) for ids in batch]
        ids = torch.tensor([[*one, *([self._pad] * gap)] for one, gap in zip(batch, gaps, strict=True)])
        mask = torch.tensor([[1] * (longest - gap) + [0] * gap for gap in gaps])
        with torch.inference_mode():
            found: Scores = self._model(input_ids=ids, attention_mask=mask).logits.float().numpy()
        return found


def with_ends(model: Artifact, ids: Sequence[int], first: int | None, last: int | None) -> list[int]:
    """Token ids between CLS and SEP, where the model is an encoder that wants them and they are not there."""
    if not classifier_layout(model.config()).encoder:
        return list(ids)
    inner = [one for one in ids if one not in (first, last)]
    return [*([] if first is None else [first]), *inner, *([] if last is None else [last])]
