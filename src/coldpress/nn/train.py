"""Training with Transformers' Trainer: rows to packed micro-batches, progress, and nothing that a kill could take.

Trainer keeps the loop, the schedule, the optimizer and the checkpoints. Its batch is a whole step (all rows between two
updates); how a step is cut into micro-batches, and how the model is asked for their loss, is decided here.
"""

from __future__ import annotations

import copy
import functools
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from coldpress.data.packing import TokenSequence
from coldpress.errors import Interrupted, TrainingError
from coldpress.events import Message, Sink
from coldpress.nn import imports
from coldpress.nn.checkpoints import last_checkpoint, resume_point
from coldpress.nn.reporters import reporting
from coldpress.nn.watch import Evaluations, Watch

__all__ = ["Batching", "Stopping", "TrainingReport", "last_checkpoint", "train"]

DEFAULT_ROWS = 8
"""Of a batch, where the config does not say (Transformers' default)."""

SHORT_FLOPS = 5e11
"""Of a training (6 to each parameter and token) that one CPU core is done with in some seconds."""


@dataclass(frozen=True)
class Batching:
    """How much goes through the model at once. It changes speed and memory, not what is learned."""

    tokens: int = 4096
    """Of a micro-batch, at most; a longer record is one by itself."""
    records: int | None = None
    """Of a micro-batch, at most."""
    room: int | None = None
    """Bytes for what a micro-batch keeps, where that is little: one is then tried before the training. None: plenty."""
    most: int = 4096
    """Tokens of a micro-batch beyond which nothing is gained."""
    checkpointing: bool | None = None
    """Keep only the input of each block and compute the rest again; None is what the arguments say."""


@dataclass(frozen=True)
class Stopping:
    """What is handed over, and when training may end early. Both need evaluations."""

    load_best: bool = True
    """Hand over the weights with the lowest evaluation loss instead of the last ones."""
    patience: int | None = None
    """Evaluations without improvement after which training ends."""
    threshold: float = 0.0
    """Nats per token that count as improvement."""


