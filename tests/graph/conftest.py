"""Building graphs from checkpoints in tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from coldpress.artifacts.arch_config import arch_from_config
from coldpress.artifacts.tensors import TensorSet
from coldpress.graph.decoder import build_decoder
from coldpress.graph.form import EMBEDDING, Form, Quantization, expert_nodes, products
from coldpress.graph.weights import DataFile


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., Path]:
    """build(checkpoint, bits=None, embedding_bits=None, quantization=..., **form) -> folder with model.onnx."""
    count = 0

    def make(
        source: Path,
        bits: int | dict[str, int] | None = None,
        embedding_bits: int | None = None,
        quantization: Quantization | None = None,
        **form: Any,
    ) -> Path:
        nonlocal count
        count += 1
        target = tmp_path / f"graph{count}"
        target.mkdir()
        arch = arch_from_config(json.loads((source / "config.json").read_text()))
        plain = Form(**{"io": "float32", **form})
        chosen: dict[str, int] = (
            dict(bits)
            if isinstance(bits, dict)
            else {}
            if bits is None
            else dict.fromkeys((*(name for name, _ in products(arch, plain)), *expert_nodes(arch)), bits)
        )
        if embedding_bits is not None:
            chosen[EMBEDDING] = embedding_bits
        nodes = {name: replace(quantization or Quantization(), bits=count) for name, count in chosen.items()}
        with TensorSet.open(source) as tensors:
            data = DataFile()
            model = build_decoder(arch, replace(plain, nodes=nodes), tensors, data)
            data.write(target, threads=2)
        ir.save(model, target / "model.onnx")
        return target

    return make
