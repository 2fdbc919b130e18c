"""The proof of a step: its result against its input, on text (`evaluate.divergence` has the mathematics).

Both models are loaded from their files and asked batch by batch. A checkpoint goes through its blocks first, one in
memory at a time; then the candidate is opened. Peak memory: the larger of one block and an ONNX candidate (as ONNX
Runtime holds it), the reference's hidden states (`torch_runner.STATES_BYTES`), and what the comparison takes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from coldpress.artifacts.base import Artifact
from coldpress.artifacts.classifiers import CLASSIFICATION
from coldpress.data.tokenizer import Tokenizer
from coldpress.evaluate.classifier import ClassifierRunner
from coldpress.evaluate.divergence import compare, compare_classes
from coldpress.evaluate.runners import LayerwiseRunner, open_runner
from coldpress.evaluate.texts import SEQUENCE_TOKENS, class_sequences, text_sequences
from coldpress.events import Message, Progress
from coldpress.passes.base import Context

__all__ = ["KeptReference", "prove"]


class KeptReference:
    """A reference that stays open from one proof to the next: a search compares many candidates with one model.

    The same one is what has the same files, unchanged. It holds the reference's hidden states.
    """

    def __init__(self) -> None:
        self._files: Any = None
        self._runner: Any = None
        self._stack = ExitStack()

    def open(self, reference: Artifact, opened: Callable[[Artifact], AbstractContextManager[Any]]) -> Any:
        """The runner of the reference: the open one, or a new one in its place."""
        files = _state_of_files(reference)
        if self._runner is None or files != self._files:
            self.close()
            self._runner = self._stack.enter_context(opened(reference))
            self._files = files
        return self._runner

    def close(self) -> None:
        """Let go of it."""
        self._stack.close()
        self._runner = None


def _state_of_files(model: Artifact) -> Any:
    folders = dict.fromkeys(folder for folder in (model.model, model.adapter) if folder is not None)
    return model, [
        (str(path), status.st_size, status.st_mtime_ns)
        for folder in folders
        for path in sorted(folder.iterdir())
        if path.is_file() and (status := path.stat())
    ]


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

    With `kept` the reference stays open, for another candidate that is compared with it on the same text.
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
        return {**vars(classes), "reference": "whole"}
    with ExitStack() as stack:
        opened = functools.partial(
            open_runner, trust_remote_code=context.trust_remote_code, blocks="always", on_block=on_block
        )
        first = stack.enter_context(opened(reference)) if kept is None else kept.open(reference, opened)
        second = stack.enter_context(opened(candidate))
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
    return {**vars(result), "reference": how}
