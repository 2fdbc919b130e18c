"""What a training changed."""

from __future__ import annotations

import pytest
import torch

from coldpress.nn.changes import Fingerprints


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    made = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 4), torch.nn.LayerNorm(4))
    made[2].requires_grad_(False)
    return made


def test_counts_and_names_of_what_changed() -> None:
    made = model()
    before = Fingerprints.of(made)
    nothing = before.compared_with(made)
    assert (nothing.trained, nothing.total) == (24 + 6 + 24 + 4, 24 + 6 + 24 + 4 + 8)
    assert (nothing.layers, nothing.layers_changed) == (2, 0)
    assert nothing.text == "trained 58 of 66 parameters (87.88%); 0 of 2 layers changed"
    with torch.no_grad():
        made[1].bias[0] += 1e-4
    assert before.compared_with(made).layers_changed == 1
    with torch.no_grad():
        made[0].weight *= 1.001
    assert before.compared_with(made).text.endswith("all 2 layers changed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_values_that_change_against_each_other_are_seen(dtype: torch.dtype) -> None:
    """The sum over all of them stays as it was."""
    made = model().to(dtype)
    before = Fingerprints.of(made)
    with torch.no_grad():
        first, second = made[0].weight[0, 0].clone(), made[0].weight[0, 1].clone()
        made[0].weight[0, 0], made[0].weight[0, 1] = second, first
    assert before.compared_with(made).layers_changed == 1
