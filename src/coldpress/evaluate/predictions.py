"""What a model answers to every record of a data set: by the likelihood of each label, by writing, or by its head."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from coldpress.artifacts.base import Artifact
from coldpress.artifacts.classifiers import is_classifier
from coldpress.config.schema import DataConfig
from coldpress.data.templates import Encoded, Rendered, encode
from coldpress.data.tokenizer import Tokenizer
from coldpress.errors import DataError
from coldpress.evaluate.abilities import EncodingRunner, GeneratingRunner, LogitsRunner
from coldpress.evaluate.answers import AnswerSet, check_labels, read_texts
from coldpress.evaluate.classifier import ends_of, has_layout, with_ends
from coldpress.evaluate.encoders import config_of
from coldpress.evaluate.likelihood import log_softmax, score_candidates
from coldpress.evaluate.runners import batches_of
from coldpress.events import Progress, Sink

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["Predictions", "by_generation", "by_head", "by_likelihood", "read_by_head"]

_RENDERED_AT_ONCE = 4096
"""Texts that are tokenized in one call."""


@dataclass(frozen=True)
class Predictions:
    """Answers of a model beside the right ones, record by record."""

    truth: tuple[str, ...] = field(repr=False)
    predicted: tuple[str, ...] = field(repr=False)
    """A label; or whatever was generated, where that is none."""
    labels: tuple[str, ...]
    prompts: tuple[str, ...] = field(repr=False)
    """What stands before the answer; records with the same one are one cluster."""
    left_out: int = 0
    """Records longer than the model's context."""
    scores: npt.NDArray[np.float64] | None = field(default=None, repr=False)
    """ln p of each label but for a constant of the record [records, labels], where all were asked for."""


def by_likelihood(
    runner: LogitsRunner,
    tokenizer: Tokenizer,
    answers: AnswerSet,
    *,
    batch_size: int = 32,
    complete: bool = False,
    emit: Sink | None = None,
    step: str = "",
) -> Predictions:
    """The most likely label of every record; equal prompts are asked once. `complete` scores all labels."""
    import numpy as np

    kept, tasks, known = _fitting(runner, tokenizer, answers)

    def report(done: int) -> None:
        if emit is not None:
            emit(Progress(step, done, len(tasks), "records"))

    scores = score_candidates(tasks, runner, batch_size=batch_size, complete=complete, on_done=report)
    of_row = [scores[known[answers.prompts[row]]] for row in kept]
    return Predictions(
        truth=tuple(answers.truth[row] for row in kept),
        predicted=tuple(answers.labels[int(one.argmax())] for one in of_row),
        labels=answers.labels,
        prompts=tuple(answers.prompts[row] for row in kept),
        left_out=len(answers.truth) - len(kept),
        scores=np.stack(of_row) if complete else None,
    )


