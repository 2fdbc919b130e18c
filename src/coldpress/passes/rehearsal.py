"""Before the first step: can what will be trained be saved, read, merged, and is there room for it?

The adapter as it stands before training is written where checkpoints go, read back by the code that merges and builds,
and added to one weight of the base. An adapter that begins as nothing must leave that weight as it is. So a training
never ends in a folder that nothing can read.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

from coldpress.artifacts.adapter import AdapterWeights
from coldpress.artifacts.adapter_base import ClassifierBase
from coldpress.artifacts.base import AdapterSpec, Artifact
from coldpress.artifacts.classifiers import CLASSIFICATION
from coldpress.artifacts.quantized import open_checkpoint
from coldpress.artifacts.tensors import TensorSource
from coldpress.errors import StepError, StoreError
from coldpress.passes.merge_adapter_weights import open_merged
from coldpress.units import size

__all__ = ["rehearse", "require_disk"]

COPIES = 5
"""Of what trains, on disk at once: the result, the best weights, and a checkpoint with two numbers of optimizer state
for each."""
UNCHANGED = 1e-2
"""Relative difference of a weight with an untrained adapter from the weight: starts in 16 bits round."""


def require_disk(folder: Path, trained_bytes: int) -> None:
    """Raise StoreError where checkpoints and the result will not fit."""
    free, needed = shutil.disk_usage(folder).free, COPIES * trained_bytes
    if needed > free:
        raise StoreError(
            f"checkpoints and the result take {size(needed)} of disk, and {size(free)} are free in {folder}",
            hint="free some space (`coldpress cache prune`) or set cache_dir elsewhere",
        )


def rehearse(
    promised: Artifact, expected: AdapterSpec, save: Callable[[Path], object], work: Path, *, begins_as_base: bool
) -> None:
    """Save, read and merge the untrained adapter; raises what stands in the way.

    `promised` is the artifact that the training is to make; its adapter need not be there. `expected`: as planned.
    """
    import numpy as np

    folder = work / "rehearsal"
    shutil.rmtree(folder, ignore_errors=True)
    save(folder)
    made = dataclasses.replace(promised, path=work, adapter=folder)
    found = made.describe()
    if found.adapter != expected:
        raise StepError(
            f"rehearsal: the adapter would be saved as {found.adapter}, and {expected} was planned",
            hint="this is a bug in the pass; please report it with the config",
        )
    with open_checkpoint(made.model, found.config) as tensors, AdapterWeights.open(folder) as adapter:
        source: TensorSource = tensors
        if found.task == CLASSIFICATION:
            source = ClassifierBase(found.config, found.precision).tensors(tensors, adapter)
        merged = open_merged(made, source, adapter)
        name = min(adapter.changed & {info.name for info in tensors.infos()}, default=None)
        if name is not None:
            before, after = merged.before_and_after(name)
            if not np.isfinite(after).all():
                raise StepError(f"rehearsal: {name} is not finite once the untrained adapter is added to it")
            moved = float(np.linalg.norm(after - before))
            if begins_as_base and moved > UNCHANGED * float(np.linalg.norm(before)):
                raise StepError(
                    f"rehearsal: the untrained adapter changes {name}, so what is saved is not what would be trained",
                    hint="this is a bug in the pass; please report it with the config",
                )
    shutil.rmtree(folder)
