"""Models that read a text and continue none: encoders, with or without a classification head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from coldpress.artifacts.base import read_json
from coldpress.artifacts.quantized import open_checkpoint
from coldpress.errors import CheckpointError, UnsupportedModelError
from coldpress.nn import imports

__all__ = ["load_encoder"]

_UNUSED = ("pooler.",)
"""Weights of BERT's pooler are in few checkpoints, and only a classification head reads what it makes."""


def load_encoder(folder: Path, *, classifier: bool, dtype: str = "float32", trust_remote_code: bool = False) -> Any:
    """The model in eval mode; `dtype` is float32, or auto for the stored one. Raises CheckpointError."""
    config = read_json(folder / "config.json")
    if "auto_map" in config and not trust_remote_code:
        raise UnsupportedModelError(
            f"{folder} needs the checkpoint's own Python code", hint="read it, then run with --trust-remote-code"
        )
    with open_checkpoint(folder, config):  # a damaged or cut file is named here, before a library fails inside
        pass
    imports.load_inference()
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoModel, AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.disable_progress_bar()
    kind = AutoModelForSequenceClassification if classifier else AutoModel
    try:
        model, info = kind.from_pretrained(
            folder,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, StrictDataclassError) as error:
        raise CheckpointError(f"{folder} cannot be loaded: {error}", hint="is the download complete?") from error
    missing = [name for name in info["missing_keys"] if classifier or not name.startswith(_UNUSED)]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} weights of the model, the first: {min(missing)}",
            hint="Transformers would fill them with random numbers; is the download complete?",
        )
    return model.eval()
