"""Whether an adapter belongs to the base model that it is put on, from headers and a few rows of the weights.

adapter_config.json names the base that the adapter was trained on. Where that is another local folder, the weights of
both are compared; rows that differ by more than the rounding between two floating-point types are another model's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coldpress.artifacts.adapter import AdapterWeights
from coldpress.artifacts.adapter_kinds import unknown_kind
from coldpress.artifacts.classifiers import ClassifierTensors, classifier_layout
from coldpress.artifacts.json_file import read_json
from coldpress.artifacts.quantized import Checkpoint, open_checkpoint
from coldpress.artifacts.tensors import TensorSource
from coldpress.errors import CheckpointError

__all__ = ["ClassifierBase", "check_adapter", "recorded_base"]

ROUNDING = 3e-3
"""Greatest distance, relative to their size, of the same weights in two types: bf16 keeps 8 bits."""
_BASE = "base_model_name_or_path"


def recorded_base(adapter: Path, record: Mapping[str, Any]) -> Path | None:
    """The local checkpoint folder that an adapter's config names; a relative one lies beside the adapter."""
    said = record.get(_BASE)
    if not isinstance(said, str) or not said:
        return None
    places = (adapter / said, Path(said))
    return next((place.resolve() for place in places if (place / "config.json").is_file()), None)


@dataclass(frozen=True)
class ClassifierBase:
    """A base that its adapter makes a classifier of."""

    config: Mapping[str, Any]
    dtype: str
    """Of what is new."""

    def tensors(self, base: TensorSource, adapter: AdapterWeights) -> ClassifierTensors:
        """The weights of `base` under the names that `adapter` knows; raises CheckpointError where it has no head."""
        layout = classifier_layout(self.config)
        labels = adapter.rows_of(layout.labels_name)
        if labels is None and layout.labels_name not in {info.name for info in base.infos()}:
            raise CheckpointError(
                f"{adapter.folder} makes a classifier of its base, and has no {layout.labels_name}",
                hint="train it again; the head belongs to modules_to_save",
            )
        return ClassifierTensors(base, self.config, self.dtype, labels or 0)


def check_adapter(
    adapter: Path, model: Path, base: Checkpoint, *, tied: bool, classifier: ClassifierBase | None = None
) -> None:
    """Raise CheckpointError for an adapter that is damaged, or was made for another base than `model`."""
    record = read_json(adapter / "adapter_config.json")
    if unknown_kind(record) is not None:  # nothing is known of its tensors; whoever merges it refuses it
        return
    with AdapterWeights.open(adapter) as weights:
        source: TensorSource = base if classifier is None else classifier.tensors(base, weights)
        # A classifier has no head that predicts words, so nothing is tied.
        weights.check_fit({info.name: info.shape for info in source.infos()}, tied=tied and classifier is None)
    other = recorded_base(adapter, record)
    if other is not None and other != model.resolve() and not base.packings and _differ(other, base):
        raise CheckpointError(
            f"{adapter} was trained on {other}, whose weights are not those of {model}",
            hint=f"give {other} as the model; if it must be this one, change {_BASE} in adapter_config.json",
        )


def _differ(folder: Path, base: Checkpoint) -> bool:
    """Whether the weights of a folder are others: two rows of every tensor that both have are looked at."""
    import numpy as np

    apart = size = 0.0
    with open_checkpoint(folder, read_json(folder / "config.json")) as other:
        if other.packings:
            return False  # rounded: nothing can be told
        for info in base.infos():
            if info.name not in other or other.info(info.name).shape != info.shape or not info.shape:
                continue
            for row in sorted({0, info.shape[0] // 2}):
                mine, theirs = (np.asarray(one.read(info.name, row, row + 1), np.float64) for one in (base, other))
                apart += float(np.square(mine - theirs).sum())
                size += float(np.square(mine).sum())
    return not apart <= (ROUNDING**2) * size
