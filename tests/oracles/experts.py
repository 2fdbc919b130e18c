"""Experts by hand: MXFP4 as a checkpoint stores it, one number at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

__all__ = ["e2m1", "store_mxfp4"]


def e2m1(code: int) -> float:
    """Sign, two bits of exponent with bias 1, one of mantissa; exponent 0 is subnormal."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    size = mantissa * 0.5 if exponent == 0 else (1 + mantissa * 0.5) * 2.0 ** (exponent - 1)
    return -size if sign else size


def store_mxfp4(folder: Path, seed: int = 0) -> Any:
    """Give the gpt-oss model in `folder` random MXFP4 experts; returns the model with the same values, float32."""
    import torch

    rng = np.random.default_rng(seed)
    tensors = load_file(folder / "model.safetensors")
    packed, values = {}, {}
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, k, n = tensors.pop(name).shape
        codes = rng.integers(0, 16, (experts, n, k))
        scales = rng.integers(121, 125, (experts, n, k // 32))
        whole = np.zeros((experts, k, n), np.float32)
        blocks = np.zeros((experts, n, k // 32, 16), np.uint8)
        for expert, row, column in np.ndindex(codes.shape):
            code, block = int(codes[expert, row, column]), column // 32
            whole[expert, column, row] = e2m1(code) * 2.0 ** (int(scales[expert, row, block]) - 127)
            blocks[expert, row, block, column % 32 // 2] |= code << 4 * (column % 2)
        packed[f"{name}_blocks"] = torch.tensor(blocks)
        packed[f"{name}_scales"] = torch.tensor(scales.astype(np.uint8))
        values[name] = torch.tensor(whole)
    save_file({**tensors, **values}, folder / "model.safetensors", {"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    save_file({**tensors, **packed}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))
    return model
