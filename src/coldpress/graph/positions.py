"""What every attention node of a graph reads: lengths, positions, rotary tables, and the mask where it is needed.

B batch, S new tokens, T past and new tokens together

padding right   the kernel gets the number of valid tokens of each row, and counts positions by itself
padding left    every row is T tokens long; positions are an input, and padding is masked in the scores
position_ids    may be an input with padding on the right too: for kernels that do not rotate (`form.rotary`)
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from coldpress.artifacts.arch import Arch, Rope
from coldpress.graph.form import Form, fused_rotary
from coldpress.graph.ops import FLOATS, GraphWriter
from coldpress.graph.weights import RopeTable

__all__ = ["Positions", "write_positions"]

_MASKED = {"float32": -1e9, "float16": -6e4, "bfloat16": -1e9}
"""Added to the score of a token that is padding."""


@dataclass(frozen=True)
class Positions:
    """The values, by what they are."""

    last_index: ir.Value
    """Valid tokens of each row, less one: int32 [B]."""
    total: ir.Value
    """T, int32 scalar."""
    length: ir.Value
    """T, int64 scalar."""
    tables: tuple[tuple[Rope, tuple[ir.Value, ir.Value]], ...]
    """cos and sin of each rope."""
    positions: ir.Value | None
    """int64 [B, S] where a node is told them."""
    bias: ir.Value | None
    """[B, 1, S, T], added to the scores."""

    def table(self, rope: Rope) -> tuple[ir.Value, ir.Value]:
        return next(values for known, values in self.tables if known == rope)


def write_positions(
    arch: Arch, form: Form, graph: GraphWriter, mask: ir.Value, ids: ir.Value, given: ir.Value | None
) -> Positions:
    """Nodes from attention_mask [B, T] and, where they are `given`, position_ids."""
    return _Writer(arch, form, graph, mask, ids, given).write()


class _Writer:
    def __init__(
        self, arch: Arch, form: Form, graph: GraphWriter, mask: ir.Value, ids: ir.Value, given: ir.Value | None
    ) -> None:
        self.arch, self.form, self.graph, self.mask, self.ids, self.given = arch, form, graph, mask, ids, given

    def write(self) -> Positions:
        graph, base, int32 = self.graph, "/model/attn_mask_reformat", ir.DataType.INT32.value
        one = graph.constant([1])
        shape = graph.op("Shape", [self.mask], name=f"{base}/Shape")
        length = graph.op("Gather", [shape, graph.constant(1)], name=f"{base}/Gather", axis=0)
        total = graph.op("Cast", [length], name=f"{base}/Gather/Cast", to=int32)
        if not self.form.left_padding:
            valid = graph.op("ReduceSum", [self.mask, one], name=f"{base}/ReduceSum", keepdims=0)
        else:
            batch = graph.op("Gather", [shape, graph.constant([0])], name=f"{base}/Batch", axis=0)
            valid = graph.op("Expand", [length, batch], name=f"{base}/Expand")
        last = graph.op("Sub", [valid, one], name=f"{base}/Sub")
        last_index = graph.op("Cast", [last], name=f"{base}/Sub/Cast", to=int32)
        switching = tuple(rope for rope in self.arch.rope_kinds if self._switches(rope))
        positions = self.given
        if positions is None and (
            (switching and self.form.rope_switch == "position_ids")
            or any(not fused_rotary(self.arch, rope) for rope in self.arch.rope_kinds)
        ):
            positions = self._counted(valid)
        if switching and self.form.rope_switch == "position_ids":
            assert positions is not None
            longest = length if self.given is None else self._longest(self.given)
            positions = self._beyond(positions, longest, switching[0].original_length)
        names = ("cache", "cache_local")
        tables = tuple(
            (rope, self._tables(name, rope, length)) for name, rope in zip(names, self.arch.rope_kinds, strict=False)
        )
        bias = self._mask_bias() if self.form.left_padding else None
        return Positions(last_index, total, length, tables, positions, bias)

    def _switches(self, rope: Rope) -> bool:
        return rope.kind == "longrope" and self.arch.context_length > rope.original_length

    def _counted(self, valid: ir.Value) -> ir.Value:
        """Position of each new token, int64 [B, S]: a prompt counts from 0, later ones from what came before."""
        graph, base = self.graph, "/model/positions"
        shape = graph.op("Shape", [self.ids], name=f"{base}/Shape")
        new = graph.op("Gather", [shape, graph.constant(1)], name=f"{base}/Gather", axis=0)
        # A padded prompt row has fewer valid tokens than S: its past is 0, not negative.
        before = graph.op("Sub", [valid, new], name=f"{base}/Sub")
        past = graph.op("Max", [before, graph.constant(0)], name=f"{base}/Max")
        column = graph.op("Unsqueeze", [past, graph.constant([1])], name=f"{base}/Unsqueeze")
        steps = graph.op("Range", [graph.constant(0), new, graph.constant(1)], name=f"{base}/Range")
        return graph.op("Add", [column, steps], name=f"{base}/Add")

    def _longest(self, given: ir.Value) -> ir.Value:
        """Tokens of the longest row, without its padding: int64 scalar."""
        graph = self.graph
        last = graph.op("ReduceMax", [given], name="/model/rope/ReduceMax", keepdims=0)
        return graph.op("Add", [last, graph.constant(1)], name="/model/rope/Longest")

    def _beyond(self, positions: ir.Value, length: ir.Value, original: int) -> ir.Value:
        """Positions in the stacked table: behind the short one once the text is longer than the original context."""
        graph, border = self.graph, self.graph.constant(original)
        beyond = graph.op("Greater", [length, border], name="/model/rope/Greater")
        flag = graph.op("Cast", [beyond], name="/model/rope/Cast", to=ir.DataType.INT64.value)
        offset = graph.op("Mul", [flag, border], name="/model/rope/Mul")
        return graph.op("Add", [positions, offset], name="/model/rope/Add")

    def _mask_bias(self) -> ir.Value:
        graph, base, io = self.graph, "/model/attn_mask_bias", FLOATS[self.form.io]
        padding = graph.op("Sub", [graph.constant(1), self.mask], name=f"{base}/Sub")
        ones = graph.op("Cast", [padding], name=f"{base}/Cast", to=io.value)
        low = graph.constant(_MASKED[self.form.io], io.numpy().type)
        scaled = graph.op("Mul", [ones, low], name=f"{base}/Mul")
        wide = graph.op("Unsqueeze", [scaled, graph.constant([1, 2])], name=f"{base}/Unsqueeze")
        shape = graph.op("Shape", [self.ids], name=f"{base}/Shape")
        new = graph.op("Gather", [shape, graph.constant([1])], name=f"{base}/Gather", axis=0)
        one = graph.constant([1])
        target = graph.op("Concat", [one, one, new, one], name=f"{base}/Concat", axis=0)
        return graph.op("Expand", [wide, target], name=f"{base}/Expand")

    def _tables(self, name: str, rope: Rope, length: ir.Value) -> tuple[ir.Value, ir.Value]:
        """cos and sin. A switching model has the short table in the first rows and the long one below, or an If."""
        graph, context, io = self.graph, self.arch.context_length, FLOATS[self.form.io]
        short, long = (rope.short_factors, rope.original_length), (rope.long_factors, context)
        if not self._switches(rope):
            only = (rope.short_factors, context)
            cos, sin = graph.weight(RopeTable(name, rope, (only,), io))
            return cos, sin
        if self.form.rope_switch == "position_ids":
            cos, sin = graph.weight(RopeTable(name, rope, (short, long), io))
            return cos, sin
        branches = []
        for size, part in (("large", long), ("small", short)):
            tables = graph.weight(RopeTable(f"{name}_{size}", rope, (part,), io))
            nodes = [
                ir.node(
                    "Identity", [table], outputs=[ir.Value(name=f"{table.name}_out")], name=f"/model/rope/{size}/{i}"
                )
                for i, table in enumerate(tables)
            ]
            for node, table in zip(nodes, tables, strict=True):
                node.outputs[0].type = table.type
            branches.append(ir.Graph([], [node.outputs[0] for node in nodes], nodes=nodes, name=f"{size}_rope"))
        beyond = graph.op("Greater", [length, graph.constant(rope.original_length)], name="/model/rope/Greater")
        cos, sin = graph.ops(
            "If",
            [beyond],
            name="/model/rope/If",
            outputs=(f"cos_{name}", f"sin_{name}"),
            then_branch=branches[0],
            else_branch=branches[1],
        )
        return cos, sin
