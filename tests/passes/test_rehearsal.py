"""What would go wrong after a training is found before it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import coldpress.nn.train
import coldpress.passes.adapter_training
from coldpress.artifacts.base import Artifact
from coldpress.errors import ColdpressError, StepError, StoreError
from coldpress.passes.base import Context
from coldpress.passes.lora import LoRA, LoRAConfig
from coldpress.passes.rehearsal import require_disk

CONFIG = LoRAConfig(train_data_config="lines", r=4, alpha=8, training_args={"max_steps": 1, "learning_rate": 1e-3})


@pytest.fixture
def never_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(*_: Any, **__: Any) -> None:
        raise AssertionError("it came to a training")

    monkeypatch.setattr(coldpress.nn.train, "train", trained)


@pytest.mark.usefixtures("never_trained")
def test_an_adapter_that_cannot_be_read_back(
    tiny_phi3: Path, context: Callable[[str], Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    save = coldpress.passes.adapter_training.save_adapter

    def cut_short(model: Any, folder: Path, *args: Any, **kwargs: Any) -> None:
        save(model, folder, *args, **kwargs)
        weights = folder / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:200])

    monkeypatch.setattr(coldpress.passes.adapter_training, "save_adapter", cut_short)
    with pytest.raises(ColdpressError, match=r"adapter_model\.safetensors"):
        LoRA().run(CONFIG, Artifact.load(tiny_phi3), context("lora"))


@pytest.mark.usefixtures("never_trained")
def test_an_adapter_that_is_saved_as_something_else(
    tiny_phi3: Path, context: Callable[[str], Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    save = coldpress.passes.adapter_training.save_adapter

    def moved(model: Any, folder: Path, *args: Any, **kwargs: Any) -> None:
        save(model, folder, *args, **kwargs)
        path = folder / "adapter_model.safetensors"
        save_file({name: torch.ones_like(tensor) for name, tensor in load_file(path).items()}, path)

    monkeypatch.setattr(coldpress.passes.adapter_training, "save_adapter", moved)
    with pytest.raises(StepError, match=r"rehearsal: the untrained adapter changes .*weight"):
        LoRA().run(CONFIG, Artifact.load(tiny_phi3), context("lora"))


def test_the_rehearsal_leaves_nothing_behind(tiny_phi3: Path, context: Callable[[str], Context]) -> None:
    ctx = context("lora")
    LoRA().run(CONFIG, Artifact.load(tiny_phi3), ctx)
    assert not (ctx.work / "rehearsal").exists()


def test_a_disk_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(free=40_000_000))
    require_disk(tmp_path, 8_000_000)
    with pytest.raises(StoreError, match=r"take 45\.0 MB of disk, and 40\.0 MB are free"):
        require_disk(tmp_path, 9_000_000)
