"""Which layers an adapter changes: from names in a config to modules of a model. Needs no torch.

PEFT's rule: a list entry matches a module of that name or one that ends in `.name`; a text is a regular expression for
the whole name; `all-linear` is every linear layer but the output head. The keys of `rank_pattern` and `alpha_pattern`
are regular expressions for the end of a module's name. PEFT ignores what matches nothing as long as something else
does; here it is an error. What is found is a list of modules, so PEFT has nothing left to interpret.
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
    "by_pattern",
    "decoder_linears",
    "exact_patterns",
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
    asked: str | Sequence[str] | None,
    linear_layers: Mapping[str, tuple[int, int]],
    model_type: str,
    *,
    exclude: str | Sequence[str] | None = None,
    layers: int | Sequence[int] | None = None,
    layers_pattern: str | Sequence[str] | None = None,
) -> Targets:
    """The layers that `target_modules` names, less `exclude_modules`, in the blocks of `layers_to_transform`.

    Raises PlanError that lists the real names for whatever matches nothing.
    """
    inner = decoder_linears(linear_layers)
    note = None
    if asked is not None and not asked:
        real = ", ".join(_lasts(inner))
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
        modules = _by_name("target_modules", asked, linear_layers)
    if not modules:
        raise PlanError("the model has no linear layer to adapt", hint="is it a language model?")
    if exclude:
        modules = _without(modules, exclude, linear_layers)
    if layers is not None:
        modules = _in_layers(modules, linear_layers, layers, layers_pattern)
    elif layers_pattern:
        raise PlanError("layers_pattern says where layers_to_transform counts, and that is not given", hint="add it")
    names = tuple(_lasts(modules))
    covered = {name for name in linear_layers if _last(name) in names}
    return Targets(modules, names, names if covered == set(modules) else modules, note)


def resolve_modules_to_save(asked: Sequence[str] | None, tensors: Iterable[str]) -> tuple[str, ...]:
    """Full names of the modules trained whole; raises PlanError for a name that no weight belongs to."""
    if not asked:
        return ()
    modules = tuple(dict.fromkeys(name.rpartition(".")[0] for name in tensors))
    unknown = [name for name in asked if not _matching(name, modules)]
    if unknown:
        raise PlanError(_unknown("modules_to_save", unknown, _lasts(modules)))
    return tuple(dict.fromkeys(module for name in asked for module in _matching(name, modules)))


def by_pattern(field: str, patterns: Mapping[str, float], default: float, modules: Sequence[str]) -> dict[str, float]:
    """Module -> its number: that of the first pattern that matches it, else the default; raises PlanError."""
    lost = [pattern for pattern in patterns if not any(_ends_with(field, pattern, module) for module in modules)]
    if lost:
        raise PlanError(
            _unknown(field, lost, _lasts(modules), "layers that are not adapted", "adapted are"),
            hint="a key is a name, or a regular expression for the end of a name such as layers.0.self_attn.o_proj",
        )
    return {
        module: next((value for pattern, value in patterns.items() if _ends_with(field, pattern, module)), default)
        for module in modules
    }


def exact_patterns(field: str, patterns: Mapping[str, float], modules: Sequence[str]) -> dict[str, float]:
    """The patterns themselves; where one module is matched by several, a pattern for each module.

    PEFT sorts the keys when it saves them, and the first match counts: another one would come first.
    """
    twice = [module for module in modules if sum(_ends_with(field, pattern, module) for pattern in patterns) > 1]
    if not twice:
        return dict(patterns)
    numbers = by_pattern(field, patterns, float("nan"), modules)
    return {f"^{re.escape(module)}": number for module, number in numbers.items() if number == number}


def _ends_with(field: str, pattern: str, module: str) -> bool:
    """PEFT's `get_pattern_key`."""
    try:
        return re.match(rf"(.*\.)?({pattern})$", module) is not None
    except re.error as error:
        raise PlanError(f"{field}: {pattern!r} is not a regular expression: {error}") from error


def _without(
    modules: tuple[str, ...], exclude: str | Sequence[str], linear_layers: Mapping[str, tuple[int, int]]
) -> tuple[str, ...]:
    if isinstance(exclude, str):
        out = _by_pattern(exclude, linear_layers, "exclude_modules")
    else:
        out = _by_name("exclude_modules", exclude, linear_layers)
    left = tuple(name for name in modules if name not in out)
    if not left:
        raise PlanError("exclude_modules leaves nothing of target_modules", hint="leave one of them out")
    return left


