"""A training part and a held-out part of one data set, for a model that is to be measured.

Rows with the same text go to the same side: a model that has seen a held-out row would be measured on its memory.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coldpress.errors import DataError

__all__ = ["Split", "split_rows", "split_seed"]


@dataclass(frozen=True)
class Split:
    """Row numbers of both parts, each in ascending order."""

    train: list[int]
    held_out: list[int]
    moved: int = 0
    """Rows that stand on the side of an equal row and would otherwise have been free to stand on the other."""


def split_rows(keys: Sequence[Hashable], size: float | int, seed: int) -> Split:
    """Hold out `size` rows (a share below 1, or a count), drawn at random with equal `keys` kept together.

    A share is at least one row. Raises DataError when a side would be empty.
    """
    total = len(keys)
    share = isinstance(size, float) and size < 1
    wanted = max(round(total * size), 1) if share else int(size)  # of few rows, a share is at least one
    if not 0 < wanted < total:
        raise DataError(
            f"eval_dataset_size {size:g} of {total} rows leaves {max(total - wanted, 0)} to train on and "
            f"{max(wanted, 0)} to hold out; both sides need at least one row",
            hint="use a share such as 0.1, or a smaller count",
        )
    groups: dict[Hashable, list[int]] = {}
    for row, key in enumerate(keys):
        groups.setdefault(key, []).append(row)
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    held_out: list[int] = []
    train: list[int] = []
    for group in order:
        # A group goes to the held-out side as long as it fits there.
        (held_out if len(held_out) + len(group) <= wanted else train).extend(group)
    if not held_out:
        raise DataError(
            f"the {total} rows hold only {len(groups)} different texts, too few to hold out {wanted} rows",
            hint="give a separate eval_data_config",
        )
    return Split(sorted(train), sorted(held_out), total - len(groups))


def split_seed(arguments: Mapping[str, Any]) -> int:
    """Seed of the split: `data_seed` of the training arguments, else `seed`, else 42."""
    for name in ("data_seed", "seed"):
        if arguments.get(name) is not None:
            return int(arguments[name])
    return 42
