"""Going on with an adapter that the model has: what of a config may still be chosen, and what the adapter has settled.

A parameter that is not given follows the adapter; one that is given and differs is an error. Dropouts, the data and the
training arguments are free.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coldpress.artifacts.adapter_kinds import unknown_kind
from coldpress.artifacts.adapter_record import AdapterSpec, scale_key
from coldpress.artifacts.base import Spec
from coldpress.errors import PlanError
from coldpress.nn.adapters import Targets, by_pattern, resolve_modules_to_save, resolve_targets
from coldpress.passes.adapter_settings import Adaptation
from coldpress.passes.training_config import AdapterConfig

__all__ = ["continued", "refuse_other_settings"]

_CHOOSES = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
"""Parameters that together choose the layers."""
_PLAIN: Mapping[str, Any] = {
    "use_dora": False,
    "use_rslora": False,
    "bias": "none",
    "decompose_both": False,
    "decompose_factor": -1,
}
"""Parameters that PEFT keeps under the same name, and what they are where an adapter's config is silent."""
_STARTS = ("init_lora_weights", "init_weights")
_DROPOUTS = ("lora_dropout", "rank_dropout", "rank_dropout_scale", "module_dropout")


def continued(config: AdapterConfig, spec: Spec, peft_type: str) -> Adaptation:
    """The adapter of `spec`, to be trained further; raises PlanError for one that this type of pass cannot take up."""
    adapter = _adapter_of(spec)
    own = str(adapter.settings.get("peft_type", "LORA"))
    reason = unknown_kind({"peft_type": own, **adapter.settings})
    if reason is not None:
        raise PlanError(f"{reason}, nor trained further", hint="put MergeAdapterWeights before this step, or use PEFT")
    if own != peft_type:
        raise PlanError(
            f"the model has a {adapter.kind} adapter, which this pass does not train further",
            hint=f"use the pass {adapter.kind}, or put MergeAdapterWeights before this step",
        )
    ranks = {name: int(rank) for name, rank in _numbers(adapter, "r", "rank_pattern").items()}
    settings = {**adapter.settings, **{key: getattr(config, key) for key in _DROPOUTS if hasattr(config, key)}}
    names = adapter.target_modules
    covered = {name for name in spec.linear_layers() if name.rpartition(".")[2] in names}
    targets = Targets(adapter.modules, names, names if covered == set(adapter.modules) else adapter.modules)
    note = f"goes on with the {adapter.kind} adapter that the model has, of rank {adapter.r}"
    return Adaptation(peft_type, settings, targets, ranks, settings, _whole(adapter, spec), (note,), goes_on=True)


def refuse_other_settings(config: AdapterConfig, spec: Spec) -> None:
    """Raise PlanError with every parameter that is given and differs from the adapter that the model has."""
    adapter, given = _adapter_of(spec), config.model_fields_set
    odd = [*_plain_differences(config, adapter), *_other_numbers(config, adapter)]
    odd += [
        f"{key} says how an adapter begins, and this one has begun"
        for key in _STARTS
        if key in given and getattr(config, key) is not True
    ]
    if given & set(_CHOOSES):
        odd += _other_layers(config, spec, adapter)
    if "modules_to_save" in given:
        asked = resolve_modules_to_save(config.modules_to_save, (tensor.name for tensor in spec.tensors))
        whole = _whole(adapter, spec)
        if set(asked) != set(whole):
            odd.append(f"modules_to_save is {_listed(asked)}, the adapter's: {_listed(whole)}")
    if odd:
        raise PlanError(
            "the model has an adapter, and what is asked for differs from it:\n  " + "\n  ".join(odd),
            hint="leave these out to go on with it as it is, or put MergeAdapterWeights before this step",
        )


def _adapter_of(spec: Spec) -> AdapterSpec:
    assert spec.adapter is not None
    return spec.adapter


def _whole(adapter: AdapterSpec, spec: Spec) -> tuple[str, ...]:
    """Modules that the adapter holds whole, by their full names."""
    places = {place for tensor in spec.tensors for place in _above(tensor.name)}
    saved = adapter.settings.get("modules_to_save") or ()
    return tuple(sorted(place for place in places for name in saved if place == name or place.endswith(f".{name}")))


def _above(name: str) -> list[str]:
    """The modules that a tensor lies in."""
    parts = name.split(".")[:-1]
    return [".".join(parts[: count + 1]) for count in range(len(parts))]


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(sorted(names)) or "none"


def _numbers(adapter: AdapterSpec, key: str, patterns: str) -> dict[str, float]:
    """Rank or alpha of every adapted layer."""
    given = adapter.settings.get(patterns) or {}
    matching = {pattern: value for pattern, value in given.items() if _matches(patterns, pattern, adapter.modules)}
    return by_pattern(patterns, matching, float(adapter.settings[key]), adapter.modules)


def _matches(field: str, pattern: str, modules: tuple[str, ...]) -> bool:
    """PEFT keeps patterns that match nothing."""
    try:
        by_pattern(field, {pattern: 1}, 1, modules)
    except PlanError:
        return False
    return True


def _plain_differences(config: AdapterConfig, adapter: AdapterSpec) -> list[str]:
    given, odd = config.model_fields_set, []
    for key, mine in (("r", adapter.r), ("alpha", adapter.alpha)):
        if key in given and getattr(config, key) != mine:
            odd.append(f"{key} is {getattr(config, key):g}, the adapter's is {mine:g}")
    for key, silent in _PLAIN.items():
        field = type(config).model_fields.get(key)
        theirs = adapter.settings.get(key, silent)
        # What a pass has one value of (use_dora in DoRA) counts as given.
        if field is not None and (key in given or field.default != silent) and getattr(config, key) != theirs:
            odd.append(f"{key} is {getattr(config, key)!r}, the adapter's is {theirs!r}")
    return odd


def _other_numbers(config: AdapterConfig, adapter: AdapterSpec) -> list[str]:
    odd = []
    alpha = scale_key(str(adapter.settings.get("peft_type", "LORA")))
    for key, base, own in (("rank_pattern", adapter.r, "r"), ("alpha_pattern", adapter.alpha, alpha)):
        if key not in config.model_fields_set:
            continue
        mine = by_pattern(key, getattr(config, key), base, adapter.modules)
        theirs = _numbers(adapter, own, key)
        apart = [name for name in adapter.modules if mine[name] != theirs[name]]
        odd += [f"{key} gives {name} {mine[name]:g}, the adapter has {theirs[name]:g}" for name in apart[:3]]
    return odd


def _other_layers(config: AdapterConfig, spec: Spec, adapter: AdapterSpec) -> list[str]:
    asked = set(
        resolve_targets(
            config.target_modules,
            spec.linear_layers(),
            spec.model_type,
            exclude=config.exclude_modules,
            layers=config.layers_to_transform,
            layers_pattern=config.layers_pattern,
        ).modules
    )
    more, fewer = sorted(asked - set(adapter.modules)), sorted(set(adapter.modules) - asked)
    odd = []
    if more:
        odd.append(f"target_modules names {len(more)} layers that the adapter does not change, the first: {more[0]}")
    if fewer:
        odd.append(f"target_modules leaves out {len(fewer)} layers that the adapter changes, the first: {fewer[0]}")
    return odd
