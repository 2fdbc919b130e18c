"""What training a sequence classifier adds: its classes, the tokens that an encoder expects, its config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from coldpress.artifacts.base import Spec
from coldpress.artifacts.classifiers import (
    CLASSIFICATION,
    classifier_config,
    classifier_layout,
    is_classifier,
    labels_of,
    longest_text,
)
from coldpress.config.schema import PreProcess
from coldpress.data.packing import Packed, TokenSequence
from coldpress.data.prepare import Prepared
from coldpress.data.tokenizer import Tokenizer
from coldpress.errors import DataError, PlanError

__all__ = ["as_trained", "for_classifier", "refuse_unclassifiable", "trained_config", "write_config"]


def refuse_unclassifiable(spec: Spec, pre: PreProcess) -> None:
    """Raise PlanError for a model or data that no classifier is trained with."""
    classifier_layout(spec.config)
    if spec.packings:
        raise PlanError("the model is quantized already: no classifier is made of it", hint="take the unquantized one")
    if pre.label_col is None:
        raise PlanError(
            "task text-classification needs to know which column holds the class",
            hint="set label_col in pre_process_data_config",
        )


def as_trained(spec: Spec) -> Spec:
    """The model with the weights that are loaded to be trained."""
    return spec.as_classifier() if spec.task == CLASSIFICATION else spec


def for_classifier(prepared: Prepared, spec: Spec, tokenizer: Tokenizer) -> Prepared:
    """The sequences as the model reads them, and targets by its own classes where it has some; raises DataError."""
    assert prepared.classes is not None
    own = _own_classes(spec)
    names, places = prepared.classes, list(range(len(prepared.classes)))
    if own is not None and len(own) == len(names) and all(name == f"LABEL_{place}" for place, name in enumerate(own)):
        own = None  # Transformers' names for classes that nobody named
    if own is not None:
        names = own
        strangers = [name for name in prepared.classes if name not in own]
        if strangers:
            raise DataError(
                f"the data has classes that the model has not: {', '.join(strangers[:8])}; it has: {', '.join(own)}",
                hint="train on its classes, or start from the model that it was made of",
            )
        places = [own.index(name) for name in prepared.classes]
    ends = _ends(spec, tokenizer)
    longest = min(prepared.max_seq_len, longest_text(spec.config) or prepared.max_seq_len)

    def read(packed: Packed | None) -> Packed | None:
        if packed is None:
            return None
        return replace(packed, sequences=[_read(one, places, ends, longest) for one in packed.sequences])

    train = read(prepared.train)
    assert train is not None
    return replace(prepared, train=train, held_out=read(prepared.held_out), classes=names)


def _own_classes(spec: Spec) -> tuple[str, ...] | None:
    """Classes of a model that is a classifier already."""
    return labels_of(spec.config) if is_classifier(spec.config) else None


def _ends(spec: Spec, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """What an encoder wants before and after a text, where the data does not put it there."""
    if not classifier_layout(spec.config).encoder:
        return [], []
    known = tokenizer.special_tokens or {}
    ids = (tokenizer.backend.token_to_id(known[name]) if name in known else None for name in ("cls_token", "sep_token"))
    first, last = ([] if one is None else [int(one)] for one in ids)
    return first, last


def _read(one: TokenSequence, places: Sequence[int], ends: tuple[list[int], list[int]], longest: int) -> TokenSequence:
    assert one.target is not None
    first, last = ends
    ids = one.ids[len(first) :] if first and one.ids[: len(first)] == first else one.ids
    ids = ids[: -len(last)] if last and ids[-len(last) :] == last else ids
    ids = [*first, *ids[: longest - len(first) - len(last)], *last]
    return replace(one, ids=ids, labels=[-100] * len(ids), target=places[one.target])


def trained_config(spec: Spec, prepared: Prepared, tokenizer: Tokenizer) -> dict[str, Any] | None:
    """config.json of the classifier that is trained; None where the model is not to be one."""
    if spec.task != CLASSIFICATION:
        return None
    assert prepared.classes is not None
    return classifier_config(spec.config, prepared.classes, tokenizer.pad_id)


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
