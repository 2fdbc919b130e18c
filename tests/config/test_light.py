"""A check must stay light: no framework, no YAML for JSON. How long it takes is measured by benchmarks/startup.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CODE = """
import sys
from coldpress.config.load import load_config
from coldpress.config.schema import Frozen
from pydantic import ConfigDict
class Any_(Frozen):
    model_config = ConfigDict(extra="allow")
load_config({path!r}, passes=dict.fromkeys(("LoRA", "QLoRA", "MergeAdapterWeights", "ModelBuilder"), Any_))
heavy = {{"torch", "transformers", "numpy", "onnx_ir", "ruamel", "ruamel.yaml"}} & set(sys.modules)
print(*heavy)
"""


def test_a_check_imports_no_framework(seed_file: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(path=str(seed_file))], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []
