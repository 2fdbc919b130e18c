"""Which of several texts does a model find the most likely? Scored by log p of the tokens in which they differ.

    prompt  [w w w w w w w]            tokens that all candidates begin with: run once
    labels                 s  ad ness E    score = ln p(s | w) + ln p(ad | w s) + ln p(ness | ...) + ln p(E | ...)
                           joy E

    bound   ln p(first token that differs) is the most that a label can still reach: no log-probability is positive

A candidate is finished when its whole text is scored. A record is decided as soon as its best candidate by bound is a
finished one: labels that have lost by then are never run. What follows the label counts too (EOS, where the data
config adds it), so a label that is the beginning of another one is not favoured.

Runners that continue from a cache run a batch of prompts once, then only label tokens behind them. Others (a model
block by block) run whole texts, twice a record at most in practice. Both give the same scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

from coldpress.data.templates import Encoded
from coldpress.evaluate.abilities import ContinuingRunner, LogitsRunner
from coldpress.evaluate.reading import common_prefix
from coldpress.evaluate.runners import batches_of, in_batches

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]

__all__ = ["LOSS_BYTES", "log_softmax", "score_candidates", "score_continuations", "token_losses"]

LOSS_BYTES = 16 << 20
"""Of the logits that are turned into losses at a time, in float64."""

_MIN_SHARED = 4
"""A prefix of all prompts that is shorter is not worth a run of its own."""


def score_candidates(
    tasks: Sequence[Sequence[Encoded]],
    runner: LogitsRunner,
    *,
    batch_size: int,
    complete: bool = False,
    on_done: Callable[[int], None] | None = None,
) -> list[Floats]:
    """Scores of the candidates of each task; the highest is the exact score of the most likely one.

    Where `complete`, all scores are exact; else those of the losers are bounds. Scores of a task differ from
    log-likelihoods by what the tokens that all its candidates share contribute. `on_done` is told how many are decided.
    """
    made = [_Task(candidates, complete) for candidates in tasks]
    report = on_done or (lambda done: None)
    if getattr(runner, "continues", False) and all(task.shared > 0 for task in made):
        _continue(made, cast("ContinuingRunner", runner), batch_size, report)
    else:
        _run_whole(made, runner, batch_size, report)
    return [task.scores() for task in made]


class _Task:
    """The candidate texts of one record, and what is known of their scores."""

    def __init__(self, candidates: Sequence[Encoded], complete: bool) -> None:
        self.ids = [one.ids for one in candidates]
        shortest = min(len(ids) for ids in self.ids)
        self.shared = next((place for place in range(shortest) if len({ids[place] for ids in self.ids}) > 1), shortest)
        """Tokens that all candidates begin with."""
        self.first = max(self.shared, 1)
        """Where scores begin; the very first token of a text has nothing before it."""
        self.bounds = [0.0] * len(candidates)
        """No candidate scores higher than its bound; a finished one scores exactly that."""
        self.finished: set[int] = set()
        self.complete = complete

    def next(self) -> int | None:
        """The candidate to run now; None when the task is decided."""
        if self.complete:
            return next((one for one in range(len(self.ids)) if one not in self.finished), None)
        best = self.best()
        return None if best in self.finished else best

    def best(self) -> int:
        # A finished candidate wins a tie, then the first.
        return max(range(len(self.bounds)), key=lambda one: (self.bounds[one], one in self.finished, -one))

    def scores(self) -> Floats:
        import numpy as np

        return np.array(self.bounds)

    def learn_first(self, log_probabilities: Floats) -> None:
        """Take in the scores of the token after the shared ones: [vocabulary]."""
        for candidate, ids in enumerate(self.ids):
            self.bounds[candidate] = float(log_probabilities[ids[self.shared]]) if len(ids) > self.shared else 0.0
            if len(ids) <= self.shared + 1:
                self.finished.add(candidate)

    def rest(self, candidate: int) -> list[int]:
        """What must be run behind the prompt to finish a candidate."""
        return self.ids[candidate][self.shared : -1]

    def learn_rest(self, candidate: int, log_probabilities: Floats) -> None:
        """Take in the scores after each token of `rest`: [tokens, vocabulary]."""
        import numpy as np

        targets = self.ids[candidate][self.shared + 1 :]
        self.bounds[candidate] += float(log_probabilities[np.arange(len(targets)), targets].sum())
        self.finished.add(candidate)

    def learn_whole(self, candidate: int, log_probabilities: Floats) -> None:
        """Take in the scores of one candidate's text from `first` - 1 on."""
        import numpy as np

        ids = self.ids[candidate]
        picked = log_probabilities[np.arange(len(ids) - self.first), ids[self.first :]]
        if not self.finished and self.shared:
            for other, its in enumerate(self.ids):
                self.bounds[other] = float(log_probabilities[0, its[self.first]]) if len(its) > self.first else 0.0
        self.bounds[candidate] = float(picked.sum())
        self.finished.add(candidate)


def _continue(tasks: Sequence[_Task], runner: ContinuingRunner, batch_size: int, report: Callable[[int], None]) -> None:
    prompts = [task.ids[0][: task.shared] for task in tasks]
    batches, shared = _started(prompts, runner, batch_size)
    done = 0
    for batch in batches:
        state, scores = runner.start([prompts[place] for place in batch], shared=shared)
        for row, log_probabilities in enumerate(log_softmax(scores)):
            tasks[batch[row]].learn_first(log_probabilities)
        while True:
            going = [(row, chosen) for row, place in enumerate(batch) if (chosen := tasks[place].next()) is not None]
            if not going:
                break
            tokens = [tasks[batch[row]].rest(chosen) for row, chosen in going]
            found = runner.following(state, [row for row, _ in going], tokens)
            for (row, chosen), logits in zip(going, found, strict=True):
                tasks[batch[row]].learn_rest(chosen, log_softmax(logits))
        del state  # or it would stay while the next batch is computed
        done += len(batch)
        report(done)


