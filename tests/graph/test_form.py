"""Names and choices of a graph that a plan knows without building it."""

from __future__ import annotations

from coldpress.artifacts.arch_config import arch_from_config
from coldpress.graph.form import fused_rotary, mixed_layers, products

CONFIG = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 16,
    "num_attention_heads": 4, "vocab_size": 100,
}  # fmt: skip


def test_mixed_layers_are_those_of_llama_cpp() -> None:
    # use_more_bits in llama-quant.cpp: i < n/8, i >= 7n/8, or (i - n/8) % 3 == 2.
    chosen = {int(name.split(".")[1].split("/")[0]) for name in mixed_layers(arch_from_config(CONFIG))}
    assert chosen == {0, 1, 14, 15, 4, 7, 10, 13}


def test_products_are_five_a_layer_and_the_head() -> None:
    names = [name for name, _ in products(arch_from_config(CONFIG))]
    assert len(names) == len(set(names)) == 16 * 5 + 1
    assert {name for name in mixed_layers(arch_from_config(CONFIG)) if "qkv" in name or "down" in name} < set(names)


def test_rotary_in_the_attention_kernel_wants_multiples_of_16() -> None:
    for head_dim, fused in ((16, True), (96, True), (8, False), (24, False)):
        arch = arch_from_config({**CONFIG, "head_dim": head_dim})
        assert fused_rotary(arch, arch.rope) is fused
