"""Records with a right answer: the texts that a model is asked about, and what it should have said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from coldpress.config.schema import DataConfig
from coldpress.data.classes import check_class_text, class_labels
from coldpress.data.formats import Reading
from coldpress.data.sources import Records, read_records
from coldpress.data.templates import Encoded, Rendered, encode, read_format, render, render_all
from coldpress.data.tokenizer import Tokenizer
from coldpress.errors import DataError
from coldpress.registry import nearest

__all__ = ["MAX_LABELS", "AnswerSet", "Candidates", "check_labels", "read_answers", "read_texts"]

MAX_LABELS = 100
"""Different answers that can be scored against each other; more are no classes, but free text."""


@dataclass(frozen=True)
class AnswerSet:
    """Records of a data config, with their answers."""

    config: DataConfig = field(repr=False)
    records: Records = field(repr=False)
    rendered: tuple[Rendered, ...] = field(repr=False)
    """Texts with the right answer in its place."""
    truth: tuple[str, ...] = field(repr=False)
    labels: tuple[str, ...]
    """Every answer there is, in alphabetical order."""
    reading: Reading = field(repr=False)

    @property
    def prompts(self) -> list[str]:
        """What stands before the answer: records with the same one are no independent witnesses."""
        return [one.text[: one.answer_start] for one in self.rendered]

    def candidates(self, rows: Sequence[int], tokenizer: Tokenizer) -> list[Candidates]:
        """The text of each record with every label in the answer's place, tokenized whole."""
        pre = self.config.pre_process_data_config
        texts = [
            render(self.records.rows[row], pre, tokenizer, answer=label, reading=self.reading)
            for row in rows
            for label in self.labels
        ]
        encoded = encode(texts, pre, tokenizer)
        count = len(self.labels)
        return [Candidates(encoded[place : place + count]) for place in range(0, len(encoded), count)]


@dataclass(frozen=True)
class Candidates:
    """The texts of one record, one for each label."""

    texts: Sequence[Encoded]

    @property
    def longest(self) -> int:
        return max(len(one.ids) for one in self.texts)


def read_answers(
    config: DataConfig, tokenizer: Tokenizer, *, labels: Sequence[str] | None = None, free: bool = False
) -> AnswerSet:
    """Records of a data config; raises DataError when it names no answer, or an answer is none of `labels`.

    Without `labels` they are the answers that occur. `free` answers may be of any number.
    """
    records = read_records(config)
    pre = config.pre_process_data_config
    reading = read_format(records, pre, tokenizer)
    rendered = render_all(records, pre, tokenizer, reading)
    missing = [place for one, place in zip(rendered, records.places, strict=True) if one.answer is None]
    if len(missing) == len(rendered):
        raise DataError(
            f"the data config {config.name} names no answer, so there is nothing to be right about",
            hint='add "label_col" to pre_process_data_config',
        )
    if missing:
        raise DataError(f"{len(missing)} records of {config.name} have no answer, the first: {missing[0]}")
    truth = tuple(str(one.answer) for one in rendered)
    if reading.chat:  # where its last turn begins is only looked for where it matters
        pairs = zip(records.rows, truth, strict=True)
        rendered = [render(row, pre, tokenizer, answer=answer, reading=reading) for row, answer in pairs]
    found = check_labels(truth, records.places, labels, config.name)
    if not free and not 2 <= len(found) <= MAX_LABELS:
        raise DataError(
            f"{config.name} has {len(found)} different answers; this accuracy is for 2 to {MAX_LABELS}",
            hint="is label_col the right column? Free text is compared by exact_match",
        )
    return AnswerSet(config, records, tuple(rendered), truth, found, reading)


def check_labels(
    truth: Sequence[str], places: Sequence[str], labels: Sequence[str] | None, name: str
) -> tuple[str, ...]:
    """The labels there are; raises DataError for every answer outside of those that are given."""
    occurring = dict.fromkeys(truth)
    if labels is None:
        return tuple(sorted(occurring))
    outside = [answer for answer in occurring if answer not in labels]
    if outside:
        first = places[truth.index(outside[0])]
        close = nearest(outside[0], labels)
        raise DataError(
            f"{name} has answers outside the set of labels ({', '.join(labels)}): "
            f"{', '.join(repr(one) for one in outside[:8])}{' ...' if len(outside) > 8 else ''}; the first at {first}",
            hint=f"did you mean {close!r}?" if close else "correct the records, or add the label to `labels`",
        )
    return tuple(labels)


def read_texts(config: DataConfig, tokenizer: Tokenizer) -> tuple[Records, list[str], list[str] | None]:
    """Records, the text of each without its answer, and the answers where the config names their column.

    For models with a classification head: there the answer is no part of the text.
    """
    records = read_records(config)
    pre = config.pre_process_data_config
    bare = pre.model_copy(update={"label_col": None, "completion_only_loss": False})
    reading = read_format(records, bare, tokenizer)
    answers = None
    if pre.label_col is not None:
        check_class_text(config, reading)
        answers = class_labels(records, pre)
    return records, [one.text for one in render_all(records, bare, tokenizer, reading)], answers
