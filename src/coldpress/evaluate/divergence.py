"""How far one model is from another, on the same tokens.

    P   the reference's next-token distribution at a position      KL      mean of sum P ln(P / Q), nats per token
    Q   the candidate's                                            top-1   share of positions with the same best token
                                                                   ppl     exp(mean -ln p(next token)), of each

    se      standard error of ln(ppl_Q / ppl_P): the mean over n positions of d = ln p - ln q, clustered by the
            next token c, sqrt(sum_c (sum_{i in c} (d_i - mean d))^2) / n. Rounding moves a token's score the same way
            wherever it stands, so its occurrences are no independent witnesses (Liang and Zeger 1986); in records
            made from one template that is most of the text.

The errors of KL and of top-1 are those of a ratio of sums over sequences: positions of one text are witnesses together.

Every position that has a next token counts once; sums are float64. Peak memory beside the models: a batch of logits of
each (`runners.LOGITS_BYTES`, or one sequence if that is more), and `COMPARE_BYTES`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from coldpress.artifacts.classifiers import is_classifier
from coldpress.config.metrics import DivergenceMetric
from coldpress.data.tokenizer import Tokenizer
from coldpress.errors import PlanError
from coldpress.evaluate.abilities import EncodingRunner, LogitsRunner
from coldpress.evaluate.answers import read_texts
from coldpress.evaluate.bench import Bench
from coldpress.evaluate.encoders import config_of
from coldpress.evaluate.predictions import read_by_head
from coldpress.evaluate.runners import batches_of, in_batches
from coldpress.evaluate.statistics import mean_error, ratio_error
from coldpress.evaluate.texts import SEQUENCE_TOKENS, bundled_tokens, class_sequences, text_sequences
from coldpress.events import Progress, Sink
from coldpress.scores import Measurement

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["Comparison", "compare", "compare_classes", "cosines", "measure"]

BATCH = 16
COMPARE_BYTES = 16 << 20
"""Of the distributions compared at a time, about five arrays [positions, vocabulary]."""


def measure(metric: DivergenceMetric, bench: Bench) -> list[Measurement]:
    """The sub types of a metric; none for the model that others are compared with."""
    if bench.reference is None:
        raise PlanError(
            f"{metric.name} compares a model with the one it came from, and there is none",
            hint="a workflow compares with its input model; `coldpress eval A --compare B` compares B with A",
        )
    if bench.model == bench.reference:
        return []
    names = [sub.name for sub in metric.sub_types]
    encoders = "cosine_similarity" in names
    if encoders and len(set(names)) > 1:
        raise PlanError(
            "cosine_similarity is of encoders, kl and top1_agreement are of causal models: no model has both",
            hint="ask for one kind in a metric",
        )
    return [_of_embeddings(metric, bench)] if encoders else _of_distributions(metric, bench, names)


def _of_distributions(metric: DivergenceMetric, bench: Bench, names: Sequence[str]) -> list[Measurement]:
    assert bench.reference is not None
    tokenizer = _shared_tokenizer(bench)
    if is_classifier(config_of(bench.model)):
        return _named(names, _of_classes(metric, bench, tokenizer))
    first = bench.runners.get(bench.reference, ("logits",), on_block=bench.on_block)
    second = bench.runner(("logits",))
    limits = [one.context_length for one in (first, second) if one.context_length is not None]
    sequences = text_sequences(
        tokenizer,
        tokens=metric.tokens,
        longest=min([SEQUENCE_TOKENS, *limits]),
        data=None if metric.data_config is None else bench.data(metric.data_config),
    )
    found = compare(first, second, sequences, batch_size=metric.batch_size, emit=bench.emit, step=bench.step)
    return _named(names, found)


def _of_classes(metric: DivergenceMetric, bench: Bench, tokenizer: Tokenizer) -> Comparison:
    assert bench.reference is not None
    first, second = (bench.runners.get(one, ("classification",)) for one in (bench.reference, bench.model))
    sequences = class_sequences(
        bench.model,
        tokenizer,
        tokens=metric.tokens,
        longest=min([SEQUENCE_TOKENS, *(one.context_length for one in (first, second) if one.context_length)]),
        data=None if metric.data_config is None else bench.data(metric.data_config),
    )
    return compare_classes(first, second, sequences, emit=bench.emit, step=bench.step)


def _named(names: Sequence[str], found: Comparison) -> list[Measurement]:
    made = {
        "kl": Measurement("kl", found.kl, "nats/token", False, found.tokens, found.kl_error),
        "top1_agreement": Measurement(
            "top1_agreement", found.top1_agreement, "share", True, found.tokens, found.top1_error
        ),
    }
    return [made[name] for name in names]


def _shared_tokenizer(bench: Bench) -> Tokenizer:
    """That of both models; raises PlanError where they read one text as different tokens."""
    assert bench.reference is not None
    own, other = bench.tokenizer(), Tokenizer.load(bench.reference.tokenizer_path)
    if bundled_tokens(own) != bundled_tokens(other):
        raise PlanError(
            f"{bench.model.path} and {bench.reference.path} have different tokenizers, so their next-token "
            "distributions cannot be compared",
            hint="compare bits_per_byte of a metric of type perplexity instead",
        )
    return own


def _of_embeddings(metric: DivergenceMetric, bench: Bench) -> Measurement:
    import numpy as np

    assert bench.reference is not None
    tokenizer = _shared_tokenizer(bench)
    if metric.data_config is None:
        ids = bundled_tokens(tokenizer)
        texts = [ids[start : start + 32] for start in range(0, min(len(ids), metric.tokens), 32)]
    else:
        config = bench.data(metric.data_config)
        texts = read_by_head(read_texts(config, tokenizer)[1], config, tokenizer, bench.model)
    vectors = []
    for model in (bench.reference, bench.model):
        runner = bench.runners.get(model, ("encoding",))
        limit = runner.context_length
        rows: list[Any] = [None] * len(texts)
        for batch in batches_of([len(one) for one in texts], metric.batch_size):
            found = runner.encode([texts[place][:limit] for place in batch])
            for place, vector in zip(batch, found, strict=True):
                rows[place] = vector
        vectors.append(np.stack(rows))
    value, error = mean_error(cosines(*vectors).tolist())
    return Measurement("cosine_similarity", value, "", True, len(texts), error)


def cosines(first: npt.NDArray[np.float32], second: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Of each row of one with the same row of the other."""
    import numpy as np

    a, b = first.astype(np.float64), second.astype(np.float64)
    return np.asarray((a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)))


