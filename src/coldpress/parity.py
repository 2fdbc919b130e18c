"""The proof of a step: its result against its input, on text (`evaluate.divergence` has the mathematics).

Both models are loaded from their files and asked batch by batch. A checkpoint goes through its blocks first, one in
memory at a time; then the candidate is opened. Peak memory: the larger of one block and an ONNX candidate (as ONNX
Runtime holds it), the reference's hidden states (`torch_runner.STATES_BYTES`), and what the comparison takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
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

__all__ = ["prove"]


def prove(
    reference: Artifact,
    candidate: Artifact,
    context: Context,
    *,
    tokens: int = 4096,
    data_config: str | None = None,
    held_out: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Compare two models on text, as the engine records it. See `text_sequences` for the text.

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
        first, second = (
            stack.enter_context(
                open_runner(model, trust_remote_code=context.trust_remote_code, blocks="always", on_block=on_block)
            )
            for model in (reference, candidate)
        )
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
