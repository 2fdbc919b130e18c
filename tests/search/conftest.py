from __future__ import annotations

from fakes.workflows import fake_passes, workflow

__all__ = ["fake_passes", "workflow"]
