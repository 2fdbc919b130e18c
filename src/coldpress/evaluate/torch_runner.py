"""Hugging Face checkpoints on Transformers: whole, or with one decoder block in memory at a time.

Weights are multiplied in float32 unless a dtype is asked for: what is compared is the model, not the precision it
happens to run in. Block by block costs one reading of the weights for as many sequences as `STATES_BYTES` holds.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coldpress.artifacts.base import BaseQuantization, read_json
from coldpress.artifacts.tensors import TensorSource
from coldpress.config.metrics import RunnerChoice
from coldpress.evaluate.abilities import Ability, Stop

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Logits = npt.NDArray[np.float32]

__all__ = ["STATES_BYTES", "LayerwiseRunner", "TorchRunner"]

STATES_BYTES = 256 << 20
"""Hidden states that wait between two blocks; more sequences than they hold take another reading of the weights."""


@dataclass
class _Past:
    """Prompts that were run: keys and values [row, head, token, size] a layer, padded on the right."""

    cache: Any
    lengths: list[int]
    mask: Any
    """[rows, tokens]: 1 where a token stands."""


class TorchRunner:
    """A Hugging Face checkpoint, with its adapter if it has one, on the CPU."""

    name = "Transformers"
    kind: RunnerChoice = "transformers"
    abilities: frozenset[Ability] = frozenset(("log-likelihood", "logits", "generation"))

    def __init__(
        self,
        folder: Path,
        *,
        adapter: Path | None = None,
        base_quantization: BaseQuantization | None = None,
        trust_remote_code: bool = False,
        dtype: str = "float32",
    ) -> None:
        """`dtype` is float32, or auto for the stored one."""
        from coldpress.nn.loading import load_adapter, load_dequantized, load_model

        if adapter is None or base_quantization is None:
            model = load_model(folder, dtype=dtype, trust_remote_code=trust_remote_code)
        else:
            model = load_dequantized(folder, base_quantization, trust_remote_code=trust_remote_code)
        if adapter is not None:
            model = load_adapter(model, adapter)
        self._model = model.eval()
        config = read_json(folder / "config.json")
        self.vocab_size = int(config["vocab_size"])
        limit = config.get("max_position_embeddings")
        self.context_length = None if limit is None else int(limit)
        base = model.get_base_model() if adapter is not None else model
        self._keeps = "logits_to_keep" in inspect.signature(type(base).forward).parameters
        self.continues = _plain_cache(base, self.context_length)
        self._prefix: tuple[tuple[int, ...], Any] = ((), None)

    @property
    def model(self) -> Any:
        """The Transformers model itself."""
        return self._model

    def logits(self, batch: Sequence[Sequence[int]]) -> list[Logits]:
        import torch

        from coldpress.nn.threads import tick

        tick()
        with torch.inference_mode():
            out = self._model(input_ids=_padded(batch), use_cache=False).logits.float().numpy()
        return [out[row, : len(ids)] for row, ids in enumerate(batch)]

    @property
    def dtype(self) -> str:
        return str(next(self._model.parameters()).dtype).removeprefix("torch.")

    def forward(self, batch: Sequence[Sequence[int]]) -> None:
        """Run prompts as before a generation: scores of the last token, and a cache."""
        self.start(batch)

    def side_by_side(self, lengths: Sequence[int], shared: int) -> bool:
        return True

    def start(self, prompts: Sequence[Sequence[int]], *, shared: int = 0) -> tuple[Any, Logits]:
        import torch

        from coldpress.nn.threads import tick

        tick()
        lengths = [len(ids) for ids in prompts]
        shared = min(shared, min(lengths) - 1)
        ids = _padded([one[shared:] for one in prompts])
        mask = _mask(lengths)
        cache = None
        if shared:
            cache = _copied(self._prefix_cache(tuple(prompts[0][:shared])))
            for layer in cache.layers:  # one row seen as many: what comes behind it copies it anyway
                layer.keys = layer.keys.expand(len(prompts), -1, -1, -1)
                layer.values = layer.values.expand(len(prompts), -1, -1, -1)
        last = [length - shared - 1 for length in lengths]
        kept = sorted(set(last))
        options = {"logits_to_keep": torch.tensor(kept)} if self._keeps else {}
        with torch.inference_mode():
            out = self._model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=torch.arange(shared, shared + ids.shape[1]).expand(len(prompts), -1),
                past_key_values=cache,
                use_cache=True,
                **options,
            )
            places = [kept.index(place) for place in last] if self._keeps else last
            scores = out.logits[torch.arange(len(prompts)), places].float().numpy()
        return _Past(out.past_key_values, lengths, mask), scores

    def _prefix_cache(self, prefix: tuple[int, ...]) -> Any:
        import torch

        if self._prefix[0] != prefix:
            ids = torch.tensor([prefix])
            with torch.inference_mode():
                out = self._model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
            self._prefix = (prefix, out.past_key_values)
        return self._prefix[1]

    def following(self, state: _Past, rows: Sequence[int], tokens: Sequence[Sequence[int]]) -> list[Logits]:
        import torch

        from coldpress.nn.threads import tick

        tick()
        ids = _padded(tokens)
        cache = _copied(state.cache)
        if list(rows) != list(range(len(state.lengths))):
            cache.batch_select_indices(torch.tensor(rows))
        before = torch.tensor([[state.lengths[row]] for row in rows])
        with torch.inference_mode():
            out = (
                self._model(
                    input_ids=ids,
                    attention_mask=torch.cat([state.mask[list(rows)], _mask([len(one) for one in tokens])], dim=1),
                    position_ids=before + torch.arange(ids.shape[1]),
                    past_key_values=cache,
                    use_cache=True,
                )
                .logits.float()
                .numpy()
            )
        return [out[row, : len(one)] for row, one in enumerate(tokens)]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop_tokens: Collection[int] = (),
        stop: Stop | None = None,
    ) -> list[list[int]]:
        import torch

        longest = max(len(ids) for ids in prompts)
        # Padding on the left, as `generate` wants it: a new token stands beside the last one.
        ids = torch.tensor([[0] * (longest - len(one)) + list(one) for one in prompts])
        mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in prompts])

        def done(tokens: Any, scores: Any) -> Any:
            assert stop is not None
            return torch.tensor([stop(row[longest:]) for row in tokens.tolist()])

        out = self._greedy(
            ids, mask, max_new_tokens,
            eos_token_id=sorted(stop_tokens) or None, stopping_criteria=None if stop is None else [done],
        )  # fmt: skip
        return [_until(row, stop_tokens, stop) for row in out[:, longest:].tolist()]

    def _greedy(self, ids: Any, mask: Any, new: int, **options: Any) -> Any:
        """`generate` of Transformers without anything that the checkpoint's generation_config.json adds."""
        from transformers import GenerationConfig

        plain = GenerationConfig(max_new_tokens=new, do_sample=False, num_beams=1, use_cache=True, pad_token_id=0)
        plain.eos_token_id = options.pop("eos_token_id", None)
        own, self._model.generation_config = self._model.generation_config, plain
        try:
            return self._model.generate(input_ids=ids, attention_mask=mask, **options)
        finally:
            self._model.generation_config = own

    def stream(self, prompt: Sequence[int], new_tokens: int) -> Iterator[int]:
        import torch

        cache, ids = None, torch.tensor([prompt])
        options = {"logits_to_keep": 1} if self._keeps else {}
        for _ in range(new_tokens):
            with torch.inference_mode():
                out = self._model(input_ids=ids, past_key_values=cache, use_cache=True, **options)
                ids = out.logits[:, -1:].argmax(dim=-1)
            cache = out.past_key_values
            yield int(ids)

    def close(self) -> None:
        self._model = None
        self._prefix = ((), None)


