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
from transformers.trainer_pt_utils import LengthGroupedSampler

from coldpress.errors import TrainingError
from coldpress.nn import ranks
from coldpress.nn.batches import MicroBatch, StepBatch
from coldpress.nn.checkpoints import BEST, read_weights, write_weights
from coldpress.nn.losses import Loss
from coldpress.nn.threads import tick
from coldpress.nn.watch import Watch

__all__ = ["StepTrainer"]

SNAPSHOT_BYTES = 256 << 20
"""Trained weights up to this size are kept in memory every few steps, to be saved should the training break."""
SNAPSHOT_STEPS = 10


class _Groups(LengthGroupedSampler):  # type: ignore[misc]
    """Rows of like length side by side, in an order that the seed and the epoch alone decide: alike on all ranks."""

    def __init__(self, rows: int, dataset: Any, seed: int) -> None:
        super().__init__(rows, dataset)
        self._seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.generator = torch.Generator().manual_seed(self._seed + epoch)


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
        ranks.wait()  # each rank writes its random state
        if state.is_world_process_zero:
            self._trainer.watch.saved(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self._trainer.watch.logged(logs or {})


class StepTrainer(transformers.Trainer):  # type: ignore[misc]
    """A batch of the data loader is a `StepBatch`: everything between two updates."""

    control: Any
    is_fsdp_enabled: bool

    def __init__(self, *, watch: Watch, loss: Loss, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.watch = watch
        watch.everyone = ranks.everyone
        self.loss = loss
        self.handed_over: int | None = None
        self._agreed = (False, False)
        self._most = 0
        """Micro-batches of this step, of the rank that has most."""
        self._trained = ranks.trained(self.model)
        """Of one process: FSDP puts others in their place."""
        self._good: tuple[int, dict[str, torch.Tensor]] | None = None
        self._small = sum(one.numel() * one.element_size() for one in self._trained.values()) <= SNAPSHOT_BYTES
        self.add_callback(_Callback(self))

    # -- ranks --------------------------------------------------------------------------------------------------------

    def create_accelerator_and_postprocess(self) -> None:
        how = self.args.fsdp_plugin_args
        if how is not None and self.args.mixed_precision in ranks.NARROW:
            how["mixed_precision_policy"] = ranks.sharded_precision(self.args.mixed_precision)
        super().create_accelerator_and_postprocess()
        if how is not None and not self.is_fsdp_enabled and ranks.ranks() > 1:
            ranks.shard_on_cpu(self.accelerator, how)
            self.is_fsdp_enabled = True

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        rows = self._train_batch_size * ranks.ranks()
        return _Groups(rows, self.train_dataset if train_dataset is None else train_dataset, self._data_seed)

    @property
    def _data_seed(self) -> int:
        return int(self.args.seed if self.args.data_seed is None else self.args.data_seed)

    def _get_dataloader(
        self,
        dataset: Any,
        description: str,
        batch_size: int,
        sampler_fn: Any = None,
        is_training: bool = False,
        dataloader_key: str | None = None,
    ) -> Any:
        """Several ranks divide the rows of a step; Trainer would fill the last one up with rows of the first."""
        divides_itself = is_training and self.args.train_sampling_strategy == "batch_rebalance"
        if ranks.ranks() == 1 or divides_itself:
            return super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, dataloader_key)
        from accelerate.data_loader import prepare_data_loader

        sampler = self._get_train_sampler(dataset) if is_training else torch.utils.data.SequentialSampler(dataset)
        drop_last = is_training and self.args.dataloader_drop_last
        loader = torch.utils.data.DataLoader(
            dataset,
            batch_sampler=ranks.RankBatches(sampler, batch_size, drop_last=drop_last),
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )
        # As the loader of one process, so that it is not divided again; its order is a matter of the seed alone.
        return prepare_data_loader(
            loader, num_processes=1, process_index=0, use_seedable_sampler=True, data_seed=self._data_seed
        )

    def _gathered(self, *values: int) -> list[list[int]]:
        """What each rank gives."""
        if ranks.ranks() == 1:
            return [list(values)]
        found: list[list[int]] = self.accelerator.gather(torch.tensor([values], device=self.args.device)).tolist()
        return found

    def _alike(self, step: StepBatch, most: int) -> list[MicroBatch]:
        """`most` micro-batches: every rank runs the model equally often, if need be on something at weight 0."""
        spare = step.micro[-1]
        return [*step.micro, *[MicroBatch(spare.inputs, spare.segments, 0, 0)] * (most - len(step.micro))]

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Dropping gradients looks at what is trained, not at all modules of the model each time."""
        if ranks.ranks() > 1:
            return super().train(*args, **kwargs)
        self.model.zero_grad = self._drop_gradients
        try:
            return super().train(*args, **kwargs)
        finally:
            del self.model.zero_grad

    def _drop_gradients(self, set_to_none: bool = True) -> None:
        for parameter in self._trained.values():
            parameter.grad = None

    # -- a step -------------------------------------------------------------------------------------------------------

    def _get_num_items_in_batch(self, batch_samples: list[StepBatch], device: Any) -> Any:
        """What carries loss in this step, over all ranks."""
        counts = self._gathered(sum(one.count for one in batch_samples), sum(len(one.micro) for one in batch_samples))
        self._most = max(micro for _, micro in counts)
        return torch.tensor(sum(count for count, _ in counts), device=device)

    def training_step(self, model: Any, inputs: StepBatch, num_items_in_batch: Any = None) -> torch.Tensor:
        tick()
        if not model.training:  # it goes through all modules
            model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        # DDP and FSDP average gradients over ranks; each contributes its sum.
        share = ranks.ranks() / max(int(num_items_in_batch), 1)
        total = torch.zeros((), device=self.args.device)
        micro = self._alike(inputs, self._most)
        for place, one in enumerate(micro):
            last = place == len(micro) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                found = self.loss(model, one.to(self.args.device)) * (share if one.count else 0.0)
                self._backward(found)
            total += found.detach()
        loss, tokens = self._agree(total, inputs.tokens)
        self.watch.add(loss, tokens, inputs.rows)
        return torch.tensor(loss, device=self.args.device)

    def _backward(self, loss: torch.Tensor) -> None:
        if ranks.ranks() == 1 and self.accelerator.scaler is None:
            loss.backward()  # accelerate looks for an optional package each time
        else:
            self.accelerator.backward(loss)

    def _agree(self, loss: torch.Tensor, tokens: int) -> tuple[float, int]:
        """The step's loss and tokens over all ranks, and what all of them do after it: save, stop."""
        save = self.watch.wants_save() and self.is_world_process_zero()
        if ranks.ranks() == 1:
            self._agreed = (save, self.watch.stop_asked)
            return float(loss), tokens
        figures = torch.stack([
            loss.double().cpu(), torch.tensor(float(tokens)).double(), torch.tensor(float(save)).double(),
            torch.tensor(float(self.watch.stop_asked)).double(),
        ])  # fmt: skip
        figures = self.accelerator.reduce(figures.to(self.args.device), reduction="sum").cpu()
        figures[0] /= ranks.ranks()
        self._agreed = (bool(figures[2] > 0), bool(figures[3] > 0))
        return float(figures[0]), int(figures[1])

    def _clip_grad_norm(self, model: Any) -> Any:
        if ranks.ranks() == 1 and self.accelerator.scaler is None:  # what accelerate does, without looking for more
            norm = torch.nn.utils.clip_grad_norm_(self._trained.values(), self.args.max_grad_norm)
        else:
            norm = super()._clip_grad_norm(model)
        if norm is not None and self.accelerator.scaler is None and not torch.isfinite(torch.as_tensor(norm)):
            raise self.watch.broken(f"the norm of the gradient became {float(norm)}", len(self.watch.losses) - 1)
        return norm

    def end_of_step(self, state: Any, control: Any) -> None:
        save, stop = self._agreed
        self.watch.end_of_step(state, control, save=save, stop=stop)
        if self._small and self.watch.good and state.global_step % SNAPSHOT_STEPS == 1:
            weights = self._trained if ranks.ranks() == 1 else ranks.trained(self.model)
            self._good = state.global_step, {name: one.detach().clone() for name, one in weights.items()}

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
                tick()
                for one in self._alike(step, max(micro for (micro,) in self._gathered(len(step.micro)))):
                    found = self.loss(self.model_wrapped, one.to(self.args.device))
                    total += torch.tensor([float(found) if one.count else 0.0, one.count], dtype=torch.float64)
        self.model.train(was_training)
        if ranks.ranks() > 1:
            total = self.accelerator.reduce(total.to(self.args.device), reduction="sum").cpu()
        if not total[1]:
            raise TrainingError("no token of the evaluation data carries loss", hint="look at it with `coldpress data`")
        metrics = {f"{metric_key_prefix}_loss": float(total[0] / total[1])}
        if self.watch.evaluated(metrics["eval_loss"], self.state.global_step):
            best = ranks.gathered(ranks.trained(self.model))
            if self.is_world_process_zero():
                write_weights(self._best, best)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @property
    def _best(self) -> Path:
        return Path(self.args.output_dir).with_name(BEST)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Under FSDP a checkpoint's weights are written with its optimizer, and frozen ones are not gathered."""
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
        elif not _internal_call:
            self._save(output_dir, state_dict=ranks.gathered(ranks.trained(self.model)))

    def finish(self, load_best: bool) -> None:
        """After the last step: measure it where that was not done, and take the best weights if these are wanted."""
        ours = self.watch.evaluations
        if self.eval_dataset is None:
            return
        evaluated = [point["step"] for point in self.state.log_history if "eval_loss" in point]
        if self.state.global_step not in evaluated:
            self.evaluate()
        earlier = load_best and ours.best_step not in (None, self.state.global_step)
        if earlier and ranks.from_first(self._best.is_file):
            kept = read_weights(self._best) if self.is_world_process_zero() else {}
            for name, parameter in ranks.trained(self.model).items():
                ranks.fill(parameter, kept.get(name))
            self.handed_over = ours.best_step

    def with_last_good(self, error: TrainingError, folder: Path) -> TrainingError:
        """The same error, saying where the last good weights lie; writes them there."""
        if self._good is None:
            return error
        step, kept = self._good
        with torch.no_grad():
            for name, parameter in ranks.trained(self.model).items():
                parameter.copy_(kept[name])
        if self.is_world_process_zero():
            shutil.rmtree(folder, ignore_errors=True)
        self.save_model(str(folder))
        kept_in = f"what was trained until step {step} is kept in {folder}"
        return TrainingError(f"{error.message}; {kept_in}", hint=error.hint)
