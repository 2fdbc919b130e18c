"""Training an adapter with Transformers' Trainer: progress, checkpoints that survive a kill, and a loss curve.

work/checkpoints/checkpoint-40/     written by Trainer: adapter, optimizer, schedule, random state
                 ... curve.json     loss of every step so far
                 ... complete       written last; a checkpoint without it is not resumed from
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from coldpress.data.packing import IGNORED, TokenSequence
from coldpress.errors import Interrupted, TrainingError
from coldpress.events import Message, Progress, Sink
from coldpress.nn import imports

__all__ = ["TrainingReport", "collate", "last_checkpoint", "train"]

CHECKPOINT_SECONDS = 120.0
"""Between checkpoints, when the config does not say when to save."""
CHECKPOINT_SHARE = 0.05
"""Saving takes at most this share of the time: slow disks and large adapters are saved less often."""
PROGRESS_SECONDS = 0.2
"""Between progress events."""


@dataclass(frozen=True)
class TrainingReport:
    """What a training did. Losses in nats per token."""

    steps: int
    seconds: float
    """Of this process; a resumed training took longer."""
    tokens: int
    """Trained on, padding not counted, over all epochs."""
    losses: tuple[float, ...]
    """Of every step, from the first."""
    log: tuple[Mapping[str, float], ...] = field(repr=False)
    """Every point that was logged: loss, learning rate, gradient norm, evaluation loss."""
    resumed_from: int | None = None
    """Step of the checkpoint that this training went on from."""

    @property
    def loss(self) -> float:
        """Mean over the last tenth of the steps (at least one)."""
        last = self.losses[-max(1, len(self.losses) // 10) :]
        return sum(last) / len(last)

    @property
    def eval_loss(self) -> float | None:
        found = [point["eval_loss"] for point in self.log if "eval_loss" in point]
        return found[-1] if found else None

    def to_dict(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "seconds": round(self.seconds, 3),
            "tokens": self.tokens,
            "loss": self.loss,
            "eval_loss": self.eval_loss,
            "resumed_from": self.resumed_from,
            "losses": list(self.losses),
            "log": [dict(point) for point in self.log],
        }


def collate(
    sequences: Sequence[Mapping[str, Any]], *, pad_id: int, padding_side: str = "right", use_mask: bool = True
) -> dict[str, Any]:
    """One batch, padded to its longest sequence: `input_ids`, `labels` and, where padding could be seen, a mask.

    A causal model never looks right, so padding on the right needs no mask, and without one attention is faster.
    """
    import torch

    longest = max(len(one["input_ids"]) for one in sequences)
    left = padding_side == "left"

    def padded(values: list[int], fill: int) -> list[int]:
        gap = [fill] * (longest - len(values))
        return gap + values if left else values + gap

    if "label" in sequences[0]:  # a classifier looks at whole texts, and must not see padding
        return {
            "input_ids": torch.tensor([padded(one["input_ids"], pad_id) for one in sequences]),
            "attention_mask": torch.tensor([padded([1] * len(one["input_ids"]), 0) for one in sequences]),
            "labels": torch.tensor([one["label"] for one in sequences]),
        }
    batch = {
        "input_ids": torch.tensor([padded(one["input_ids"], pad_id) for one in sequences]),
        "labels": torch.tensor([padded(one["labels"], IGNORED) for one in sequences]),
    }
    if left and use_mask:
        batch["attention_mask"] = torch.tensor([padded([1] * len(one["input_ids"]), 0) for one in sequences])
    return batch


def train(
    model: Any,
    sequences: Sequence[TokenSequence],
    held_out: Sequence[TokenSequence] | None,
    *,
    arguments: Mapping[str, Any],
    pad_id: int,
    padding_side: str = "right",
    use_mask: bool = True,
    work: Path,
    step: str,
    emit: Sink,
) -> TrainingReport:
    """Train what requires gradients in `model`, in place. `arguments` are Transformers' TrainingArguments.

    Goes on from the last complete checkpoint in `work`. SIGTERM and SIGINT save one and raise Interrupted. Raises
    TrainingError when the loss is not finite, or the arguments do not go together.
    """
    imports.load_training(quantized=imports.needs_bitsandbytes(str(arguments.get("optim") or "")))
    folder = work / "checkpoints"
    resume, given = _resume_point(folder, arguments.get("resume_from_checkpoint"))
    trainer, watch = _trainer(
        model, sequences, held_out, {**arguments, **given}, pad_id, padding_side, use_mask, folder, step, emit
    )
    if resume is not None:
        watch.resume(resume)
    started = time.perf_counter()
    with _stop_signals(watch), imports.quiet_renames():
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    if watch.stopped:
        raise Interrupted(
            f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}",
            hint="its checkpoint is kept: the same command goes on from there",
        )
    done = int(trainer.state.global_step)
    if done == 0:
        raise TrainingError("not one training step was made", hint="check num_train_epochs, max_steps and the data")
    return TrainingReport(
        steps=done,
        seconds=time.perf_counter() - started,
        tokens=round(watch.tokens_per_step * done),
        losses=tuple(watch.losses),
        log=tuple(dict(point) for point in trainer.state.log_history if "train_runtime" not in point),
        resumed_from=watch.resumed_from,
    )


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end."""
    found = [
        (int(match.group(1)), path)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and (path / "complete").is_file()
    ]
    return max(found)[1] if found else None


