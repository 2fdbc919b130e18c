"""ONNX Runtime GenAI: models as its users run them, with its own cache and its own choice of graphs.

Given tokens go through in one call a batch, padded on the right. A batch may be fed only once, so prompts that are
continued go one by one through one generator, wound back to what a text and the one before it both begin with (a model
with a graph of its own for prompts cannot be wound back).
A graph whose head is pruned yields the last token's logits alone: plain ONNX Runtime scores labels with it. The
tokenizer of GenAI is not used: it adds no BOS where the checkpoint's does.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coldpress.artifacts.adapter import AdapterWeights
from coldpress.artifacts.adapter_inputs import ADAPTER_FILE, FORMATS, lora_inputs, write_inputs
from coldpress.artifacts.base import read_json
from coldpress.config.metrics import RunnerChoice
from coldpress.errors import CheckpointError, MissingExtraError, StepError
from coldpress.evaluate.abilities import Ability, Stop
from coldpress.evaluate.reading import Reader

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Logits = npt.NDArray[np.float32]

__all__ = ["GenAIRunner"]


_ROOM = 32
"""Tokens that may follow the longest text so far before a generator with more room is made."""


class _Generator(Reader):
    """A generator that reads text after text."""

    def __init__(self, runner: GenAIRunner) -> None:
        super().__init__()
        self._runner, self._room = runner, 0
        self._generator: Any = None

    def append(self, ids: Sequence[int], known: int, keep: int) -> Logits:
        import numpy as np

        limit = self._runner.context_length
        if len(ids) > self._room:
            self._room = len(ids) + _ROOM if limit is None else max(len(ids), min(len(ids) + _ROOM, limit))
            self._generator, known = self._runner.generator(1, self._room), 0
        else:
            self._generator.rewind_to(known)
        self._generator.append_tokens(np.asarray(ids[known:], np.int32))
        return np.array(self._generator.get_output("logits"))[0, -keep:].astype(np.float32)


class GenAIRunner:
    """An ONNX Runtime GenAI model folder."""

    name = "ONNX Runtime GenAI"
    kind: RunnerChoice = "onnxruntime-genai"

    def __init__(self, folder: Path, *, adapter: Path | None = None) -> None:
        """`adapter` is the PEFT folder of a model with LoRA inputs."""
        try:
            import onnxruntime_genai as og
        except ModuleNotFoundError as error:
            raise MissingExtraError(
                f"{error.name} is not installed", hint="pip install 'coldpress[cpu]' (or [gpu])"
            ) from error
        config = read_json(folder / "genai_config.json").get("model", {})
        self._og, self._folder = og, folder
        self.vocab_size = int(config.get("vocab_size", 0))
        limit = config.get("context_length")
        self.context_length = None if limit is None else int(limit)
        self._pad = int(config.get("pad_token_id") or 0)
        try:
            self._model = og.Model(str(folder))
            self._adapters: Any = None
            if adapter is not None:
                self._activate(adapter)
        except RuntimeError as error:
            raise CheckpointError(f"ONNX Runtime GenAI cannot load {folder}: {error}") from error
        self._reader = _Generator(self)
        self._all_logits = self._yields_all_logits()
        self.continues = self._all_logits and "pipeline" not in config.get("decoder", {})

    @property
    def abilities(self) -> frozenset[Ability]:
        return frozenset(("generation", *(("log-likelihood", "logits") if self._all_logits else ())))

    def _activate(self, adapter: Path) -> None:
        """From the file that was made for the model, else from the PEFT weights."""
        from coldpress.graph.lora import inputs_of

        self._adapters = self._og.Adapters(self._model)
        made = self._folder / f"{ADAPTER_FILE}{FORMATS['onnx_adapter']}"
        if made.is_file():
            self._adapters.load(str(made), "adapter")
            return
        dtype = next((dtype for dtype, _ in inputs_of(self._folder).values()), "float32")
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # Windows keeps a mapped file
            with AdapterWeights.open(adapter) as weights:
                made = write_inputs(Path(folder) / "adapter", lora_inputs(weights, dtype))
            self._adapters.load(str(made), "adapter")

    def _yields_all_logits(self) -> bool:
        generator = self.generator(1, 3)
        generator.append_tokens([self._pad, self._pad])
        return bool(generator.get_output("logits").shape[1] == 2)

    def generator(self, rows: int, length: int, **options: Any) -> Any:
        parameters = self._og.GeneratorParams(self._model)
        parameters.set_search_options(do_sample=False, batch_size=rows, max_length=length, **options)
        generator = self._og.Generator(self._model, parameters)
        if self._adapters is not None:
            generator.set_active_adapter(self._adapters, "adapter")
        return generator

    def logits(self, batch: Sequence[Sequence[int]]) -> list[Logits]:
        import numpy as np

        out = np.asarray(self._fed(batch).get_output("logits"))
        return [out[row, : len(one)].astype(np.float32, copy=False) for row, one in enumerate(batch)]

    def _fed(self, batch: Sequence[Sequence[int]]) -> Any:
        """A generator that has read the sequences, padded on the right."""
        import numpy as np

        longest = max(len(ids) for ids in batch)
        ids = np.full((len(batch), longest), self._pad, np.int32)
        for row, one in enumerate(batch):
            ids[row, : len(one)] = one
        try:
            generator = self.generator(len(batch), longest)
            generator.append_tokens(ids)
        except RuntimeError as error:
            raise self._failed(error) from error
        return generator

    def side_by_side(self, lengths: Sequence[int], shared: int) -> bool:
        return False

    def start(self, prompts: Sequence[Sequence[int]], *, shared: int = 0) -> tuple[Sequence[Sequence[int]], Logits]:
        import numpy as np

        return prompts, np.concatenate([self._read(ids, 1) for ids in prompts])

    def following(
        self, state: Sequence[Sequence[int]], rows: Sequence[int], tokens: Sequence[Sequence[int]]
    ) -> list[Logits]:
        return [self._read([*state[row], *new], len(new)) for row, new in zip(rows, tokens, strict=True)]

    def _read(self, ids: Sequence[int], keep: int) -> Logits:
        try:
            return self._reader.read(ids, keep)
        except RuntimeError as error:
            raise self._failed(error) from error

    def forward(self, batch: Sequence[Sequence[int]]) -> None:
        """Run prompts as before a generation."""
        self._fed(batch)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop_tokens: Collection[int] = (),
        stop: Stop | None = None,
    ) -> list[list[int]]:
        return [self._continued(ids, max_new_tokens, stop_tokens, stop) for ids in prompts]

    def _continued(
        self, prompt: Sequence[int], max_new_tokens: int, stop_tokens: Collection[int], stop: Stop | None
    ) -> list[int]:
        made: list[int] = []
        for token in self._tokens(prompt, max_new_tokens, len(prompt) + max_new_tokens):
            if token in stop_tokens:
                break
            made.append(token)
            if stop is not None and stop(made):
                break
        return made

    def stream(self, prompt: Sequence[int], new_tokens: int) -> Iterator[int]:
        # A minimum keeps the end token from ending it.
        length = len(prompt) + new_tokens
        return self._tokens(prompt, new_tokens, length, min_length=length)

    def _tokens(self, prompt: Sequence[int], new_tokens: int, length: int, **options: Any) -> Iterator[int]:
        import numpy as np

        try:
            generator = self.generator(1, length, **options)
            generator.append_tokens(np.asarray(prompt, np.int32))
            for _ in range(new_tokens):
                if generator.is_done():
                    return
                generator.generate_next_token()
                yield int(generator.get_next_tokens()[0])
        except RuntimeError as error:
            raise self._failed(error) from error

    def _failed(self, error: RuntimeError) -> StepError:
        return StepError(f"ONNX Runtime GenAI cannot run {self._folder}: {error}")

    def close(self) -> None:
        self._model = self._adapters = None
        self._reader = _Generator(self)
