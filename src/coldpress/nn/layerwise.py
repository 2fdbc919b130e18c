"""Transformers' own model, run block by block with one decoder block's weights in memory.

    outline     the model as Transformers makes it, its weights without memory (device `meta`), its buffers computed
    block       one decoder layer; loaded in float32, run on every batch, and emptied before the next one is loaded
    visit       one call of the whole model in which blocks before block i give back what is known already, block i
                really runs, and the rest is left out

    visit i      embed -> masks, rope -> block 0 .. i-2: NaN -> block i-1: its kept output -> block i: runs; stop
    last visit   ...                                     -> block n-1: its kept output -> norm -> head -> logits

What stands between the blocks (masks, rotary tables, multipliers, softcaps) is the model's own code, run in every
visit, so no family is re-implemented. A model in which a block reads more than the block before it gets NaN there and
is refused. Names and fused weights (experts) are converted by Transformers' loader, a block at a time.

The embedding is read by rows, the head by slices of its rows. Peak memory: the float32 weights of the largest block
(about three times that where the loader fuses experts), the hidden states [tokens, hidden] of the batches in hand,
what one block computes for one batch, `HEAD_BYTES`, and one batch of logits.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coldpress.artifacts.base import read_json
from coldpress.artifacts.quantized import open_checkpoint
from coldpress.artifacts.tensors import TensorInfo, TensorSource
from coldpress.errors import CheckpointError, UnsupportedModelError
from coldpress.nn.loading import load_adapter, load_outline

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

__all__ = ["LayerwiseModel"]

HEAD_BYTES = 64 << 20
"""Float32 rows of the output head in memory at a time."""


class LayerwiseModel:
    """A causal language model in float32 on the CPU that holds one decoder block at a time."""

    def __init__(
        self,
        folder: Path,
        *,
        tensors: TensorSource | None = None,
        adapter: Path | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        """`tensors` are the weights, those of the folder unless given; `adapter` is a PEFT folder, put on by PEFT.

        Raises CheckpointError as `load_model` does, UnsupportedModelError for a model without a list of blocks.
        """
        self._opened = open_checkpoint(folder, read_json(folder / "config.json")) if tensors is None else None
        source: TensorSource = self._opened if tensors is None else tensors  # type: ignore[assignment]
        self._visit: tuple[int, Any] = (0, None)
        self._tuples: dict[int, int] = {}
        """Blocks that return a tuple, and its length."""
        outline = load_outline(
            folder,
            {info.name: _Stored(source, info, on_meta=True) for info in source.infos()},
            trust_remote_code=trust_remote_code,
        )
        self._weights = _Weights(outline, source, folder, apart=adapter is not None)
        list_name, blocks = _find_blocks(outline, folder)
        embedding, head = outline.get_input_embeddings(), outline.get_output_embeddings()
        self._model = outline
        if adapter is not None:
            with self._weights.zeros():
                self._model = load_adapter(outline, adapter).eval()
        self._block_names = [self._weights.below(f"{list_name}.{place}.") for place in range(len(blocks))]
        self._embedding = _RowsOfEmbedding(embedding, self._weights)
        _slice_head(head, self._weights)
        for place, block in enumerate(blocks):
            block.forward = functools.partial(self._at_block, place, block.forward)
        in_blocks = {name for names in self._block_names for name in names}
        self._weights.load([name for name in self._weights.names if name not in in_blocks])
        self._weights.check(self._weights.tensors.keys() - in_blocks)

    @property
    def blocks(self) -> int:
        return len(self._block_names)

    @property
    def hidden_size(self) -> int:
        return self._embedding.width

    def through_blocks(
        self, batches: Sequence[torch.Tensor], on_block: Callable[[int, int], None] | None = None
    ) -> list[torch.Tensor]:
        """Hidden states [rows, tokens, hidden] after the last block, of batches of token ids [rows, tokens].

        `on_block` is told (blocks done, blocks).
        """
        self._embedding.take(batches)
        states: list[Any] = [None] * len(batches)
        for block, names in enumerate(self._block_names):
            with self._weights.loaded(names):
                for place, ids in enumerate(batches):
                    states[place] = self._call(ids, block, states[place])
            if on_block is not None:
                on_block(block + 1, self.blocks)
        return states

    def logits(self, ids: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """[rows, tokens, vocabulary] of a batch (or rows of one) that the last `through_blocks` was given."""
        found: torch.Tensor = self._call(ids, self.blocks, states).logits
        return found

    def close(self) -> None:
        """Let go of weights and files."""
        self._model = None
        self._embedding.drop()
        if self._opened is not None:
            self._opened.close()

    def _call(self, ids: torch.Tensor, block: int, given: Any) -> Any:
        import torch

        from coldpress.nn.threads import tick

        tick()
        self._visit = (block, given)
        with torch.inference_mode():
            try:
                return self._model(input_ids=ids, use_cache=False)
            except _Reached as reached:
                return reached.output

    def _at_block(self, place: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stands in for the `forward` of every block."""
        block, given = self._visit
        if place < block:
            value = given if place == block - 1 else given.new_full((), float("nan")).expand(given.shape)
            return (value, *[None] * (self._tuples[place] - 1)) if place in self._tuples else value
        if block > 1 and _has_nan((args, kwargs)) and not _has_nan(given):
            raise UnsupportedModelError(
                f"{type(self._model).__name__} cannot be run block by block: its block {block} reads more than the "
                f"output of the block before it"
            )
        out = forward(*args, **kwargs)
        if isinstance(out, tuple):
            self._tuples[place] = len(out)
            out = out[0]
        raise _Reached(out)


