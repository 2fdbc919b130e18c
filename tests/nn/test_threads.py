"""How many threads a training takes: by its work, unless the user says."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from coldpress.data.packing import TokenSequence
from coldpress.events import Event
from coldpress.nn.threads import threads_for


def model(width: int) -> torch.nn.Module:
    made = torch.nn.Linear(2, 2)
    made.config = SimpleNamespace(hidden_size=width)
    return made


@pytest.fixture(autouse=True)
def four_threads(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield None
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("width", "rows", "tokens", "expected"),
    [(256, 4, 4096, 1), (768, 4, 4096, 2), (768, 8, 4096, 4), (4096, 1, 4096, 3), (4096, 8, 32, 2)],
)
def test_threads_follow_the_work(width: int, rows: int, tokens: int, expected: int) -> None:
    sequences = [TokenSequence([1] * length, [1] * length) for length in (40, 56)]
    events: list[Event] = []
    with threads_for(model(width), sequences, rows, tokens, "train", events.append):
        assert torch.get_num_threads() == expected
    assert torch.get_num_threads() == 4
    assert bool(events) == (expected < 4), "it is said"


def test_the_user_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    with threads_for(model(8), [TokenSequence([1, 2], [1, 2])], 1, 4096, "train", lambda event: None):
        assert torch.get_num_threads() == 4