@dataclass(frozen=True)
class Comparison:
    """A candidate against its reference."""

    kl: float
    """Mean KL divergence, nats per token; 0 is equal."""
    top1_agreement: float
    perplexity_reference: float
    perplexity: float
    standard_error: float
    """Of the logarithm of their ratio."""
    tokens: int
    """Positions compared."""
    kl_error: float | None
    """Standard error of the mean KL divergence."""
    top1_error: float | None
    """Standard error of the agreement."""


def compare(
    reference: LogitsRunner,
    candidate: LogitsRunner,
    sequences: Sequence[Sequence[int]],
    *,
    batch_size: int = BATCH,
    emit: Sink | None = None,
    step: str = "",
) -> Comparison:
    """Mean KL, agreement and perplexities over all positions of `sequences`."""
    sums = _Sums()
    total = sum(len(one) - 1 for one in sequences)
    theirs = in_batches(reference, sequences, batch_size)
    ours = in_batches(candidate, sequences, batch_size)
    for number, (place, p) in enumerate(theirs, start=1):
        other, q = next(ours)
        if place != other:
            raise AssertionError("both runners must see the sequences in one order")
        sums.add(p[:-1], q[:-1], sequences[place][1:])
        del p, q  # or they would stay while the next batch is computed
        if emit is not None and (number % batch_size == 0 or number == len(sequences)):
            emit(Progress(step, sums.tokens, total, "tokens"))
    return sums.result()


