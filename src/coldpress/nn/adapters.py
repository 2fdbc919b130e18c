"""Which layers an adapter changes: from names in a config to modules of a model. Needs no torch.

PEFT's rule: a list entry matches a module of that name or one that ends in `.name`; a text is a regular expression for
the whole name; `all-linear` is every linear layer but the output head. PEFT ignores an entry that matches nothing as
long as another one matches; here it is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from coldpress.errors import PlanError
from coldpress.registry import nearest

__all__ = [
    "ALL_LINEAR",
    "DEFAULT_TARGETS",
    "Targets",
    "decoder_linears",
    "four_bit_names",
    "resolve_modules_to_save",
    "resolve_targets",
]

ALL_LINEAR = "all-linear"

# Attention projections that PEFT (and, for phi3, Olive) adapt when a config names none.
DEFAULT_TARGETS: Mapping[str, tuple[str, ...]] = {
    "gemma": ("q_proj", "v_proj"),
    "gemma2": ("q_proj", "v_proj"),
    "llama": ("q_proj", "v_proj"),
    "mistral": ("q_proj", "v_proj"),
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
    "phi3": ("o_proj", "qkv_proj"),
    "qwen2": ("q_proj", "v_proj"),
    "qwen3": ("q_proj", "v_proj"),
}

_HEADS = ("lm_head", "embed_out", "output")


@dataclass(frozen=True)
class Targets:
    """The linear layers an adapter changes."""

    modules: tuple[str, ...]
    """Full names, in model order."""
    names: tuple[str, ...]
    """Last parts of these names, sorted."""
    peft: tuple[str, ...]
    """What PEFT is given: `names` where these match exactly the modules, else the full names."""
    note: str | None = None


def decoder_linears(linear_layers: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Linear layers without the output head: what `all-linear` means."""
    return {name: shape for name, shape in linear_layers.items() if _last(name) not in _HEADS}


def four_bit_names(linear_layers: Mapping[str, tuple[int, int]], block_size: int = 64) -> tuple[str, ...]:
    """The layers that QLoRA holds in 4 bits: all of the decoder whose rows are whole blocks.

    Blocks run on from row to row. bitsandbytes 0.50 on a CPU with AVX512 dequantizes a matrix wrongly when its rows end
    within a block and their length is a multiple of 16; such layers stay as they are, on every device.
    """
    return tuple(name for name, (_, width) in decoder_linears(linear_layers).items() if width % block_size == 0)


def resolve_targets(
    asked: str | Sequence[str] | None, linear_layers: Mapping[str, tuple[int, int]], model_type: str
) -> Targets:
    """The layers that `target_modules` names; raises PlanError that lists the real ones."""
    inner = decoder_linears(linear_layers)
    note = None
    if asked is not None and not asked:
        real = ", ".join(sorted({_last(name) for name in inner}))
        raise PlanError(
            "target_modules is empty, so nothing would be trained", hint=f"name some of {real}; or {ALL_LINEAR}"
        )
    if asked is None:
        known = [name for name in DEFAULT_TARGETS.get(model_type, ()) if _matching(name, inner)]
        asked = known or ALL_LINEAR
        said = ", ".join(known) if known else "all linear layers"
        note = f"target_modules is not given: {said} (the default for {model_type})"
    if asked == ALL_LINEAR:
        modules = tuple(inner)
    elif isinstance(asked, str):
        modules = _by_pattern(asked, linear_layers)
    else:
        modules = _by_name(asked, linear_layers)
    if not modules:
        raise PlanError("the model has no linear layer to adapt", hint="is it a causal language model?")
    names = tuple(sorted({_last(name) for name in modules}))
    covered = {name for name in linear_layers if _last(name) in names}
    return Targets(modules, names, names if covered == set(modules) else modules, note)


def resolve_modules_to_save(asked: Sequence[str] | None, tensors: Iterable[str]) -> tuple[str, ...]:
    """Modules trained whole; raises PlanError for a name that no weight belongs to."""
    if not asked:
        return ()
    modules = {name.rpartition(".")[0] for name in tensors}
    unknown = [name for name in asked if not any(m == name or m.endswith("." + name) for m in modules)]
    if unknown:
        raise PlanError(_unknown("modules_to_save", unknown, sorted({_last(name) for name in modules})))
    return tuple(asked)


def _by_pattern(pattern: str, linear_layers: Mapping[str, tuple[int, int]]) -> tuple[str, ...]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise PlanError(f"target_modules {pattern!r} is not a regular expression: {error}") from error
    # PEFT matches against names below the causal model, `model.layers.0.self_attn.o_proj`.
    found = tuple(name for name in linear_layers if compiled.fullmatch(name))
    if not found and (exact := _matching(pattern, linear_layers)):
        return exact
    if not found:
        raise PlanError(
            f"target_modules {pattern!r}, read as a regular expression, matches no linear layer; "
            f"they are called like {next(iter(linear_layers), 'nothing')}",
            hint=f"name them: {', '.join(sorted({_last(name) for name in linear_layers}))}; or {ALL_LINEAR}",
        )
    return found


def _by_name(asked: Sequence[str], linear_layers: Mapping[str, tuple[int, int]]) -> tuple[str, ...]:
    unknown = [name for name in asked if not _matching(name, linear_layers)]
    if unknown:
        raise PlanError(_unknown("target_modules", unknown, sorted({_last(name) for name in linear_layers})))
    chosen = {module for name in asked for module in _matching(name, linear_layers)}
    return tuple(name for name in linear_layers if name in chosen)


def _matching(name: str, linear_layers: Iterable[str]) -> tuple[str, ...]:
    return tuple(module for module in linear_layers if module == name or module.endswith("." + name))


def _unknown(field: str, unknown: Sequence[str], known: Sequence[str]) -> str:
    close = {name: nearest(name, known) for name in unknown}
    said = ", ".join(f"{name} (did you mean {close[name]}?)" if close[name] else name for name in unknown)
    return f"{field} names modules that the model does not have: {said}; it has: {', '.join(known)}"


def _last(name: str) -> str:
    return name.rpartition(".")[2]