def _fitting(
    runner: LogitsRunner, tokenizer: Tokenizer, answers: AnswerSet
) -> tuple[list[int], list[Any], dict[str, int]]:
    """Rows that fit into the context, one task for each distinct prompt, and which task is a prompt's."""
    limit = runner.context_length
    prompts = answers.prompts
    known: dict[str, int] = {}
    too_long: set[str] = set()
    tasks: list[Sequence[Encoded]] = []
    distinct = list(dict.fromkeys(prompts))
    first_row = {prompt: row for row, prompt in reversed(list(enumerate(prompts)))}
    step = max(1, _RENDERED_AT_ONCE // len(answers.labels))
    for start in range(0, len(distinct), step):
        chosen = distinct[start : start + step]
        for prompt, candidates in zip(
            chosen, answers.candidates([first_row[one] for one in chosen], tokenizer), strict=True
        ):
            if limit is not None and candidates.longest > limit:
                too_long.add(prompt)
                continue
            _refuse_prefixes(candidates.texts, answers)
            known[prompt] = len(tasks)
            tasks.append(candidates.texts)
    if not tasks:
        raise DataError(f"no record of {answers.config.name} fits into the model's context of {limit} tokens")
    return [row for row, prompt in enumerate(prompts) if prompt not in too_long], tasks, known


def _refuse_prefixes(texts: Sequence[Any], answers: AnswerSet) -> None:
    """A label whose text is the beginning of another's would always win: less text is never less likely."""
    ordered = sorted(range(len(texts)), key=lambda place: texts[place].ids)
    for short, long in itertools.pairwise(ordered):
        if texts[long].ids[: len(texts[short].ids)] == texts[short].ids:
            raise DataError(
                f"in {answers.config.name} the text with {answers.labels[short]!r} is the beginning of the one with "
                f"{answers.labels[long]!r}, so their likelihoods cannot be compared",
                hint="let something follow the answer: add_special_tokens: true (EOS), or a line break in the template",
            )


def by_generation(
    runner: GeneratingRunner,
    tokenizer: Tokenizer,
    answers: AnswerSet,
    *,
    batch_size: int = 32,
    max_new_tokens: int | None = None,
    emit: Sink | None = None,
    step: str = "",
) -> Predictions:
    """What the model says after every prompt, on one line; it may be none of the labels."""
    encoded = encode(answers.rendered, answers.config.pre_process_data_config, tokenizer)
    prompts = [one.ids[: one.answer_start] for one in encoded]
    longest = max(len(one.ids) - len(prompt) for one, prompt in zip(encoded, prompts, strict=True))
    new = max_new_tokens or longest + 1
    limit = runner.context_length
    kept = [row for row, ids in enumerate(prompts) if ids and (limit is None or len(ids) + new <= limit)]
    if not kept:
        raise DataError(
            f"no record of {answers.config.name} has a prompt that fits into the model's context of {limit} tokens "
            f"with {new} new ones"
        )

    def done(tokens: Sequence[int]) -> bool:
        return "\n" in _decoded(tokenizer, tokens).lstrip()

    said: dict[int, str] = {}
    for batch in batches_of([len(prompts[row]) for row in kept], batch_size):
        rows = [kept[place] for place in batch]
        found = runner.generate(
            [prompts[row] for row in rows], max_new_tokens=new, stop_tokens=tokenizer.stop_ids, stop=done
        )
        for row, tokens in zip(rows, found, strict=True):
            said[row] = _first_line(_decoded(tokenizer, tokens))
        if emit is not None:
            emit(Progress(step, len(said), len(kept), "records"))
    return Predictions(
        truth=tuple(answers.truth[row].strip() for row in kept),
        predicted=tuple(said[row] for row in kept),
        labels=tuple(label.strip() for label in answers.labels),
        prompts=tuple(answers.prompts[row] for row in kept),
        left_out=len(encoded) - len(kept),
    )


def by_head(
    runner: EncodingRunner,
    tokenizer: Tokenizer,
    config: DataConfig,
    model: Artifact,
    *,
    batch_size: int = 32,
    emit: Sink | None = None,
    step: str = "",
) -> Predictions:
    """The class that a model's own head finds the most likely; answers are names of classes, or their numbers."""
    import numpy as np

    records, texts, answers = read_texts(config, tokenizer)
    if answers is None:
        raise DataError(
            f"the data config {config.name} names no answer, so there is nothing to be right about",
            hint='add "label_col" to pre_process_data_config',
        )
    named = [_class_name(answer, runner.labels) for answer in answers]
    check_labels(named, records.places, runner.labels, config.name)
    ids = read_by_head(texts, config, tokenizer, model)
    limit = runner.context_length
    kept = [row for row, one in enumerate(ids) if limit is None or len(one) <= limit]
    if not kept:
        raise DataError(f"no record of {config.name} fits into the model's context of {limit} tokens")
    scores = np.zeros((len(ids), len(runner.labels)))
    done = 0
    for batch in batches_of([len(ids[row]) for row in kept], batch_size):
        rows = [kept[place] for place in batch]
        scores[rows] = log_softmax(runner.classify([ids[row] for row in rows]))
        done += len(rows)
        if emit is not None:
            emit(Progress(step, done, len(kept), "records"))
    return Predictions(
        truth=tuple(named[row] for row in kept),
        predicted=tuple(runner.labels[int(scores[row].argmax())] for row in kept),
        labels=runner.labels,
        prompts=tuple(texts[row] for row in kept),
        left_out=len(ids) - len(kept),
        scores=scores[kept],
    )


def read_by_head(texts: Sequence[str], config: DataConfig, tokenizer: Tokenizer, model: Artifact) -> list[list[int]]:
    """Tokens of texts as a model with a head of its own reads them: as it was trained, where the family is known."""
    known = config_of(model)
    if not is_classifier(known) or not has_layout(known):
        return [list(one.ids) for one in tokenizer.backend.encode_batch(list(texts), add_special_tokens=True)]
    pre = config.pre_process_data_config.model_copy(update={"label_col": None, "completion_only_loss": False})
    encoded = encode([Rendered(text) for text in texts], pre, tokenizer)
    return [with_ends(model, one.ids, *ends_of(tokenizer)) for one in encoded]


def _class_name(answer: str, labels: Sequence[str]) -> str:
    """A class by its name, in any case, or by its number."""
    if answer in labels:
        return answer
    folded = {label.lower(): label for label in labels}
    if answer.lower() in folded:
        return folded[answer.lower()]
    return labels[int(answer)] if answer.isdigit() and int(answer) < len(labels) else answer


def _decoded(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    return str(tokenizer.backend.decode(list(tokens), skip_special_tokens=True))


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")