def _resume_point(folder: Path, asked: Any) -> tuple[Path | None, dict[str, Any]]:
    """Where to go on from: our own last checkpoint, else the one that the config names. False starts afresh."""
    own = last_checkpoint(folder)
    if asked is False:
        shutil.rmtree(folder, ignore_errors=True)
        return None, {"resume_from_checkpoint": None}
    if own is None and isinstance(asked, str):
        if not (Path(asked) / "trainer_state.json").is_file():
            raise TrainingError(f"resume_from_checkpoint: {asked} is not a checkpoint of Trainer")
        own = Path(asked)
    for path in folder.iterdir() if folder.is_dir() else ():
        if path != own and path.name.startswith("checkpoint-") and not (path / "complete").is_file():
            shutil.rmtree(path, ignore_errors=True)  # cut short by a kill
    return own, {"resume_from_checkpoint": None}


class _Sequences:
    """Token sequences as Trainer's data loader takes them."""

    def __init__(self, sequences: Sequence[TokenSequence]) -> None:
        self._sequences = sequences

    def __len__(self) -> int:
        return len(self._sequences)

    def __getitem__(self, place: int) -> dict[str, Any]:
        one = self._sequences[place]
        label = {} if one.target is None else {"label": one.target}  # a name that Trainer does not take out
        return {"input_ids": one.ids, "labels": one.labels, **label}