@dataclass(frozen=True)
class TrainingReport:
    """What a training did. Losses in nats per token (per record for classes)."""

    steps: int
    seconds: float
    """Of this process's training loop; a resumed training took longer."""
    tokens: int
    """Trained on, padding not counted, over all epochs."""
    losses: tuple[float, ...]
    """Of every step, from the first."""
    log: tuple[Mapping[str, float], ...] = field(repr=False)
    """Every point that was logged: loss, learning rate, gradient norm, evaluation loss."""
    resumed_from: int | None = None
    """Step of the checkpoint that this training went on from."""
    tokens_per_second: float = 0.0
    """Of this process's training loop, evaluations and checkpoints included."""
    best_step: int | None = None
    """Step whose weights are handed over, where that is not the last."""
    form: str = "packed"
    """packed, padded or classes."""
    fused: Mapping[str, int] = field(default_factory=dict)
    """Layers that computed in fused form, by kind."""
    ranks: int = 1
    """Processes that trained together; a step has as many times the rows of the arguments."""

    @property
    def loss(self) -> float:
        """Mean over the last tenth of the steps (at least one)."""
        last = self.losses[-max(1, len(self.losses) // 10) :]
        return sum(last) / len(last)

    @property
    def eval_loss(self) -> float | None:
        """Of the weights that are handed over."""
        found = {int(point["step"]): point["eval_loss"] for point in self.log if "eval_loss" in point}
        if self.best_step is not None:
            return found.get(self.best_step)
        return found[max(found)] if found else None

    def to_dict(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "seconds": round(self.seconds, 3),
            "tokens": self.tokens,
            "tokens_per_second": round(self.tokens_per_second, 1),
            "loss": self.loss,
            "eval_loss": self.eval_loss,
            "best_step": self.best_step,
            "resumed_from": self.resumed_from,
            "ranks": self.ranks,
            "form": self.form,
            "fused": dict(self.fused),
            "losses": list(self.losses),
            "log": [dict(point) for point in self.log],
        }


def train(
    model: Any,
    sequences: Sequence[TokenSequence],
    held_out: Sequence[TokenSequence] | None,
    *,
    arguments: Mapping[str, Any],
    pad_id: int,
    padding_side: str = "right",
    work: Path,
    step: str,
    emit: Sink,
    logs: Path | None = None,
    batching: Batching | None = None,
    stopping: Stopping | None = None,
    describe: Callable[[int], str] = str,
) -> TrainingReport:
    """Train what requires gradients in `model`, in place. `arguments` are Transformers' TrainingArguments.

    Goes on from the last whole checkpoint in `work`. SIGTERM and SIGINT save one and raise Interrupted. Raises
    TrainingError when the loss is no number or diverges, or the arguments do not go together. `describe` gives the
    text of a training sequence, for messages. The services of `report_to` write into `logs` (default: in `work`).
    """
    imports.load_training(quantized=imports.needs_bitsandbytes(str(arguments.get("optim") or "")))
    from coldpress.nn import ranks
    from coldpress.nn.losses import loss_of
    from coldpress.nn.threads import threads_for

    folder = work / "checkpoints"
    stopping = stopping or Stopping()
    checked = _checked({**arguments, "resume_from_checkpoint": None}, folder, held_out, len(sequences))
    # The ranks, if there are several, know each other from here on.
    resume = _to_resume(folder, arguments.get("resume_from_checkpoint"), step, emit)
    watch = Watch(
        step,
        emit,
        timed=str(checked.save_strategy.value) == "no",
        describe=describe,
        guessing=_guessing(model, sequences),
        evaluations=Evaluations(stopping.patience, stopping.threshold),
    )
    if resume is not None:
        watch.resume(resume)
    autocast = _autocast_type(model, checked)
    services = arguments.get("report_to") if checked.process_index == 0 else None
    resumed, kept = watch.resumed_from, logs or work / "logs"
    told = reporting(services, step=step, logs=kept, work=work, resumed_at=resumed, emit=emit)
    with (
        _stop_signals(watch),
        imports.quiet_renames(),
        loss_of(
            model,
            sequences,
            autocast=autocast,
            plain=bool(checked.torch_compile),
            whole_layers=_worth_whole_layers(model, sequences, checked),
        ) as loss,
        told as reporters,
        ExitStack() as stack,
    ):
        _settled(loss, model, checked, step, emit)
        how = _tried(model, sequences, loss, batching or Batching(), autocast if checked.bf16 else None, step, emit)
        stack.enter_context(threads_for(model, sequences, checked.per_device_train_batch_size, how.tokens, step, emit))
        plain = ranks.PlainModel(model)
        trainer = _trainer(model, sequences, held_out, checked, how, pad_id, padding_side, watch, loss)
        for reporter in reporters:
            trainer.add_callback(reporter)
        ranks.check_alike(form=loss.form, sequences=len(sequences), tokens=sum(len(one.ids) for one in sequences))
        ranks.draw_apart(checked.seed)
        before = watch.tokens
        seconds = _steps_made(trainer, watch, resume, work)
        trainer.finish(stopping.load_best)
        plain.restore()
    if not trainer.state.global_step:
        raise TrainingError("not one training step was made", hint="check num_train_epochs, max_steps and the data")
    return TrainingReport(
        steps=int(trainer.state.global_step),
        seconds=seconds,
        tokens=watch.tokens,
        losses=tuple(watch.losses),
        log=tuple(dict(point) for point in trainer.state.log_history if "train_runtime" not in point),
        resumed_from=watch.resumed_from,
        tokens_per_second=(watch.tokens - before) / max(seconds, 1e-9),
        best_step=trainer.handed_over,
        form=loss.form,
        fused=dict(loss.fused.counts),
        ranks=ranks.ranks(),
    )


def _worth_whole_layers(model: Any, sequences: Sequence[TokenSequence], checked: Any) -> bool:
    """A short training is over before they pay for their making."""
    rows = checked.per_device_train_batch_size
    steps = checked.max_steps if checked.max_steps > 0 else len(sequences) / rows * checked.num_train_epochs
    tokens = sum(len(one.ids) for one in sequences) / len(sequences) * rows * steps
    parameters = sum(one.numel() for one in model.parameters())
    return bool(6 * parameters * tokens > SHORT_FLOPS)


def _settled(loss: Any, model: Any, checked: Any, step: str, emit: Sink) -> None:
    """What follows from how the model is asked for its loss."""
    if loss.form == "padded" and not checked.torch_compile:
        emit(Message("info", "this model's records cannot share a row: it is trained on padded batches", step))
    if loss.own_types(model) and checked.bf16:
        # Nothing is left for autocast to cast, and each of its casts costs time.
        checked.bf16, checked.mixed_precision = False, "no"


def _to_resume(folder: Path, asked: Any, step: str, emit: Sink) -> Path | None:
    """The checkpoint to go on from, of all ranks; those that were cut short are named."""
    from coldpress.nn import ranks

    resume: Path | None
    resume, broken = ranks.from_first(lambda: resume_point(folder, asked))
    for name in broken:
        emit(Message("warning", f"{name} was cut short and is not used", step))
    return resume


def _steps_made(trainer: Any, watch: Watch, resume: Path | None, work: Path) -> float:
    """Train to the end; the seconds it took. Raises Interrupted where it was asked to stop."""
    started = time.perf_counter()
    watch.begin()
    try:
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    except TrainingError as error:
        raise trainer.with_last_good(error, work / "last-good") from error
    if watch.stopped:
        raise Interrupted(
            f"stopped at step {int(trainer.state.global_step)} of {trainer.state.max_steps}",
            hint="its checkpoint is kept: the same command goes on from there",
        )
    return time.perf_counter() - started


def _tried(
    model: Any, sequences: Sequence[TokenSequence], loss: Any, batching: Batching, autocast: Any, step: str, emit: Sink
) -> Batching:
    """Where room is short, what one micro-batch showed."""
    if batching.room is None:
        return batching
    from coldpress.nn.probe import probed

    found, size = probed(model, sequences, loss, batching, autocast)
    emit(Message("info", f"one micro-batch took {size / 1e3:.0f} kB a token: {found.tokens} tokens at a time", step))
    return found


def _checked(arguments: Mapping[str, Any], folder: Path, held_out: Any, count: int) -> Any:
    """TrainingArguments: a step is one batch for Trainer; saving, logging and evaluating as the config says."""
    import transformers

    given = copy.deepcopy(dict(arguments))  # Transformers changes mappings in place
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        given.pop("ddp_backend", None)  # accelerate refuses one that it does not need
    rows = int(given.pop("per_device_train_batch_size", None) or DEFAULT_ROWS)
    rows *= int(given.pop("gradient_accumulation_steps", None) or 1)
    ours: dict[str, Any] = {
        "output_dir": str(folder),
        "disable_tqdm": True,
        "prediction_loss_only": True,
        "remove_unused_columns": False,
        "save_total_limit": 2,
        "save_strategy": "steps" if "save_steps" in given else "no",
        **_evaluation_defaults(given, held_out, rows, count),
    }
    for name in ("load_best_model_at_end", "metric_for_best_model", "greater_is_better", "logging_nan_inf_filter"):
        given.pop(name, None)  # see Stopping, and Watch: a loss that is no number ends the training
    given.pop("logging_dir", None)
    given["report_to"] = "none"  # see reporters.py
    try:
        with imports.quiet_renames():
            checked = transformers.TrainingArguments(**{**ours, **given}, per_device_train_batch_size=rows)
    except (TypeError, ValueError, ImportError) as error:
        raise TrainingError(f"training_args: {error}", hint="see Transformers' TrainingArguments") from error
    checked._n_gpu = min(checked.n_gpu, 1)  # several devices are several processes here, never DataParallel
    return checked


def _evaluation_defaults(given: Mapping[str, Any], held_out: Any, rows: int, count: int) -> dict[str, Any]:
    """Ten evaluations a training, where there is held-out data and the config does not say when."""
    strategy = given.get("eval_strategy") or "steps"
    if held_out is None or strategy != "steps" or given.get("eval_steps") is not None:
        return {}
    steps = int(given.get("max_steps") or -1)
    if steps <= 0:
        steps = math.ceil(math.ceil(count / rows) * float(given.get("num_train_epochs") or 3))
    return {"eval_strategy": "steps", "eval_steps": max(1, math.ceil(steps / 10))}


def _guessing(model: Any, sequences: Sequence[TokenSequence]) -> float | None:
    """Loss of a guess among all tokens; of a classifier, none."""
    size = getattr(model.config, "vocab_size", None)
    return math.log(size) if size and sequences[0].target is None else None


def _autocast_type(model: Any, arguments: Any) -> Any:
    """The type that accelerate will have products computed in, if that is not the model's own."""
    import torch

    return torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None


class _Sequences:
    """Token sequences as Trainer's data loader and its length-grouping sampler take them."""

    def __init__(self, sequences: Sequence[TokenSequence]) -> None:
        self._sequences = sequences

    def __len__(self) -> int:
        return len(self._sequences)

    def __getitem__(self, place: int) -> dict[str, Any]:
        return {"index": place, "input_ids": self._sequences[place].ids, "sequence": self._sequences[place]}


def _trainer(
    model: Any,
    sequences: Sequence[TokenSequence],
    held_out: Sequence[TokenSequence] | None,
    arguments: Any,
    batching: Batching,
    pad_id: int,
    padding_side: str,
    watch: Watch,
    loss: Any,
) -> Any:
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    from coldpress.nn.batches import cut_step, idle
    from coldpress.nn.trainer import StepTrainer

    cut = functools.partial(
        cut_step,
        form=loss.form,
        tokens=batching.tokens,
        records=batching.records,
        pad_id=pad_id,
        padding_side=padding_side,
        apart=loss.apart,
        sharing=loss.sharing,
    )
    if batching.checkpointing is not None:
        arguments.gradient_checkpointing = batching.checkpointing
    if arguments.gradient_checkpointing:
        arguments.gradient_checkpointing_kwargs = {"use_reentrant": False}
        model.config.use_cache = False
    try:
        trainer = StepTrainer(
            model=model,
            args=arguments,
            train_dataset=_Sequences(sequences),
            eval_dataset=None if held_out is None else _Sequences(held_out),
            data_collator=lambda rows: (
                cut([(one["index"], one["sequence"]) for one in rows]) if rows else idle(cut([(0, sequences[0])]))
            ),
            watch=watch,
            loss=loss,
        )
    except (TypeError, ValueError, ImportError) as error:
        raise TrainingError(f"training_args: {error}", hint="see Transformers' TrainingArguments") from error
    for printing in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printing)
    return trainer


@contextmanager
def _stop_signals(watch: Watch) -> Iterator[None]:
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
