"""A thin writer of ONNX graphs over onnx_ir: named nodes, constants, initializers in the data file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from coldpress.graph.weights import DataFile, Place, Weight

__all__ = ["FLOATS", "IR_VERSION", "MICROSOFT", "OPSET", "GraphWriter"]

MICROSOFT = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""
OPSET = 21
IR_VERSION = 10

FLOATS: Mapping[str, ir.DataType] = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
}


class GraphWriter:
    """Collects the nodes of one graph in order."""

    def __init__(self, data: DataFile) -> None:
        self.data = data
        self.nodes: list[ir.Node] = []
        self.initializers: list[ir.Value] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}

    def op(
        self,
        kind: str,
        inputs: Sequence[ir.Value | None],
        *,
        name: str,
        domain: str = "",
        outputs: Sequence[str] | None = None,
        **attributes: Any,
    ) -> ir.Value:
        """Add a node with one output, or with the named ones; returns the first."""
        return self.ops(kind, inputs, name=name, domain=domain, outputs=outputs, **attributes)[0]

    def ops(
        self,
        kind: str,
        inputs: Sequence[ir.Value | None],
        *,
        name: str,
        domain: str = "",
        outputs: Sequence[str] | None = None,
        **attributes: Any,
    ) -> tuple[ir.Value, ...]:
        """Add a node; an output called "" is left out."""
        values = [ir.Value(name=output) for output in outputs or (f"{name}/output_0",)]
        node = ir.node(kind, inputs, attributes, domain=domain, outputs=values, name=name)
        self.nodes.append(node)
        return tuple(node.outputs)

    def constant(self, value: Any, dtype: type[Any] = np.int64) -> ir.Value:
        """A small tensor inside the model file; equal ones are shared."""
        array = np.asarray(value, dtype)
        key = (array.dtype.name, array.shape, array.tobytes())
        if key not in self._constants:
            text = "_".join(str(item) for item in array.reshape(-1)) + ("" if array.ndim == 0 else "_vector")
            name = f"/constants/{array.dtype.name}/{text}"
            self._constants[key] = self._initializer(name, ir.tensor(array, name=name))
        return self._constants[key]

    def weight(self, weight: Weight) -> tuple[ir.Value, ...]:
        """The tensors of a weight, as initializers in the data file."""
        return tuple(self.place(place) for place in self.data.add(weight))

    def place(self, place: Place) -> ir.Value:
        """An initializer over bytes of the data file, which may be those of another with other dims."""
        return self._initializer(place.name, place.tensor(self.data.name))

    def _initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        shape = ir.Shape(tensor.shape.numpy())
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
        self.initializers.append(value)
        return value

    def model(
        self,
        inputs: Sequence[ir.Value],
        outputs: Sequence[ir.Value],
        *,
        producer: tuple[str, str],
        metadata: Mapping[str, str],
    ) -> ir.Model:
        graph = ir.Graph(
            inputs,
            outputs,
            nodes=self.nodes,
            initializers=self.initializers,
            opset_imports={"": OPSET, MICROSOFT: 1},
            name="decoder",
        )
        return ir.Model(
            graph, ir_version=IR_VERSION, producer_name=producer[0], producer_version=producer[1],
            metadata_props=dict(metadata),
        )  # fmt: skip
