"""From an adapter pass's config to PEFT's settings, the layers they mean, and what the adapter will be."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from coldpress.artifacts.adapter_record import AdapterSpec, adapter_spec
from coldpress.artifacts.base import Spec, is_tied
from coldpress.artifacts.classifiers import CLASSIFICATION, classifier_layout
from coldpress.errors import PlanError
from coldpress.nn.adapted import begins_with_base, doubled
from coldpress.nn.adapters import Targets, by_pattern, exact_patterns, resolve_modules_to_save, resolve_targets
from coldpress.passes.training_config import AdapterConfig

if TYPE_CHECKING:
    from coldpress.passes.lora import LoRAConfig

__all__ = ["Adaptation", "lora_adaptation", "refuse_long_ranks", "resolve_adapter", "trained_parameters"]

_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings")
_HEADS = ("lm_head", "embed_out")


@dataclass(frozen=True)
class Adaptation:
    """An adapter to train."""

    peft_type: str
    """LORA, LOHA or LOKR."""
    settings: Mapping[str, Any] = field(repr=False)
    """Arguments of PEFT's config of this type."""
    targets: Targets
    ranks: Mapping[str, int] = field(repr=False)
    """By full name of the layer."""
    saved: Mapping[str, Any] = field(repr=False)
    """The settings that the result is saved with."""
    whole: tuple[str, ...] = ()
    """Modules trained whole, full names."""
    notes: tuple[str, ...] = ()
    goes_on: bool = False
    """The model has this adapter already."""

    @property
    def begins_as_base(self) -> bool:
        """Whether it changes nothing before it is trained."""
        at_random = any(self.settings.get(name) is False for name in ("init_lora_weights", "init_weights"))
        return not self.goes_on and not at_random

    @property
    def result(self) -> AdapterSpec:
        return adapter_spec({"peft_type": self.peft_type, **self.saved}, self.targets.modules)


def resolve_adapter(config: AdapterConfig, spec: Spec, peft_type: str, own: Mapping[str, Any]) -> Adaptation:
    """`own` are the settings that the type adds to those of `AdapterConfig`. Raises PlanError."""
    targets = resolve_targets(
        config.target_modules,
        spec.linear_layers(),
        spec.model_type,
        exclude=config.exclude_modules,
        layers=config.layers_to_transform,
        layers_pattern=config.layers_pattern,
    )
    if spec.task == CLASSIFICATION:
        targets = replace(targets, peft=targets.modules)
    whole = resolve_modules_to_save(config.modules_to_save, (tensor.name for tensor in spec.tensors))
    twice = sorted(set(whole) & set(targets.modules))
    if twice:
        raise PlanError(
            f"{', '.join(twice[:4])} would be adapted and trained whole",
            hint="take it out of target_modules (exclude_modules), or out of modules_to_save",
        )
    found = by_pattern("rank_pattern", config.rank_pattern, config.r, targets.modules)
    ranks = {name: int(rank) for name, rank in found.items()}
    alphas = by_pattern("alpha_pattern", config.alpha_pattern, config.alpha, targets.modules)
    for key, numbers in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        low = [f"{name}: {number:g}" for name, number in numbers.items() if number <= 0]
        if low:
            raise PlanError(f"{key} must give numbers above 0, got {low[0]}")
    settings: dict[str, Any] = {
        "r": config.r,
        "lora_alpha" if peft_type == "LORA" else "alpha": _number(config.alpha),
        "target_modules": list(targets.peft),
        "modules_to_save": _short(whole, spec) or None,
        "rank_pattern": exact_patterns("rank_pattern", config.rank_pattern, targets.modules),
        "alpha_pattern": exact_patterns("alpha_pattern", config.alpha_pattern, targets.modules),
        "task_type": "CAUSAL_LM",
        **own,
    }
    if spec.task == CLASSIFICATION:
        settings.update(_for_classifier(spec, targets, whole))
    else:
        settings.update(_tying(spec, targets, whole, peft_type))
    saved = settings
    notes: tuple[str, ...] = () if targets.note is None else (targets.note,)
    if begins_with_base(settings):
        refuse_long_ranks(ranks, spec)
        saved = doubled(settings)
        start = settings["init_lora_weights"]
        notes += (f"init_lora_weights {start} ends as an adapter of the unchanged base, of rank {saved['r']}",)
    return Adaptation(peft_type, settings, targets, ranks, saved, whole, notes)


def _for_classifier(spec: Spec, targets: Targets, whole: tuple[str, ...]) -> dict[str, Any]:
    """A classifier's head is trained whole. Its layers are named in full: `dense` is a name in many places."""
    layout = classifier_layout(spec.config)
    new = [name for name in layout.pooler if name in spec.lacking and name.endswith(".weight")]
    pooler = [name.removesuffix(".weight") for name in new]
    return {
        "task_type": "SEQ_CLS",
        "target_modules": list(targets.modules),
        "modules_to_save": list(dict.fromkeys((*layout.head_modules, *pooler, *whole))),
    }


def _number(value: float) -> float | int:
    """PEFT writes whole numbers as such."""
    return int(value) if value == int(value) else value


