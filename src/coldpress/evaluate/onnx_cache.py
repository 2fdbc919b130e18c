"""Caches of ONNX decoders, as they are carried from run to run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Logits = npt.NDArray[np.float32]

__all__ = ["ROOM", "Past", "floats", "ort_value"]

ROOM = 32
"""Tokens that a cache has room for beyond those in it."""


@dataclass
class Past:
    """Prompts that were run: name -> OrtValue [row, head, token, size], padded on the right.

    A token more is written behind each row's last, into the same caches where they have room: what was there before
    stays as it is, so that another token may take its place afterwards.
    """

    caches: dict[str, Any]
    mask: Any
    """int64 [rows, tokens]."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [int(count) for count in self.mask.sum(axis=1)]

    def rows(self, chosen: Sequence[int]) -> Past:
        """Some rows, no wider than they need."""
        width = int(self.mask[list(chosen)].any(axis=0).nonzero()[0].max()) + 1
        if list(chosen) == list(range(len(self.mask))) and width == self.mask.shape[1]:
            return self
        caches = {name: ort_value(one.numpy()[list(chosen), :, :width]) for name, one in self.caches.items()}
        return Past(caches, self.mask[list(chosen), :width])

    def with_room(self, tokens: int) -> Past:
        """The same, in caches for so many tokens and some more."""
        import numpy as np

        if next(iter(self.caches.values())).shape()[2] >= tokens:
            return self
        more = max(ROOM, tokens // 4)
        caches = {}
        for name, one in self.caches.items():
            had = one.numpy()
            wide = np.zeros((*had.shape[:2], tokens + more, had.shape[3]), had.dtype)
            wide[:, :, : had.shape[2]] = had
            caches[name] = ort_value(wide)
        return Past(caches, self.mask)


def floats(value: Any) -> Logits:
    """Of an OrtValue, as float32."""
    array: Logits = value.numpy().astype("float32", copy=False)
    return array


def ort_value(array: Any) -> Any:
    """An OrtValue of an array."""
    import numpy as np
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
