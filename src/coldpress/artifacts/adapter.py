"""A LoRA adapter as PEFT saves it, and a base model with the adapter added, tensor by tensor and row by row.

    W   base weight [out, in]          A   [r, in]          s   alpha / r, or alpha / sqrt(r) (rsLoRA)
    m   magnitude [out] (DoRA)         B   [out, r]         all sums in float32

    LoRA    W' = W + s B A
    DoRA    W' = m (W + s B A) / ||W + s B A||, the norm over each output's row

An embedding and a Conv1D layer hold W^T; there the rows of the file are inputs, and a DoRA norm runs over all of them.
After QLoRA, W is what 4-bit quantization left of the base: the weights that the adapter was trained on.
Sources: Hu et al. 2021, section 4.1; Kalajdzievski 2023 (rsLoRA); Liu et al. 2024 (DoRA), equation 5; names and cases
as in peft/tuners/lora/layer.py, variants.py and dora.py.
"""

from __future__ import annotations

import math
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coldpress.artifacts.adapter_kinds import refuse_unknown_kinds
from coldpress.artifacts.base import BaseQuantization, read_json
from coldpress.artifacts.tensors import TensorInfo, TensorSet, TensorSource, numpy_dtype
from coldpress.errors import CheckpointError, PlanError

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

__all__ = ["EMBEDDING", "AdapterWeights", "LowRank", "MergedTensors"]

PREFIX = "base_model.model."
EMBEDDING = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
HEAD = ("lm_head.weight", "embed_out.weight", "output.weight")
"""How the names of the two matrices end that a model may tie."""
CHUNK_ELEMENTS = 1 << 20
"""Weights looked at at a time where a whole tensor must be read for one figure of each block or column."""
KEPT = 8
"""Tensors whose block scales and norms are remembered: those that threads of a writer are at work on."""
_OTHER_MODEL = "it was trained on another model"


KERNEL_RANK = 32
"""Highest rank for which one pass over the weight beats a matrix product and a sum (measured: 1.3 and 0.9 billion
weights a second at rank 16, 0.3 and 0.7 at 64)."""


@dataclass(frozen=True)
class LowRank:
    """What an adapter says of one weight, by the names of its own tensors."""

    first: str
    """A."""
    second: str
    """B."""
    rank: int
    shape: tuple[int, int]
    """Of the weight as it lies in the base."""
    scale: float
    transposed: bool
    """The weight lies as [in, out]."""
    magnitude: str | None
    """m, for DoRA."""


# End of a tensor's name -> what it is. The module's name stands before it.
_KINDS: Mapping[str, str] = {
    ".lora_A.weight": "first",
    ".lora_B.weight": "second",
    ".lora_embedding_A": "first",
    ".lora_embedding_B": "second",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_B.bias": "bias",
    ".token_adapter.trainable_tokens_delta": "tokens",
}


