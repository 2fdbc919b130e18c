"""What a training changed: how many numbers it could change, and which layers came out other than they went in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["Changes", "Fingerprints"]

_ADAPTER_PARTS = (".lora_", ".hada_", ".lokr_", ".modules_to_save.", ".base_layer.", ".original_module.")
"""What PEFT puts between a module's name and that of a tensor."""


@dataclass(frozen=True)
class Changes:
    """A model after its training, against the same model before."""

    trained: int
    """Numbers that the training could change."""
    total: int
    """Numbers in the model, those of an adapter included. 4-bit weights count as what they stand for."""
    layers: int
    """Modules with such numbers."""
    layers_changed: int

    @property
    def text(self) -> str:
        share = self.trained / max(self.total, 1)
        said = f"trained {self.trained:,} of {self.total:,} parameters ({share:.2%})"
        if self.layers_changed == self.layers:
            return f"{said}; all {self.layers} layers changed"
        return f"{said}; {self.layers_changed} of {self.layers} layers changed"

    def to_dict(self) -> dict[str, int]:
        return {
            "parameters": self.trained,
            "of": self.total,
            "layers": self.layers,
            "layers_changed": self.layers_changed,
        }


class Fingerprints:
    """What is left of a model before its training, without a copy of it.

    Two sums of each tensor that is trained: of all its values, and of every second.
    """

    def __init__(self, sums: Mapping[str, tuple[float, float]]) -> None:
        self._sums = sums

    @classmethod
    def of(cls, model: torch.nn.Module) -> Fingerprints:
        return cls(_sums(model))

    def compared_with(self, model: torch.nn.Module) -> Changes:
        """The same model after its training."""
        after = _sums(model)
        layers: dict[str, bool] = {}
        for name, sums in after.items():
            layer = _layer(name)
            layers[layer] = layers.get(layer, False) or sums != self._sums.get(name)
        parameters = list(model.parameters())
        return Changes(
            trained=sum(one.numel() for one in parameters if one.requires_grad),
            total=sum(_size(one) for one in parameters),
            layers=len(layers),
            layers_changed=sum(layers.values()),
        )


def _sums(model: torch.nn.Module) -> dict[str, tuple[float, float]]:
    import torch

    found = {}
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.requires_grad:
                flat = value.detach().flatten()
                found[name] = (float(flat.sum(dtype=torch.float64)), float(flat[::2].sum(dtype=torch.float64)))
    return found


def _layer(name: str) -> str:
    for part in _ADAPTER_PARTS:
        name = name.partition(part)[0]
    return name.removesuffix(".weight").removesuffix(".bias")


def _size(value: Any) -> int:
    """Numbers of a tensor; a packed one of bitsandbytes knows its own shape."""
    state = getattr(value, "quant_state", None)
    shape = value.shape if state is None else state.shape
    size = 1
    for one in shape:
        size *= int(one)
    return size
