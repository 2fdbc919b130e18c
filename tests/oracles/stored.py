"""Checkpoints as quantization tools write them, made with Python integers one code at a time.

Layouts as written by gptqmodel 7.7 (`pack_original`), autoawq 0.2.9 (`WQLinear_GEMM.from_linear`), compressed-tensors
0.20 (`pack_to_int32`) and bitsandbytes 0.50 (`QuantState.as_dict`).
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.torch import load_file, save_file

__all__ = [
    "CASES",
    "NF4",
    "Case",
    "Grid",
    "awq_tensors",
    "four_bit_tensors",
    "gptq_tensors",
    "int8_tensors",
    "on_grid",
    "packed_tensors",
    "quantize_folder",
    "store",
]

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
# Quantiles of a normal distribution: Dettmers et al. 2023, appendix E.
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]  # fmt: skip


@dataclass
class Grid:
    """A quantized matrix before any packing."""

    codes: np.ndarray
    """[n, k], from 0."""
    scales: np.ndarray
    """[n, G]."""
    zeros: np.ndarray
    """[n, G]."""
    group_of: np.ndarray
    """[k]."""
    bits: int

    def values(self) -> np.ndarray:
        """float64 [n, k], one weight at a time."""
        out = np.zeros(self.codes.shape)
        for row in range(out.shape[0]):
            for column in range(out.shape[1]):
                group = self.group_of[column]
                step = int(self.codes[row, column]) - int(self.zeros[row, group])
                out[row, column] = step * float(self.scales[row, group])
        return out


def on_grid(
    weights: np.ndarray,
    *,
    bits: int,
    group: int,
    symmetric: bool,
    scale_dtype: str = "float16",
    group_of: np.ndarray | None = None,
) -> Grid:
    """Round to nearest. `group` -1 is a whole row."""
    n, k = weights.shape
    size = k if group == -1 else group
    where = np.arange(k) // size if group_of is None else group_of
    count, top, half = int(where.max()) + 1, 2**bits - 1, 2 ** (bits - 1)
    scales, zeros = np.zeros((n, count)), np.full((n, count), half)
    for row in range(n):
        for one in range(count):
            part = weights[row, where == one].astype(np.float64)
            low, high = min(part.min(), 0.0), max(part.max(), 0.0)
            span = 2 * max(-low, high) if symmetric else high - low
            scales[row, one] = max(span / top, 1e-4)
            if not symmetric:
                zeros[row, one] = min(max(round(-low / scales[row, one]), 0), top)
    stored = scales.astype(ml_dtypes.bfloat16 if scale_dtype == "bfloat16" else scale_dtype)
    steps = np.rint(weights.astype(np.float64) / stored.astype(np.float64)[:, where]) + zeros[:, where]
    return Grid(np.clip(steps, 0, top).astype(np.int64), stored, zeros.astype(np.int64), where, bits)


def word(codes: list[int], bits: int) -> int:
    """Codes of one signed 32-bit word, the first in the lowest bits."""
    total = sum(int(code) << (bits * place) for place, code in enumerate(codes))
    return total - (1 << 32) if total >= 1 << 31 else total


def gptq_tensors(name: str, grid: Grid, *, first_format: bool, with_index: bool = True) -> dict[str, np.ndarray]:
    n, k = grid.codes.shape
    share = 32 // grid.bits
    weight = np.zeros((k // share, n), np.int32)
    for row in range(k // share):
        for column in range(n):
            weight[row, column] = word(list(grid.codes[column, row * share : (row + 1) * share]), grid.bits)
    stored = grid.zeros - 1 if first_format else grid.zeros
    assert stored.min() >= 0  # what happens below is a matter of the carry, tested apart
    zeros = np.zeros((stored.shape[1], n // share), np.int32)
    for one in range(stored.shape[1]):
        for column in range(n // share):
            zeros[one, column] = word(list(stored[column * share : (column + 1) * share, one]), grid.bits)
    out = {f"{name}.qweight": weight, f"{name}.qzeros": zeros, f"{name}.scales": np.ascontiguousarray(grid.scales.T)}
    if with_index:
        out[f"{name}.g_idx"] = grid.group_of.astype(np.int32)
    return out


def awq_tensors(name: str, grid: Grid) -> dict[str, np.ndarray]:
    def packed(columns: np.ndarray) -> np.ndarray:
        out = np.zeros((columns.shape[0], columns.shape[1] // 8), np.int32)
        for row in range(out.shape[0]):
            for column in range(out.shape[1]):
                out[row, column] = word([columns[row, 8 * column + place] for place in AWQ_ORDER], 4)
        return out

    return {
        f"{name}.qweight": packed(grid.codes.T),
        f"{name}.qzeros": packed(grid.zeros.T),
        f"{name}.scales": np.ascontiguousarray(grid.scales.T),
    }


def packed_tensors(name: str, grid: Grid, *, symmetric: bool) -> dict[str, np.ndarray]:
    """compressed-tensors: codes from 0 are its signed ones plus 2^(bits-1)."""

    def packed(rows: np.ndarray) -> np.ndarray:
        share = 32 // grid.bits
        width = -(-rows.shape[1] // share)
        out = np.zeros((rows.shape[0], width), np.int32)
        for row in range(rows.shape[0]):
            for column in range(width):
                out[row, column] = word(list(rows[row, column * share : (column + 1) * share]), grid.bits)
        return out

    out = {
        f"{name}.weight_packed": packed(grid.codes),
        f"{name}.weight_scale": grid.scales,
        f"{name}.weight_shape": np.array(grid.codes.shape, np.int64),
    }
    if not symmetric:
        out[f"{name}.weight_zero_point"] = np.ascontiguousarray(packed(grid.zeros.T).T)
    return out


def int8_tensors(name: str, grid: Grid, *, symmetric: bool) -> dict[str, np.ndarray]:
    out = {f"{name}.weight": (grid.codes - 128).astype(np.int8), f"{name}.weight_scale": grid.scales}
    if not symmetric:
        out[f"{name}.weight_zero_point"] = (grid.zeros - 128).astype(np.int8)
    return out


def four_bit_tensors(
    name: str, weights: np.ndarray, *, nested: bool, block: int = 64
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """bitsandbytes' NF4 and the values that it stands for. `nested`: absmax in 8 bits, here with a made-up code."""
    flat = weights.astype(np.float64).reshape(-1)
    count = -(-flat.size // block)
    absmax = np.array([np.abs(flat[i * block : (i + 1) * block]).max() for i in range(count)], np.float32)
    tensors: dict[str, np.ndarray] = {f"{name}.weight.quant_map": np.array(NF4, np.float32)}
    state = {"quant_type": "nf4", "blocksize": block, "dtype": "bfloat16", "shape": list(weights.shape)}
    if nested:
        code = np.linspace(-1, 1, 256).astype(np.float32)
        offset = float(np.float32(absmax.mean()))
        inner = [np.abs(absmax[i : i + 256] - offset).max() for i in range(0, count, 256)]
        picked = [int(np.argmin(np.abs(code - (absmax[i] - offset) / inner[i // 256]))) for i in range(count)]
        tensors |= {
            f"{name}.weight.absmax": np.array(picked, np.uint8),
            f"{name}.weight.nested_absmax": np.array(inner, np.float32),
            f"{name}.weight.nested_quant_map": code,
        }
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        absmax = np.array([code[picked[i]] * np.float32(inner[i // 256]) + np.float32(offset) for i in range(count)])
    else:
        tensors[f"{name}.weight.absmax"] = absmax
    codes = [int(np.argmin([abs(flat[i] / max(absmax[i // block], 1e-9) - v) for v in NF4])) for i in range(flat.size)]
    values = np.array([NF4[codes[i]] * float(absmax[i // block]) for i in range(flat.size)]).reshape(weights.shape)
    codes += [0] * (len(codes) % 2)
    data = [codes[i] * 16 + codes[i + 1] for i in range(0, len(codes), 2)]
    tensors[f"{name}.weight"] = np.array(data, np.uint8).reshape(-1, 1)
    text = json.dumps(state).encode()
    tensors[f"{name}.weight.quant_state.bitsandbytes__nf4"] = np.frombuffer(text, np.uint8)
    return tensors, values


@dataclass(frozen=True)
class Case:
    """One way to store a matrix."""

    method: str
    bits: int = 4
    group: int = 32
    symmetric: bool = True
    form: str = ""
    act_order: bool = False
    scale_dtype: str = "float16"

    def settings(self) -> dict[str, Any]:
        """quantization_config, as the tool writes it."""
        if self.method == "gptq":
            return {
                "bits": self.bits, "group_size": self.group, "desc_act": self.act_order, "sym": self.symmetric,
                "lm_head": False, "quant_method": "gptq", "checkpoint_format": self.form, "pack_dtype": "int32",
                "meta": {"damp_percent": 0.01}, "true_sequential": True,
            }  # fmt: skip
        if self.method == "awq":
            return {
                "quant_method": "awq", "bits": 4, "group_size": self.group, "zero_point": not self.symmetric,
                "version": "gemm", "modules_to_not_convert": None,
            }  # fmt: skip
        if self.method == "compressed-tensors":
            strategy = {"fp8-block": "block", "fp8-tensor": "tensor"}.get(self.form) or (
                "channel" if self.group == -1 else "group"
            )
            weights = {
                "num_bits": self.bits, "type": "float" if "fp8" in self.form else "int", "symmetric": self.symmetric,
                "group_size": None if self.group == -1 else self.group, "strategy": strategy, "dynamic": False,
                "actorder": None,
            }  # fmt: skip
            form = "float-quantized" if "fp8" in self.form else self.form
            group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
            return {
                "config_groups": {"group_0": group}, "format": form, "ignore": ["lm_head"],
                "kv_cache_scheme": None, "quant_method": "compressed-tensors", "quantization_status": "compressed",
            }  # fmt: skip
        if self.method == "fp8":
            return {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [16, 16]}
        return {
            "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_use_double_quant": self.form == "nested",
            "bnb_4bit_quant_storage": "uint8", "llm_int8_skip_modules": None,
        }  # fmt: skip


CASES = {
    "gptq-4": Case("gptq", form="gptq"),
    "gptq-4-asymmetric": Case("gptq", symmetric=False, form="gptq_v2"),
    "gptq-4-old-asymmetric": Case("gptq", symmetric=False, form="gptq"),
    "gptq-4-order": Case("gptq", form="gptq", act_order=True),
    "gptq-4-order-asymmetric": Case("gptq", symmetric=False, form="gptq_v2", act_order=True, group=16),
    "gptq-4-row": Case("gptq", group=-1, form="gptq"),
    "gptq-8": Case("gptq", bits=8, form="gptq"),
    "gptq-8-asymmetric": Case("gptq", bits=8, symmetric=False, form="gptq_v2", group=16),
    "awq": Case("awq", symmetric=False),
    "awq-16": Case("awq", symmetric=False, group=16),
    "packed-4": Case("compressed-tensors", form="pack-quantized", scale_dtype="bfloat16"),
    "packed-4-asymmetric": Case("compressed-tensors", symmetric=False, form="pack-quantized"),
    "packed-4-row": Case("compressed-tensors", group=-1, form="pack-quantized", scale_dtype="bfloat16"),
    "packed-8": Case("compressed-tensors", bits=8, form="pack-quantized", scale_dtype="float32"),
    "packed-8-asymmetric-row": Case("compressed-tensors", bits=8, group=-1, symmetric=False, form="pack-quantized"),
    "int8-row": Case("compressed-tensors", bits=8, group=-1, form="int-quantized", scale_dtype="bfloat16"),
    "int8-asymmetric-row": Case("compressed-tensors", bits=8, group=-1, symmetric=False, form="int-quantized"),
    "fp8-blocks": Case("fp8", bits=8),
    "fp8-tensor": Case("compressed-tensors", bits=8, form="fp8-tensor"),
    "fp8-row": Case("compressed-tensors", bits=8, group=-1, form="fp8-row"),
    "nf4": Case("bitsandbytes"),
    "nf4-nested": Case("bitsandbytes", form="nested"),
}
"""What tools write. The codes of all but fp8 and nf4 can be taken over."""


def store(case: Case, name: str, weights: np.ndarray, order: np.ndarray | None = None) -> tuple[dict[str, Any], Any]:
    """The tensors of one layer, and its Grid; for codes that are no grid the float64 values.

    `order` is the group of each column where the case has act_order.
    """
    if case.method == "bitsandbytes":
        return four_bit_tensors(name, weights, nested=case.form == "nested")
    if "fp8" in (case.method, case.form[:3]):
        return float8_tensors(name, weights, case)
    grid = on_grid(
        weights,
        bits=case.bits,
        group=case.group,
        symmetric=case.symmetric,
        scale_dtype=case.scale_dtype,
        group_of=order if case.act_order else None,
    )
    if case.method == "gptq":
        if case.form == "gptq":
            grid.zeros = np.maximum(grid.zeros, 1)
        return gptq_tensors(name, grid, first_format=case.form == "gptq"), grid
    if case.method == "awq":
        return awq_tensors(name, grid), grid
    if case.form == "int-quantized":
        return int8_tensors(name, grid, symmetric=case.symmetric), grid
    return packed_tensors(name, grid, symmetric=case.symmetric), grid


def float8_tensors(name: str, weights: np.ndarray, case: Case) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Values of float8_e4m3fn, whose greatest is 448, with scales for blocks of 16 x 16, for rows or for all."""
    n, k = weights.shape
    tall, wide = {"fp8": (16, 16), "fp8-row": (1, k), "fp8-tensor": (n, k)}[case.form or case.method]
    scales = np.zeros((-(-n // tall), -(-k // wide)), np.float32)
    codes, values = np.zeros((n, k), ml_dtypes.float8_e4m3fn), np.zeros((n, k))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            place = (slice(i * tall, (i + 1) * tall), slice(j * wide, (j + 1) * wide))
            scales[i, j] = np.abs(weights[place]).max() / 448
            codes[place] = (weights[place] / scales[i, j]).astype(ml_dtypes.float8_e4m3fn)
            values[place] = codes[place].astype(np.float64) * float(scales[i, j])
    if case.form == "fp8-tensor":
        scales = scales.reshape(1)
    suffix = "weight_scale_inv" if case.method == "fp8" else "weight_scale"
    return {f"{name}.weight": codes, f"{name}.{suffix}": scales}, values


def quantize_folder(source: Path, target: Path, case: Case, seed: int = 0) -> dict[str, np.ndarray]:
    """A checkpoint with every linear layer but the head quantized; returns the float64 values of each such weight.

    Layers that read the same input share the order of their columns, as GPTQ finds it.
    """
    import torch

    shutil.copytree(source, target)
    rng = np.random.default_rng(seed)
    plain = load_file(target / "model.safetensors")
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, np.ndarray] = {}
    orders: dict[tuple[str, int], np.ndarray] = {}
    for name, tensor in plain.items():
        layer, _, last = name.rpartition(".")
        if last != "weight" or "_proj" not in layer:
            tensors[name] = tensor
            continue
        k = tensor.shape[1]
        kind = layer.rpartition(".")[0] + ("in" if layer.endswith(("q_proj", "k_proj", "v_proj")) else layer[-9:])
        order = orders.setdefault((kind, k), rng.permutation(np.arange(k) // (k if case.group == -1 else case.group)))
        stored, found = store(case, layer, tensor.float().numpy(), order)
        values[name] = found.values() if isinstance(found, Grid) else found
        tensors |= {key: as_torch(array) for key, array in stored.items()}
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"quantization_config": case.settings()}))
    return values


def as_torch(array: np.ndarray) -> Any:
    import torch

    names = {"bfloat16": (np.int16, torch.bfloat16), "float8_e4m3fn": (np.uint8, torch.float8_e4m3fn)}
    if array.dtype.name in names:
        same, dtype = names[array.dtype.name]
        return torch.from_numpy(np.ascontiguousarray(array).view(same).copy()).view(dtype)
    return torch.from_numpy(np.ascontiguousarray(array).copy())
