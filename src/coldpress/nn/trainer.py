"""Transformers' Trainer with steps instead of batches: micro-batches inside, exact losses, one decision for all ranks.

Importing this module imports Transformers' Trainer.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers

from coldpress.errors import TrainingError
from coldpress.nn.batches import MicroBatch, StepBatch
from coldpress.nn.checkpoints import BEST, read_weights, write_weights
from coldpress.nn.losses import Loss
from coldpress.nn.watch import Watch

__all__ = ["StepTrainer"]

SNAPSHOT_BYTES = 256 << 20
"""Trained weights up to this size are kept in memory every few steps, to be saved should the training break."""
SNAPSHOT_STEPS = 10


class _Callback(transformers.TrainerCallback):  # type: ignore[misc]
    """Trainer's events, handed on."""

    def __init__(self, trainer: StepTrainer) -> None:
        self._trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.end_of_step(state, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._trainer.watch.evaluations.enough:
            control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._trainer.watch.saved(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self._trainer.watch.logged(logs or {})


class StepTrainer(transformers.Trainer):  # type: ignore[misc]
    """A batch of the data loader is a `StepBatch`: everything between two updates."""

    control: Any

    def __init__(self, *, watch: Watch, loss: Loss, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.watch = watch
        self.loss = loss
        self.handed_over: int | None = None
        self._agreed = (False, False)
        self._good: tuple[int, dict[str, torch.Tensor]] | None = None
        self._small = sum(one.numel() * one.element_size() for one in self._trained().values()) <= SNAPSHOT_BYTES
        self.add_callback(_Callback(self))

    def _trained(self) -> dict[str, torch.Tensor]:
        return {name: one for name, one in self.model.named_parameters() if one.requires_grad}

    # -- a step -------------------------------------------------------------------------------------------------------

    def _get_num_items_in_batch(self, batch_samples: list[StepBatch], device: Any) -> Any:
        """What carries loss in this step, over all processes."""
        count = torch.tensor(sum(one.count for one in batch_samples), device=device)
        return self.accelerator.gather(count).sum() if self.accelerator.num_processes > 1 else count

    def training_step(self, model: Any, inputs: StepBatch, num_items_in_batch: Any = None) -> torch.Tensor:
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        # DDP and FSDP average gradients over processes; each contributes its sum.
        share = self.accelerator.num_processes / max(int(num_items_in_batch), 1)
        total = torch.zeros((), device=self.args.device)
        micro = self._alike(inputs)
        for place, one in enumerate(micro):
            last = place == len(micro) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                found = self.loss(model, one.to(self.args.device)) * (share if one.count else 0.0)
                self.accelerator.backward(found)
            total += found.detach()
        loss, tokens = self._agree(total, inputs.tokens)
        self.watch.add(loss, tokens, inputs.rows)
        return torch.tensor(loss, device=self.args.device)

    def _alike(self, step: StepBatch) -> list[MicroBatch]:
        """Every process runs the model equally often; where one has less to do, it repeats something at weight 0."""
        micro = list(step.micro)
        if self.accelerator.num_processes == 1:
            return micro
        own = torch.tensor(len(micro), device=self.args.device)
        most = int(self.accelerator.gather(own.unsqueeze(0)).max())
        if micro:
            spare = micro[-1]
            micro += [MicroBatch(spare.inputs, spare.segments, 0, 0)] * (most - len(micro))
        return micro

    def _agree(self, loss: torch.Tensor, tokens: int) -> tuple[float, int]:
        """The step's loss and tokens over all processes, and what all of them do after it: save, stop."""
        save = self.watch.wants_save() and self.is_world_process_zero()
        figures = torch.stack([
            loss.double().cpu(), torch.tensor(float(tokens)).double(), torch.tensor(float(save)).double(),
            torch.tensor(float(self.watch.stop_asked)).double(),
        ])  # fmt: skip
        if self.accelerator.num_processes > 1:
            figures = self.accelerator.reduce(figures.to(self.args.device), reduction="sum").cpu()
            figures[0] /= self.accelerator.num_processes
        self._agreed = (bool(figures[2] > 0), bool(figures[3] > 0))
        return float(figures[0]), int(figures[1])

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)
        if norm is not None and self.accelerator.scaler is None and not torch.isfinite(torch.as_tensor(norm)):
            raise self.watch.broken(f"the norm of the gradient became {float(norm)}", len(self.watch.losses) - 1)
        return norm

    def end_of_step(self, state: Any, control: Any) -> None:
        save, stop = self._agreed
        self.watch.end_of_step(state, control, save=save, stop=stop)
        if self._small and self.watch.good and state.global_step % SNAPSHOT_STEPS == 1:
            self._good = (state.global_step, {name: one.detach().clone() for name, one in self._trained().items()})

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # nothing here shows them

    def _track_num_input_tokens(self, inputs: StepBatch) -> None:
        if self.args.include_num_input_tokens_seen != "no":
            self.state.num_input_tokens_seen = self.watch.tokens

    # -- evaluation, and what is handed over --------------------------------------------------------------------------

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """Mean loss over everything that carries loss in the held-out data: exact, whatever the batches."""
        loader = self.get_eval_dataloader(eval_dataset)
        was_training = self.model.training
        self.model.eval()
        total = torch.zeros(2, dtype=torch.float64)
        with torch.no_grad():
            for step in loader:
                for one in self._alike(step):
                    found = self.loss(self.model_wrapped, one.to(self.args.device))
                    total += torch.tensor([float(found) if one.count else 0.0, one.count], dtype=torch.float64)
        self.model.train(was_training)
        if self.accelerator.num_processes > 1:
            total = self.accelerator.reduce(total.to(self.args.device), reduction="sum").cpu()
        if not total[1]:
            raise TrainingError("no token of the evaluation data carries loss", hint="look at it with `coldpress data`")
        metrics = {f"{metric_key_prefix}_loss": float(total[0] / total[1])}
        if self.watch.evaluated(metrics["eval_loss"], self.state.global_step) and self.is_world_process_zero():
            write_weights(self._best, self._trained())
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @property
    def _best(self) -> Path:
        return Path(self.args.output_dir).with_name(BEST)

    def finish(self, load_best: bool) -> None:
        """After the last step: measure it where that was not done, and take the best weights if these are wanted."""
        ours = self.watch.evaluations
        if self.eval_dataset is None:
            return
        evaluated = [point["step"] for point in self.state.log_history if "eval_loss" in point]
        if self.state.global_step not in evaluated:
            self.evaluate()
        if load_best and ours.best_step not in (None, self.state.global_step) and self._best.is_file():
            kept = read_weights(self._best)
            with torch.no_grad():
                for name, parameter in self._trained().items():
                    parameter.copy_(kept[name])
            self.handed_over = ours.best_step

    def with_last_good(self, error: TrainingError, folder: Path) -> TrainingError:
        """The same error, saying where the last good weights lie; writes them there."""
        if self._good is None:
            return error
        step, kept = self._good
        with torch.no_grad():
            for name, parameter in self._trained().items():
                parameter.copy_(kept[name])
        shutil.rmtree(folder, ignore_errors=True)
        self.save_model(str(folder))
        kept_in = f"what was trained until step {step} is kept in {folder}"
        return TrainingError(f"{error.message}; {kept_in}", hint=error.hint)
