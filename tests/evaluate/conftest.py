from __future__ import annotations

from pathlib import Path

import pytest

from coldpress.data.tokenizer import Tokenizer
from fakes.tiny_models import make_checkpoint, make_tokenizer


@pytest.fixture(scope="session")
def tiny_phi3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("phi3"))


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return Tokenizer.load(folder)
