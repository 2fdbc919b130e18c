"""The passes of a tree: one under each name, or a list of alternatives."""

from __future__ import annotations

from collections.abc import Iterator

from coldpress.config.tree import Node

__all__ = ["is_searched", "pass_nodes", "steps"]


def steps(root: Node) -> dict[str, list[Node]]:
    """Each step's passes, in order: one, or alternatives."""
    passes = root.get("passes")
    named = passes.mapping if passes is not None and passes.mapping is not None else {}
    return {name: [node] if node.items is None else list(node.items) for name, node in named.items()}


def pass_nodes(root: Node) -> Iterator[tuple[str, Node]]:
    """Every pass that is a mapping, alternatives too, with its path in today's form."""
    passes = root.get("passes")
    for name, node in list((passes.mapping if passes is not None and passes.mapping is not None else {}).items()):
        if node.mapping is not None:
            yield f"passes.{name}", node
        for index, item in enumerate(list(node.items or [])):
            if item.mapping is not None:
                yield f"passes.{name}.{index}", item


def is_searched(root: Node) -> bool:
    """Whether the file asks for a search."""
    node = root.get("search_strategy")
    return node is not None and node.value is not None and node.value is not False