def _short(whole: tuple[str, ...], spec: Spec) -> list[str]:
    """The modules by their last names where PEFT, which takes any name with that end, means the same by them."""
    modules = {tensor.name.rpartition(".")[0] for tensor in spec.tensors}
    parts = {part for name in modules for part in _prefixes(name)}
    lasts = sorted({name.rpartition(".")[2] for name in whole})
    return lasts if {name for name in parts if name.endswith(tuple(lasts))} == set(whole) else list(whole)


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: count + 1]) for count in range(len(parts))]


def _tying(spec: Spec, targets: Targets, whole: tuple[str, ...], peft_type: str) -> dict[str, Any]:
    """What a model needs that uses one matrix as embedding and head; raises PlanError for what would separate them."""
    if not is_tied(spec.config, spec.tensors):
        return {}
    adapted = [name for name in targets.names if name in (*_EMBEDDINGS, *_HEADS)]
    heads = [name for name in whole if name.endswith(_HEADS)]
    if adapted or heads:
        raise PlanError(
            f"{', '.join(adapted or heads)} is tied: the model uses one matrix as embedding and head, and an adapter "
            "of one of them would separate the two",
            hint="name the embedding in modules_to_save: it is trained whole, and as both",
        )
    if not any(name.endswith(_EMBEDDINGS) for name in whole):
        return {}
    if peft_type != "LORA":
        raise PlanError(
            "the model uses one matrix as embedding and head, and PEFT keeps them together under LoRA only",
            hint="leave the embedding out of modules_to_save, or use LoRA",
        )
    return {"ensure_weight_tying": True}


def refuse_long_ranks(ranks: Mapping[str, int], spec: Spec) -> None:
    """Raise PlanError for a rank beyond what the layer's own matrix has."""
    shapes = spec.linear_layers()
    for name, rank in ranks.items():
        if rank > min(shapes[name]):
            raise PlanError(
                f"rank {rank} is beyond {name} of shape {list(shapes[name])}, which has {min(shapes[name])} "
                "singular values to begin with",
                hint="lower r, or give this layer its own in rank_pattern",
            )


def lora_adaptation(config: LoRAConfig, spec: Spec) -> Adaptation:
    """The adapter that LoRA, DoRA and their quantized kin train."""
    adaptation = resolve_adapter(
        config,
        spec,
        "LORA",
        {
            "lora_dropout": config.lora_dropout,
            "use_dora": config.use_dora,
            "use_rslora": config.use_rslora,
            "init_lora_weights": config.init_lora_weights,
            "bias": config.bias,
        },
    )
    if config.bias != "none" and not _biases(adaptation, spec):
        which = "the model has" if config.bias == "all" else "the adapted layers have"
        raise PlanError(f"bias {config.bias} trains nothing: {which} no biases", hint='set bias to "none"')
    return adaptation


def trained_parameters(adaptation: Adaptation, spec: Spec) -> int:
    """Numbers that the training can change."""
    linear = spec.linear_layers()
    count = 0
    for name, rank in adaptation.ranks.items():
        count += _OF_LAYER[adaptation.peft_type](adaptation.settings, rank, *linear[name])
    whole = tuple(f"{name}." for name in adaptation.whole)
    count += sum(math.prod(tensor.shape) for tensor in spec.tensors if whole and tensor.name.startswith(whole))
    return count + sum(_biases(adaptation, spec).values())


def _of_lora(settings: Mapping[str, Any], rank: int, out: int, into: int) -> int:
    return rank * (out + into) + (out if settings["use_dora"] else 0)


def _of_loha(settings: Mapping[str, Any], rank: int, out: int, into: int) -> int:
    return 2 * rank * (out + into)


def _of_lokr(settings: Mapping[str, Any], rank: int, out: int, into: int) -> int:
    """As PEFT decides what is whole and what a product."""
    (a, b), (c, d) = (_factors(size, settings["decompose_factor"]) for size in (out, into))
    left = rank * (a + c) if settings["decompose_both"] and rank < max(a, c) / 2 else a * c
    return left + (rank * (b + d) if rank < max(b, d) / 2 else b * d)


def _factors(size: int, factor: int) -> tuple[int, int]:
    """Two numbers whose product is `size`, the first as `decompose_factor` asks or as near below it as it divides."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = math.isqrt(size) if factor < 0 else min(math.isqrt(size), factor)
    first = max(number for number in range(1, most + 1) if size % number == 0)
    return first, size // first


_OF_LAYER: Mapping[str, Callable[[Mapping[str, Any], int, int, int], int]] = {
    "LORA": _of_lora,
    "LOHA": _of_loha,
    "LOKR": _of_lokr,
}
"""Numbers trained in a layer, by PEFT's type, of its settings, rank, outputs and inputs."""


def _biases(adaptation: Adaptation, spec: Spec) -> dict[str, int]:
    """Biases that are trained beside the adapter, and their sizes."""
    asked = adaptation.settings.get("bias", "none")
    own = {f"{name}.bias" for name in adaptation.targets.modules}
    whole = tuple(f"{name}." for name in adaptation.whole)
    return {
        tensor.name: math.prod(tensor.shape)
        for tensor in spec.tensors
        if tensor.name.endswith(".bias")
        and (asked == "all" or (asked == "lora_only" and tensor.name in own))
        and not (whole and tensor.name.startswith(whole))
    }
