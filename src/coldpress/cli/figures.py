"""Where a step stands, in figures: loss, rate, time left, memory; as much of it as a line has room for."""

from __future__ import annotations

from collections.abc import Sequence

from coldpress.events import Progress
from coldpress.units import duration, size

__all__ = ["fitted", "position", "progress_figures"]

_NAMES = {"learning_rate": "lr", "grad_norm": "grad norm"}
_ORDER = (
    "loss", "eta_seconds", "tokens_per_second", "learning_rate", "eval_loss", "best_eval_loss", "memory_bytes",
    "grad_norm",
)  # fmt: skip
"""The most wanted first: a narrow terminal shows the beginning."""


def position(event: Progress) -> str:
    """How far: `51/153 steps`, `3.1 GB of 7.6 GB`."""
    if event.unit == "B":
        return f"{size(event.done)} of {size(event.total)}"
    return f"{event.done:g}/{event.total:g} {event.unit}".rstrip()


def progress_figures(event: Progress) -> list[str]:
    """The values of a progress event as people read them, the most wanted first."""
    known = [name for name in _ORDER if name in event.values]
    others = [name for name in event.values if name not in _ORDER]
    done = event.done >= event.total
    return [_figure(name, event.values[name]) for name in (*known, *others) if not (done and name == "eta_seconds")]


def _figure(name: str, value: float) -> str:
    if name == "eta_seconds":
        return f"{duration(value)} left"
    if name == "tokens_per_second":
        return f"{value:,.0f} tok/s"
    if name.endswith("_bytes"):
        return f"{name.removesuffix('_bytes').replace('_', ' ')} {size(value)}"
    if name == "learning_rate":
        return f"lr {value:.3g}"
    return f"{_NAMES.get(name, name.replace('_', ' '))} {value:.4g}"


def fitted(parts: Sequence[str], width: int) -> str:
    """As many of the parts as fit into the width, from the first on; the first always, cut where it must be."""
    if not parts:
        return ""
    line = parts[0] if len(parts[0]) <= width else parts[0][: max(width - 1, 0)] + "…"
    for part in parts[1:]:
        if len(line) + 2 + len(part) > width:
            break
        line += "  " + part
    return line