def compare_classes(
    reference: EncodingRunner,
    candidate: EncodingRunner,
    sequences: Sequence[Sequence[int]],
    *,
    emit: Sink | None = None,
    step: str = "",
) -> Comparison:
    """Two classifiers on texts: a text is a position, the class that the reference finds its next token."""
    sums = _Sums()
    for start in range(0, len(sequences), BATCH):
        batch = sequences[start : start + BATCH]
        p, q = reference.classify(batch), candidate.classify(batch)
        for row in range(len(batch)):  # each text is a witness of its own
            sums.add(p[row : row + 1], q[row : row + 1], [int(p[row].argmax())])
        if emit is not None:
            emit(Progress(step, start + len(batch), len(sequences), "texts"))
    return sums.result()


class _Sums:
    def __init__(self) -> None:
        self.kl = self.agree = self.loss_p = self.loss_q = 0.0
        self.tokens = 0
        self._of_sequences: list[tuple[float, float, int]] = []
        """KL, agreements and positions of each sequence."""
        self._growth: dict[int, tuple[float, int]] = {}
        """Next token -> (sum of ln p - ln q, occurrences)."""

    def add(
        self, reference: npt.NDArray[np.float32], candidate: npt.NDArray[np.float32], targets: Sequence[int]
    ) -> None:
        import numpy as np

        width = min(reference.shape[1], candidate.shape[1])  # a padded vocabulary has scores for no token
        before = self.kl, self.agree, self.tokens
        step = max(1, COMPARE_BYTES // (5 * 4 * width))
        for start in range(0, len(targets), step):
            stop = min(start + step, len(targets))
            p, q = _log_softmax(reference[start:stop, :width]), _log_softmax(candidate[start:stop, :width])
            self.kl += float((np.exp(p) * (p - q)).sum(dtype=np.float64))
            self.agree += float((p.argmax(axis=1) == q.argmax(axis=1)).sum())
            rows, next_tokens = np.arange(stop - start), np.asarray(targets[start:stop])
            ln_p, ln_q = p[rows, next_tokens].astype(np.float64), q[rows, next_tokens].astype(np.float64)
            self.loss_p -= float(ln_p.sum())
            self.loss_q -= float(ln_q.sum())
            for token, growth in zip(targets[start:stop], (ln_p - ln_q).tolist(), strict=True):
                total, count = self._growth.get(token, (0.0, 0))
                self._growth[token] = (total + growth, count + 1)
            self.tokens += stop - start
        self._of_sequences.append((self.kl - before[0], self.agree - before[1], self.tokens - before[2]))

    def result(self) -> Comparison:
        n = self.tokens
        # A candidate that yields NaN must not pass a limit, and NaN is neither above nor below one.
        # The sum of equal distributions may end a rounding below 0.
        kl = max(self.kl / n, 0.0) if math.isfinite(self.kl) else math.inf
        mean = (self.loss_q - self.loss_p) / n
        clusters = sum((total - count * mean) ** 2 for total, count in self._growth.values())
        error = math.sqrt(clusters) / n if math.isfinite(clusters) else 0.0
        kls, agreements, counts = zip(*self._of_sequences, strict=True)
        return Comparison(
            kl=kl,
            top1_agreement=self.agree / n,
            perplexity_reference=_perplexity(self.loss_p / n),
            perplexity=_perplexity(self.loss_q / n),
            standard_error=error,
            tokens=n,
            kl_error=ratio_error(kls, counts)[1] if math.isfinite(kl) else None,
            top1_error=ratio_error(agreements, counts)[1],
        )


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0)) if math.isfinite(loss) else math.inf


def _log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    import numpy as np

    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True, dtype=np.float64)), np.float32)
