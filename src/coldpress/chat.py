"""Text from a model: a prompt continued, a conversation held, on ONNX Runtime GenAI or on Transformers."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any, Protocol

from coldpress.artifacts.adapter import AdapterWeights
from coldpress.artifacts.adapter_inputs import (
    ADAPTER_FILE,
    FORMATS,
    check_inputs,
    lora_inputs,
    read_adapter_file,
    write_inputs,
)  # fmt: skip
from coldpress.artifacts.base import Artifact, read_json
from coldpress.data.tokenizer import Tokenizer
from coldpress.errors import CheckpointError, MissingExtraError, UsageError
from coldpress.evaluate.runners import TorchRunner

__all__ = ["Generator", "Sampling", "open_generator"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    """0 takes the most likely token."""
    top_p: float = 1.0
    seed: int | None = None


class Generator(Protocol):
    """A model that continues text."""

    def stream(self, prompt: str, sampling: Sampling) -> Iterator[str]:
        """Pieces of the continuation as they come."""
        ...

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """The prompt of a conversation by the model's chat template; raises UsageError when it has none."""
        ...


def open_generator(path: Path, *, adapter: Path | None = None, trust_remote_code: bool = False) -> Generator:
    """Load a model for generation; raises CheckpointError or MissingExtraError.

    `adapter` is an .onnx_adapter file for an ONNX model with LoRA inputs; None is the one it was built with, if any.
    """
    artifact = Artifact.load(path)
    if artifact.kind == "onnx":
        return _GenAI(artifact, adapter)
    if adapter is not None:
        raise UsageError(f"{path} is a checkpoint, and {adapter} is for an ONNX model", hint="give an ONNX model")
    return _Torch(artifact, trust_remote_code)


class _GenAI:
    """An ONNX model on ONNX Runtime GenAI."""

    def __init__(self, artifact: Artifact, adapter: Path | None = None) -> None:
        try:
            import onnxruntime_genai as og
        except ModuleNotFoundError as error:
            raise MissingExtraError(
                f"{error.name} is not installed", hint="pip install 'coldpress[cpu]' (or [gpu])"
            ) from error
        self._og = og
        self._folder = artifact.model
        try:
            self._model = og.Model(str(artifact.model))
        except RuntimeError as error:
            raise CheckpointError(f"ONNX Runtime GenAI cannot load {artifact.model}: {error}") from error
        self._adapters: Any = None
        if adapter is not None:
            self._activate(adapter)
        elif artifact.adapter is not None:
            self._activate_own(artifact.adapter)
        # The tokenizer of the checkpoint itself: GenAI's own adds no BOS where the checkpoint's does.
        self._tokenizer = Tokenizer.load(artifact.model)
        self._context = int(read_json(artifact.model / "genai_config.json")["model"]["context_length"])

    def _activate(self, file: Path) -> None:
        from coldpress.graph.lora import inputs_of

        check_inputs(read_adapter_file(file), inputs_of(self._folder), str(self._folder))
        self._adapters = self._og.Adapters(self._model)
        self._adapters.load(str(file), "adapter")

    def _activate_own(self, adapter: Path) -> None:
        """The adapter that the model was built with: from its file, or from the PEFT weights beside the model."""
        file = self._folder / f"{ADAPTER_FILE}{FORMATS['onnx_adapter']}"
        if file.is_file():
            self._activate(file)
            return
        from coldpress.graph.lora import inputs_of

        dtype = next((dtype for dtype, _ in inputs_of(self._folder).values()), "float32")
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # Windows keeps a mapped file
            with AdapterWeights.open(adapter) as weights:
                made = write_inputs(Path(folder) / "adapter", lora_inputs(weights, dtype))
            self._activate(made)

    def stream(self, prompt: str, sampling: Sampling) -> Iterator[str]:
        ids = self._tokenizer.backend.encode(prompt).ids
        if not ids:
            raise UsageError("the prompt is empty", hint="give the model some text to continue")
        if len(ids) >= self._context:
            raise UsageError(f"the prompt has {len(ids)} tokens and the model's context is {self._context}")
        parameters = self._og.GeneratorParams(self._model)
        options: dict[str, Any] = {"max_length": min(len(ids) + sampling.max_new_tokens, self._context)}
        if sampling.temperature > 0:
            options |= {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
            if sampling.seed is not None:
                options["random_seed"] = sampling.seed
        else:
            options["do_sample"] = False
        parameters.set_search_options(**options)
        generator = self._og.Generator(self._model, parameters)
        if self._adapters is not None:
            generator.set_active_adapter(self._adapters, "adapter")
        generator.append_tokens(ids)
        yield from _pieces(self._tokenizer, self._tokens(generator))

    def _tokens(self, generator: Any) -> Iterator[int]:
        while not generator.is_done():
            generator.generate_next_token()
            yield int(generator.get_next_tokens()[0])

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        return _render(self._tokenizer, messages)


class _Torch:
    """A checkpoint, with its adapter if it has one, on Transformers."""

    def __init__(self, artifact: Artifact, trust_remote_code: bool) -> None:
        self._tokenizer = Tokenizer.load(artifact.tokenizer_path)
        runner = TorchRunner(
            artifact.model,
            adapter=artifact.adapter,
            base_quantization=artifact.base_quantization,
            trust_remote_code=trust_remote_code,
        )
        self._model = runner.model

    def stream(self, prompt: str, sampling: Sampling) -> Iterator[str]:
        import threading

        import torch

        streamer = _TokenQueue()
        options: dict[str, Any] = {"max_new_tokens": sampling.max_new_tokens, "do_sample": sampling.temperature > 0}
        if sampling.temperature > 0:
            options |= {"temperature": sampling.temperature, "top_p": sampling.top_p}
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        prompt_ids = self._tokenizer.backend.encode(prompt).ids
        if not prompt_ids:
            raise UsageError("the prompt is empty", hint="give the model some text to continue")
        ids = torch.tensor([prompt_ids])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        work = {**inputs, **options, "streamer": streamer, "pad_token_id": self._tokenizer.pad_id}
        thread = threading.Thread(target=self._model.generate, kwargs=work, daemon=True)
        thread.start()
        yield from _pieces(self._tokenizer, streamer)
        thread.join()

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        return _render(self._tokenizer, messages)


class _TokenQueue:
    """What `generate` calls a streamer: it is given the prompt once, then every new token."""

    def __init__(self) -> None:
        self._queue: Queue[int | None] = Queue()
        self._prompt_seen = False

    def put(self, tokens: Any) -> None:
        if self._prompt_seen:
            self._queue.put(int(tokens.reshape(-1)[0]))
        self._prompt_seen = True

    def end(self) -> None:
        self._queue.put(None)

    def __iter__(self) -> Iterator[int]:
        while (token := self._queue.get()) is not None:
            yield token


def _pieces(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """Text as its tokens come; an unfinished character (U+FFFD) waits for its next byte."""
    made: list[int] = []
    shown = ""
    for token in tokens:
        made.append(token)
        text = tokenizer.backend.decode(made, skip_special_tokens=True)
        if len(text) > len(shown) and not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text


def _render(tokenizer: Tokenizer, messages: Sequence[dict[str, str]]) -> str:
    if tokenizer.chat_template is None:
        raise UsageError("the model has no chat template", hint="use `coldpress generate` with a prompt")
    return tokenizer.chat(messages, generation_prompt=True)
