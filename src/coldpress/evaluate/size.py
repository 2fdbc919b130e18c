"""The metric `size_on_disk`: bytes of the files that a model is run from, each counted once, none of them read."""

from __future__ import annotations

import json
from pathlib import Path

from coldpress.artifacts.base import Artifact
from coldpress.config.metrics import SizeMetric
from coldpress.errors import CheckpointError
from coldpress.evaluate.bench import Bench
from coldpress.scores import Measurement

__all__ = ["files_to_run", "measure"]

_RECORDS = ("artifact.json", "record.json", "run.json", "training_args.bin", "trainer_state.json", "optimizer.pt")
"""Written beside models, and not needed to run them."""
_BESIDE = (".json", ".model", ".jinja", ".txt", ".py", ".onnx_adapter")


def measure(metric: SizeMetric, bench: Bench) -> list[Measurement]:
    """Bytes of a model, its adapter and its tokenizer."""
    files = files_to_run(bench.model)
    total = sum(path.stat().st_size for path in files)
    return [Measurement(sub.name, float(total), "bytes", False, len(files), 0.0) for sub in metric.sub_types]


def files_to_run(model: Artifact) -> list[Path]:
    """Weights, configs and tokenizer files; a file that two folders share is there once."""
    found: dict[tuple[int, int], Path] = {}
    for folder in (model.model, model.adapter, model.tokenizer):
        if folder is not None:
            for path in [*_weights(folder, model.kind), *_small(folder)]:
                status = path.stat()
                found.setdefault((status.st_dev, status.st_ino), path)
    if not found:
        raise CheckpointError(f"{model.model} holds no files of a model")
    return sorted(found.values())


def _small(folder: Path) -> list[Path]:
    return [
        path
        for path in folder.iterdir()
        if path.is_file() and path.suffix in _BESIDE and path.name not in _RECORDS and not path.name.startswith(".")
    ]


def _weights(folder: Path, kind: str) -> list[Path]:
    """What the weights are read from; of a checkpoint stored twice, the form that is loaded."""
    if kind == "onnx":
        graphs = list(folder.glob("*.onnx"))
        return [*graphs, *(path for path in folder.iterdir() if path.suffix in (".data", ".bin", ".safetensors"))]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        parts = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [folder / name for name in sorted(set(parts)) if (folder / name).is_file()]
    safe = list(folder.glob("*.safetensors"))
    return safe or [path for path in folder.glob("*.bin") if path.name not in _RECORDS]
