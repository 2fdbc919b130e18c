"""The metric `perplexity`: how surprised a causal model is by text, in windows that overlap.

    text     t0 t1 t2 t3 t4 t5 t6 t7 t8        window 6, stride 3
    first    .  +  +  +  +  +                  +: scored, each token of a text but the first (that too, after BOS) once
    second            .  .  .  +  +  +         .: context only

    loss           sum of -ln p over scored tokens / their number, nats a token
    perplexity     exp(loss)
    bits a byte    the same sum / ln 2 / UTF-8 bytes of the scored text: tokenizers of any kind compare

Errors are those of a ratio of sums over texts (over windows where there is one text): tokens of one text are no
independent witnesses. Peak memory beside the model: a batch of logits (`runners.LOGITS_BYTES`, or one window if that is
more) and `likelihood.LOSS_BYTES`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from coldpress.config.metrics import PerplexityMetric
from coldpress.config.schema import DataConfig
from coldpress.data.prepare import texts_of
from coldpress.data.templates import Rendered
from coldpress.data.tokenizer import Tokenizer
from coldpress.errors import DataError
from coldpress.evaluate.abilities import LogitsRunner
from coldpress.evaluate.bench import Bench
from coldpress.evaluate.likelihood import token_losses
from coldpress.evaluate.runners import in_batches
from coldpress.evaluate.statistics import ratio_error
from coldpress.events import Progress, Sink
from coldpress.scores import Measurement

__all__ = ["Document", "Surprise", "documents", "measure", "surprise", "windows"]


@dataclass(frozen=True)
class Document:
    """One text, as tokens."""

    ids: Sequence[int] = field(repr=False)
    first: int
    """Its first token that is scored."""
    bytes: int
    """Of the scored text."""


@dataclass(frozen=True)
class Surprise:
    """What a model thinks of texts."""

    loss: float
    """Nats a token."""
    loss_error: float | None
    bits_per_byte: float
    bits_error: float | None
    tokens: int
    """Scored ones."""

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0)) if math.isfinite(self.loss) else math.inf


def measure(metric: PerplexityMetric, bench: Bench) -> list[Measurement]:
    """The sub types of a metric, of one reading of the text."""
    config = bench.data(metric.data_config)
    runner = bench.runner(("logits",), metric.runner)
    window = _window(metric.window, config, runner)
    texts = documents(config, bench.tokenizer(), window)
    found = surprise(
        runner, texts, window=window, stride=metric.stride, batch_size=metric.batch_size, emit=bench.emit,
        step=bench.step,
    )  # fmt: skip
    perplexity = found.perplexity
    made = {
        "perplexity": (perplexity, "", None if found.loss_error is None else perplexity * found.loss_error),
        "loss": (found.loss, "nats/token", found.loss_error),
        "bits_per_byte": (found.bits_per_byte, "bits/byte", found.bits_error),
    }
    details = {"texts": len(texts), "window": window, "stride": metric.stride or window // 2}
    return [
        Measurement(sub.name, value, unit, False, found.tokens, error, details)
        for sub in metric.sub_types
        for value, unit, error in (made[sub.name],)
    ]


def _window(asked: int | None, config: DataConfig, runner: LogitsRunner) -> int:
    limit = runner.context_length
    window = asked or min(config.pre_process_data_config.max_seq_len, limit or math.inf)
    if limit is not None and window > limit:
        raise DataError(
            f"a window of {window} tokens is longer than the model's context of {limit}",
            hint=f"set window to {limit} or less",
        )
    return int(window)


def documents(config: DataConfig, tokenizer: Tokenizer, window: int) -> list[Document]:
    """Texts of a data config: each record one, or all of them joined, as its strategy says. Raises DataError."""
    pre = config.pre_process_data_config
    texts = texts_of(config, tokenizer)
    rendered = texts.rendered
    if pre.strategy.startswith("join"):
        rendered = [Rendered(pre.joiner.join(one.text for one in rendered))]
    elif pre.max_samples is not None:
        rendered = rendered[: pre.max_samples]
    found = []
    for one, encoding in zip(rendered, tokenizer.encode([one.text for one in rendered]), strict=True):
        begun = list(encoding.ids[:1]) == [tokenizer.bos_id]
        before = [tokenizer.bos_id] if pre.add_special_tokens and tokenizer.bos_id is not None and not begun else []
        ids, spans = [*before, *encoding.ids], [*((0, 0) for _ in before), *encoding.offsets]
        if pre.strategy.startswith("join") and pre.max_samples is not None:
            ids, spans = ids[: pre.max_samples * window], spans[: pre.max_samples * window]
        first = 1
        if texts.completion_only and one.answer_start is not None:
            answer = one.answer_start
            first = max(1, next((place for place, (_, end) in enumerate(spans) if end > answer), len(ids)))
        if first < len(ids):
            found.append(Document(ids, first, len(one.text[spans[first][0] : spans[-1][1]].encode())))
    if not found:
        raise DataError(
            f"{config.name} has no text of two tokens or more, so there is nothing to predict",
            hint="are text_template or text_cols right?",
        )
    return found


def windows(length: int, first: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, first scored token) of each window over a text: every token from `first` on is scored once."""
    start, scored = 0, first
    while True:
        end = min(start + window, length)
        if end > scored:
            yield start, end, scored
            scored = end
        if end == length:
            return
        start += stride


def surprise(
    runner: LogitsRunner,
    texts: Sequence[Document],
    *,
    window: int,
    stride: int | None = None,
    batch_size: int = 4,
    emit: Sink | None = None,
    step: str = "",
) -> Surprise:
    """Loss and bits a byte of texts; `stride` is half a window unless given. A stride beyond the window is refused."""
    stride = stride or max(1, window // 2)
    if stride >= window:
        raise DataError(f"a stride of {stride} leaves no context in a window of {window}", hint="make it smaller")
    cuts = (windows(len(text.ids), text.first, window, stride) for text in texts)
    places = [(row, *one) for row, each in enumerate(cuts) for one in each]
    sequences = [texts[row].ids[start:end] for row, start, end, _ in places]
    lost = [0.0] * len(places)
    done, total = 0, sum(end - scored for _, _, end, scored in places)
    for place, logits in in_batches(runner, sequences, batch_size):
        row, start, end, scored = places[place]
        rows = logits[scored - start - 1 : end - start - 1]
        lost[place] = float(token_losses(rows, texts[row].ids[scored:end]).sum())
        done += end - scored
        if emit is not None:
            emit(Progress(step, done, total, "tokens"))
    return _summed(texts, [(row, end - scored) for row, _, end, scored in places], lost)


def _summed(texts: Sequence[Document], places: Sequence[tuple[int, int]], lost: Sequence[float]) -> Surprise:
    """Sums by text, or by window where there is one text."""
    alone = len(texts) == 1
    tokens: dict[int, float] = {}
    losses: dict[int, float] = {}
    for number, ((row, count), loss) in enumerate(zip(places, lost, strict=True)):
        cluster = number if alone else row
        tokens[cluster] = tokens.get(cluster, 0.0) + count
        losses[cluster] = losses.get(cluster, 0.0) + loss
    scored = sum(tokens.values())
    loss, loss_error = ratio_error(list(losses.values()), list(tokens.values()))
    if alone:  # bytes of a window are its share of the text's, by tokens
        sizes = [texts[0].bytes * count / scored for count in tokens.values()]
    else:
        sizes = [float(texts[row].bytes) for row in tokens]
    bits, bits_error = ratio_error([one / math.log(2) for one in losses.values()], sizes)
    return Surprise(loss, loss_error, bits, bits_error, int(scored))
