"""Classes of records, for sequence classification: names in a fixed order, and the index of each record's class.

Names are the distinct values of the label column as text, sorted; whole numbers are sorted as numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from coldpress.config.schema import DataConfig, PreProcess
from coldpress.data.formats import Reading, is_blank
from coldpress.data.packing import IGNORED, Packed, TokenSequence
from coldpress.data.sources import Records
from coldpress.data.templates import Encoded, columns_of
from coldpress.errors import DataError
from coldpress.registry import nearest

__all__ = ["check_class_text", "class_labels", "class_names", "class_notes", "class_targets", "classified"]

_SHOWN = 5


def check_class_text(config: DataConfig, reading: Reading) -> None:
    """Refuse a data config without a class column, or with the class in the text; raises DataError."""
    pre = config.pre_process_data_config
    if pre.label_col is None:
        raise DataError(
            f"the data config {config.name} does not say which column holds the class",
            hint='add "label_col" to pre_process_data_config',
        )
    columns, used_by = columns_of(pre, reading)
    if pre.label_col in columns:
        raise DataError(
            f"the class, column {pre.label_col!r}, stands in the text ({used_by}): the model would read its answer",
            hint=f"take {{{pre.label_col}}} out of {used_by}",
        )


def class_labels(records: Records, config: PreProcess) -> list[str]:
    """The class of every record; raises DataError that names the records without one."""
    column = config.label_col
    assert column is not None
    records.require((column,), "label_col")
    labels: list[str] = []
    wrong: list[str] = []
    for row, place in zip(records.rows, records.places, strict=True):
        value = row.get(column)
        if is_blank(value):
            wrong.append(f"{place}: the class is empty")
        elif not isinstance(value, str | int) and not (isinstance(value, float) and value.is_integer()):
            wrong.append(f"{place}: the class is {value!r:.40}, neither text nor a whole number")
        else:
            labels.append(str(int(value) if isinstance(value, float) else value).strip())
    if wrong:
        more = [f"and {len(wrong) - _SHOWN} more"] if len(wrong) > _SHOWN else []
        raise DataError(
            f"{len(wrong)} of {len(records)} records have no class in the column {column!r}\n  "
            + "\n  ".join([*wrong[:_SHOWN], *more]),
            hint="fill it in, or remove the rows; one class a record",
        )
    return labels


def class_names(labels: Sequence[str], config: DataConfig) -> tuple[str, ...]:
    """The distinct classes in order; raises DataError for a single one."""
    distinct = set(labels)
    if len(distinct) < 2:
        raise DataError(
            f"all {len(labels)} records of {config.name} are of the class {labels[0]!r}: nothing is to be told apart",
            hint=f"is {config.pre_process_data_config.label_col} the right column for label_col?",
        )
    if all(name.removeprefix("-").isdecimal() for name in distinct):
        return tuple(sorted(distinct, key=int))
    return tuple(sorted(distinct))


def class_targets(labels: Sequence[str], names: Sequence[str], records: Records, config: DataConfig) -> list[int]:
    """The index of each record's class; raises DataError for classes that the training data does not have."""
    index = {name: number for number, name in enumerate(names)}
    unknown: dict[str, str] = {}
    for label, place in zip(labels, records.places, strict=True):
        if label not in index:
            unknown.setdefault(label, place)
    if unknown:
        said = ", ".join(f"{label!r} ({place})" for label, place in sorted(unknown.items())[:_SHOWN])
        close = nearest(min(unknown), names)
        raise DataError(
            f"{config.name} has classes that the training data does not have: {said}; it has: {', '.join(names[:20])}",
            hint=f"did you mean {close!r}?" if close else "add such records to the training data, or remove these",
        )
    return [index[label] for label in labels]


def classified(
    rows: Sequence[Encoded], targets: Sequence[int], max_seq_len: int, eos_id: int | None, max_samples: int | None
) -> Packed:
    """One sequence a record, with its class. A long one is cut and keeps its EOS: the class is read off its end."""
    sequences: list[TokenSequence] = []
    cut = short = lost = longest = 0
    for row, target in zip(rows[:max_samples], targets, strict=False):
        ids = row.ids
        longest = max(longest, len(ids))
        if not ids:
            short += 1
            continue
        if len(ids) > max_seq_len:
            cut, lost = cut + 1, lost + len(ids) - max_seq_len
            ends = eos_id is not None and ids[-1] == eos_id and max_seq_len > 1
            ids = [*ids[: max_seq_len - 1], ids[-1]] if ends else ids[:max_seq_len]
        sequences.append(TokenSequence(ids, [IGNORED] * len(ids), target=target))
    seen = len(rows[:max_samples])
    return Packed(sequences, seen, cut_rows=cut, short_rows=short, dropped_tokens=lost, longest=longest)


def class_notes(targets: Sequence[int], names: Sequence[str], texts: Sequence[str]) -> tuple[str, ...]:
    """What is odd about the classes of the training records."""
    counts = Counter(targets)
    notes = []
    absent = [names[number] for number in range(len(names)) if not counts[number]]
    if absent:
        notes.append(f"only held-out records have the class {', '.join(map(repr, absent))}: it cannot be learned")
    if len(names) > max(20, len(targets) // 2):
        notes.append(f"{len(names)} classes for {len(targets)} records: is label_col the right column?")
    seen: dict[str, int] = {}
    torn = sum(seen.setdefault(text, target) != target for text, target in zip(texts, targets, strict=True))
    if torn:
        notes.append(f"{torn} records have the text of another one and a different class")
    return tuple(notes)
