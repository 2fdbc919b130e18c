"""Every test here may use the fake pass."""

from __future__ import annotations

import pytest

from fakes.workflows import fake_passes, workflow

__all__ = ["fake_passes", "fakes", "workflow"]


@pytest.fixture(autouse=True)
def fakes(fake_passes: None) -> None:
    """Installed for all."""