def _run_whole(tasks: Sequence[_Task], runner: LogitsRunner, batch_size: int, report: Callable[[int], None]) -> None:
    while True:
        waiting = [(task, chosen) for task in tasks if (chosen := task.next()) is not None]
        report(len(tasks) - len(waiting))
        if not waiting:
            return
        sequences = [task.ids[chosen] for task, chosen in waiting]
        for place, logits in in_batches(runner, sequences, batch_size):
            task, chosen = waiting[place]
            task.learn_whole(chosen, log_softmax(logits[task.first - 1 : -1]))


def _started(
    prompts: Sequence[Sequence[int]], runner: ContinuingRunner, batch_size: int
) -> tuple[list[list[int]], int]:
    """Which prompts are started together, and how many tokens all begin with, where that is worth a run.

    One less than the shortest has at most, so that something is left of each.
    """
    lengths = [len(one) for one in prompts]
    shared = min(common_prefix(min(map(list, prompts)), max(map(list, prompts))), min(lengths) - 1)
    shared = shared if shared >= _MIN_SHARED else 0
    if runner.side_by_side(lengths, shared):
        return batches_of(lengths, batch_size, runner.vocab_size), shared
    return [[place] for place in sorted(range(len(prompts)), key=lambda place: list(prompts[place]))], shared


def log_softmax(logits: Any) -> Floats:
    """ln p along the last axis, in float64."""
    import numpy as np

    rows: Floats = np.asarray(logits, np.float64)
    rows = rows - rows.max(axis=-1, keepdims=True)
    rows -= np.log(np.exp(rows).sum(axis=-1, keepdims=True))
    return rows


def token_losses(logits: Any, targets: Sequence[int]) -> Floats:
    """-ln p of each target in nats; logits [targets, vocabulary] hold the scores of each."""
    import numpy as np

    step = max(1, LOSS_BYTES // (8 * logits.shape[-1]))
    found = [
        log_softmax(logits[start : start + step])[np.arange(len(part)), part]
        for start in range(0, len(targets), step)
        for part in (np.asarray(targets[start : start + step]),)
    ]
    return -np.concatenate(found)


def score_continuations(
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    runner: LogitsRunner,
    *,
    batch_size: int,
    on_done: Callable[[int], None] | None = None,
) -> list[tuple[float, bool]]:
    """(ln p of the tokens after the context, whether each is the most likely one) of (context, tokens) pairs.

    Equal contexts are run once where the runner can go on from them. Neither part may be empty.
    """
    report = on_done or (lambda done: None)
    if not getattr(runner, "continues", False):
        return _score_whole(pairs, runner, batch_size, report)
    # Where most of a text is to be scored, its context saves nothing.
    short = [place for place, (context, tokens) in enumerate(pairs) if len(tokens) <= len(context)]
    long = [place for place, (context, tokens) in enumerate(pairs) if len(tokens) > len(context)]
    first = _score_continued([pairs[one] for one in short], cast("ContinuingRunner", runner), batch_size, report)
    second = _score_whole([pairs[one] for one in long], runner, batch_size, lambda done: report(len(short) + done))
    found = dict(zip((*short, *long), (*first, *second), strict=True))
    return [found[place] for place in range(len(pairs))]


def _score_continued(
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    going_on: ContinuingRunner,
    batch_size: int,
    report: Callable[[int], None],
) -> list[tuple[float, bool]]:
    found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
    of_context: dict[tuple[int, ...], list[int]] = {}
    for place, (context, _) in enumerate(pairs):
        of_context.setdefault(tuple(context), []).append(place)
    contexts = list(of_context)
    done = 0
    batches, shared = _started(contexts, going_on, batch_size) if contexts else ([], 0)
    for batch in batches:
        state, scores = going_on.start([contexts[place] for place in batch], shared=shared)
        waiting: list[tuple[int, int]] = []
        for row, log_probabilities in enumerate(log_softmax(scores)):
            for place in of_context[contexts[batch[row]]]:
                token = pairs[place][1][0]
                found[place] = float(log_probabilities[token]), int(log_probabilities.argmax()) == token
                if len(pairs[place][1]) > 1:
                    waiting.append((row, place))
        for chosen in batches_of([len(pairs[place][1]) for _, place in waiting], batch_size, going_on.vocab_size):
            rows = [waiting[one] for one in chosen]
            logits = going_on.following(state, [row for row, _ in rows], [pairs[place][1][:-1] for _, place in rows])
            for (_, place), one in zip(rows, logits, strict=True):
                value, greedy = _given(one, pairs[place][1][1:])
                found[place] = found[place][0] + value, found[place][1] and greedy
        del state  # or it would stay while the next batch is computed
        done += sum(len(of_context[contexts[place]]) for place in batch)
        report(done)
    return found


def _score_whole(
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    runner: LogitsRunner,
    batch_size: int,
    report: Callable[[int], None],
) -> list[tuple[float, bool]]:
    found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
    sequences = [[*context, *tokens[:-1]] for context, tokens in pairs]
    for done, (place, logits) in enumerate(in_batches(runner, sequences, batch_size), start=1):
        context, tokens = pairs[place]
        found[place] = _given(logits[len(context) - 1 :], tokens)
        report(done)
    return found


def _given(logits: Any, tokens: Sequence[int]) -> tuple[float, bool]:
    return -float(token_losses(logits, tokens).sum()), bool((logits.argmax(axis=-1) == list(tokens)).all())
