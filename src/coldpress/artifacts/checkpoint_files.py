"""The small files of a checkpoint folder, which a step that writes new weights takes along."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from coldpress.artifacts.json_file import read_json

__all__ = ["copy_configs"]


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
