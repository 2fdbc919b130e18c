"""One text after another through one cache: what a text and the one before it both begin with is not read again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Logits = npt.NDArray[np.float32]

__all__ = ["Reader", "common_prefix"]


class Reader(ABC):
    """A cache of one row that can be taken back to any of its tokens."""

    def __init__(self) -> None:
        self._ids: tuple[int, ...] = ()

    def read(self, ids: Sequence[int], keep: int = 1) -> Logits:
        """Logits after each of the last `keep` tokens of a text: [keep, vocabulary]."""
        known = min(common_prefix(self._ids, ids), len(ids) - keep)
        self._ids = ()  # a run that fails leaves the cache as nobody knows
        found = self.append(ids, known, keep)
        self._ids = tuple(ids)
        return found[-keep:]

    @abstractmethod
    def append(self, ids: Sequence[int], known: int, keep: int) -> Logits:
        """Logits after at least the last `keep` tokens; the cache begins with the first `known`, and may hold more."""


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens that both begin with."""
    limit = min(len(first), len(second))
    return next((place for place in range(limit) if first[place] != second[place]), limit)
