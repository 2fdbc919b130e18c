"""What a training leaves beside its weights: `training.json` with every figure, and a model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import coldpress
from coldpress.artifacts.base import Artifact, read_json
from coldpress.artifacts.weight_files import weight_bytes
from coldpress.config.schema import AzureMLResource, DataConfig
from coldpress.data.packing import Packed
from coldpress.data.prepare import Prepared
from coldpress.data.sources import files_of
from coldpress.digest import digest_file, digest_files
from coldpress.hardware import library_versions
from coldpress.model_card import CARD_FILE, base_license, model_name, task_of, training_card
from coldpress.passes.base import Context
from coldpress.record import DataRecord, ModelRecord, TrainingRecord, to_json

__all__ = ["TRAINING_FILE", "document_training"]

TRAINING_FILE = "training.json"
_LIBRARIES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "tokenizers", "safetensors")
_NOT_SETTINGS = frozenset(("train_data_config", "eval_data_config", "training_args"))


class _Trains(Protocol):
    """The parameters of a pass that trains."""

    @property
    def train_data_config(self) -> str | DataConfig: ...
    @property
    def eval_data_config(self) -> str | DataConfig | None: ...
    def model_dump(self, *, mode: Literal["json"]) -> dict[str, Any]: ...


def document_training(
    folder: Path,
    report: Mapping[str, Any],
    *,
    method: str,
    config: _Trains,
    arguments: Mapping[str, Any],
    prepared: Prepared,
    model: Artifact,
    ctx: Context,
) -> None:
    """Write both into the folder of what was trained: an adapter (it has adapter_config.json), or a whole model.

    `report` is the training's own account (`TrainingReport.to_dict`), `model` what it began with. It replaces the
    card that PEFT writes.
    """
    spec = model.describe()
    losses = [float(loss) for loss in report["losses"]]
    tenth = losses[: max(1, len(losses) // 10)]
    dumped = config.model_dump(mode="json")
    settings = {name: value for name, value in dumped.items() if name not in _NOT_SETTINGS and value is not None}
    trained_on = ctx.data(config.train_data_config)
    held_on = ctx.data(config.eval_data_config or config.train_data_config)
    record = TrainingRecord.model_validate(
        {
            **report,
            "method": method,
            "loss_first": sum(tenth) / len(tenth),
            "prompt": prepared.prompt,
            "chat_template": prepared.chat_template,
            "settings": settings,
            "arguments": json.loads(json.dumps(dict(arguments), default=str)),
            "data": _data(trained_on, prepared.train),
            "held_out": None if prepared.held_out is None else _data(held_on, prepared.held_out),
            "device": _device(ctx),
            "base": ModelRecord(
                kind=spec.kind,
                model_type=spec.model_type,
                precision=spec.precision,
                parameters=spec.parameters,
                bytes=weight_bytes(model),
                name=model_name(model.model),
                license=base_license(model.model),
            ),
            "libraries": {"coldpress": coldpress.__version__, **library_versions(_LIBRARIES)},
        }
    )
    (folder / TRAINING_FILE).write_text(json.dumps(to_json(record), indent=1) + "\n", encoding="utf-8")
    adapter = folder / "adapter_config.json"
    settings_of_peft = read_json(adapter) if adapter.is_file() else None
    card = training_card(record, task_of(spec.config, settings_of_peft), adapter=settings_of_peft is not None)
    (folder / CARD_FILE).write_text(card, encoding="utf-8")


def _data(config: DataConfig, packed: Packed) -> DataRecord:
    load = config.load_dataset_config
    files = {} if isinstance(load.data_files, AzureMLResource) else files_of(config)
    hub = "@".join(part for part in (load.data_name, load.revision) if part)
    paths = list(files.values())
    return DataRecord(
        name=config.name,
        origin=", ".join(path.name for path in paths) or hub,
        fingerprint=None if not paths else digest_file(paths[0]) if len(paths) == 1 else digest_files(files),
        rows=packed.rows,
        sequences=len(packed.sequences),
        tokens=packed.tokens,
        loss_tokens=packed.loss_tokens,
    )


def _device(ctx: Context) -> str:
    if ctx.accelerator.device == "gpu" and ctx.hardware.gpus:
        return ctx.hardware.gpus[0].name
    return f"{ctx.hardware.processor}, {ctx.hardware.threads} threads"
