"""The loss of a language model without its logits: a slice of tokens at a time, gradients made on the way.

    n   tokens with loss      d   hidden size      V   vocabulary
    z = W h + b  [V]          f   what the model does to its logits (a softcap, a scale), elementwise
    loss = sum over tokens of  log sum_j exp f(z)_j - f(z)_target
    dloss/dh = W^T ( f'(z) * (softmax(f(z)) - onehot(target)) )

The [n, V] logits are never whole: of a slice, one buffer of logits lives, becomes exp(f(z) - max) in place, and goes
into the product with W at once; dividing by its sum is left to the [slice, d] result. So a slice costs two products,
one maximum, one exponential and one sum. As in Liger Kernel (Hsu et al. 2024) the gradient is made in the forward
pass; unlike there, nothing is written that has the size of the logits of more than one slice.

Peak: `SLICE_BYTES` for the logits of a slice, [n, d] for the gradient, and [V, d] where W itself is trained.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

ROUNDING = 16
"""Rows of a slice are a multiple of it."""

__all__ = ["Head", "head_loss", "linear_cross_entropy"]

SLICE_BYTES = 16 << 20
"""Logits in memory at a time. On a CPU they should stay in its caches; on a GPU sixteen times that is used."""


@dataclass(frozen=True)
class Head:
    """From hidden states to logits."""

    module: torch.nn.Module
    """A linear layer [d -> V], or what stands in for one (a layer with an adapter, a trained copy)."""
    softcap: float | None = None
    """c of c tanh(z / c)."""
    scale: float = 1.0
    """The logits are multiplied by it, before the softcap."""
    product: Callable[[torch.Tensor], torch.Tensor] | None = None
    """What `module` computes, where its forward pass was replaced."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, d] -> [n, V]."""
        found: torch.Tensor = (self.product or self.module)(hidden)
        if self.scale != 1.0:
            found = found * self.scale
        if self.softcap is not None:
            found = torch.tanh(found / self.softcap) * self.softcap
        return found

    @property
    def plain(self) -> torch.nn.Linear | None:
        """The frozen linear layer itself, where there is nothing else to it."""
        module = self.module
        # By its forward pass, since FSDP gives each module a class of its own.
        simple = getattr(type(module), "forward", None) is torch.nn.Linear.forward and module.bias is None
        if simple and not module.weight.requires_grad and self.softcap is None and self.scale == 1.0:
            assert isinstance(module, torch.nn.Linear)
            return module
        return None


def head_loss(head: Head, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum of the cross entropies, float32 scalar. hidden [n, d]; targets [n], ids below V."""
    vocabulary = _vocabulary(head.module)
    rows = _rows(hidden, vocabulary)
    linear = head.plain
    if linear is not None and hidden.dtype == linear.weight.dtype:
        return linear_cross_entropy(hidden, linear.weight, targets, rows)
    parameters = [one for one in head.module.parameters() if one.requires_grad]
    return _BySlices.apply(hidden, targets, rows, head.logits, torch.is_grad_enabled(), *parameters)


def _vocabulary(module: torch.nn.Module) -> int:
    weight = getattr(module, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.dim() == 2:
        return int(weight.shape[0])
    return int(getattr(module, "out_features", 1 << 15))


def _rows(hidden: torch.Tensor, vocabulary: int) -> int:
    budget = SLICE_BYTES * (16 if hidden.is_cuda else 1)
    return max(1, budget // (vocabulary * int(hidden.element_size()) * ROUNDING)) * ROUNDING


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, rows: int = 256
) -> torch.Tensor:
    """Sum of the cross entropies of `hidden @ weight.T`, float32 scalar; `weight` is frozen.

    hidden [n, d] and weight [V, d] of one type; `rows` tokens at a time. Products round to that type, sums are float32.
    """
    return _Plain.apply(hidden, weight, targets, rows, torch.is_grad_enabled())


class _Plain(torch.autograd.Function):  # type: ignore[misc]
    """The quick path: a frozen matrix and nothing after it."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, rows: int, wanted: bool
    ) -> torch.Tensor:
        real = hidden.shape[0]
        # Filled up to a multiple: a product is prepared once for each shape.
        hidden = torch.nn.functional.pad(hidden, (0, 0, 0, -real % ROUNDING))
        targets = torch.nn.functional.pad(targets, (0, -real % ROUNDING))
        count, losses = hidden.shape[0], hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        wanted = wanted and ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if wanted else None
        buffer = hidden.new_empty((min(rows, count), weight.shape[0]))
        for start in range(0, count, rows):
            own, ids = hidden[start : start + rows], targets[start : start + rows].unsqueeze(1)
            logits = torch.mm(own, weight.t(), out=buffer[: own.shape[0]])
            right = logits.gather(1, ids).float()
            highest = logits.amax(1, keepdim=True)
            shares = logits.sub_(highest).exp_()
            sums = shares.sum(1, keepdim=True, dtype=torch.float32)
            losses[start : start + rows] = (sums.log() + highest.float() - right).squeeze(1)
            if gradient is not None:
                part = torch.mm(shares, weight)
                wide = part.float().div_(sums)
                wide -= weight.index_select(0, ids.squeeze(1))
                gradient[start : start + rows] = wide
        if gradient is not None:
            ctx.save_for_backward(gradient[:real])
        return losses[:real].sum()

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(upstream), None, None, None, None


class _BySlices(torch.autograd.Function):  # type: ignore[misc]
    """Any head: each slice's gradients by autograd, inside the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        rows: int,
        logits: Callable[[torch.Tensor], torch.Tensor],
        wanted: bool,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        count, total = hidden.shape[0], hidden.new_zeros((), dtype=torch.float32)
        made = [torch.zeros_like(one, dtype=torch.float32) for one in parameters] if wanted else []
        gradient = torch.empty_like(hidden) if wanted else None
        for start in range(0, count, rows):
            own = hidden[start : start + rows].detach().requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                found = logits(own).float()
                loss = torch.nn.functional.cross_entropy(found, targets[start : start + rows], reduction="sum")
            total += loss.detach()
            if gradient is not None:
                first, *others = torch.autograd.grad(loss, [own, *parameters])
                gradient[start : start + rows] = first
                for sum_, one in zip(made, others, strict=True):
                    sum_ += one
        ctx.dtypes = [one.dtype for one in parameters]
        ctx.save_for_backward(*([] if gradient is None else [gradient, *made]))
        return total

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
        gradient, *made = ctx.saved_tensors
        others = [one.mul_(upstream).to(dtype) for one, dtype in zip(made, ctx.dtypes, strict=True)]
        return gradient.mul_(upstream), None, None, None, None, *others
