"""Accuracy by label likelihood: of all labels in the data, does the model find the right one the most likely?

For every record the text is rendered with each label in the answer's place, tokenized whole, and scored by the
sum of log p(token | before) from the answer's first token to the end of the text, with EOS where the data config
adds it. Because what follows the label counts too, a label that is the beginning of another one is not favoured.

Log-probabilities are never positive, so a label whose first tokens alone score below another label's whole text has
lost. One run of a record gives the first token of all labels; only labels that can still win are run to their end.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from coldpress.artifacts.base import Artifact
from coldpress.config.schema import DataConfig, Metric
from coldpress.data.sources import Records, read_records
from coldpress.data.templates import Encoded, encode, render, render_all
from coldpress.data.tokenizer import Tokenizer
from coldpress.errors import DataError
from coldpress.evaluate.runners import LogitsRunner, in_batches, open_runner
from coldpress.events import Message, Progress, Sink

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["AccuracyScore", "label_accuracy", "measure"]

MAX_LABELS = 100


class _Context(Protocol):
    """What `measure` needs of a step's context."""

    @property
    def step(self) -> str: ...
    @property
    def emit(self) -> Sink: ...
    @property
    def trust_remote_code(self) -> bool: ...
    def data(self, reference: str | DataConfig) -> DataConfig: ...


@dataclass(frozen=True)
class AccuracyScore:
    """Share of records whose most likely label is the right one; higher is better."""

    value: float
    standard_error: float
    n: int
    left_out: int = 0
    """Records longer than the model's context."""
    majority: float = 0.0
    """What always saying the most frequent label would reach."""
    predictions: tuple[str, ...] = field(default=(), repr=False)


def measure(metric: Metric, model: Artifact, context: _Context) -> dict[str, Any]:
    """Accuracy of a model as the engine records it: value, standard_error, n."""
    config = context.data(metric.data_config)
    tokenizer = Tokenizer.load(model.tokenizer_path)
    with open_runner(model, trust_remote_code=context.trust_remote_code) as runner:
        score = label_accuracy(
            runner, tokenizer, config, batch_size=metric.batch_size, emit=context.emit, step=context.step
        )
    if score.left_out:
        text = f"{score.left_out} records of {config.name} are longer than the model's context and were left out"
        context.emit(Message("warning", text, context.step))
    return {"value": score.value, "standard_error": score.standard_error, "n": score.n}


def label_accuracy(
    runner: LogitsRunner,
    tokenizer: Tokenizer,
    config: DataConfig,
    *,
    batch_size: int = 32,
    emit: Sink | None = None,
    step: str = "",
) -> AccuracyScore:
    """Score every record of a data config; raises DataError when it names no answer."""
    records = read_records(config)
    truth = _labels(records, config, tokenizer)
    labels = sorted(set(truth))
    tasks, rows = [], []
    for row, record in enumerate(records.rows):
        texts = [render(record, config.pre_process_data_config, tokenizer, answer=label) for label in labels]
        encoded = encode(texts, config.pre_process_data_config, tokenizer)
        longest = max(len(one.ids) for one in encoded)
        if runner.context_length is None or longest <= runner.context_length:
            tasks.append(_Task(encoded))
            rows.append(row)
    if not tasks:
        raise DataError(f"no record of {config.name} fits into the model's context of {runner.context_length} tokens")
    _score(tasks, runner, batch_size, emit, step)
    predictions = tuple(labels[task.best()] for task in tasks)
    right = sum(guess == truth[row] for guess, row in zip(predictions, rows, strict=True))
    n = len(tasks)
    share = right / n
    return AccuracyScore(
        value=share,
        standard_error=math.sqrt(share * (1 - share) / n),
        n=n,
        left_out=len(records) - n,
        majority=Counter(truth[row] for row in rows).most_common(1)[0][1] / n,
        predictions=predictions,
    )


def _labels(records: Records, config: DataConfig, tokenizer: Tokenizer) -> list[str]:
    pre = config.pre_process_data_config
    if pre.label_col is None and not pre.chat_template:
        raise DataError(
            f"the data config {config.name} names no answer, so there is nothing to be right about",
            hint='add "label_col" to pre_process_data_config',
        )
    labels = [one.answer for one in render_all(records, pre, tokenizer)]
    found = [label for label in labels if label is not None]
    if len(found) < len(labels):
        raise DataError(f"{len(labels) - len(found)} records of {config.name} have no answer")
    distinct = set(found)
    if not 2 <= len(distinct) <= MAX_LABELS:
        raise DataError(
            f"{config.name} has {len(distinct)} different answers; this accuracy is for 2 to {MAX_LABELS}",
            hint="is label_col the right column?",
        )
    return found


class _Task:
    """The candidate texts of one record, and what is known of their scores."""

    def __init__(self, candidates: Sequence[Encoded]) -> None:
        self.ids = [one.ids for one in candidates]
        self.start = min(one.answer_start or 0 for one in candidates)
        shortest = min(len(ids) for ids in self.ids)
        self.shared = next((place for place in range(shortest) if len({ids[place] for ids in self.ids}) > 1), shortest)
        """Tokens that all candidates begin with."""
        self.bounds = [0.0] * len(candidates)
        """No candidate scores higher than its bound; a finished one scores exactly that."""
        self.finished: set[int] = set()

    def next(self) -> int | None:
        """The open candidate that can still win; None when the best one is finished."""
        best = self.best()
        return None if best in self.finished else best

    def best(self) -> int:
        # A finished candidate wins a tie, then the first.
        return max(range(len(self.bounds)), key=lambda one: (self.bounds[one], one in self.finished, -one))

    def learn(self, candidate: int, logits: npt.NDArray[np.float32]) -> None:
        """Take in the logits of one candidate's text."""
        import numpy as np

        ids, first = self.ids[candidate], max(self.start, 1)
        rows = logits[first - 1 : len(ids) - 1].astype(np.float64)
        rows -= rows.max(axis=1, keepdims=True)
        rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
        picked = rows[np.arange(len(rows)), ids[first:]]
        if not self.finished:
            common = float(picked[: max(self.shared - first, 0)].sum())
            for other, its in enumerate(self.ids):
                if len(its) > self.shared >= first and self.shared - first < len(rows):
                    self.bounds[other] = common + float(rows[self.shared - first, its[self.shared]])
                else:
                    self.bounds[other] = common
        self.bounds[candidate] = float(picked.sum())
        self.finished.add(candidate)


def _score(tasks: Sequence[_Task], runner: LogitsRunner, batch_size: int, emit: Sink | None, step: str) -> None:
    done = 0
    while True:
        waiting = [(task, chosen) for task in tasks if (chosen := task.next()) is not None]
        if not waiting:
            return
        sequences = [task.ids[chosen] for task, chosen in waiting]
        for place, logits in in_batches(runner, sequences, batch_size):
            task, chosen = waiting[place]
            task.learn(chosen, logits)
            if task.next() is None:
                done += 1
                if emit is not None and (done % batch_size == 0 or done == len(tasks)):
                    emit(Progress(step, done, len(tasks), "records"))
