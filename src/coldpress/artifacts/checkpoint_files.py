"""The files of a checkpoint folder that a step writes: the small ones, which it takes along, and weights in shards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coldpress.artifacts.json_file import read_json
from coldpress.artifacts.tensors import INDEX_FILE, SINGLE_FILE, TensorInfo, write_safetensors

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["copy_configs", "write_shards"]


def copy_configs(source: Path, target: Path) -> None:
    """`config.json` and what else describes the model; code of its own comes along, a mark of quantization does not."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.glob("*")):
        known = path.name in ("config.json", "generation_config.json") or path.suffix == ".py"
        if path.is_file() and known:
            shutil.copyfile(path, target / path.name)
    config = read_json(target / "config.json")
    if config.pop("quantization_config", None) is not None:
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_shards(
    folder: Path, tensors: Iterable[tuple[TensorInfo, Callable[[], npt.NDArray[Any]]]], *, shard_bytes: int
) -> None:
    """Weights as `model.safetensors`, or in several files with an index where they take more than `shard_bytes`.

    Each producer is called once, in order. A tensor is never divided, so a file may be larger.
    """
    shards: list[list[tuple[TensorInfo, Callable[[], npt.NDArray[Any]]]]] = [[]]
    held = 0
    for entry in tensors:
        if shards[-1] and held + entry[0].nbytes > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(entry)
        held += entry[0].nbytes
    if len(shards) == 1:
        write_safetensors(folder / SINGLE_FILE, shards[0], {"format": "pt"})
        return
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, shard, {"format": "pt"})
        places.update({info.name: name for info, _ in shard})
    size = sum(info.nbytes for shard in shards for info, _ in shard)
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
