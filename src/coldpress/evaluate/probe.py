"""A process that loads one model, runs a prompt, and says what that took: `python -m coldpress.evaluate.probe`.

It reads one JSON object from standard input and writes one to standard output. Libraries are imported before the clock
starts, as they are in a service that loads a model; their memory counts, as it does there.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from coldpress.artifacts.base import Artifact
from coldpress.evaluate.abilities import Needs
from coldpress.evaluate.encoders import config_of, is_encoder
from coldpress.evaluate.runners import open_runner, runner_names
from coldpress.memory import PeakMeter

__all__ = ["main", "probe"]


def _vram() -> int:
    """Bytes of GPU memory that this process holds; 0 where nvidia-smi lists it nowhere."""
    import os

    program = shutil.which("nvidia-smi")
    if program is None:
        return 0
    command = [program, "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    out = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    rows = [line.split(",") for line in out.splitlines() if line.count(",") == 1]
    return sum(int(float(used)) << 20 for pid, used in rows if pid.strip() == str(os.getpid()))


def _import_libraries(model: Artifact, runner: str) -> None:
    if runner == "transformers":
        from coldpress.nn import imports

        imports.load_inference()
    elif runner == "onnxruntime":
        import onnxruntime  # noqa: F401 - importing is the point
    else:
        import onnxruntime_genai  # noqa: F401


def probe(task: dict[str, Any]) -> dict[str, Any]:
    """Load the model of a task and run its prompt; seconds and bytes by the names of the sub types."""
    model = Artifact.from_record(Path(task["path"]), task["record"])
    encodes = is_encoder(config_of(model))
    needs: Needs = () if encodes else ("generation",)
    choice = task["runner"] or runner_names(model)[0]
    _import_libraries(model, choice)
    with PeakMeter(0.005) as peak:
        started = time.perf_counter()
        opened = open_runner(
            model,
            needs=needs,
            runner=choice,
            trust_remote_code=task["trust_remote_code"],
            dtype="auto",
        )
        with opened as runner:
            getattr(runner, "ready", lambda: None)()
            loaded = time.perf_counter()
            prompt = task["prompt"][: runner.context_length]
            if encodes:
                runner.forward([prompt])
                answered = time.perf_counter()
            else:
                room = (runner.context_length or 1 << 30) - task["new_tokens"]
                stream = runner.stream(prompt[:room], task["new_tokens"])
                next(stream)
                answered = time.perf_counter()
                for _ in stream:
                    pass
            vram = _vram()
            name = runner.name
    return {
        "load": loaded - started,
        "first_answer": answered - started,
        "peak_rss": peak.total,
        "peak_anonymous": peak.anonymous,
        "peak_vram": vram,
        "runner": name,
    }


def main() -> None:
    print(json.dumps(probe(json.loads(sys.stdin.read()))))  # noqa: T201 - its answer


if __name__ == "__main__":
    main()
