"""A check must stay light: no framework, no YAML for JSON, well under half a second."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CODE = """
import sys, time
from coldpress.config.load import load_config
from coldpress.config.schema import Frozen
from pydantic import ConfigDict
class Any_(Frozen):
    model_config = ConfigDict(extra="allow")
load_config({path!r}, passes=dict.fromkeys(("LoRA", "QLoRA", "MergeAdapterWeights", "ModelBuilder"), Any_))
heavy = {{"torch", "transformers", "numpy", "onnx_ir", "ruamel", "ruamel.yaml"}} & set(sys.modules)
assert not heavy, heavy
print(time.process_time())
"""


def test_a_check_imports_no_framework_and_is_fast(seed_file: Path) -> None:
    seconds = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", CODE.format(path=str(seed_file))], capture_output=True, text=True, check=True
        )
        seconds.append(float(done.stdout))
    assert min(seconds) < 0.5
