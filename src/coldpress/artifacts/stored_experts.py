"""Experts that a checkpoint stores in MXFP4, all of a layer in one tensor (see `kernels.mxfp4`).

    X_blocks uint8 [experts, n, k / 32, 16], X_scales uint8 [experts, n, k / 32]     reads as X [experts, k, n]

X is what Transformers makes of them (`dequantize_convertops` in integrations/mxfp4.py), inputs first. The graph wants
outputs first, which is how the codes lie: under the name `turned(X)` they read so, [experts * n, k].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from coldpress.artifacts.stored import StoredMatrix
from coldpress.artifacts.tensors import TensorInfo, TensorSource
from coldpress.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]

__all__ = ["is_turned", "mxfp4_experts", "turned"]

_TURNED = ":turned"


def turned(name: str) -> str:
    """Under this name the experts read with outputs first; a source lists it only under its own."""
    return name + _TURNED


def is_turned(name: str) -> bool:
    return name.endswith(_TURNED)


@dataclass(frozen=True)
class _Experts:
    source: TensorSource = field(repr=False)
    name: str
    shape: tuple[int, int, int]
    """Experts, n, k."""
    packing: str = "mxfp4 values are no integer codes"

    @property
    def info(self) -> TensorInfo:
        experts, n, k = self.shape
        return TensorInfo.of(self.name, "float32", (experts, k, n))

    @property
    def tensors(self) -> tuple[str, ...]:
        return f"{self.name}_blocks", f"{self.name}_scales"

    def rows(self, start: int, stop: int) -> Floats:
        """Whole experts, [experts, k, n]."""
        import numpy as np

        n = self.shape[1]
        return np.stack([self.stripe(expert, 0, n).T for expert in range(start, stop)])

    def stripe(self, expert: int, low: int, high: int) -> Floats:
        """Rows `low` to `high` of an expert, [high - low, k]."""
        from coldpress.kernels.mxfp4 import dequantize_mxfp4

        codes, scales = (self.source.read(name, expert, expert + 1)[0, low:high] for name in self.tensors)
        return dequantize_mxfp4(codes, scales)


@dataclass(frozen=True)
class _Turned:
    inner: _Experts
    packing: str = "it is another view"

    @property
    def info(self) -> TensorInfo:
        experts, n, k = self.inner.shape
        return TensorInfo.of(turned(self.inner.name), "float32", (experts * n, k))

    @property
    def tensors(self) -> tuple[str, ...]:
        return self.inner.tensors

    def rows(self, start: int, stop: int) -> Floats:
        import numpy as np

        n = self.inner.shape[1]
        pieces = [
            self.inner.stripe(expert, max(start - expert * n, 0), min(stop - expert * n, n))
            for expert in range(start // n, -(-stop // n))
        ]
        return np.concatenate(pieces) if len(pieces) > 1 else pieces[0]


def mxfp4_experts(source: TensorSource, name: str) -> Iterator[StoredMatrix]:
    """The experts `name`, and their other view; raises CheckpointError."""
    blocks, scales = f"{name}_blocks", f"{name}_scales"
    if scales not in source:
        raise CheckpointError(f"{scales} is missing beside {blocks}", hint="is the download complete?")
    found, beside = source.info(blocks), source.info(scales)
    shaped = len(found.shape) == 4 and found.shape[3] == 16 and beside.shape == found.shape[:3]
    if not shaped or (found.dtype, beside.dtype) != ("uint8", "uint8"):
        raise CheckpointError(
            f"{blocks} is {found.dtype} {list(found.shape)} and {scales} {beside.dtype} {list(beside.shape)}; MXFP4 "
            "experts are uint8 [experts, rows, blocks, 16] and [experts, rows, blocks]",
            hint="the checkpoint is damaged, or its config.json belongs to another one",
        )
    experts, n, count, _ = found.shape
    whole = _Experts(source, name, (experts, n, 32 * count))
    yield whole
    yield _Turned(whole)
