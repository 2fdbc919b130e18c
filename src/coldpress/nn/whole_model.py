"""A whole model to train, and its weights as the checkpoint that it came from has them.

What is trained is float32 (a bf16 weight of 0.2 has no number between it and 0.201, and an update is often smaller than
that); what is frozen may be narrower. Written back, every tensor has its name and type of before: Transformers undoes
the conversions that it made at loading, tied matrices are stored as they were, and what the model does not use is
copied. Peak memory of the writing: one tensor beside the model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coldpress.artifacts.checkpoint_files import write_shards
from coldpress.artifacts.tensors import TensorInfo, TensorSource, numpy_dtype
from coldpress.errors import CheckpointError

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

__all__ = ["check_names", "train_only", "write_checkpoint"]


def train_only(model: torch.nn.Module, trained: Collection[str], frozen_dtype: str) -> None:
    """Let the parameters with these names train, in float32; freeze the others, in `frozen_dtype`."""
    import torch

    for name, value in model.named_parameters():
        value.requires_grad_(name in trained)
        if value.is_floating_point():
            value.data = value.data.to(torch.float32 if name in trained else getattr(torch, frozen_dtype))


def check_names(model: Any, infos: Iterable[TensorInfo], source: Path) -> None:
    """Before a training: whether the model would be written as `infos`, what `source` holds; raises CheckpointError."""
    shapes = {info.name: info.shape for info in infos}
    odd = sorted(name for name, value in _as_stored(model).items() if shapes.get(name) != tuple(value.shape))
    if odd:
        raise CheckpointError(
            f"{source} stores {len(odd)} weights in another way than Transformers writes them, the first: {odd[0]}",
            hint="load it in Transformers, save it with save_pretrained, and give that folder as the model",
        )


def write_checkpoint(
    model: Any, base: TensorSource, target: Path, *, shard_bytes: int, on_tensor: Callable[[int, int], None]
) -> None:
    """Write the weights of `model` as `base` has them. `on_tensor` is told (done, all)."""
    state, twins = _as_stored(model), _twins(model)
    infos = sorted(base.infos(), key=lambda info: info.name)

    def tensors() -> Iterator[tuple[TensorInfo, Callable[[], npt.NDArray[Any]]]]:
        for place, info in enumerate(infos, start=1):
            yield info, producer(place, info)

    def producer(place: int, info: TensorInfo) -> Callable[[], npt.NDArray[Any]]:
        def produce() -> npt.NDArray[Any]:
            value = state.get(info.name, state.get(twins.get(info.name, "")))
            made = base.read(info.name) if value is None else _array(value, info.dtype)
            on_tensor(place, len(infos))
            return made

        return produce

    write_shards(target, tensors(), shard_bytes=shard_bytes)


def _as_stored(model: Any) -> dict[str, torch.Tensor]:
    """The model's tensors by their names in a checkpoint, each once."""
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    state = dict(model.state_dict())
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    state = remove_tied_weights_from_state_dict(state, model)
    return dict(revert_weight_conversion(model, state))


def _twins(model: Any) -> dict[str, str]:
    """Tied names -> the name under which their tensor is kept."""
    return {str(twin): str(kept) for twin, kept in (getattr(model, "all_tied_weights_keys", None) or {}).items()}


def _array(value: torch.Tensor, dtype: str) -> npt.NDArray[Any]:
    """A tensor as an array of a type; NumPy knows bf16 only by its bits."""
    import torch

    made = value.detach().to("cpu", getattr(torch, dtype)).contiguous()
    bits = made.view(torch.int16) if dtype == "bfloat16" else made
    found: npt.NDArray[Any] = bits.numpy().view(numpy_dtype(dtype))
    return found
