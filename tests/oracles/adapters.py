"""Adapters made with PEFT, and a base with the weights that its ONNX form stands for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from coldpress.kernels.quantize import quantize
from oracles.quantization import dequantize_block_by_block

__all__ = ["base_in_blocks", "inputs_of", "make_adapter", "merged_checkpoint"]


def make_adapter(base: Path, folder: Path, targets: list[str], *, r: int = 4, seed: int = 1, **more: Any) -> Path:
    """A PEFT adapter with nothing left at zero."""
    import peft

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(r=r, lora_alpha=2 * r + 1, target_modules=targets, task_type="CAUSAL_LM", **more)
    wrapped = peft.get_peft_model(model, config)
    for name, value in wrapped.named_parameters():
        if value.requires_grad:
            noise = torch.randn_like(value) * 0.1
            value.data.mul_(1 + noise) if "magnitude" in name else value.data.add_(noise)
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    return folder


def merged_checkpoint(base: Path, adapter: Path, folder: Path) -> Path:
    """PEFT's merge in float32, saved in float32."""
    import peft

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(folder)
    return folder


@torch.no_grad()
def base_in_blocks(base: Path, block_size: int, candidates: int, embedding_bits: int | None = None) -> Any:
    """The model with every product's weights as its symmetric blocks of 4 bits stand for."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()

    def back(weight: torch.Tensor, bits: int) -> torch.Tensor:
        w = weight.float().numpy()
        count = candidates if bits == 4 else 1
        got = quantize(w, bits=bits, block_size=block_size, symmetric=True, candidates=count)
        return torch.tensor(dequantize_block_by_block(got.codes, got.scales, got.zeros, bits, w.shape[1]))

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.copy_(back(module.weight, 4))
    if embedding_bits is not None:
        table = model.get_input_embeddings().weight
        table.copy_(back(table, embedding_bits))
    return model


def inputs_of(adapter: Path) -> Mapping[str, np.ndarray]:
    """A^T and s B^T of each module in float64, straight from the PEFT files."""
    import json

    from safetensors.numpy import load_file

    record = json.loads((adapter / "adapter_config.json").read_text())
    scale = record["lora_alpha"] / (record["r"] ** 0.5 if record["use_rslora"] else record["r"])
    found = {}
    for name, value in load_file(adapter / "adapter_model.safetensors").items():
        found[name.removeprefix("base_model.model.")] = value.astype(np.float64).T * (scale if "lora_B" in name else 1)
    return found