class _Reached(BaseException):
    """Ends a visit. Model code may catch every Exception; this is none."""

    def __init__(self, output: Any) -> None:
        self.output = output


class _Stored:
    """A weight as Transformers' loader takes one: `tensor[...].to(dtype)` reads it."""

    def __init__(self, source: TensorSource, info: TensorInfo, *, on_meta: bool) -> None:
        self._source, self._info, self._on_meta = source, info, on_meta

    def __getitem__(self, _: object) -> _Stored:
        return self

    def to(self, device: Any = None, dtype: Any = None) -> torch.Tensor:
        import torch

        if self._on_meta:
            return torch.empty(self._info.shape, dtype=dtype or torch.float32, device="meta")
        return _tensor(self._source.read(self._info.name)).to(dtype=dtype or torch.float32)


class _Weights:
    """The weights of an outline: which tensors of the source make each, and loading some of them for a while."""

    def __init__(self, outline: Any, source: TensorSource, folder: Path, *, apart: bool) -> None:
        """`apart`: the outline's modules will move to other names (PEFT), so names are converted on a copy."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        self.source, self._folder = source, folder
        self._skeleton = copy.deepcopy(outline) if apart else outline
        self._mapping = get_model_conversion_mapping(self._skeleton)
        self.tensors: dict[str, torch.Tensor] = self._skeleton.state_dict(keep_vars=True)
        """Name -> the tensor without memory that stands there while nothing is loaded."""
        self._places = {name: _owner(outline, name) for name in self.tensors}
        renamings = [one for one in self._mapping if isinstance(one, WeightRenaming)]
        converters = [one for one in self._mapping if isinstance(one, WeightConverter)]
        self.names: dict[str, list[str]] = defaultdict(list)
        """Name in the model (of weights split from one tensor, the first) -> names in the source."""
        self._plain: dict[str, str] = {}
        for info in source.infos():
            # As `convert_and_load_state_dict_in_model` of transformers/core_model_loading.py chooses.
            args = (self._skeleton.base_model_prefix, self.tensors)
            name, pattern = rename_source_key(info.name, renamings, converters, *args)
            if name not in self.tensors and info.name in self.tensors:
                name, pattern = rename_source_key(info.name, [], [], *args)
            if name in self.tensors:
                self.names[name].append(info.name)
                if pattern is None:
                    self._plain[name] = info.name

    def below(self, prefix: str) -> list[str]:
        return [name for name in self.tensors if name.startswith(prefix)]

    def take_over(self, parameter: torch.Tensor) -> str:
        """The tensor of the source that is this parameter of the outline; from now on it is not loaded here."""
        same = [name for name, (module, leaf) in self._places.items() if getattr(module, leaf) is parameter]
        found = [self._plain[name] for name in same if name in self._plain]
        if not found:
            raise UnsupportedModelError(
                f"{self._folder} cannot be run block by block: {', '.join(same)} is not one tensor of the checkpoint"
            )
        for name in same:
            self.names.pop(name, None)
            self.tensors.pop(name, None)
        return found[0]

    def load(self, names: Iterable[str]) -> None:
        """Put weights into the model, converted by Transformers; raises CheckpointError for those that do not fit."""
        import torch
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        names = list(names)
        wanted = [source for name in names for source in self.names.get(name, ())]
        stored = {name: _Stored(self.source, self.source.info(name), on_meta=False) for name in wanted}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nothing here writes to weights
            info, _ = convert_and_load_state_dict_in_model(
                self._skeleton, stored, LoadStateDictConfig(dtype=torch.float32, weight_mapping=self._mapping)
            )
        wrong = [*(name for name, *_ in info.mismatched_keys), *info.conversion_errors]
        if wrong:
            raise CheckpointError(
                f"{len(wrong)} weights of {self._folder} do not fit the model that config.json describes, "
                f"the first: {min(wrong)}"
            )
        for name in names:
            module, leaf = self._places[name]
            twin, _ = _owner(self._skeleton, name)
            if twin is not module:
                setattr(module, leaf, getattr(twin, leaf))

    def check(self, names: Iterable[str]) -> None:
        """Raise UnsupportedModelError for weights that are still without memory."""
        empty = [name for name in names if getattr(*self._places[name]).is_meta]
        if empty:
            raise UnsupportedModelError(
                f"{self._folder} cannot be run block by block: {min(empty)} shares its tensor with another block"
            )

    @contextmanager
    def zeros(self) -> Iterator[None]:
        """Zeros of no size in the place of all weights: PEFT puts an adapter's weights where the base's are."""
        import torch

        for name, tensor in self.tensors.items():
            zeros = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
            parameter = isinstance(tensor, torch.nn.Parameter)
            setattr(*self._places[name], torch.nn.Parameter(zeros, requires_grad=False) if parameter else zeros)
        try:
            yield
        finally:
            for name, tensor in self.tensors.items():
                setattr(*self._places[name], tensor)

    @contextmanager
    def loaded(self, names: Sequence[str]) -> Iterator[None]:
        """These weights, for as long as the block runs."""
        try:
            self.load(names)
            self.check(names)
            yield
        finally:
            for name in names:
                module, leaf = self._places[name]
                for owner in {id(module): module, id(twin := _owner(self._skeleton, name)[0]): twin}.values():
                    setattr(owner, leaf, self.tensors[name])


class _RowsOfEmbedding:
    """Makes an embedding look rows up in a table of the tokens in hand alone."""

    def __init__(self, embedding: Any, weights: _Weights) -> None:
        import torch

        self._embedding, self._source = embedding, weights.source
        self._rows: int = embedding.weight.shape[0]
        self.width: int = embedding.weight.shape[1]
        self._name = weights.take_over(embedding.weight)
        self._row_of = torch.empty(0, dtype=torch.int64)
        embedding.padding_idx = None  # matters to gradients alone, and lies outside a small table
        inner = embedding.forward
        embedding.forward = lambda ids: inner(self._row_of[ids])

    def take(self, batches: Sequence[torch.Tensor]) -> None:
        import torch

        tokens = torch.unique(torch.cat([ids.flatten() for ids in batches]))
        self._row_of = torch.zeros(self._rows, dtype=torch.int64)
        self._row_of[tokens] = torch.arange(len(tokens))
        table = torch.empty(len(tokens), self.width)
        for row, token in enumerate(tokens.tolist()):
            table[row] = _tensor(self._source.read(self._name, token, token + 1))[0]
        self._embedding.weight = torch.nn.Parameter(table, requires_grad=False)

    def drop(self) -> None:
        """Let go of the table; the module itself is in a cycle of references, which is collected some time later."""
        self._embedding.weight = None


def _slice_head(head: Any, weights: _Weights) -> None:
    """Make a linear layer read its weights a slice of rows at a time."""
    import torch

    if not isinstance(head, torch.nn.Linear):
        raise UnsupportedModelError(f"an output head of type {type(head).__name__} cannot be read in slices")
    source, (rows, width) = weights.source, head.weight.shape
    name = weights.take_over(head.weight)
    step = max(1, HEAD_BYTES // (4 * width))

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        out = hidden.new_empty(*hidden.shape[:-1], rows)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            bias = None if head.bias is None else head.bias[start:stop]
            weight = _tensor(source.read(name, start, stop)).float()
            out[..., start:stop] = torch.nn.functional.linear(hidden, weight, bias)
        return out

    head.forward = forward


def _find_blocks(model: Any, folder: Path) -> tuple[str, Any]:
    """The list of modules that holds most weights: (its name, the list)."""
    import torch

    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)]
    if not lists:
        raise UnsupportedModelError(f"{folder} has no list of decoder blocks to run one by one")
    return max(lists, key=lambda one: sum(parameter.numel() for parameter in one[1].parameters()))


def _owner(model: Any, name: str) -> tuple[Any, str]:
    """The module that holds a parameter or buffer, and its name there."""
    parent, _, leaf = name.rpartition(".")
    return model.get_submodule(parent), leaf


def _has_nan(value: Any) -> bool:
    import torch

    if isinstance(value, torch.Tensor):
        return bool(value.is_floating_point() and value.isnan().any())
    if isinstance(value, dict):
        return any(_has_nan(one) for one in value.values())
    return isinstance(value, tuple | list) and any(_has_nan(one) for one in value)


def _tensor(array: npt.NDArray[Any]) -> torch.Tensor:
    """A torch view of an array, also of one whose type is from ml_dtypes."""
    import numpy as np
    import torch

    if array.dtype.name.startswith(("bfloat", "float8")):
        bits = np.int16 if array.dtype.itemsize == 2 else np.uint8
        return torch.from_numpy(array.view(bits)).view(getattr(torch, array.dtype.name))
    return torch.from_numpy(array)
