"""Parameters that fine-tuning passes share: every training's, and those of every adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from coldpress.config.candidates import Candidates
from coldpress.config.schema import DataConfig, Frozen

__all__ = ["AdapterConfig", "TrainingConfig"]


class TrainingConfig(Frozen):
    """Parameters of every training."""

    train_data_config: str | DataConfig
    """Data to train on."""
    eval_data_config: str | DataConfig | None = None
    """Data to measure the evaluation loss on."""
    eval_dataset_size: float | int | None = Field(default=None, gt=0)
    """Part of the training data to hold out instead: a share below 1, or a number of rows."""
    torch_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Type of the frozen weights and of the matrix products; what is trained is always float32."""
    training_args: Mapping[str, Any] = Field(default_factory=dict)
    """Transformers' TrainingArguments."""
    batch: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Records that go through the model at once, at most; auto: as many as the memory has room for. What is learned
    does not depend on it: a step has per_device_train_batch_size * gradient_accumulation_steps rows either way."""
    load_best: bool = True
    """Hand over the weights with the lowest evaluation loss, where there is evaluation data, instead of the last."""
    early_stopping_patience: int | None = Field(default=None, ge=1)
    """End the training after so many evaluations without improvement; null: never."""
    early_stopping_threshold: float = Field(default=0.0, ge=0)
    """Nats per token that count as improvement."""


class AdapterConfig(TrainingConfig):
    """Parameters of every adapter's training."""

    searchable: ClassVar[Mapping[str, Candidates]] = {
        "r": Candidates((16, 32, 64), by_default=True),
        "alpha": Candidates((16, 32, 64)),
        "training_args.learning_rate": Candidates((5e-5, 1e-4, 2e-4, 5e-4)),
    }
    r: int = Field(default=64, ge=1)
    """Rank of the adapter."""
    alpha: float = Field(default=16, gt=0)
    """The adapter's contribution is scaled by alpha / r."""
    target_modules: str | tuple[str, ...] | None = None
    """Linear layers to adapt: names, a regular expression, or all-linear; null is the usual attention layers."""
    exclude_modules: str | tuple[str, ...] | None = None
    """Linear layers to leave out of these: names, or a regular expression."""
    layers_to_transform: int | tuple[int, ...] | None = None
    """Numbers of the blocks to adapt, from 0; null is all."""
    layers_pattern: str | tuple[str, ...] | None = None
    """Name of the list that layers_to_transform counts in (layers, h ...), where a model has several."""
    rank_pattern: Mapping[str, int] = Field(default_factory=dict)
    """Other ranks for some layers: a name, or a regular expression for the end of a name, to a rank."""
    alpha_pattern: Mapping[str, float] = Field(default_factory=dict)
    """Other alphas for some layers."""
    modules_to_save: tuple[str, ...] | None = None
    """Modules to train whole, besides the adapter."""
