"""Importing what training needs, and nothing else."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from coldpress.nn.imports import hidden, quiet_collector


def run(program: str) -> None:
    subprocess.run([sys.executable, "-c", program], check=True)


def test_training_imports_nothing_optional() -> None:
    run(
        "import sys\n"
        "from coldpress.nn.imports import load_training\n"
        "load_training()\n"
        "from transformers import Trainer\n"
        "import peft\n"
        "assert not {'bitsandbytes', 'datasets', 'sklearn', 'scipy', 'torch._inductor.compile_fx'} & set(sys.modules)\n"
        "from peft.import_utils import is_bnb_available\n"
        "assert not is_bnb_available()\n"
        "import datasets\n"  # hidden while the others were imported, not gone
        "datasets.Dataset\n"
    )


def test_quantized_after_plain_in_one_process() -> None:
    run(
        "import importlib.util, sys\n"
        "if importlib.util.find_spec('bitsandbytes') is None: sys.exit()\n"
        "from coldpress.nn.imports import load_training\n"
        "load_training()\n"
        "load_training(quantized=True)\n"
        "from peft.import_utils import is_bnb_4bit_available\n"
        "from transformers.utils import is_bitsandbytes_available\n"
        "assert is_bnb_4bit_available() and is_bitsandbytes_available()\n"
        "import transformers.integrations.bitsandbytes as late\n"
        "assert late.bnb\n"
    )


def test_hidden_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "made_up.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with hidden("made_up"):
        assert importlib.util.find_spec("made_up") is None
        with pytest.raises(ImportError):
            importlib.import_module("made_up")
    module = importlib.import_module("made_up")
    with hidden("made_up"):
        assert sys.modules["made_up"] is module, "what is imported stays"


def test_the_collector_is_left_as_it_was() -> None:
    was = gc.isenabled()
    with quiet_collector():
        assert not gc.isenabled()
    assert gc.isenabled() == was