def _trainer(
    model: Any,
    sequences: Sequence[TokenSequence],
    held_out: Sequence[TokenSequence] | None,
    arguments: Mapping[str, Any],
    pad_id: int,
    padding_side: str,
    use_mask: bool,
    folder: Path,
    step: str,
    emit: Sink,
) -> tuple[Any, _Watch]:
    import transformers
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    class WatchedTrainer(transformers.Trainer):  # type: ignore[misc]
        """Trainer that shows every micro-batch's loss to the watch."""

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            watch.add(float(loss), self.state.global_step)
            return loss

    class Callback(transformers.TrainerCallback):  # type: ignore[misc]
        """Trainer's events, handed to the watch."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            watch.end_of_step(state, control)

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            watch.saved(folder / f"checkpoint-{state.global_step}")

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            watch.logged(logs or {})

    ours = {
        "output_dir": str(folder),
        "disable_tqdm": True,
        "report_to": "none",
        "prediction_loss_only": True,
        "save_total_limit": 2,
        "save_strategy": "steps" if "save_steps" in arguments else "no",
    }
    try:
        with imports.quiet_renames():
            checked = transformers.TrainingArguments(**{**ours, **arguments})
        watch = _Watch(step, emit, _tokens_per_step(sequences, checked), timed=str(checked.save_strategy.value) == "no")
        trainer = WatchedTrainer(
            model=model,
            args=checked,
            train_dataset=_Sequences(sequences),
            eval_dataset=None if held_out is None else _Sequences(held_out),
            data_collator=lambda batch: collate(batch, pad_id=pad_id, padding_side=padding_side, use_mask=use_mask),
            callbacks=[Callback()],
        )
    except (TypeError, ValueError, ImportError) as error:
        raise TrainingError(f"training_args: {error}", hint="see Transformers' TrainingArguments") from error
    for printing in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printing)
    return trainer, watch


def _tokens_per_step(sequences: Sequence[TokenSequence], arguments: Any) -> float:
    mean = sum(len(one.ids) for one in sequences) / len(sequences)
    rows = arguments.train_batch_size * arguments.gradient_accumulation_steps * max(arguments.world_size, 1)
    return float(mean * min(rows, len(sequences)))


class _Watch:
    """What happens while Trainer runs: losses, progress events, when to save, when to stop."""

    def __init__(self, step: str, emit: Sink, tokens_per_step: float, *, timed: bool) -> None:
        self.step, self.emit, self.tokens_per_step, self.timed = step, emit, tokens_per_step, timed
        self.losses: list[float] = []
        self.resumed_from: int | None = None
        self.stop_asked = False
        self.stopped = False
        self._micro = 0.0
        self._values: dict[str, float] = {}
        self._first = self._shown = self._saved = time.monotonic()
        self._first_step = 0
        self._save_began: float | None = None
        self._save_took = 0.0

    def resume(self, checkpoint: Path) -> None:
        self.resumed_from = self._first_step = int(checkpoint.name.rpartition("-")[2])
        curve = checkpoint / "curve.json"
        if curve.is_file():
            self.losses = [float(value) for value in json.loads(curve.read_text(encoding="utf-8"))]
        self.emit(Message("info", f"goes on from the checkpoint at step {self.resumed_from}", self.step))

    def add(self, loss: float, done: int) -> None:
        """Loss of one micro-batch, already its share of the step's."""
        if not math.isfinite(loss):
            raise self._broken(loss, done)
        self._micro += loss

    def _broken(self, loss: float, done: int) -> TrainingError:
        if not self.losses:
            return TrainingError(
                f"the loss is {loss} in the first step, before any weight was changed: the model itself yields it",
                hint="does the checkpoint hold NaN or infinite weights, or overflow in this torch_dtype?",
            )
        return TrainingError(
            f"the loss became {loss} in step {done + 1}; the last finite one was {self.losses[-1]:.4g} in step {done}",
            hint="lower learning_rate, set max_grad_norm, or look at the data with `coldpress data`",
        )

    def end_of_step(self, state: Any, control: Any) -> None:
        now = time.monotonic()
        self.losses.append(self._micro)
        self._micro = 0.0
        done, total = int(state.global_step), int(state.max_steps)
        if self.stop_asked and done < total:
            self.stopped = control.should_save = control.should_training_stop = True
        elif (
            self.timed
            and done < total
            and now - self._saved > max(CHECKPOINT_SECONDS, self._save_took / CHECKPOINT_SHARE)
        ):
            control.should_save = True
        if control.should_save:
            self._save_began = now
        if now - self._shown >= PROGRESS_SECONDS or done in (1, total):
            self._shown = now
            self.emit(
                Progress(self.step, done, total, "steps", {"loss": self.losses[-1], **self._rates(done, total, now)})
            )

    def _rates(self, done: int, total: int, now: float) -> dict[str, float]:
        seconds = max(now - self._first, 1e-9)
        made = max(done - self._first_step, 1)
        return {
            "tokens_per_second": self.tokens_per_step * made / seconds,
            "eta_seconds": seconds / made * (total - done),
            **self._values,
        }

    def logged(self, logs: Mapping[str, Any]) -> None:
        self._values.update(
            {name: float(logs[name]) for name in ("learning_rate", "grad_norm", "eval_loss") if name in logs}
        )

    def saved(self, checkpoint: Path) -> None:
        """Mark a checkpoint as complete, after all that Trainer wrote is on disk."""
        (checkpoint / "curve.json").write_text(json.dumps(self.losses), encoding="utf-8")
        for path in checkpoint.iterdir():
            if path.is_file():
                with path.open("rb+") as file:
                    os.fsync(file.fileno())
        (checkpoint / "complete").touch()
        self._saved = time.monotonic()
        self._save_took = self._saved - (self._save_began or self._saved)
        self._save_began = None


@contextmanager
def _stop_signals(watch: _Watch) -> Iterator[None]:
    """SIGTERM and SIGINT ask for a checkpoint and an end after the running step; a second one ends at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Any] = {}
    numbers: tuple[int, ...] = (signal.SIGTERM, signal.SIGINT)

    def ask(number: int, frame: FrameType | None) -> None:
        watch.stop_asked = True
        signal.signal(number, before[number])

    for number in numbers:
        before[number] = signal.getsignal(number) or signal.SIG_DFL
        signal.signal(number, ask)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
