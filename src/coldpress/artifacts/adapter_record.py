"""What `adapter_config.json` says of an adapter, as far as a plan needs it.

DoRA, rsLoRA    settings of PEFT's type LORA; DoRA is called by its own name here, as its pass is
LoHa, LoKr      types of their own, whose alpha is called `alpha`
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["ADAPTER_HINT", "AdapterSpec", "adapter_folder", "adapter_spec", "modules_of", "scale_key"]

_PASSES: Mapping[str, str] = {"LORA": "LoRA", "LOHA": "LoHa", "LOKR": "LoKr"}
_OWN_TENSORS = (".lora_", ".hada_", ".lokr_")
"""What stands after a module's name in the names of an adapter's tensors."""
ADAPTER_HINT = "give the folder that holds adapter_config.json, or the output folder of a fine-tuning"
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class AdapterSpec:
    """An adapter on top of a checkpoint."""

    r: int
    alpha: float
    target_modules: tuple[str, ...]
    """Last part of the names of the linear layers it changes."""
    kind: str = "LoRA"
    """LoRA, DoRA, LoHa, LoKr, or PEFT's name of another type."""
    modules: tuple[str, ...] = field(default=(), repr=False)
    """Full names of these layers, sorted."""
    settings: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """The rest of adapter_config.json."""


def adapter_folder(place: Path) -> Path | None:
    """The adapter's folder: `place` itself, or in it where that is a fine-tuned model or a run's output folder."""
    inside = (place / name for name in ("", "adapter", "model/adapter"))
    return next((folder for folder in inside if (folder / "adapter_config.json").is_file()), None)


def adapter_spec(record: Mapping[str, Any], modules: Iterable[str]) -> AdapterSpec:
    """`record`: adapter_config.json. Raises KeyError, TypeError or ValueError where it is no low-rank adapter's."""
    kind = str(record.get("peft_type", "LORA"))
    names = tuple(sorted(set(modules)))
    return AdapterSpec(
        r=int(record["r"]),
        alpha=float(record[scale_key(kind)]),
        target_modules=tuple(sorted({name.rpartition(".")[2] for name in names})),
        kind="DoRA" if kind == "LORA" and record.get("use_dora") else _PASSES.get(kind, kind),
        modules=names,
        settings=dict(record),
    )


def scale_key(peft_type: str) -> str:
    """How a type's adapter_config.json calls alpha."""
    return "alpha" if peft_type in ("LOHA", "LOKR") else "lora_alpha"


def modules_of(tensors: Iterable[str]) -> set[str]:
    """Modules that an adapter changes, from the names of its tensors."""
    found = set()
    for name in tensors:
        for mark in _OWN_TENSORS:
            module, own, _ = name.partition(mark)
            if own:
                found.add(module.removeprefix(_PREFIX))
    return found
