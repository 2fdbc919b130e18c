"""Text from a model: a prompt continued, a conversation held, on ONNX Runtime GenAI or on Transformers."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from coldpress.errors import CheckpointError, ColdpressError, MissingExtraError, UsageError
from coldpress.evaluate.torch_runner import TorchRunner

__all__ = ["Generator", "Sampling", "open_generator"]

_COLDEST, _HOTTEST = 1e-6, 1e6
"""Beyond them a score over the temperature may overflow in float32, or vanish."""
_SEEDS = 2**63
_GENAI_SEEDS = 2**31
"""onnxruntime-genai 0.18 keeps a seed in 32 bits; greater ones are taken modulo this."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; raises UsageError for values that cannot be sampled with."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    """0 takes the most likely token."""
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        problems = []
        if self.max_new_tokens < 1:
            problems.append(f"max_new_tokens is 1 or more, not {self.max_new_tokens}")
        if self.temperature != 0 and not _COLDEST <= self.temperature <= _HOTTEST:
            problems.append(
                f"temperature is 0 (the most likely token) or {_COLDEST:g} to {_HOTTEST:g}, not {self.temperature}"
            )
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p is above 0 and at most 1, not {self.top_p}")
        if self.seed is not None and not 0 <= self.seed < _SEEDS:
            problems.append(f"seed is 0 to {_SEEDS - 1}, not {self.seed}")
        if problems:
            raise UsageError("; ".join(problems))


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
        config = _genai_model(artifact.model)
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
        self._context, self._vocab = int(config["context_length"]), int(config["vocab_size"])

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
        ids = _prompt_ids(self._tokenizer, prompt, self._vocab)
        if len(ids) >= self._context:
            raise UsageError(
                f"the prompt has {len(ids)} tokens and the model's context is {self._context}",
                hint=f"shorten the prompt to {self._context - 1} tokens or fewer, or use a model with a longer context",
            )
        parameters = self._og.GeneratorParams(self._model)
        options: dict[str, Any] = {"max_length": min(len(ids) + sampling.max_new_tokens, self._context)}
        if sampling.temperature > 0:
            options |= {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
            if sampling.seed is not None:
                options["random_seed"] = sampling.seed % _GENAI_SEEDS
        else:
            options["do_sample"] = False
        try:
            parameters.set_search_options(**options)
            generator = self._og.Generator(self._model, parameters)
            if self._adapters is not None:
                generator.set_active_adapter(self._adapters, "adapter")
            generator.append_tokens(ids)
            yield from _pieces(self._tokenizer, self._tokens(generator))
        except RuntimeError as error:
            raise CheckpointError(f"ONNX Runtime GenAI cannot run {self._folder}: {error}") from error

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
        self._folder = artifact.model
        self._vocab = int(self._model.get_input_embeddings().num_embeddings)

    def stream(self, prompt: str, sampling: Sampling) -> Iterator[str]:
        from concurrent.futures import ThreadPoolExecutor

        import torch

        streamer = _TokenQueue()
        options: dict[str, Any] = {"max_new_tokens": sampling.max_new_tokens, "do_sample": sampling.temperature > 0}
        if sampling.temperature > 0:
            options |= {"temperature": sampling.temperature, "top_p": sampling.top_p}
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        ids = torch.tensor([_prompt_ids(self._tokenizer, prompt, self._vocab)])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        abandoned = threading.Event()

        def stop(tokens: Any, scores: Any) -> Any:
            return torch.full((len(tokens),), abandoned.is_set())

        def work() -> None:
            try:
                self._model.generate(
                    **inputs,
                    **options,
                    streamer=streamer,
                    stopping_criteria=[stop],
                    pad_token_id=self._tokenizer.pad_id,
                )
            finally:
                streamer.end()  # generate ends it only where it succeeds, and the reader waits for it

        with ThreadPoolExecutor(max_workers=1) as pool:
            running = pool.submit(work)
            try:
                yield from _pieces(self._tokenizer, streamer)
            finally:
                abandoned.set()
        if (error := running.exception()) is not None:
            raise ColdpressError(
                f"Transformers cannot continue the prompt with {self._folder}: {type(error).__name__}: {error}",
                hint="do the files of the checkpoint belong together? Without a temperature nothing is sampled",
            ) from error

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


def _genai_model(folder: Path) -> Mapping[str, Any]:
    """The `model` section of genai_config.json; raises CheckpointError, and UsageError for a graph without an end."""
    config = read_json(folder / "genai_config.json")
    try:
        model: Mapping[str, Any] = config["model"]
        inputs, outputs = model["decoder"]["inputs"], model["decoder"]["outputs"]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / 'genai_config.json'} does not describe a decoder: {error}") from error
    for name, found, part, option in (
        ("input_ids", inputs, "embedding", "exclude_embeds"), ("logits", outputs, "head", "exclude_lm_head"),
    ):  # fmt: skip
        if name not in found:
            raise UsageError(
                f"{folder} was built without its {part} ({option}), so it cannot continue text by itself",
                hint=f"build it without {option}, or run it with ONNX Runtime beside the {part}",
            )
    return model


def _prompt_ids(tokenizer: Tokenizer, prompt: str, vocab: int) -> list[int]:
    """Tokens of a prompt; raises UsageError where there are none, or some that the model does not have."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"the prompt is not UTF-8: character {error.start + 1} is {prompt[error.start]!r}",
            hint="convert it to UTF-8 first, for example with iconv",
        ) from error
    ids: list[int] = tokenizer.backend.encode(prompt).ids
    if not ids:
        raise UsageError("the prompt is empty", hint="give the model some text to continue")
    beyond = [token for token in dict.fromkeys(ids) if token >= vocab]
    if beyond:
        named = ", ".join(f"{tokenizer.token(token)!r} ({token})" for token in beyond[:8])
        raise UsageError(
            f"the model has {vocab} tokens, and the prompt has tokens beyond them: {named}",
            hint="leave them out of the prompt; if they belong to the model, its embedding must be resized",
        )
    return ids


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
