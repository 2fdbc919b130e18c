"""LoRA adapters as inputs of a graph: y = x W^T + (x A) B, with A and B given at run time.

    A   [k, r]   input `<module>.lora_A.weight`      module   as in the checkpoint: model.layers.0.self_attn.q_proj
    B   [r, n]   input `<module>.lora_B.weight`      r        any, of each module its own; alpha / r is worked into B

Each input is an initializer as well, with r = 0: an adapter that leaves a module out leaves it as it is, and without
any adapter the graph is the base model. Names and shapes are those of Olive's `convert-adapters`.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import google.protobuf.message
import numpy as np
import onnx_ir as ir

from coldpress.artifacts.adapter_inputs import Outline
from coldpress.artifacts.arch import Linear
from coldpress.artifacts.base import read_json
from coldpress.artifacts.tensors import TensorSource
from coldpress.errors import CheckpointError
from coldpress.graph.ops import GraphWriter

__all__ = ["LoraInputs", "inputs_of"]


class LoraInputs:
    """Adds the adapters' part to the products of a graph and gathers its inputs."""

    def __init__(self, modules: Collection[str], tensors: TensorSource, graph: GraphWriter, io: ir.DataType) -> None:
        """`modules`: last parts of the names of the linear layers that adapters may change."""
        self._modules, self._tensors, self._graph, self._io = frozenset(modules), tensors, graph, io
        self._deltas: dict[str, ir.Value] = {}
        self.values: list[ir.Value] = []
        """The inputs, in the order of the products."""

    def added(self, name: str, linear: Linear, x: ir.Value, y: ir.Value) -> ir.Value:
        """y with the adapters' part of the product `name`; y itself where no adapter reaches it."""
        modules = [part.tensor.removesuffix(".weight") for part in linear.parts]
        if not any(module.rpartition(".")[2] in self._modules for module in modules):
            return y
        base = name.removesuffix("MatMul")
        pieces = []
        # Where one of query, key and value is adapted, all get inputs: an empty one yields the zeros to stack.
        for module, part in zip(modules, linear.parts, strict=True):
            rows = self._tensors.info(part.tensor).shape[0]
            delta = self._delta(module, linear.k, rows, x)
            if part.count != rows:
                bounds = [self._graph.constant([edge]) for edge in (part.first, part.first + part.count, -1)]
                delta = self._graph.op("Slice", [delta, *bounds], name=f"{base}lora/Slice_{part.first}")
            pieces.append(delta)
        if len(pieces) > 1:
            pieces = [self._graph.op("Concat", pieces, name=f"{base}lora/Concat", axis=-1)]
        return self._graph.op("Add", [y, pieces[0]], name=f"{base}lora/Add")

    def _delta(self, module: str, k: int, n: int, x: ir.Value) -> ir.Value:
        """(x A) B of a whole module: gate and up may be halves of one."""
        if module not in self._deltas:
            node = "/" + module.replace(".", "/")
            a = self._input(f"{module}.lora_A.weight", (k, f"{module}.lora_r"))
            b = self._input(f"{module}.lora_B.weight", (f"{module}.lora_r", n))
            low = self._graph.op("MatMul", [x, a], name=f"{node}/lora_A/MatMul")
            self._deltas[module] = self._graph.op("MatMul", [low, b], name=f"{node}/lora_B/MatMul")
        return self._deltas[module]

    def _input(self, name: str, shape: tuple[int | str, int | str]) -> ir.Value:
        empty = np.zeros([0 if isinstance(size, str) else size for size in shape], self._io.numpy())
        value = ir.Value(
            name=name,
            type=ir.TensorType(self._io),
            shape=ir.Shape(shape),
            const_value=ir.tensor(empty, dtype=self._io, name=name),
        )
        self._graph.initializers.append(value)
        self.values.append(value)
        return value


def inputs_of(folder: Path) -> dict[str, Outline]:
    """The LoRA inputs of a GenAI folder's graph: dtype and shape by name, None for any size. Raises CheckpointError."""
    genai = read_json(folder / "genai_config.json").get("model", {})
    graph_file = folder / str(genai.get("decoder", {}).get("filename", "model.onnx"))
    try:
        graph = ir.load(graph_file).graph
    except (OSError, ValueError, google.protobuf.message.DecodeError) as error:
        raise CheckpointError(f"{graph_file} cannot be read as an ONNX model: {error}") from error
    return {
        value.name or "": (
            value.dtype.numpy().name,
            tuple(size if isinstance(size, int) else None for size in value.shape),
        )
        for value in graph.inputs
        if ".lora_" in (value.name or "") and value.dtype is not None and value.shape is not None
    }
