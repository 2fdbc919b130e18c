"""Which weights a full fine-tuning trains: from names in a config to tensors of a model. Needs no torch.

An entry is the name of a module or the end of one (`mlp`, `layers.31`, `model.norm`), or a regular expression for a
whole name; it stands for every weight below the modules that it names. An entry that names nothing is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from coldpress.errors import PlanError
from coldpress.registry import nearest

__all__ = ["trained_part"]


def trained_part(
    tensors: Iterable[str], trainable: Sequence[str] | None = None, freeze: Sequence[str] | None = None
) -> tuple[str, ...]:
    """The tensors that `trainable` names (all where it is None), less those that `freeze` names; raises PlanError."""
    names = tuple(tensors)
    chosen = names if trainable is None else _named("trainable_modules", trainable, names)
    frozen = set(_named("freeze", freeze or (), names))
    left = tuple(name for name in chosen if name not in frozen)
    if not left:
        what = "trainable_modules is empty" if trainable is not None and not trainable else "freeze leaves nothing"
        raise PlanError(f"{what}, so nothing would be trained", hint="name some of the model's parts")
    return left


def _named(field: str, entries: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    places = {name: _above(name) for name in names}
    found: set[str] = set()
    lost = []
    for entry in entries:
        try:
            whole = re.compile(entry)
        except re.error as error:
            raise PlanError(f"{field}: {entry!r} is neither a name nor a regular expression: {error}") from error
        mine = {
            name
            for name, above in places.items()
            if any(place == entry or place.endswith(f".{entry}") or whole.fullmatch(place) for place in above)
        }
        found |= mine
        if not mine:
            lost.append(entry)
    if lost:
        known = sorted({part for name in names for part in _parts(name)})
        close = {entry: nearest((_parts(entry) or [entry])[-1], known) for entry in lost}
        said = ", ".join(f"{entry} (did you mean {close[entry]}?)" if close[entry] else entry for entry in lost)
        raise PlanError(
            f"{field} names parts that the model does not have: {said}; it has: {', '.join(known)}",
            hint="a part is a module's name, the end of one (mlp, layers.0), or a regular expression for a whole name",
        )
    return tuple(name for name in names if name in found)


def _above(name: str) -> tuple[str, ...]:
    """A tensor's name and those of the modules that it lies in."""
    parts = name.split(".")
    return tuple(".".join(parts[:count]) for count in range(1, len(parts) + 1))


def _parts(name: str) -> list[str]:
    """Names of the modules that a tensor lies in, without numbers."""
    return [part for part in name.split(".") if not part.isdigit() and part not in ("weight", "bias")]
