"""Best fit decreasing: items of given lengths into as few bins of one capacity as the rule finds.

The longest item is placed first; each goes into the bin with the least room that still takes it. At most 11/9 of the
best possible number of bins, plus 4 (Johnson et al. 1974); records of text are many and mixed, and fill nearly all.
"""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence

__all__ = ["best_fit_decreasing"]


def best_fit_decreasing(lengths: Sequence[int], capacity: int, seed: int | None = None) -> list[list[int]]:
    """Bins of item numbers, each bin ascending, ordered by their first item. `seed` shuffles items of equal length.

    Every length must be between 1 and `capacity`. O(n log n) for the sort, and O(distinct rooms) a step.
    """
    order = list(range(len(lengths)))
    if seed is not None:
        random.Random(seed).shuffle(order)
    order.sort(key=lambda item: -lengths[item])
    bins: list[list[int]] = []
    open_bins: dict[int, deque[int]] = {}  # by the room that they have left, the oldest first
    rooms: list[int] = []  # keys of open_bins, ascending
    for item in order:
        length = lengths[item]
        if not 1 <= length <= capacity:
            raise ValueError(f"item {item} has length {length}, not 1 to {capacity}")
        place = bisect_left(rooms, length)
        if place == len(rooms):
            chosen, room = len(bins), capacity
            bins.append([])
        else:
            room = rooms[place]
            chosen = open_bins[room].popleft()
            if not open_bins[room]:
                del open_bins[room], rooms[place]
        bins[chosen].append(item)
        room -= length
        if room:
            if room not in open_bins:
                open_bins[room] = deque()
                insort(rooms, room)
            open_bins[room].append(chosen)
    return sorted(sorted(one) for one in bins)
