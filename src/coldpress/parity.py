"""The proof of a step: its result against its input, on text (`evaluate.divergence` has the mathematics).

Both models are loaded from their files and asked batch by batch. A checkpoint goes through its blocks first, one in
memory at a time; then the candidate is opened. Peak memory: the larger of one block and an ONNX candidate (as ONNX
Runtime holds it), the reference's hidden states (`torch_runner.STATES_BYTES`), and what the comparison takes.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any, TypeAlias

from coldpress.artifacts.base import Artifact
from coldpress.artifacts.classifiers import CLASSIFICATION
from coldpress.data.tokenizer import Tokenizer
from coldpress.evaluate.classifier import ClassifierRunner
from coldpress.evaluate.divergence import compare, compare_classes
from coldpress.evaluate.onnx_session import provider_here
from coldpress.evaluate.runners import LayerwiseRunner, open_runner
from coldpress.evaluate.size import files_to_run
from coldpress.evaluate.texts import SEQUENCE_TOKENS, class_sequences, text_sequences
from coldpress.events import Message, Progress
from coldpress.passes.base import Context

__all__ = ["KeptReference", "prove"]


_Identity: TypeAlias = tuple[Any, ...]


class KeptReference:
    """References that stay open from one proof to the next: a search compares many candidates with one model, and what
    a merge made is what the build after it is compared with.

    The same one is what has the same files, unchanged, wherever they lie: a result is moved when it was proved. Each
    holds its hidden states; there are two at most, and only one while another model is opened.
    """

    def __init__(self) -> None:
        self._held: dict[_Identity, tuple[Any, ExitStack]] = {}

    def open(self, reference: Artifact, opened: Callable[[Artifact], AbstractContextManager[Any]]) -> Any:
        """The runner of the reference: an open one, or a new one. All others are let go."""
        wanted = _identity(reference)
        for other in [one for one in self._held if one != wanted]:
            self._held.pop(other)[1].close()
        if wanted not in self._held:
            stack = ExitStack()
            self._held[wanted] = stack.enter_context(opened(reference)), stack
        return self._held[wanted][0]

    def keep(self, model: Artifact, runner: Any, stack: ExitStack) -> None:
        """Keep an open one for a proof that it is the reference of; `stack` closes it."""
        identity = _identity(model)
        if identity not in self._held:
            self._held[identity] = runner, stack.pop_all()

    def close(self) -> None:
        """Let go of them."""
        while self._held:
            self._held.popitem()[1][1].close()


def _identity(model: Artifact) -> _Identity:
    status = [path.stat() for path in files_to_run(model)]
    files = sorted((one.st_dev, one.st_ino, one.st_size, one.st_mtime_ns) for one in status)
    return model.kind, model.base_quantization, model.task, *files


def prove(
    reference: Artifact,
    candidate: Artifact,
    context: Context,
    *,
    tokens: int = 4096,
    data_config: str | None = None,
    held_out: Mapping[str, Any] | None = None,
    kept: KeptReference | None = None,
) -> dict[str, Any]:
    """Compare two models on text, as the engine records it. See `text_sequences` for the text.

    With `kept` the reference stays open, for another candidate that is compared with it on the same text, and so does a
    candidate that ran block by block, for what is made of it.
    `reference` in the result says how the reference was computed: "layer by layer" or "whole".
    """

    def on_block(done: int, blocks: int) -> None:
        context.emit(Progress(context.step, done, blocks, "layers"))

    tokenizer = Tokenizer.load(reference.tokenizer_path)
    if reference.describe().task == CLASSIFICATION:
        first_classes, second_classes = (
            ClassifierRunner(one, trust_remote_code=context.trust_remote_code) for one in (reference, candidate)
        )
        limits = [one.context_length for one in (first_classes, second_classes) if one.context_length is not None]
        sequences = class_sequences(
            reference,
            tokenizer,
            tokens=tokens,
            longest=min([SEQUENCE_TOKENS, *limits]),
            data=None if data_config is None else context.data(data_config),
            held_out=held_out,
        )
        classes = compare_classes(first_classes, second_classes, sequences, emit=context.emit, step=context.step)
        return {**vars(classes), "reference": "whole", "compared": "texts"}
    with ExitStack() as stack:
        opened = functools.partial(
            open_runner, trust_remote_code=context.trust_remote_code, blocks="always", on_block=on_block
        )
        first = stack.enter_context(opened(reference)) if kept is None else kept.open(reference, opened)
        ours = stack.enter_context(ExitStack())
        provider = candidate.execution_provider
        if candidate.kind == "onnx" and provider is not None and not provider_here(provider):
            said = f"proved with the CPU's kernels; those of {provider}, which is not here, were not run"
            context.emit(Message("warning", said, context.step))
        second = ours.enter_context(opened(candidate, stand_in=True))
        limits = [one.context_length for one in (first, second) if one.context_length is not None]
        sequences = text_sequences(
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
        # Its file stays open, and Windows moves no folder with an open file in it.
        if kept is not None and isinstance(second, LayerwiseRunner) and os.name == "posix":
            kept.keep(candidate, second, ours)
    return {**vars(result), "reference": how}