def _in_layers(
    modules: tuple[str, ...],
    linear_layers: Iterable[str],
    layers: int | Sequence[int],
    pattern: str | Sequence[str] | None,
) -> tuple[str, ...]:
    """Those of the blocks with these numbers."""
    wanted = {layers} if isinstance(layers, int) else set(layers)
    if not wanted:
        raise PlanError(
            "layers_to_transform is empty, so nothing would be trained", hint="number some, or leave it out"
        )
    patterns = (pattern,) if isinstance(pattern, str) else tuple(pattern or ())
    # As PEFT finds it: the first number below a module, or below one that a pattern names.
    expressions = [rf"(?:^|.*?\.){one}\.(\d+)\." for one in patterns] or [r".*?\.[^.]*\.(\d+)\."]
    lists = sorted({match.group(1) for name in linear_layers if (match := re.match(r".*?([^.]+)\.\d+\.", name))})
    try:
        lost = [one for one, text in zip(patterns, expressions, strict=False) if not _any(text, linear_layers)]
    except re.error as error:
        raise PlanError(f"layers_pattern is not a regular expression: {error}") from error
    if lost:
        raise PlanError(_unknown("layers_pattern", lost, lists))
    number = {name: int(match.group(1)) for name in modules if (match := _first(expressions, name))}
    there = sorted({int(match.group(1)) for name in linear_layers if (match := _first(expressions, name))})
    odd = sorted(wanted - set(there))
    if odd or not there:
        has = f"layers {there[0]} to {there[-1]}" if there else "no numbered layers"
        raise PlanError(
            f"layers_to_transform names {', '.join(map(str, odd))}; the model has {has}", hint="layers count from 0"
        )
    left = tuple(name for name in modules if number.get(name) in wanted)
    if not left:
        raise PlanError(
            f"target_modules and layers_to_transform have no layer in common: "
            f"the modules are in the layers {', '.join(map(str, sorted(set(number.values())))) or 'without number'}"
        )
    return left


def _first(expressions: Sequence[str], name: str) -> re.Match[str] | None:
    return next((match for text in expressions if (match := re.match(text, name))), None)


def _any(expression: str, names: Iterable[str]) -> bool:
    return any(re.match(expression, name) for name in names)


def _by_pattern(
    pattern: str, linear_layers: Mapping[str, tuple[int, int]], field: str = "target_modules"
) -> tuple[str, ...]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise PlanError(f"{field} {pattern!r} is not a regular expression: {error}") from error
    # PEFT matches against names below the causal model, `model.layers.0.self_attn.o_proj`.
    found = tuple(name for name in linear_layers if compiled.fullmatch(name))
    if not found and (exact := _matching(pattern, linear_layers)):
        return exact
    if not found:
        raise PlanError(
            f"{field} {pattern!r}, read as a regular expression, matches no linear layer; "
            f"they are called like {next(iter(linear_layers), 'nothing')}",
            hint=f"name them: {', '.join(_lasts(linear_layers))}",
        )
    return found


def _by_name(field: str, asked: Sequence[str], linear_layers: Mapping[str, tuple[int, int]]) -> tuple[str, ...]:
    unknown = [name for name in asked if not _matching(name, linear_layers)]
    if unknown:
        raise PlanError(_unknown(field, unknown, _lasts(linear_layers)))
    chosen = {module for name in asked for module in _matching(name, linear_layers)}
    return tuple(name for name in linear_layers if name in chosen)


def _matching(name: str, linear_layers: Iterable[str]) -> tuple[str, ...]:
    return tuple(module for module in linear_layers if module == name or module.endswith("." + name))


def _unknown(
    field: str,
    unknown: Sequence[str],
    known: Sequence[str],
    what: str = "modules that the model does not have",
    there: str = "it has",
) -> str:
    close = {name: nearest(_last(name), known) for name in unknown}
    said = ", ".join(f"{name} (did you mean {close[name]}?)" if close[name] else name for name in unknown)
    return f"{field} names {what}: {said}; {there}: {', '.join(known)}"


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _lasts(names: Iterable[str]) -> list[str]:
    return sorted({_last(name) for name in names})
