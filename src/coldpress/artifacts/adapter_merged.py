"""A base model with an adapter added, tensor by tensor and row by row; all sums in float32.

    W    base weight [out, in]      P    what the adapter adds (`adapter_products`)      m    magnitude [out] (DoRA)

    W' = W + P                           DoRA: W' = m (W + P) / ||W + P||, the norm over each output's row

An embedding and a Conv1D layer hold W^T; there the rows of the file are inputs, and a DoRA norm runs over all of them.
After QLoRA, W is what 4-bit quantization left of the base: the weights that the adapter was trained on.
Source of the second: Liu et al. 2024 (DoRA), equation 5.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any

from coldpress.artifacts.adapter import EMBEDDING, HEAD, AdapterWeights
from coldpress.artifacts.adapter_products import LowRank, Product
from coldpress.artifacts.base import BaseQuantization
from coldpress.artifacts.tensors import TensorInfo, TensorSource, numpy_dtype
from coldpress.errors import CheckpointError

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

__all__ = ["MergedTensors"]

CHUNK_ELEMENTS = 1 << 20
"""Weights looked at at a time where a whole tensor must be read for one figure of each block or column."""
KEPT = 8
"""Tensors whose block scales and norms are remembered: those that threads of a writer are at work on."""
KERNEL_RANK = 32
"""Highest rank for which one pass over the weight beats a matrix product and a sum (measured: 1.3 and 0.9 billion
weights a second at rank 16, 0.3 and 0.7 at 64)."""


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
        product = adapter.pairs.get(name) or adapter.products.get(name)
        if product is not None:
            return before, self._merged(name, product, before, start, stop)
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

    def _merged(self, name: str, pair: Product, before: Array, start: int, stop: int) -> Array:
        import numpy as np

        merged = self._sum(pair, before, start, stop)
        if not isinstance(pair, LowRank) or pair.magnitude is None:
            return merged
        magnitude = self._adapter.read(pair.magnitude).reshape(-1)
        if pair.transposed:
            merged *= magnitude / self._once("norm", name, lambda: self._column_norms(name, pair))
        else:
            merged *= (magnitude[start:stop] / np.sqrt(np.einsum("ij,ij->i", merged, merged)))[:, None]
        return merged

    def _sum(self, product: Product, before: Array, start: int, stop: int) -> Array:
        """W + P: rows start to stop as the weight lies."""
        merged = product.rows(self._adapter, start, stop)
        merged += before
        return merged

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