class AdapterWeights:
    """A PEFT LoRA folder: low-rank pairs by weight name, and weights, biases and token rows that replace the base's."""

    def __init__(self, folder: Path, record: Mapping[str, Any], tensors: TensorSet) -> None:
        self.folder = folder
        self._record = record
        self._tensors = tensors
        self.pairs: dict[str, LowRank] = {}
        self.replaced: dict[str, str] = {}
        """Weight name -> name in the adapter file, for modules that were trained whole."""
        self.tokens: dict[str, tuple[str, tuple[int, ...]]] = {}
        """Embedding's name -> (name in the adapter file, the rows that it replaces)."""
        self.biases: dict[str, tuple[str, float]] = {}
        """Bias's name -> (name in the adapter file, scale of what is added)."""
        self._sort(self._found())
        self.changed = frozenset((*self.pairs, *self.replaced, *self.tokens, *self.biases))
        """Names of the weights that the adapter touches."""
        if not self.changed:
            raise CheckpointError(
                f"{folder / 'adapter_model.safetensors'} holds no tensors: there is nothing to add to the base",
                hint="save the adapter again with save_pretrained",
            )

    @classmethod
    def open(cls, folder: Path) -> AdapterWeights:
        """Raises CheckpointError for a damaged adapter, PlanError for a kind that is not known here."""
        record = read_json(folder / "adapter_config.json")
        refuse_unknown_kinds(record)
        tensors = TensorSet.open(folder / "adapter_model.safetensors")
        try:
            return cls(folder, record, tensors)
        except BaseException:
            tensors.close()
            raise

    def __enter__(self) -> AdapterWeights:
        return self

    def __exit__(self, *_: object) -> None:
        self._tensors.close()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Rows of one of the adapter's own tensors, float32."""
        import numpy as np

        return self._tensors.read(name, start, stop).astype(np.float32)

    def check(self, base: TensorSource, *, tied: bool) -> None:
        """Every tensor must belong to a weight of the base, fit it and be finite; raises CheckpointError.

        `tied` is the model's tie_word_embeddings: embedding and head are one matrix and must stay so.
        """
        import numpy as np

        if tied:
            self._check_tied()
        # A head in a tied adapter is the twin of its embedding.
        strangers = sorted(name for name in self.changed if name not in base and not (tied and name.endswith(HEAD)))
        bare = [name for name in strangers if name in self.biases and name.removesuffix("bias") + "weight" in base]
        if bare:
            raise CheckpointError(
                f"{self.folder} was trained with lora_bias, and {len(bare)} of its layers have no bias to add to, "
                f"the first: {bare[0].removesuffix('.bias')}",
                hint="train without lora_bias",
            )
        if strangers:
            raise CheckpointError(
                f"{self.folder} changes {len(strangers)} weights that the base model does not have: "
                + ", ".join(strangers[:8])
                + (" ..." if len(strangers) > 8 else ""),
                hint=_OTHER_MODEL,
            )
        for name, pair in self.pairs.items():
            if base.info(name).shape != pair.shape:
                raise CheckpointError(
                    f"{self.folder}: the adapter of {name} is for a weight of shape {list(pair.shape)}, "
                    f"the base has {list(base.info(name).shape)}",
                    hint=_OTHER_MODEL,
                )
        for name, own in (*self.replaced.items(), *((name, own) for name, (own, _) in self.biases.items())):
            if name in base and base.info(name).shape != self._tensors.info(own).shape:
                raise CheckpointError(
                    f"{self.folder}: {name} has shape {list(self._tensors.info(own).shape)}, "
                    f"in the base model {list(base.info(name).shape)}",
                    hint=_OTHER_MODEL,
                )
        for name, (own, rows) in self.tokens.items():
            size, width = base.info(name).shape
            if self._tensors.info(own).shape != (len(rows), width) or max(rows, default=0) >= size:
                raise CheckpointError(
                    f"{self.folder}: {len(rows)} tokens up to {max(rows, default=0)} with a tensor of shape "
                    f"{list(self._tensors.info(own).shape)} do not fit {name} of shape [{size}, {width}]",
                    hint=_OTHER_MODEL,
                )
        for info in self._tensors.infos():
            if not np.isfinite(self.read(info.name)).all():
                raise CheckpointError(
                    f"{self.folder}: {info.name} holds NaN or infinity", hint="its training diverged; train it again"
                )

    def _check_tied(self) -> None:
        import numpy as np

        touched = [name for name in self.changed if name.endswith((*EMBEDDING, *HEAD))]
        apart = [name for name in touched if name not in self.replaced and name not in self.tokens]
        whole = [self.read(self.replaced[name]) for name in touched if name in self.replaced]
        if whole and not (len(whole) == 2 and np.array_equal(whole[0], whole[1])):
            apart += [name for name in touched if name in self.replaced]
        apart += [name for name in self.tokens if name.endswith(HEAD)]
        if apart:
            raise CheckpointError(
                f"{self.folder} changes {', '.join(sorted(apart))}, and the base model uses one matrix as embedding "
                "and head: added to it, the adapter would change both, and it was trained on one",
                hint="load the base in Transformers, give lm_head its own copy of the weight, set tie_word_embeddings "
                "to false, save it, and give that folder as the base",
            )

    def _found(self) -> dict[str, dict[str, str]]:
        """Module -> kind -> name in the file; whole weights go to `replaced`."""
        found: dict[str, dict[str, str]] = {}
        for info in self._tensors.infos():
            if not info.name.startswith(PREFIX):
                raise CheckpointError(f"{self.folder}: {info.name!r} is not a tensor of a PEFT adapter")
            inner = info.name.removeprefix(PREFIX).replace(".base_layer.", ".")
            for end, kind in _KINDS.items():
                if inner.endswith(end):
                    found.setdefault(inner.removesuffix(end), {})[kind] = info.name
                    break
            else:
                if "lora_" in inner or "token_adapter" in inner:
                    raise CheckpointError(f"{self.folder}: {info.name!r} belongs to a kind of adapter not known here")
                self.replaced[inner] = info.name
        return found

    def _sort(self, found: Mapping[str, Mapping[str, str]]) -> None:
        dora, lonely = bool(self._record.get("use_dora")), []
        for module, names in found.items():
            weight = f"{module}.weight"
            if "tokens" in names:
                self.tokens[weight] = (names["tokens"], self._token_rows(module))
                if len(names) > 1:
                    raise PlanError(f"{self.folder}: {module} has trained tokens and a LoRA, which is not built")
                continue
            wanted = ("first", "second", "magnitude") if dora else ("first", "second")
            missing = [kind for kind in wanted if kind not in names]
            if missing:
                words = {"first": "A", "second": "B", "magnitude": "magnitude vector"}
                lonely.append(f"{module} has no {' and no '.join(words[kind] for kind in missing)}")
                continue
            if "magnitude" in names and not dora:
                lonely.append(f"{module} has a magnitude vector, and adapter_config.json says nothing of DoRA")
            pair = self.pairs[weight] = self._pair(module, names)
            if "bias" in names:
                self.biases[f"{module}.bias"] = (names["bias"], pair.scale)
        if lonely:
            raise CheckpointError(
                f"{self.folder / 'adapter_model.safetensors'} and its config contradict each other: "
                + "; ".join(lonely[:8]),
                hint="save the adapter again with save_pretrained",
            )

    def _pair(self, module: str, names: Mapping[str, str]) -> LowRank:
        first, second = (self._tensors.info(names[kind]).shape for kind in ("first", "second"))
        rank, said = first[0] if first else 0, self._number("r", "rank_pattern", module)
        if said < 1:
            raise CheckpointError(
                f"{self.folder / 'adapter_config.json'}: the rank of {module} is {said:g}; least is 1"
            )
        if len(first) != 2 or len(second) != 2 or first[0] != second[1] or rank != said:
            raise CheckpointError(
                f"{self.folder}: A of {module} has shape {list(first)} and B {list(second)}; at rank {said:g}, as "
                f"adapter_config.json says, they must be [{said:g}, in] and [out, {said:g}]",
                hint="config and weights belong to different adapters",
            )
        embedding = names["first"].endswith("lora_embedding_A")
        transposed = embedding or bool(self._record.get("fan_in_fan_out"))
        magnitude = names.get("magnitude")
        if magnitude is not None:
            size = math.prod(self._tensors.info(magnitude).shape)
            if size != second[0]:
                raise CheckpointError(f"{self.folder}: {module} has {second[0]} outputs and {size} magnitudes")
        scale = self._number("lora_alpha", "alpha_pattern", module)
        scale /= math.sqrt(rank) if self._record.get("use_rslora") else rank
        shape = (first[1], second[0]) if transposed else (second[0], first[1])
        return LowRank(names["first"], names["second"], rank, shape, scale, transposed, magnitude)

    def _number(self, key: str, patterns: str, module: str) -> float:
        """A number with PEFT's patterns: a key is a regular expression for the end of the module's name."""
        try:
            patterned = (self._record.get(patterns) or {}).items()
            said = [value for pattern, value in patterned if re.match(rf"(.*\.)?({pattern})$", module)]
            number = float(said[0] if said else self._record[key])
            if not math.isfinite(number):
                raise ValueError(f"{number} for {module}")
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError, re.error) as error:
            raise CheckpointError(
                f"{self.folder / 'adapter_config.json'}: {key} and {patterns} must be finite numbers by module: "
                f"{error!r}"
            ) from error
        return number

    def _token_rows(self, module: str) -> tuple[int, ...]:
        said = self._record.get("trainable_token_indices")
        if isinstance(said, Mapping):
            said = next((value for key, value in said.items() if f".{module}".endswith(f".{key}")), None)
        if not isinstance(said, list) or not all(type(one) is int and one >= 0 for one in said):
            raise CheckpointError(
                f"{self.folder / 'adapter_config.json'}: trainable_token_indices does not say which rows of {module} "
                f"the adapter holds, got {str(said)[:60]}"
            )
        return tuple(said)