class LayerwiseRunner:
    """A Hugging Face checkpoint, with its adapter if it has one, in float32 on the CPU, one decoder block in memory.

    `tensors` are the weights, those of the folder unless given (an adapter merged, codes dequantized).
    """

    name = "Transformers, layer by layer"
    kind: RunnerChoice = "transformers"
    abilities: frozenset[Ability] = frozenset(("log-likelihood", "logits"))

    def __init__(
        self,
        folder: Path,
        *,
        tensors: TensorSource | None = None,
        adapter: Path | None = None,
        trust_remote_code: bool = False,
        on_block: Callable[[int, int], None] | None = None,
    ) -> None:
        from coldpress.nn.layerwise import LayerwiseModel

        self._model = LayerwiseModel(folder, tensors=tensors, adapter=adapter, trust_remote_code=trust_remote_code)
        self._on_block = on_block
        self._last: tuple[list[list[list[int]]], list[Any]] | None = None
        """The batches that went through the blocks at once last, and their states."""
        config = read_json(folder / "config.json")
        self.vocab_size = int(config["vocab_size"])
        limit = config.get("max_position_embeddings")
        self.context_length = None if limit is None else int(limit)

    def logits(self, batch: Sequence[Sequence[int]]) -> list[Logits]:
        (found,) = self.each([batch])
        return found

    def each(self, batches: Sequence[Sequence[Sequence[int]]]) -> Iterator[list[Logits]]:
        """`logits` of each batch, in order; the weights are read once for as many batches as `STATES_BYTES` holds.

        The very batches that went through last are not read again: only the head is computed.
        """
        waiting = list(batches)
        while waiting:
            held, taken = 0, 0
            while taken < len(waiting):
                held += 4 * self._model.hidden_size * len(waiting[taken]) * max(map(len, waiting[taken]))
                if taken and held > STATES_BYTES:
                    break
                taken += 1
            now, waiting = waiting[:taken], waiting[taken:]
            ids = [_padded(batch) for batch in now]
            states = self._through_blocks(now, ids)
            for place, batch in enumerate(now):
                out = self._model.logits(ids[place], states[place]).numpy()
                yield [out[row, : len(one)] for row, one in enumerate(batch)]
                del out  # or it would stay while the next batch is computed

    def _through_blocks(self, batches: Sequence[Sequence[Sequence[int]]], ids: Sequence[Any]) -> list[Any]:
        asked = [[list(one) for one in batch] for batch in batches]
        if self._last is None or self._last[0] != asked:
            self._last = None  # its memory is wanted now
            self._last = asked, list(self._model.through_blocks(ids, self._on_block))
        return self._last[1]

    def close(self) -> None:
        self._last = None
        self._model.close()


