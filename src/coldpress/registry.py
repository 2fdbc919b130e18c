"""Lazy tables of what Coldpress can do: a name, and where its code lies.

Nothing is imported until it is asked for. Plug-ins enter by the same door: an entry point in the group
`coldpress.passes` named as the pass, with the value `module:attr`.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import entry_points
from typing import Any

from coldpress.errors import MissingExtraError, UsageError

__all__ = ["PASSES", "LazyTable", "nearest"]


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The most similar of `known`, ignoring case; None when nothing is close."""
    folded = {candidate.lower(): candidate for candidate in known}
    found = difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.6)
    return folded[found[0]] if found else None


class LazyTable(Mapping[str, Any]):
    """name -> object at `module:attr`, imported at first use. Names match in any case, as Olive's do."""

    def __init__(self, kind: str, group: str, builtin: Mapping[str, str]) -> None:
        self._kind = kind
        self._group = group
        self._builtin = dict(builtin)
        self._all: dict[str, str] | None = None

    def _targets(self) -> dict[str, str]:
        if self._all is None:
            plugins = {point.name: point.value for point in entry_points(group=self._group)}
            self._all = {**plugins, **self._builtin}
        return self._all

    def name_of(self, name: str) -> str | None:
        """The registered spelling of `name`, or None."""
        if name in self._builtin:
            return name
        return {known.lower(): known for known in self._targets()}.get(name.lower())

    def __getitem__(self, name: str) -> Any:
        spelled = self.name_of(name)
        if spelled is None:
            close = nearest(name, self._targets())
            hint = f"did you mean {close}?" if close else f"known: {', '.join(sorted(self._targets()))}"
            raise UsageError(f"there is no {self._kind} called {name!r}", hint=hint)
        target = self._builtin.get(spelled) or self._targets()[spelled]
        module, _, attribute = target.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError as error:
            if error.name is not None and error.name.startswith("coldpress"):
                raise
            raise MissingExtraError(
                f"the {self._kind} {spelled} needs the package {error.name}, which is not installed",
                hint="pip install 'coldpress[cpu]'",
            ) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._targets())

    def __len__(self) -> int:
        return len(self._targets())


PASSES = LazyTable(
    "pass",
    "coldpress.passes",
    {
        "LoRA": "coldpress.passes.lora:LoRA",
        "DoRA": "coldpress.passes.lora:DoRA",
        "LoHa": "coldpress.passes.low_rank_products:LoHa",
        "LoKr": "coldpress.passes.low_rank_products:LoKr",
        "QLoRA": "coldpress.passes.quantized_lora:QLoRA",
        "FullFinetune": "coldpress.passes.full_finetune:FullFinetune",
        "LoftQ": "coldpress.passes.quantized_lora:LoftQ",
        "MergeAdapterWeights": "coldpress.passes.merge_adapter_weights:MergeAdapterWeights",
        "ModelBuilder": "coldpress.passes.model_builder:ModelBuilder",
        "ExtractAdapters": "coldpress.passes.extract_adapters:ExtractAdapters",
    },
)