class MergedTensors:
    """A base model with an adapter added: a TensorSource that makes the rows it is asked for.

    Peak memory of a read: 12 bytes for each of its weights, and after QLoRA 24 for each of `CHUNK_ELEMENTS`. Double
    quantization, and a DoRA norm over columns, go through the whole tensor in pieces once.
    """

    def __init__(
        self,
        base: TensorSource,
        adapter: AdapterWeights,
        *,
        tied: bool,
        quantization: BaseQuantization | None = None,
        four_bits: Collection[str] = (),
        added: bool = True,
    ) -> None:
        """Raises CheckpointError for an adapter that does not fit; `tied` is the model's tie_word_embeddings.

        With `quantization`, the layers `four_bits` go through 4 bits first; their rows are whole blocks. Without
        `added`, the tensors are those of the base alone, as the adapter saw it.
        """
        adapter.check(base, tied=tied)
        self._base, self._adapter = base, adapter
        self._quantization, self._four_bits = quantization, frozenset(four_bits)
        self._changed = {name for name in adapter.changed if name in base and added}
        self._same: dict[str, str] = {}
        """Head -> embedding, where a tied base holds its matrix twice."""
        if tied:
            heads, tables = (
                [info.name for info in base.infos() if info.name.endswith(end)] for end in (HEAD, EMBEDDING)
            )
            self._same = dict(zip(heads, tables, strict=False))
        sideways = [name for name, pair in adapter.pairs.items() if pair.transposed and self._in_four_bits(name)]
        if sideways:
            raise CheckpointError(
                f"{adapter.folder} changes {len(sideways)} Conv1D layers of a base in 4 bits, "
                f"whose blocks lie otherwise; the first: {sideways[0]}",
                hint="merge it with PEFT",
            )
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, str], Array] = OrderedDict()

    def __contains__(self, name: object) -> bool:
        return name in self._base

    def infos(self) -> Iterator[TensorInfo]:
        return (self.info(info.name) for info in self._base.infos())

    def info(self, name: str) -> TensorInfo:
        info = self._base.info(name)
        return TensorInfo.of(name, "float32", info.shape) if self._touched(name) else info

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Rows with the adapter added, float32; those of other tensors as they are."""
        known = self._same.get(name, name)
        pair = self._adapter.pairs.get(known) if known in self._changed else None
        plain = pair is not None and not pair.transposed and pair.magnitude is None and not self._in_four_bits(known)
        if pair is None or not plain or pair.rank > KERNEL_RANK:
            return self.before_and_after(name, start, stop)[1]
        import numpy as np

        from coldpress.kernels.low_rank import add_product

        before = self._base.read(known, start, stop)
        b = self._adapter.read(pair.second, start, start + len(before)) * np.float32(pair.scale)
        return add_product(before, b, self._adapter.read(pair.first))

    def before_and_after(self, name: str, start: int = 0, stop: int | None = None) -> tuple[Array, Array]:
        """Rows of the base as the adapter saw it, and with the adapter added."""
        name = self._same.get(name, name)
        before = self._base_rows(name, start, stop)
        if name not in self._changed:
            return before, before
        stop = start + len(before)
        adapter = self._adapter
        if name in adapter.pairs:
            return before, self._merged(name, before, start, stop)
        if name in adapter.replaced:
            return before, adapter.read(adapter.replaced[name], start, stop)
        if name in adapter.tokens:
            own, rows = adapter.tokens[name]
            after = before.copy()
            for place, row in enumerate(rows):
                if start <= row < stop:
                    after[row - start] = adapter.read(own, place, place + 1)[0]
            return before, after
        own, scale = adapter.biases[name]
        return before, before + scale * adapter.read(own, start, stop)

    def _touched(self, name: str) -> bool:
        return self._same.get(name, name) in self._changed or self._in_four_bits(name)

    def _in_four_bits(self, name: str) -> bool:
        return self._quantization is not None and name.removesuffix(".weight") in self._four_bits

    def _merged(self, name: str, before: Array, start: int, stop: int) -> Array:
        import numpy as np

        pair = self._adapter.pairs[name]
        merged = self._sum(pair, before, start, stop)
        if pair.magnitude is None:
            return merged
        magnitude = self._adapter.read(pair.magnitude).reshape(-1)
        if pair.transposed:
            merged *= magnitude / self._once("norm", name, lambda: self._column_norms(name, pair))
        else:
            merged *= (magnitude[start:stop] / np.sqrt(np.einsum("ij,ij->i", merged, merged)))[:, None]
        return merged

    def _sum(self, pair: LowRank, before: Array, start: int, stop: int) -> Array:
        """W + s B A: rows start to stop as the weight lies."""
        import numpy as np

        if pair.transposed:
            a, b = self._adapter.read(pair.first), self._adapter.read(pair.second)
            merged = np.ascontiguousarray(a[:, start:stop].T) @ b.T
        else:
            merged = self._adapter.read(pair.second, start, stop) @ self._adapter.read(pair.first)
        merged *= np.float32(pair.scale)
        merged += before
        return np.asarray(merged, np.float32)

    def _column_norms(self, name: str, pair: LowRank) -> Array:
        import numpy as np

        total = np.zeros(pair.shape[1])
        for start, stop in self._pieces(name):
            merged = self._sum(pair, self._base_rows(name, start, stop), start, stop)
            total += np.square(merged, dtype=np.float64).sum(axis=0)
        return np.asarray(np.sqrt(total), np.float32)

    def _pieces(self, name: str) -> Iterator[tuple[int, int]]:
        rows, width = self._base.info(name).shape
        step = max(1, CHUNK_ELEMENTS // width)
        return ((start, min(start + step, rows)) for start in range(0, rows, step))

    def _base_rows(self, name: str, start: int, stop: int | None) -> Array:
        """Rows of the base as the adapter saw it: float32 where anything is done to them."""
        import numpy as np

        rows = self._base.read(name, start, stop)
        if self._in_four_bits(name):
            return self._through_four_bits(name, rows, start)
        return rows.astype(np.float32, copy=False) if name in self._changed else rows

    def _through_four_bits(self, name: str, rows: Array, start: int) -> Array:
        import numpy as np

        from coldpress.kernels.nf4 import BLOCK, block_scales, round_trip_blocks

        assert self._quantization is not None
        # The base was loaded in the compute type, quantized, and dequantized to that type in every step.
        dtype, width = numpy_dtype(self._quantization.compute_dtype), rows.shape[1]
        if width % BLOCK:
            raise AssertionError(f"{name}: rows of {width} are not whole blocks of {BLOCK}")
        flat = rows.reshape(-1)
        out = np.empty(flat.size, np.float32)
        scales = None
        if self._quantization.double_quant:

            def whole() -> Array:
                pieces = (self._base.read(name, *piece).reshape(-1).astype(dtype) for piece in self._pieces(name))
                return block_scales(pieces, double_quant=True)

            scales = self._once("scales", name, whole)[start * width // BLOCK :]
        for first in range(0, flat.size, CHUNK_ELEMENTS):
            piece = flat[first : first + CHUNK_ELEMENTS].astype(dtype)
            used = block_scales([piece]) if scales is None else scales[first // BLOCK :][: piece.size // BLOCK]
            values = round_trip_blocks(piece, used, quant_type=self._quantization.quant_type)
            out[first : first + piece.size] = values.astype(dtype)
        return out.reshape(rows.shape)

    def _once(self, what: str, name: str, make: Callable[[], Array]) -> Array:
        """A figure of a whole tensor, made by the first thread that wants it."""
        key = (what, name)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = make()
                while len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
            return self._kept[key]
