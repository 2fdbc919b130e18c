"""How many CPU threads a training's kernels are divided among: no more than their work is worth.

A kernel that is divided waits for its slowest thread, and a thread that sleeps takes its time to come. For a small
model on short rows that is more than the other half of a kernel takes; beside other work on the machine, far more. The
choice depends on the model, the data and the machine's threads alone, so a resumed training makes the same one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from coldpress.data.packing import TokenSequence
from coldpress.events import Message, Sink

__all__ = ["threads_for"]

WORK = 1 << 16
"""Numbers of a layer's input (hidden size times tokens) that one thread is worth."""


@contextmanager
def threads_for(
    model: Any, sequences: Sequence[TokenSequence], rows: int, tokens: int, step: str, emit: Sink
) -> Iterator[None]:
    """While the block runs, torch uses as many threads as pay for steps of `rows` rows, `tokens` at most at a time.

    What the user says in OMP_NUM_THREADS stays as it is.
    """
    before = torch.get_num_threads()
    width = getattr(model.config, "hidden_size", None)
    if "OMP_NUM_THREADS" in os.environ or next(model.parameters()).device.type != "cpu" or not width or before == 1:
        yield
        return
    mean = sum(len(one.ids) for one in sequences) / len(sequences)
    numbers = int(width) * min(mean * rows, tokens)
    threads = max(1, min(before, int(numbers // WORK)))
    if threads < before:
        said = f"{threads} of {before} CPU threads: a layer's {numbers / 1e3:.0f} thousand numbers are too few for more"
        emit(Message("info", f"{said} (alone on the machine? docs/training.md)", step))
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
