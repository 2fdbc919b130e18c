"""How far one model is from another, on text.

    P   the reference's next-token distribution at a position      KL      mean of sum P ln(P / Q), nats per token
    Q   the candidate's                                            top-1   share of positions with the same best token
                                                                   ppl     exp(mean -ln p(next token)), of each

    se      standard error of ln(ppl_Q / ppl_P): the mean over n positions of d = ln p - ln q, clustered by the
            next token c, sqrt(sum_c (sum_{i in c} (d_i - mean d))^2) / n. Rounding moves a token's score the same way
            wherever it stands, so its occurrences are no independent witnesses (Liang and Zeger 1986); in records
            made from one template that is most of the text.

Every position that has a next token counts once. Both models are loaded from their files and asked batch by batch;
sums are float64. A checkpoint goes through its blocks first, one in memory at a time; then the candidate is opened.
Peak memory: the larger of one block and an ONNX candidate (as ONNX Runtime holds it), the reference's hidden states
(`runners.STATES_BYTES`), a batch of logits of each (`runners.LOGITS_BYTES`, or one sequence if that is more), and
`COMPARE_BYTES`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

from coldpress.artifacts.base import Artifact
from coldpress.artifacts.classifiers import CLASSIFICATION
from coldpress.config.schema import DataConfig
from coldpress.data.prepare import prepare
from coldpress.data.tokenizer import Tokenizer
from coldpress.errors import DataError
from coldpress.evaluate.classifier import ClassifierRunner, with_ends
from coldpress.evaluate.runners import LayerwiseRunner, LogitsRunner, in_batches, open_runner
from coldpress.events import Message, Progress, Sink
from coldpress.passes.base import Context

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["ParityResult", "compare", "parity_sequences", "prove"]

SEQUENCE_TOKENS = 256
"""Longest sequence compared; longer ones are cut."""
BATCH = 16
COMPARE_BYTES = 16 << 20
"""Of the distributions compared at a time, about five arrays [positions, vocabulary]."""


@dataclass(frozen=True)
class ParityResult:
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


def prove(
    reference: Artifact,
    candidate: Artifact,
    context: Context,
    *,
    tokens: int = 4096,
    data_config: str | None = None,
    held_out: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Compare two models on text, as the engine records it. See `parity_sequences` for the text.

    `reference` in the result says how the reference was computed: "layer by layer" or "whole".
    """

    def on_block(done: int, blocks: int) -> None:
        context.emit(Progress(context.step, done, blocks, "layers"))

    tokenizer = Tokenizer.load(reference.tokenizer_path)
    if reference.describe().task == CLASSIFICATION:
        data = None if data_config is None else context.data(data_config)
        return {**vars(_compare_classes(reference, candidate, tokenizer, context, tokens, data, held_out)),
                "reference": "whole"}  # fmt: skip
    with ExitStack() as stack:
        first, second = (
            stack.enter_context(
                open_runner(model, trust_remote_code=context.trust_remote_code, blocks="always", on_block=on_block)
            )
            for model in (reference, candidate)
        )
        limits = [one.context_length for one in (first, second) if one.context_length is not None]
        sequences = parity_sequences(
            tokenizer,
            tokens=tokens,
            longest=min([SEQUENCE_TOKENS, *limits]),
            data=None if data_config is None else context.data(data_config),
            held_out=held_out,
        )
        found = sum(len(one) - 1 for one in sequences)
        if found < tokens:
            context.emit(Message("warning", f"there is text for {found} tokens only, not {tokens}", context.step))
        result = compare(first, second, sequences, emit=context.emit, step=context.step)
        how = "layer by layer" if isinstance(first, LayerwiseRunner) else "whole"
    return {**vars(result), "reference": how}


def _compare_classes(
    reference: Artifact,
    candidate: Artifact,
    tokenizer: Tokenizer,
    context: Context,
    tokens: int,
    data: DataConfig | None,
    held_out: Mapping[str, Any] | None,
) -> ParityResult:
    """Two classifiers on texts: a text is a position, the class that the reference finds its next token."""
    first, second = (
        ClassifierRunner(model, trust_remote_code=context.trust_remote_code) for model in (reference, candidate)
    )
    longest = min([SEQUENCE_TOKENS, *(one.context_length for one in (first, second) if one.context_length)])
    known = tokenizer.special_tokens or {}
    marks = [known.get("cls_token"), known.get("sep_token")]
    ends = [None if mark is None else tokenizer.backend.token_to_id(mark) for mark in marks]
    sequences = [
        with_ends(reference, one, *ends)
        for one in parity_sequences(
            tokenizer, tokens=tokens, longest=longest - 2, data=data, held_out=held_out, classes=data is not None
        )
    ]
    sums = _Sums()
    for start in range(0, len(sequences), BATCH):
        batch = sequences[start : start + BATCH]
        p, q = first.scores(batch), second.scores(batch)
        sums.add(p, q, p.argmax(axis=1).tolist())
        context.emit(Progress(context.step, start + len(batch), len(sequences), "texts"))
    return sums.result()


def parity_sequences(
    tokenizer: Tokenizer,
    *,
    tokens: int,
    longest: int = SEQUENCE_TOKENS,
    data: DataConfig | None = None,
    held_out: Mapping[str, Any] | None = None,
    classes: bool = False,
) -> list[list[int]]:
    """Sequences with at least `tokens` positions to compare: text of `data` first, then the bundled text.

    `classes`: the records of `data` have classes, which are no part of their text.

    `held_out` (`size`, `seed`) takes only the part of `data` that a training step with that split did not see.
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
    take(_bundled(tokenizer))
    if not sequences:
        raise DataError("there is no text to compare the models on")
    return sequences


def _bundled(tokenizer: Tokenizer) -> list[int]:
    text = resources.files("coldpress.data").joinpath("parity_text.txt").read_text(encoding="utf-8")
    return tokenizer.ids(text)


def compare(
    reference: LogitsRunner,
    candidate: LogitsRunner,
    sequences: Sequence[Sequence[int]],
    *,
    batch_size: int = BATCH,
    emit: Sink | None = None,
    step: str = "",
) -> ParityResult:
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


class _Sums:
    def __init__(self) -> None:
        self.kl = self.agree = self.loss_p = self.loss_q = 0.0
        self.tokens = 0
        self._growth: dict[int, tuple[float, int]] = {}
        """Next token -> (sum of ln p - ln q, occurrences)."""

    def add(
        self, reference: npt.NDArray[np.float32], candidate: npt.NDArray[np.float32], targets: Sequence[int]
    ) -> None:
        import numpy as np

        width = min(reference.shape[1], candidate.shape[1])  # a padded vocabulary has scores for no token
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

    def result(self) -> ParityResult:
        n = self.tokens
        # A candidate that yields NaN must not pass a limit, and NaN is neither above nor below one.
        kl = self.kl / n if math.isfinite(self.kl) else math.inf
        mean = (self.loss_q - self.loss_p) / n
        clusters = sum((total - count * mean) ** 2 for total, count in self._growth.values())
        error = math.sqrt(clusters) / n if math.isfinite(clusters) else 0.0
        return ParityResult(kl, self.agree / n, _perplexity(self.loss_p / n), _perplexity(self.loss_q / n), error, n)


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0)) if math.isfinite(loss) else math.inf


def _log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    import numpy as np

    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True, dtype=np.float64)), np.float32)
