"""Token sequences to measure on: the text of a data config first, then the text that comes with Coldpress."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from coldpress.artifacts.base import Artifact
from coldpress.config.schema import DataConfig
from coldpress.data.prepare import prepare
from coldpress.data.tokenizer import Tokenizer
from coldpress.errors import DataError
from coldpress.evaluate.classifier import ends_of, with_ends

__all__ = ["SEQUENCE_TOKENS", "bundled_tokens", "class_sequences", "text_sequences"]

SEQUENCE_TOKENS = 256
"""Longest sequence that models are compared on; longer ones are cut."""


def text_sequences(
    tokenizer: Tokenizer,
    *,
    tokens: int,
    longest: int = SEQUENCE_TOKENS,
    data: DataConfig | None = None,
    held_out: Mapping[str, Any] | None = None,
    classes: bool = False,
) -> list[list[int]]:
    """Sequences with at least `tokens` positions to compare: text of `data` first, then the bundled text.

    `held_out` (`size`, `seed`) takes only the part of `data` that a training step with that split did not see.
    `classes`: the records of `data` have classes, which are no part of their text.
    """
    sequences: list[list[int]] = []
    count = 0

    def take(ids: Sequence[int]) -> bool:
        nonlocal count
        for start in range(0, len(ids), longest):
            piece = list(ids[start : start + longest])
            if len(piece) > 1:
                sequences.append(piece)
                count += len(piece) - 1
            if count >= tokens:
                return True
        return False

    if data is not None:
        size, seed = (None, 42) if held_out is None else (held_out["size"], int(held_out["seed"]))
        prepared = prepare(data, tokenizer, context_length=longest, held_out=size, seed=seed, classes=classes)
        packed = prepared.train if prepared.held_out is None else prepared.held_out
        for one in packed.sequences:
            if take(one.ids):
                return sequences
    take(bundled_tokens(tokenizer))
    if not sequences:
        raise DataError("there is no text to compare the models on")
    return sequences


def class_sequences(
    model: Artifact,
    tokenizer: Tokenizer,
    *,
    tokens: int,
    longest: int,
    data: DataConfig | None = None,
    held_out: Mapping[str, Any] | None = None,
) -> list[list[int]]:
    """The same for a classifier, each between CLS and SEP where it wants them."""
    found = text_sequences(
        tokenizer, tokens=tokens, longest=longest - 2, data=data, held_out=held_out, classes=data is not None
    )
    return [with_ends(model, one, *ends_of(tokenizer)) for one in found]


def bundled_tokens(tokenizer: Tokenizer) -> list[int]:
    """The text that comes with Coldpress."""
    text = resources.files("coldpress.data").joinpath("parity_text.txt").read_text(encoding="utf-8")
    return tokenizer.ids(text)