def _padded(batch: Sequence[Sequence[int]]) -> Any:
    """Token ids [sequences, longest] as a tensor."""
    import torch

    longest = max(len(ids) for ids in batch)
    return torch.tensor([[*ids, *([0] * (longest - len(ids)))] for ids in batch])


def _mask(lengths: Sequence[int]) -> Any:
    """1 for the first tokens of each row, 0 for its padding."""
    import torch

    return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()


def _copied(cache: Any) -> Any:
    """A cache that may grow while the first one stays as it is; no key and no value is copied."""
    made = copy.copy(cache)
    made.layers = [copy.copy(layer) for layer in cache.layers]
    return made


def _plain_cache(model: Any, context: int | None) -> bool:
    """Whether rows of different lengths may stand in one cache: attention over all that came before, by its mask."""
    config = model.config.get_text_config()
    if getattr(model, "_is_stateful", False) or context is None:
        return False
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ("full_attention",))
    return kinds <= {"full_attention", "sliding_attention"} and (not window or window >= context)


def _until(tokens: Sequence[int], stop_tokens: Collection[int], stop: Stop | None) -> list[int]:
    """New tokens of a row up to where it was done, while other rows of its batch went on."""
    kept: list[int] = []
    for token in tokens:
        if token in stop_tokens:
            break
        kept.append(token)
        if stop is not None and stop(kept):
            break
    return kept
