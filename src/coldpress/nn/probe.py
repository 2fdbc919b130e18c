"""One micro-batch, forward and backward, to see what memory it really takes where the plan says that room is short.

Nothing is changed by it: gradients are dropped, the random state is put back. On a GPU that runs out of memory the
micro-batch is halved until it fits; on a CPU the operating system would kill the process, so the first try is the one
that the estimate allows, and only a measured surplus makes it larger.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from coldpress.data.packing import TokenSequence
from coldpress.nn.batches import MicroBatch, cut_step
from coldpress.nn.losses import Loss
from coldpress.nn.train import Batching

__all__ = ["probed"]

MARGIN = 0.9
"""Part of the room that micro-batches are made for: those to come are filled up differently."""


def probed(
    model: Any, sequences: Sequence[TokenSequence], loss: Loss, batching: Batching, autocast: torch.dtype | None
) -> tuple[Batching, int]:
    """A batching whose micro-batches fit into its `room`, and the bytes a token that were measured.

    `autocast` is the type that products are cast to, if any are. Raises what the model raises.
    """
    assert batching.room is not None
    if batching.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    rows = sorted(enumerate(sequences), key=lambda one: -len(one[1].ids))
    longest = max(max(getattr(one, "lengths", None) or (len(one.ids),)) for one in sequences)
    tokens = batching.tokens
    while True:
        cut = cut_step(rows, form=loss.form, tokens=tokens, records=batching.records, apart=loss.apart)
        micro = cut.micro[0].to(next(model.parameters()).device)
        try:
            taken = _taken(model, loss, micro, autocast)
            break
        except torch.cuda.OutOfMemoryError:
            if tokens <= longest:
                raise
            tokens = max(longest, tokens // 2)
    size = max(1, taken // next(iter(micro.inputs.values())).numel())
    return replace(batching, tokens=int(min(max(longest, batching.room * MARGIN // size), batching.most))), size


def _taken(model: Any, loss: Loss, micro: MicroBatch, autocast: torch.dtype | None) -> int:
    """Peak bytes of a forward and a backward pass, beyond what was there before."""
    device = next(model.parameters()).device
    was_training = model.training
    model.train()
    try:
        with torch.random.fork_rng(), _Peak(device) as peak:
            with torch.autocast(device.type, autocast or torch.bfloat16, enabled=autocast is not None):
                found = loss(model, micro)
            found.backward()
    finally:
        model.train(was_training)
        for parameter in model.parameters():
            parameter.grad = None
    return peak.bytes


class _Peak:
    """Highest memory while the block runs, beyond what there was at its start."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._done = threading.Event()
        self.bytes = 0

    def __enter__(self) -> _Peak:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        else:
            self._before = self._highest = _resident()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self._highest = max(self._highest, _resident())

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self._device) - self._before
        else:
            self._done.set()
            self._thread.join()
            self.bytes = max(self._highest, _resident()) - self._before


def _resident() -> int:
    """Bytes of this process in memory."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * 4096
    except (OSError, ValueError, IndexError):
        import psutil

        return int(psutil.Process().memory_info().rss)
