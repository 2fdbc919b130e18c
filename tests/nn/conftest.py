from __future__ import annotations

from pathlib import Path

import pytest

from fakes.tiny_models import make_checkpoint


@pytest.fixture(scope="session")
def tiny_phi3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("phi3"))
