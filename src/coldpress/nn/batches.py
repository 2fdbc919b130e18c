"""From the rows of one training step to micro-batches: as many tokens at a time as there is room for, no padding.

    a step      per_device_train_batch_size * gradient_accumulation_steps rows, as the config says
    packed      its records, longest first, cut into runs of at most `tokens`; each run is one row of the model, with
                padding that rounds its length: libraries prepare a product once for each shape. What stands behind
                the last token that another one's loss is asked of is left out, and what all records of a run begin
                with (a template's head, an instruction) stands there once, up to the first loss
    padded      for models whose records cannot share a row: runs filled up to their longest record
    classes     as padded, with one class for each record

The gradient of a step is the sum over its tokens with loss, divided by their number; how the step was cut does not
enter it. That is also what Transformers computes with gradient accumulation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from coldpress.data.packing import IGNORED, TokenSequence
from coldpress.nn.packed_attention import Segments, segments_of

__all__ = ["Form", "MicroBatch", "StepBatch", "cut_step", "idle"]

ALIKE = 4
"""Tokens that the records of a row begin with: fewer stand in it as often as there are records."""
ROUNDING, LONG = 16, 256
"""A packed row is filled up to a multiple of this many tokens, of four times as many from `LONG` on. oneDNN compiles a
kernel for each new shape: about 10 ms a length, for all products of a small model, which must not come too often."""

Form = Literal["packed", "padded", "classes"]


@dataclass(frozen=True)
class MicroBatch:
    """What goes through the model at once."""

    inputs: dict[str, torch.Tensor]
    segments: Segments | None
    count: int
    """Tokens with loss, or records where each has a class."""
    tokens: int
    """Without padding."""

    def to(self, device: Any) -> MicroBatch:
        """The same on a device."""
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in self.inputs.items()}
        segments = None if self.segments is None else self.segments.to(device)
        return MicroBatch(moved, segments, self.count, self.tokens)


@dataclass(frozen=True)
class StepBatch:
    """All of one step. `rows` are indices into the training sequences."""

    rows: tuple[int, ...]
    micro: tuple[MicroBatch, ...] = field(repr=False)

    @property
    def count(self) -> int:
        return sum(one.count for one in self.micro)

    @property
    def tokens(self) -> int:
        return sum(one.tokens for one in self.micro)


@dataclass(frozen=True)
class _Record:
    ids: list[int]
    labels: list[int]
    target: int | None


def cut_step(
    rows: Sequence[tuple[int, TokenSequence]],
    *,
    form: Form,
    tokens: int,
    records: int | None = None,
    pad_id: int = 0,
    padding_side: str = "right",
    apart: int | None = None,
    sharing: bool = False,
) -> StepBatch:
    """Micro-batches of at most `tokens` tokens (padding counted) and at most `records` records each.

    `sharing`: what records begin with may stand in a packed row once. A record longer than `tokens` is a micro-batch of
    its own. A step in which no token carries loss has none.
    """
    found = [record for _, sequence in rows for record in _records(sequence)]
    if form != "classes":
        useful = [one for one in found if any(label != IGNORED for label in one.labels[1:])]
        # One record stays even so: a model that several processes share must run in each of them.
        found = useful or [max(found, key=_by_length)]
    found.sort(key=_by_length)
    micro = []
    for run in _runs([len(one.ids) for one in found], tokens, records, apart, padded=form != "packed"):
        own = found[run.start : run.stop]
        micro.append(
            _packed(own, pad_id, apart, sharing=sharing)
            if form == "packed"
            else _padded(own, pad_id, padding_side, form)
        )
    return StepBatch(tuple(index for index, _ in rows), tuple(micro))


def idle(step: StepBatch) -> StepBatch:
    """The same at weight 0: for a process that has no row in a step that others have rows in."""
    return StepBatch((), tuple(MicroBatch(one.inputs, one.segments, 0, 0) for one in step.micro))


def _by_length(record: _Record) -> int:
    """Longest first."""
    return -len(record.ids)


def _records(sequence: TokenSequence) -> Iterator[_Record]:
    """The records of a sequence; one that is no pack is one record."""
    lengths = getattr(sequence, "lengths", None) or (len(sequence.ids),)
    start = 0
    for length in lengths:
        stop = start + length
        yield _Record(sequence.ids[start:stop], sequence.labels[start:stop], getattr(sequence, "target", None))
        start = stop


def _runs(
    lengths: Sequence[int], tokens: int, records: int | None, apart: int | None, *, padded: bool
) -> Iterator[range]:
    """Records `apart` or shorter share no run with longer ones."""
    start = held = 0
    for place, length in enumerate(lengths):
        size = lengths[start] * (place - start + 1) if padded else held + length
        full = records is not None and place - start == records
        crosses = apart is not None and length <= apart < lengths[start]
        if place > start and (size > tokens or full or crosses):
            yield range(start, place)
            start, held = place, 0
        held += length
    if lengths:
        yield range(start, len(lengths))


def _packed(records: Sequence[_Record], pad_id: int, apart: int | None, *, sharing: bool) -> MicroBatch:
    tokens = sum(len(one.ids) for one in records)
    # What is longer than `apart` must stay so: its length decides how it is computed.
    cut = [_needed(one, whole=apart is not None and len(one.ids) > apart) for one in records]
    shared = _beginning(cut) if sharing else 0
    records = _filled(sorted(cut, key=_by_length), pad_id, shared)
    ids, rows, targets = records[0].ids[:shared], [], []
    for one in records:
        for place, label in enumerate(one.labels[shared:], len(ids)):
            if label != IGNORED:
                rows.append(place)
                targets.append(label)
        ids += one.ids[shared:]
    segments = segments_of([len(one.ids) for one in records], shared)
    inputs = {
        "input_ids": torch.tensor([ids]),
        "position_ids": segments.positions,
        "loss_rows": torch.tensor(rows, dtype=torch.long),
        "loss_targets": torch.tensor(targets, dtype=torch.long),
    }
    return MicroBatch(inputs, segments, len(rows), tokens)


def _beginning(records: Sequence[_Record]) -> int:
    """Tokens that all records begin with and that ask for no loss; 0 where they are not worth it."""
    low, high = min(one.ids for one in records), max(one.ids for one in records)
    limit = min(_first_loss(one) for one in records)
    alike = next((place for place in range(limit) if low[place] != high[place]), limit)
    return alike if alike >= ALIKE and len(records) > 1 else 0


def _first_loss(record: _Record) -> int:
    last = len(record.ids) - 1  # something of each record is its own
    return next((place for place, label in enumerate(record.labels) if label != IGNORED), last)


def _needed(record: _Record, *, whole: bool) -> _Record:
    """Its tokens up to the last one that a loss is asked of, or the whole of it; each with the label of the next."""
    labels = [*record.labels[1:], IGNORED]
    if whole:
        return _Record(record.ids, labels, record.target)
    last = max((place for place, label in enumerate(labels) if label != IGNORED), default=len(labels) - 1)
    return _Record(record.ids[: last + 1], labels[: last + 1], record.target)


def _filled(records: list[_Record], pad_id: int, shared: int) -> list[_Record]:
    """With padding behind the shortest record, which sees nothing of it, or as records if that is too much: none longer
    than the longest, for some models count positions; and not more of them than there are."""
    tokens = shared + sum(len(one.ids) - shared for one in records)
    filling = -tokens % (ROUNDING if tokens < LONG else 4 * ROUNDING)
    shortest, longest = records[-1], len(records[0].ids)
    padding = _Record([pad_id] * filling, [IGNORED] * filling, None)
    if len(shortest.ids) + filling <= longest:
        joined = _Record(shortest.ids + padding.ids, shortest.labels + padding.labels, shortest.target)
        return sorted([*records[:-1], joined], key=_by_length)
    most = longest - shared if shared else filling
    parts = [padding.ids[start : start + most] for start in range(0, filling, most)]
    if len(parts) > len(records):
        return records
    begun = [_Record(shortest.ids[:shared] + part, [IGNORED] * (shared + len(part)), None) for part in parts]
    return sorted([*records, *begun], key=_by_length)


def _padded(records: Sequence[_Record], pad_id: int, padding_side: str, form: Form) -> MicroBatch:
    longest = len(records[0].ids)

    def padded(values: list[int], fill: int) -> list[int]:
        gap = [fill] * (longest - len(values))
        return gap + values if padding_side == "left" else values + gap

    inputs = {
        "input_ids": torch.tensor([padded(one.ids, pad_id) for one in records]),
        "attention_mask": torch.tensor([padded([1] * len(one.ids), 0) for one in records]),
    }
    tokens = sum(len(one.ids) for one in records)
    if form == "classes":
        inputs["labels"] = torch.tensor([one.target for one in records])
        return MicroBatch(inputs, None, len(records), tokens)
    inputs["labels"] = torch.tensor([padded([IGNORED, *one.labels[1:]], IGNORED) for one in records])
    return MicroBatch(inputs, None, int((inputs["labels"] != IGNORED).sum()), tokens)
