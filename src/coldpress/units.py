"""Bytes, seconds, measured values and settings as people read them."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = [
    "apart",
    "duration",
    "parse_size",
    "plain_value",
    "quantity",
    "settings_text",
    "short_names",
    "size",
    "spread",
    "wanted",
]


def size(count: float | None, more: int = 0) -> str:
    """Bytes in powers of ten: `7.6 GB`; with so many `more` digits."""
    if count is None:
        return "?"
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.{1 + more}f} {unit}"
    return f"{count:.0f} B"


def parse_size(text: str | int) -> int:
    """Bytes of `8GB`, `7.5 GiB`, `512M` or a number; raises ValueError."""
    if isinstance(text, int):
        return text
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([kKMGT]?)(i?)B?", text)
    if found is None:
        raise ValueError(f"{text!r} is no size such as 8GB")
    base = 1024 if found[3] else 1000
    return int(float(found[1]) * base ** " KMGT".index(found[2].upper() or " "))


def duration(seconds: float | None) -> str:
    """`0.4 s`, `12 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds is None or not math.isfinite(seconds):
        return "?"
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"


def quantity(value: float | None, unit: str, more: int = 0) -> str:
    """A measured value with its unit: a `share` in percent, `bytes` as a size; with so many `more` digits."""
    if value is None or not math.isfinite(value):
        return "not a number"
    if unit == "share":
        return f"{100 * value:.{1 + more}f} %"
    if unit == "bytes":
        return size(value, more)
    text = f"{value:,.{more}f}" if abs(value) >= 1e4 else f"{value:.{4 + more}g}"
    return f"{text} {unit}".rstrip()


def apart(first: float | None, second: float | None, unit: str) -> tuple[str, str]:
    """Two measured values, with as many digits as it takes to tell them apart."""
    for more in range(12):
        texts = quantity(first, unit, more), quantity(second, unit, more)
        if texts[0] != texts[1] or first == second:
            break
    return texts


def wanted(value: float | None, bound: float | None, unit: str, *, higher_is_better: bool) -> str:
    """A measured value beside what a goal asks of it."""
    have, asked = apart(value, bound, unit)
    return f"{have}, wanted {'at least' if higher_is_better else 'at most'} {asked}"


def spread(error: float | None, unit: str) -> str:
    """A standard error to stand behind its value; empty where there is none, or it is exact."""
    if not error or not math.isfinite(error):
        return ""
    if unit == "share":
        return f"± {100 * error:.1f}"
    return f"± {size(error) if unit == 'bytes' else f'{error:.2g}'}"


def plain_value(value: Any) -> str:
    """A value of a config: a text as it stands, all else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def short_names(names: Iterable[str]) -> dict[str, str]:
    """`lora.training_args.learning_rate` as `learning_rate`, wherever no other name ends so."""
    ends = {name: name.rpartition(".")[2] for name in names}
    counts = Counter(ends.values())
    return {name: end if counts[end] == 1 else name for name, end in ends.items()}


def settings_text(settings: Mapping[str, Any]) -> str:
    """What a search chose, in one line, by the shortest names."""
    names = short_names(settings)
    return ", ".join(f"{names[name]} {plain_value(value)}" for name, value in settings.items()) or "as it is"
