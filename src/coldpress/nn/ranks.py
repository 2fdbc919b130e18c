"""Several processes that train one model: who takes which rows, what they agree on, sharded weights made whole.

    rank     a process, 0 ... ranks - 1; rank 0 writes what is kept (RANK and WORLD_SIZE, torch.distributed's names)
    step     per_device_train_batch_size * gradient_accumulation_steps rows for each rank, in the order in which one
             process would take them; rank k computes the k-th part, and of an uneven rest as near to that as it goes
    weight   under FSDP a DTensor: each rank holds a part of its rows, and only all ranks together know the whole

What is called here on one rank must be called on all, in the same order. Importing this module imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import distributed
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.data import BatchSampler, Sampler

from coldpress.errors import TrainingError

__all__ = [
    "NARROW",
    "PlainModel",
    "RankBatches",
    "check_alike",
    "draw_apart",
    "everyone",
    "fill",
    "from_first",
    "gathered",
    "rank",
    "ranks",
    "shard_on_cpu",
    "sharded_precision",
    "trained",
    "wait",
]

NARROW = {"bf16": torch.bfloat16, "fp16": torch.float16}

T = TypeVar("T")


def ranks() -> int:
    """Processes of the group; 1 where there is none."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def wait() -> None:
    """Until all ranks are here."""
    if ranks() > 1:
        distributed.barrier()


def from_first(make: Callable[[], T]) -> T:
    """What rank 0 makes, on every rank: for all that is read from a disk which others may be writing to."""
    if ranks() == 1:
        return make()
    box: list[Any] = [make() if rank() == 0 else None]
    distributed.broadcast_object_list(box, src=0)
    found: T = box[0]
    return found


class RankBatches(BatchSampler):  # type: ignore[misc]
    """The rows of each step that one rank takes. A rank may get none of the last step, as an empty list."""

    def __init__(self, sampler: Sampler[int], rows: int, *, drop_last: bool) -> None:
        """`rows` of each rank."""
        super().__init__(sampler, rows * ranks(), drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        own, count = rank(), ranks()
        for batch in super().__iter__():
            yield batch[len(batch) * own // count : len(batch) * (own + 1) // count]


def everyone(rows: Sequence[int]) -> tuple[int, ...]:
    """What all ranks have, rank 0's first."""
    if ranks() == 1:
        return tuple(rows)
    found: list[Any] = [None] * ranks()
    distributed.all_gather_object(found, list(rows))
    return tuple(row for each in found for row in each)


def draw_apart(seed: int) -> None:
    """Give each rank random numbers of its own: Trainer seeds all alike, and their dropout would fall alike."""
    if ranks() > 1:
        torch.manual_seed(seed + rank())


def check_alike(**facts: Any) -> None:
    """Raise TrainingError where ranks differ in what they must have in common; names are told to the user."""
    for name, value in facts.items():
        found: list[Any] = [value] * ranks()
        if ranks() > 1:
            distributed.all_gather_object(found, value)
        if any(one != found[0] for one in found):
            each = ", ".join(f"{one!r} on rank {number}" for number, one in enumerate(found))
            raise TrainingError(
                f"the processes of this training differ in {name}: {each}",
                hint="all machines must see the same files and have the same packages and the same kind of processor",
            )


# -- sharded weights ---------------------------------------------------------------------------------------------------


def trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """What requires gradients, by name; under FSDP the parts that this rank keeps."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # after an evaluation some still stand there whole, as copies
    return {name: one for name, one in model.named_parameters() if one.requires_grad}


def gathered(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The whole tensors on rank 0, in memory of the CPU where they were sharded; nothing on the other ranks."""
    found = {}
    for name, weight in weights.items():
        value = weight.detach()
        if isinstance(value, DTensor):
            value = value.full_tensor()
            value = value.cpu() if rank() == 0 else value
        if rank() == 0:
            found[name] = value
    return found


def fill(weight: torch.Tensor, value: torch.Tensor | None) -> None:
    """Give a weight new values; only rank 0 needs to have them."""
    with torch.no_grad():
        if ranks() == 1:
            assert value is not None
            weight.copy_(value)
            return
        device = weight.device
        own = torch.empty(weight.shape, dtype=weight.dtype, device=device)
        if value is not None:
            own.copy_(value)
        if isinstance(weight, DTensor):
            weight.copy_(distribute_tensor(own, weight.device_mesh, weight.placements))
        else:
            distributed.broadcast(own, src=0)
            weight.copy_(own)


class PlainModel:
    """A model as it is before FSDP makes its modules its own: their classes, their hooks, their places."""

    HOOKS = (
        "_forward_pre_hooks",
        "_forward_hooks",
        "_state_dict_pre_hooks",
        "_load_state_dict_pre_hooks",
        "_load_state_dict_post_hooks",
    )
    MARKS = ("_is_fsdp_managed_module", "_fsdp_use_orig_params")

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._children = [(module, dict(module.named_children())) for module in model.modules()]
        self._before = [
            (module, type(module), {name: list(getattr(module, name)) for name in self.HOOKS})
            for module in model.modules()
        ]

    def restore(self) -> None:
        """Plain parameters in the place of sharded ones: whole ones on rank 0, on the CPU; elsewhere a rank's own part.

        Afterwards rank 0 can do with the model what one process can. The others hold no model any more.
        """
        if not any(isinstance(module, FSDPModule) for module in self._model.modules()):
            return
        trained(self._model)
        for module, children in self._children:
            for name, child in children.items():
                setattr(module, name, child)
        done: dict[int, torch.nn.Parameter] = {}
        for module, cls, hooks in self._before:
            module.__class__ = cls
            for name, kept in hooks.items():
                found = getattr(module, name)
                for key in [key for key in found if key not in kept]:
                    del found[key]
            for mark in self.MARKS:
                module.__dict__.pop(mark, None)
            for name, weight in list(module.named_parameters(recurse=False)):
                if isinstance(weight, DTensor):
                    if id(weight) not in done:
                        done[id(weight)] = _plain(weight)
                    module._parameters[name] = done[id(weight)]


def _plain(weight: DTensor) -> torch.nn.Parameter:
    value = weight.detach().full_tensor()
    value = value.cpu() if rank() == 0 else weight.detach().to_local()
    return torch.nn.Parameter(value, requires_grad=weight.requires_grad)


def sharded_precision(name: str) -> Any:
    """Gathered weights and products in a 16-bit type; sums of gradients, and the loss, in float32.

    accelerate's own choice rounds both, a loss of 6.8458 to 6.8438.
    """
    return MixedPrecisionPolicy(param_dtype=NARROW[name], reduce_dtype=torch.float32)


def shard_on_cpu(accelerator: Any, how: Mapping[str, Any]) -> None:
    """FSDP for ranks on CPUs, which accelerate offers for accelerators only: its code for them runs on CPUs as well."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**how)
    # In both: the second is copied over the first whenever somebody asks for accelerate's state.
    for state in (accelerator.state, PartialState()):
        state.distributed_type = DistributedType.FSDP
