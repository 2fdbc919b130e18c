"""Which products of a graph run on the codes that a quantized checkpoint holds, and why the others do not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from coldpress.artifacts.arch import Arch
from coldpress.artifacts.quantized import agreed_packing
from coldpress.artifacts.stored import Packing
from coldpress.graph.form import HEAD, FloatType, Form, Quantization, expert_nodes, products

__all__ = ["none_taken", "take_over"]


def take_over(
    arch: Arch,
    form: Form,
    packings: Mapping[str, Packing | str],
    *,
    block_size: int | None = None,
    symmetric: bool | None = None,
) -> tuple[Form, tuple[str, ...]]:
    """The form with every node that can run on stored codes made to, and what is to be said of it.

    `packings`: of the checkpoint (`artifacts.quantized`). `block_size` and `symmetric` count where the user gave them.
    Codes of fewer bits than asked for are taken: they are exact as they are.
    """
    nodes, taken, again, plain = dict(form.nodes), Counter[str](), Counter[str](), 0
    for name, linear in products(arch, form):
        parts = [part.tensor for part in linear.parts]
        if not any(part in packings for part in parts) or (name == HEAD and form.exclude_lm_head):
            continue
        q, packing = nodes.get(name), agreed_packing(packings, parts)
        if q is None:
            plain += 1
        elif isinstance(packing, str):
            again[packing.partition(": ")[2] or "parts of one product are packed differently"] += 1
        elif (against := _against(packing, q.bits, block_size, symmetric)) is not None:
            again[against] += 1
        else:
            taken[_described(packing, form.io)] += 1
            nodes[name] = Quantization(
                packing.bits, packing.block_size, packing.symmetric, q.accuracy_level, taken=packing
            )
    for name, layer in expert_nodes(arch).items():
        for tensor, _ in arch.expert_tensors(layer):
            if tensor in packings and name in nodes:
                packing = packings[tensor]
                again[packing if isinstance(packing, str) else "experts are put together in another order"] += 1
            elif tensor in packings:
                plain += 1
    notes = [f"taken over bit for bit: {count} matrices ({what})" for what, count in taken.items()]
    notes += [f"dequantized and quantized again: {count} matrices, as {why}" for why, count in again.items()]
    if plain:
        notes.append(f"dequantized: {plain} matrices")
    return replace(form, nodes=nodes), tuple(notes)


def none_taken(packings: Mapping[str, Packing | str]) -> dict[str, Packing | str]:
    """For weights that are no longer those of the codes."""
    return dict.fromkeys(packings, "an adapter is added to them, or was trained on other ones")


def _against(packing: Packing, bits: int, block_size: int | None, symmetric: bool | None) -> str | None:
    if packing.bits > bits:
        return f"they are stored at {packing.bits} bits and wanted at {bits}"
    if block_size is not None and block_size != packing.block_size:
        return f"they are stored in blocks of {packing.block_size} and wanted in blocks of {block_size}"
    if symmetric is not None and symmetric != packing.symmetric:
        stored, wanted = ("without", "with") if packing.symmetric else ("with", "without")
        return f"they are stored {stored} zero points and wanted {wanted}"
    return None


def _described(packing: Packing, io: FloatType) -> str:
    words = [f"{packing.method} int{packing.bits}", f"block {packing.block_size}"]
    if packing.block_size != packing.group:
        words.append(f"the scale of each group of {packing.group} repeated")
    if packing.order:
        words.append("inputs gathered into the order of the columns")
    if io not in ("float32", packing.scale_dtype):
        words.append(f"scales rounded from {packing.scale_dtype} to {io}")
    return ", ".join(words)
