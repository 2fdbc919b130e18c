from __future__ import annotations

from pathlib import Path

import pytest

from coldpress.data.tokenizer import Tokenizer
from fakes.tiny_models import make_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """One token a byte; BOS 256, EOS 257, PAD 258."""
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return Tokenizer.load(folder)
