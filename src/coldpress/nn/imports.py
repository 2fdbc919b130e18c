"""Importing Transformers' Trainer and PEFT without what a step does not need.

Both probe for optional packages and import what they find: bitsandbytes (which pulls in torch's compiler), datasets
(with pandas), scikit-learn, SciPy, TensorBoard. And Python's cyclic garbage collector walks the growing heap over and
over while some 3,000 modules come in. Measured on 2 cores, process start to `Trainer` and `peft` ready: 4.6 s plainly,
3.2 s without the collector, 2.4 s with the optional packages hidden as well (torch alone: 0.9 s).

Hiding is what Python documents for `sys.modules`: a None entry makes an import fail as if nothing were installed, and
`importlib.util.find_spec` finds none. Entries are taken back afterwards. A package that is imported already stays. If a
version of these libraries cannot be imported that way, it is imported plainly.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from coldpress.errors import MissingExtraError

__all__ = [
    "hidden",
    "load_bitsandbytes",
    "load_inference",
    "load_training",
    "needs_bitsandbytes",
    "quiet_collector",
    "quiet_renames",
]

OPTIONAL = ("bitsandbytes", "datasets", "sklearn", "scipy", "tensorboard", "tensorboardX", "librosa", "soundfile")
"""Imported by Transformers or PEFT where installed, and not needed to train on token ids."""


@contextlib.contextmanager
def quiet_collector() -> Iterator[None]:
    """No garbage collection inside; afterwards what was loaded is left out of every later collection."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()


@contextlib.contextmanager
def hidden(*packages: str) -> Iterator[None]:
    """Make these packages look not installed inside the block; one that is imported already stays visible."""
    absent = [name for name in packages if name not in sys.modules]
    modules: dict[str, Any] = sys.modules
    for name in absent:
        modules[name] = None
    try:
        yield
    finally:
        for name in absent:
            if modules.get(name, 0) is None:
                del modules[name]


@contextlib.contextmanager
def quiet_renames() -> Iterator[None]:
    """No word inside of `gradient_checkpointing`, which Transformers 5 renames and PEFT and configs still use."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`(is_)?gradient_checkpointing", FutureWarning)
        yield


def needs_bitsandbytes(optimizer: str) -> bool:
    """Whether one of Trainer's optimizers is bitsandbytes' (0.50 has them for the CPU too, all but paged memory)."""
    return (
        optimizer.startswith(("paged_", "rmsprop_bnb", "ademamix", "lion_", "adamw_bnb")) or optimizer == "adamw_8bit"
    )


def load_inference() -> None:
    """Import torch and what loads a causal language model."""
    _load(("torch", "transformers", "transformers.models.auto.modeling_auto"), hide=OPTIONAL)


def load_training(*, quantized: bool = False, hide: tuple[str, ...] = OPTIONAL) -> None:
    """Import torch, Transformers' Trainer and PEFT; with bitsandbytes when the base or the optimizer is quantized."""
    if quantized:
        load_bitsandbytes()
    _load(("torch", "transformers", "transformers.trainer", "peft"), hide=hide)


def load_bitsandbytes() -> None:
    """Import bitsandbytes so that it finds no way to a hub, and tell PEFT and Transformers that it is there."""
    if "bitsandbytes" not in sys.modules:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise MissingExtraError(
                "4-bit weights and 8-bit optimizers need the package bitsandbytes",
                hint="pip install 'coldpress[cpu]' (or [gpu])",
            )
        # On CPUs with AVX512-BF16 it asks the package `kernels` for a hub download at import, and complains without it.
        logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            with hidden("kernels"):
                _load(("torch", "bitsandbytes"), hide=())
        finally:
            logger.setLevel(level)
    # They remember the answer of an earlier step that did without it.
    for check in _checks():
        clear = getattr(check, "cache_clear", None)
        if clear is not None:
            clear()
    late = sys.modules.get("transformers.integrations.bitsandbytes")
    if late is not None and not hasattr(late, "bnb"):
        importlib.reload(late)


# Functions that look for bitsandbytes once and remember the answer.
_REMEMBERED = {
    "peft.import_utils": ("is_bnb_available", "is_bnb_4bit_available"),
    "transformers.utils.import_utils": ("is_bitsandbytes_available",),
}


def _checks() -> list[Callable[[], bool]]:
    found = [getattr(sys.modules.get(module), name, None) for module, names in _REMEMBERED.items() for name in names]
    return [check for check in found if check is not None]


def _load(modules: tuple[str, ...], hide: tuple[str, ...]) -> None:
    if all(name in sys.modules for name in modules):
        return
    with quiet_collector():
        try:
            with hidden(*hide):
                for name in modules:
                    importlib.import_module(name)
                if "bitsandbytes" in hide and sys.modules.get("bitsandbytes") is None:
                    for check in _checks():  # or they would find it when the first adapter is made
                        check()
        except ImportError as error:
            if not hide or error.name not in hide:
                raise
            for name in modules:
                importlib.import_module(name)
