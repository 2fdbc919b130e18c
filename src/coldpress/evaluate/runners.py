"""The runner for a model: loaded from its files, able to do what a metric needs, or refused in plain words.

Sequences are padded on the right, where a causal model never looks, so a sequence's logits do not depend on its batch.
Which runner: the first of its kind's that has the abilities asked for, or the one that is named. A checkpoint that is
too large to be loaded whole runs block by block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from coldpress.artifacts.adapter_record import modules_of
from coldpress.artifacts.base import Artifact, read_json
from coldpress.artifacts.classifiers import is_classifier
from coldpress.artifacts.tensors import TensorSet
from coldpress.config.metrics import RunnerChoice
from coldpress.errors import PlanError, UnsupportedModelError
from coldpress.evaluate.abilities import ABILITIES, LogitsRunner, Needs, Runner
from coldpress.evaluate.classifier import ClassifierRunner, has_layout
from coldpress.evaluate.encoders import OnnxEncoder, TorchEncoder, config_of, is_encoder
from coldpress.evaluate.genai_runner import GenAIRunner
from coldpress.evaluate.onnx_runner import OnnxRunner
from coldpress.evaluate.onnx_session import provider_here
from coldpress.evaluate.torch_runner import LayerwiseRunner, TorchRunner
from coldpress.hardware import detect

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Logits = npt.NDArray[np.float32]

__all__ = [
    "LayerwiseRunner",
    "LogitsRunner",
    "OnnxRunner",
    "TorchRunner",
    "batches_of",
    "in_batches",
    "open_runner",
    "runner_names",
]

LOGITS_BYTES = 128 << 20
"""Of one batch; fewer sequences are run at a time when the vocabulary is large."""
BLOCK_TOKENS = 1024
"""Tokens that a block computes at a time (at least one sequence): bounds what lies between its matrices."""
WHOLE_SHARE = 0.5
"""Of the memory available: a model whose float32 weights take more is not loaded whole."""


@contextmanager
def open_runner(
    model: Artifact,
    *,
    needs: Needs = ("logits",),
    runner: RunnerChoice | None = None,
    trust_remote_code: bool = False,
    blocks: Literal["always", "if too large"] = "if too large",
    on_block: Callable[[int, int], None] | None = None,
    dtype: str = "float32",
    stand_in: bool = False,
) -> Iterator[Any]:
    """The runner for a model; raises PlanError where none has what is needed, and CheckpointError.

    `blocks` says when a checkpoint runs block by block; `on_block` is then told (blocks done, blocks). A model that has
    no blocks to run one by one is loaded whole where it fits. `dtype` auto runs a checkpoint in its stored type. With
    `stand_in` ONNX Runtime's CPU kernels stand in for those of a provider that is not here.
    """
    names = runner_names(model)
    if runner is not None and runner not in names:
        raise PlanError(
            f"{model.path} cannot run on {runner}", hint=f"runners of such a model: {', '.join(names) or 'none'}"
        )
    refused = []
    for name in [runner] if runner is not None else names:
        opened = _opened(model, name, trust_remote_code, blocks, on_block, dtype, needs, stand_in)
        lacking = [ability for ability in needs if ability not in opened.abilities]
        if lacking:
            opened.close()
            refused.append(f"{opened.name} cannot give {', '.join(ABILITIES[one] for one in lacking)}")
            continue
        try:
            yield opened
        finally:
            opened.close()
        return
    raise PlanError(
        f"{model.path} does not have what is asked for: {'; '.join(refused)}",
        hint="generation and log-likelihoods need a decoder, embeddings an encoder, classes a classification head",
    )


def runner_names(model: Artifact) -> tuple[RunnerChoice, ...]:
    """What can run a model, the usual one first."""
    if model.kind == "checkpoint":
        return ("transformers",)
    return ("onnxruntime", "onnxruntime-genai") if (model.model / "genai_config.json").is_file() else ("onnxruntime",)


def _opened(
    model: Artifact,
    name: RunnerChoice,
    trust_remote_code: bool,
    blocks: Literal["always", "if too large"],
    on_block: Callable[[int, int], None] | None,
    dtype: str,
    needs: Needs,
    stand_in: bool,
) -> Runner:
    if name == "onnxruntime-genai":
        return GenAIRunner(model.model, adapter=model.adapter)
    provider = model.execution_provider or "CPUExecutionProvider"
    if stand_in and name == "onnxruntime" and not provider_here(provider):
        provider = "CPUExecutionProvider"
    config = config_of(model)
    encodes = is_encoder(config)
    if name == "onnxruntime":
        if encodes:
            return OnnxEncoder(model.model, execution_provider=provider)
        return OnnxRunner(model.model, adapter=model.adapter, execution_provider=provider)
    if is_classifier(config) and (model.adapter is not None or has_layout(config)):
        return ClassifierRunner(model, trust_remote_code=trust_remote_code, dtype=dtype)
    if encodes:
        return TorchEncoder(model.model, trust_remote_code=trust_remote_code, dtype=dtype)
    if "generation" not in needs and _runs_in_blocks(model) and (blocks == "always" or _too_large(model)):
        try:
            return LayerwiseRunner(
                model.model, adapter=model.adapter, trust_remote_code=trust_remote_code, on_block=on_block
            )
        except UnsupportedModelError:
            if _too_large(model):
                raise
    return TorchRunner(
        model.model,
        adapter=model.adapter,
        base_quantization=model.base_quantization,
        trust_remote_code=trust_remote_code,
        dtype=dtype,
    )


def _runs_in_blocks(model: Artifact) -> bool:
    """Not where another library makes weights of the base while it is loaded whole.

    bitsandbytes does for a QLoRA adapter, and PEFT for an adapter that begins with a decomposition of the base (PiSSA,
    OLoRA, LoftQ ...) or that brings weights of the base along.
    """
    if model.adapter is None:
        return True
    config = read_json(model.adapter / "adapter_config.json")
    whole = tuple(f".{module}.weight" for module in config.get("modules_to_save") or ())
    with TensorSet.open(model.adapter / "adapter_model.safetensors") as tensors:
        names = [info.name for info in tensors.infos() if not modules_of([info.name])]
    plain_start = config.get("init_lora_weights", True) in (True, False, "gaussian")
    return model.base_quantization is None and plain_start and all(name.endswith(whole) for name in names)


def _too_large(model: Artifact) -> bool:
    return 4 * model.describe().parameters > WHOLE_SHARE * detect().available


def batches_of(
    lengths: Sequence[int], batch_size: int, vocab_size: int = 1, *, tokens: int | None = None
) -> list[list[int]]:
    """Positions in order of length, so that little is padded; a batch's logits stay in `LOGITS_BYTES`.

    `tokens` bounds what a batch holds, padding included (at least one sequence).
    """
    order = sorted(range(len(lengths)), key=lambda place: lengths[place], reverse=True)
    batches = []
    while order:
        longest = max(lengths[order[0]], 1)
        rows = max(1, min(batch_size, LOGITS_BYTES // (4 * longest * max(vocab_size, 1))))
        if tokens is not None:
            rows = max(1, min(rows, tokens // longest))
        batches.append(order[:rows])
        order = order[rows:]
    return batches


def in_batches(
    runner: LogitsRunner, sequences: Sequence[Sequence[int]], batch_size: int
) -> Iterator[tuple[int, Logits]]:
    """(position in `sequences`, its logits), in order of length, so that little is padded."""
    lengths = [len(one) for one in sequences]
    tokens = BLOCK_TOKENS if isinstance(runner, LayerwiseRunner) else None
    batches = batches_of(lengths, batch_size, runner.vocab_size, tokens=tokens)
    texts = ([sequences[place] for place in batch] for batch in batches)
    results = runner.each(list(texts)) if isinstance(runner, LayerwiseRunner) else map(runner.logits, texts)
    for batch in batches:
        found = next(results)
        for row, place in enumerate(batch):
            yield place, found[row]
        del found  # or it would stay while the next batch is computed
