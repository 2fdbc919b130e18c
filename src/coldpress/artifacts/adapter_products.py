"""What an adapter adds to one weight, by the names of its own tensors, made for the rows that are asked for.

    LoRA    s B A                      A [r, in], B [out, r]
    LoHa    s (A1 B1) * (A2 B2)        element by element; A1, A2 [out, r], B1, B2 [r, in]
    LoKr    s kron(C, D)               C [a, c], D [b, d], a b = out, c d = in; either may be a product of rank r
                                       row i of the sum: C[i // b] and D[i % b], each number of the one times the other

Sources: Hu et al. 2021, section 4.1; Hyeon-Woo et al. 2022 (FedPara), proposition 1; Yeh et al. 2024 (LyCORIS), section
3.2; shapes and names as in peft/tuners/lora/layer.py, loha/layer.py and lokr/layer.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

__all__ = ["Hadamard", "Kronecker", "LowRank", "Product", "RowReader"]


class RowReader(Protocol):
    """Reads rows of an adapter's own tensors, float32."""

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array: ...


class Product(Protocol):
    """What is added to a weight that lies as [out, in]."""

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight as it lies in the base."""
        ...

    def rows(self, adapter: RowReader, start: int, stop: int) -> Array:
        """Rows of what is added [stop - start, in], float32."""
        ...


@dataclass(frozen=True)
class LowRank:
    """LoRA and DoRA."""

    first: str
    """A."""
    second: str
    """B."""
    rank: int
    shape: tuple[int, int]
    scale: float
    transposed: bool
    """The weight lies as [in, out]."""
    magnitude: str | None
    """m, for DoRA."""

    def rows(self, adapter: RowReader, start: int, stop: int) -> Array:
        import numpy as np

        if self.transposed:
            a, b = adapter.read(self.first), adapter.read(self.second)
            added = np.ascontiguousarray(a[:, start:stop].T) @ b.T
        else:
            added = adapter.read(self.second, start, stop) @ adapter.read(self.first)
        added *= np.float32(self.scale)
        return np.asarray(added, np.float32)


@dataclass(frozen=True)
class Hadamard:
    """LoHa."""

    tensors: tuple[str, str, str, str]
    """A1, B1, A2, B2."""
    shape: tuple[int, int]
    scale: float

    def rows(self, adapter: RowReader, start: int, stop: int) -> Array:
        import numpy as np

        a1, b1, a2, b2 = self.tensors
        added = adapter.read(a1, start, stop) @ adapter.read(b1)
        added *= adapter.read(a2, start, stop) @ adapter.read(b2)
        added *= np.float32(self.scale)
        return np.asarray(added, np.float32)


@dataclass(frozen=True)
class Kronecker:
    """LoKr."""

    left: tuple[str, ...]
    """C, or the two of which it is the product."""
    right: tuple[str, ...]
    """D, or the two of which it is the product."""
    left_shape: tuple[int, int]
    right_shape: tuple[int, int]
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.left_shape[0] * self.right_shape[0], self.left_shape[1] * self.right_shape[1]

    def rows(self, adapter: RowReader, start: int, stop: int) -> Array:
        import numpy as np

        height = self.right_shape[0]
        left, right = _whole(adapter, self.left), _whole(adapter, self.right)
        left = left * np.float32(self.scale)
        added = np.empty((stop - start, self.shape[1]), np.float32)
        for outer in range(start // height, -(-stop // height)):
            first, last = max(start - outer * height, 0), min(stop - outer * height, height)
            place = outer * height + first - start
            block = left[outer][None, :, None] * right[first:last, None, :]
            added[place : place + last - first] = block.reshape(last - first, -1)
        return added


def _whole(adapter: RowReader, names: tuple[str, ...]) -> Array:
    read = [adapter.read(name) for name in names]
    return read[0] if len(read) == 1 else read[0] @ read[1]
