"""What a runner can be asked for, and what a metric may therefore need: n metrics and m runners, never n x m.

    runner                       log-likelihood  logits  generation  encoding  classification
    Transformers, decoder              x           x         x
    Transformers, encoder                                                x      x (with a classification head)
    ONNX Runtime, decoder              x           x         x
    ONNX Runtime, encoder                                                x      x (where the graph has such a head)
    ONNX Runtime GenAI                 x           x         x

A runner declares its abilities when it is open (a graph may lack an output); a metric names those it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

from coldpress.config.metrics import RunnerChoice

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Logits = npt.NDArray[np.float32]

__all__ = [
    "ABILITIES",
    "Ability",
    "ContinuingRunner",
    "EncodingRunner",
    "GeneratingRunner",
    "LogitsRunner",
    "Needs",
    "Runner",
    "Stop",
]

Ability = Literal["log-likelihood", "logits", "generation", "encoding", "classification"]
Needs = tuple[Ability, ...]
"""What a metric asks of a runner."""
ABILITIES: dict[Ability, str] = {
    "log-likelihood": "log-likelihoods of given tokens",
    "logits": "the logits of every token",
    "generation": "new tokens, one after the other",
    "encoding": "embeddings",
    "classification": "a score for each class of its own head",
}
"""Each ability in words."""
Stop = Callable[[Sequence[int]], bool]
"""Whether the new tokens of a row are enough."""


class Runner(Protocol):
    """A model that is loaded."""

    name: str
    """What runs it, for messages and records: Transformers, ONNX Runtime ..."""
    kind: RunnerChoice
    """The same as a config names it."""
    context_length: int | None

    @property
    def abilities(self) -> frozenset[Ability]:
        """What it can be asked for."""
        ...

    def close(self) -> None:
        """Let go of the weights."""
        ...


class LogitsRunner(Runner, Protocol):
    """A causal language model that can be asked about given tokens."""

    vocab_size: int

    def logits(self, batch: Sequence[Sequence[int]]) -> list[Logits]:
        """[tokens, vocabulary] of each sequence; row i holds the scores of token i + 1."""
        ...


class ContinuingRunner(LogitsRunner, Protocol):
    """One that keeps what it computed of a prompt, and can go on from there in several ways."""

    continues: bool
    """False where the model has no cache that rows of different lengths can share."""

    def side_by_side(self, lengths: Sequence[int], shared: int) -> bool:
        """Whether prompts of these lengths, which all begin with the same `shared` tokens, are best run in batches.

        Else each is started and continued before the next: what it and the one before it begin with is computed once.
        """
        ...

    def start(self, prompts: Sequence[Sequence[int]], *, shared: int = 0) -> tuple[Any, Logits]:
        """State after the prompts, and the scores of the next token [prompts, vocabulary].

        All prompts, of this call and the next ones, begin with the same `shared` tokens: they are computed once.
        """
        ...

    def following(self, state: Any, rows: Sequence[int], tokens: Sequence[Sequence[int]]) -> list[Logits]:
        """Logits of `tokens` after the prompts `rows` of the state, as in `logits`. The state stays as it is."""
        ...


class GeneratingRunner(Runner, Protocol):
    """A model that makes new tokens, always the most likely one."""

    def forward(self, batch: Sequence[Sequence[int]]) -> None:
        """One pass over texts, as their users make it: what latency is of."""
        ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop_tokens: Collection[int] = (),
        stop: Stop | None = None,
    ) -> list[list[int]]:
        """New tokens of each prompt, up to a stop token (which is left out), or until `stop` is content."""
        ...

    def stream(self, prompt: Sequence[int], new_tokens: int) -> Iterator[int]:
        """Exactly so many new tokens, each as soon as it is there."""
        ...


class EncodingRunner(Runner, Protocol):
    """A model that reads a whole text at once."""

    labels: tuple[str, ...]
    """Classes of the head, in the order of the scores; empty without one."""

    def forward(self, batch: Sequence[Sequence[int]]) -> None:
        """One pass over texts, as their users make it: what latency is of."""
        ...

    def encode(self, batch: Sequence[Sequence[int]]) -> npt.NDArray[np.float32]:
        """One embedding a sequence: [sequences, size]."""
        ...

    def classify(self, batch: Sequence[Sequence[int]]) -> npt.NDArray[np.float32]:
        """Scores before the softmax: [sequences, classes]."""
        ...
