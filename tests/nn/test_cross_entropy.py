"""The loss by slices against float64, over several slices and for every kind of head."""

from __future__ import annotations

from typing import Any

import pytest

from coldpress.nn import imports

imports.load_inference()

import torch  # noqa: E402 - after the imports that hide what it would pull in

from coldpress.nn import cross_entropy  # noqa: E402
from coldpress.nn.cross_entropy import Head, head_loss, linear_cross_entropy  # noqa: E402


def inputs(count: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn((count, 24), generator=draw).to(dtype)
    weight = torch.randn((70, 24), generator=draw).mul_(0.7).to(dtype)
    return hidden, weight, torch.randint(70, (count,), generator=draw)


def expected(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, after: Any = lambda z: z
) -> tuple[float, torch.Tensor, torch.Tensor]:
    h, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(after(h @ w.t()), targets, reduction="sum")
    loss.backward()
    assert h.grad is not None
    assert w.grad is not None
    return float(loss.detach()), h.grad, w.grad


@pytest.mark.parametrize("count", [1, 15, 16, 17, 100])
@pytest.mark.parametrize("rows", [16, 48])
def test_a_frozen_matrix(count: int, rows: int) -> None:
    hidden, weight, targets = inputs(count)
    value, gradient, _ = expected(hidden, weight, targets)
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, targets, rows)
    (loss * 0.25).backward()
    # 1e-6: float32 sums over 70 classes.
    assert float(loss.detach()) == pytest.approx(value, rel=1e-6)
    assert hidden.grad is not None
    assert torch.allclose(hidden.grad.double() * 4, gradient, atol=1e-5)


def test_bfloat16_rounds_and_no_more() -> None:
    hidden, weight, targets = inputs(200, torch.bfloat16)
    value, gradient, _ = expected(hidden, weight, targets)
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, targets, 32)
    loss.backward()
    # Logits of size 10 have steps of 1/16 in bfloat16; over 200 tokens these average out.
    assert float(loss.detach()) == pytest.approx(value, rel=5e-3)
    assert hidden.grad is not None
    assert (hidden.grad.double() - gradient).norm() < 2e-2 * gradient.norm()


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, targets = inputs(20)
    value, _, _ = expected(hidden * 200, weight, targets)
    assert float(linear_cross_entropy(hidden * 200, weight, targets, 16)) == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize(
    ("softcap", "scale"), [(None, 1.0), (5.0, 1.0), (None, 0.3), (4.0, 0.5)], ids=["plain", "softcap", "scale", "both"]
)
@pytest.mark.parametrize("trained", [False, True])
def test_heads(softcap: float | None, scale: float, trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "SLICE_BYTES", 70 * 4 * 32)  # several slices
    hidden, weight, targets = inputs(75)

    def after(z: torch.Tensor) -> torch.Tensor:
        z = z * scale
        return z if softcap is None else softcap * torch.tanh(z / softcap)

    value, gradient, of_weight = expected(hidden, weight, targets, after)
    linear = torch.nn.Linear(24, 70, bias=False)
    linear.weight = torch.nn.Parameter(weight, requires_grad=trained)
    hidden.requires_grad_()
    loss = head_loss(Head(linear, softcap, scale), hidden, targets)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(value, rel=1e-6)
    assert hidden.grad is not None
    assert torch.allclose(hidden.grad.double(), gradient, atol=1e-5)
    if trained:
        assert linear.weight.grad is not None
        assert torch.allclose(linear.weight.grad.double(), of_weight, atol=1e-4)


def test_no_token_with_loss() -> None:
    hidden, weight, _ = inputs(4)
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden[:0], weight, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert float(loss.detach()) == 0
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_evaluation_makes_no_gradient() -> None:
    hidden, weight, targets = inputs(40)
    value, _, _ = expected(hidden, weight, targets)
    with torch.no_grad():
        assert float(linear_cross_entropy(hidden, weight, targets, 16)) == pytest.approx(value, rel=1e-6)
