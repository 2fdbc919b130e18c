"""Adapters on a loaded model: put on with PEFT, and saved as PEFT saves them.

PiSSA and OLoRA begin with a part of the base: W = W_res + s B0 A0, of which W_res is held still and B, A are trained.
What they lead to is W + s (B A - B0 A0), an ordinary adapter of the base as it lies on disk, of twice the rank:

    A' = [A; A0]   B' = [B, -B0]   alpha' such that s stays: 2 alpha, or sqrt(2) alpha under rsLoRA

and that is what is saved, so that the base needs no copy (Meng et al. 2024, section 3; PEFT calls it conversion). W_res
is rounded to the type that the base is loaded in, so the trained model and the saved one differ by as much.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coldpress.errors import CheckpointError
from coldpress.nn import imports

if TYPE_CHECKING:
    import torch

    State = Mapping[str, torch.Tensor]

__all__ = [
    "begins_with_base",
    "doubled",
    "put_adapter_on",
    "save_adapter",
    "starting_products",
    "take_adapter_up",
]

ADAPTER_FILE = "adapter_model.safetensors"
_FACTORS = (".lora_A.", ".lora_B.")


def begins_with_base(settings: Mapping[str, Any]) -> bool:
    """Whether an adapter with these settings starts with a part of the base's weights."""
    start = settings.get("init_lora_weights")
    return isinstance(start, str) and start.startswith(("pissa", "olora"))


def put_adapter_on(base: Any, peft_type: str, settings: Mapping[str, Any], seed: int) -> Any:
    """The model with a fresh adapter, ready to train: what trains is float32. `settings` are those of PEFT's config."""
    import peft
    import torch

    kinds = {"LORA": peft.LoraConfig, "LOHA": peft.LoHaConfig, "LOKR": peft.LoKrConfig}
    # The adapter's first values are drawn here, before Trainer seeds; the caller's generator is left as it was.
    with torch.random.fork_rng(devices=[]), imports.quiet_renames(), warnings.catch_warnings():
        # PEFT's own conversion is not used; the one below knows the scale of each layer.
        warnings.filterwarnings("ignore", "Using Rank-Stabilized LoRA with rank_pattern")
        torch.manual_seed(seed)
        adapted = peft.get_peft_model(base, kinds[peft_type](**settings))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def take_adapter_up(base: Any, folder: Path, settings: Mapping[str, Any]) -> Any:
    """The model with an adapter from its files, ready to train on: what trains is float32.

    `settings` are those of its config, with other dropouts perhaps. Raises CheckpointError for an adapter that PEFT
    cannot put on.
    """
    import peft

    record = peft.PeftConfig.from_pretrained(folder)
    for key, value in settings.items():
        if key.endswith(("dropout", "dropout_scale")) and hasattr(record, key):
            setattr(record, key, value)
    record.inference_mode = False
    try:
        with imports.quiet_renames():
            adapted = peft.PeftModel.from_pretrained(base, folder, is_trainable=True, config=record)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"the adapter {folder} does not fit the model: {error}") from error
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def starting_products(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of A0 and B0 of every layer, by the names in an adapter file."""
    return {
        _in_file(name): value.detach().cpu().clone()
        for name, value in model.named_parameters()
        if any(factor in name for factor in _FACTORS)
    }


def doubled(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the adapter that a start in the base's weights leads to: see the top of the module."""
    factor = math.sqrt(2) if settings.get("use_rslora") else 2
    return {
        **settings,
        "init_lora_weights": True,
        "r": 2 * settings["r"],
        "lora_alpha": factor * settings["lora_alpha"],
        "rank_pattern": {key: 2 * value for key, value in settings["rank_pattern"].items()},
        "alpha_pattern": {key: factor * value for key, value in settings["alpha_pattern"].items()},
    }


def save_adapter(
    model: Any, folder: Path, targets: Sequence[str], *, settings: Mapping[str, Any], start: State | None = None
) -> None:
    """Write PEFT's files. `settings` and `targets` are written as given: PEFT may have shortened the targets.

    `start` holds A0 and B0 of an adapter that began with a part of the base; `settings` are then the doubled ones.
    """
    model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
    if start is not None:
        _subtract_start(folder / ADAPTER_FILE, start)
    path = folder / "adapter_config.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    record.update({key: value for key, value in settings.items() if key in record}, target_modules=list(targets))
    record["inference_mode"] = True
    path.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _subtract_start(path: Path, start: State) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    held = load_file(path)
    for name, first in start.items():
        value = held[name]
        held[name] = torch.cat([value, first], dim=0) if ".lora_A." in name else torch.cat([value, -first], dim=1)
    save_file({name: value.contiguous() for name, value in held.items()}, path, {"format": "pt"})


def _in_file(name: str) -> str:
    """A parameter's name without the adapter's."""
    return name.replace(".default.", ".")
