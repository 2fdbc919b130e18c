"""A graph of its own for prompts in ModelBuilder: what speaks against it, and what a plan says of it."""

from __future__ import annotations

from dataclasses import replace

from coldpress.artifacts.arch import Arch
from coldpress.graph.form import HEAD, Form, products, prompt_bytes
from coldpress.passes.builder_config import ModelBuilderConfig

__all__ = ["against_prompt_graph", "prompt_form", "prompt_note"]


def prompt_form(form: Form) -> Form:
    """Beside `form`, over the same cache."""
    return replace(form, int8_tokens=True)


def against_prompt_graph(config: ModelBuilderConfig, arch: Arch, form: Form, provider: str) -> list[str]:
    """`form` has its quantized nodes; `provider` goes by onnxruntime-genai's name."""
    found = []
    if provider != "cpu":
        found.append("prompt_graph is for the CPU, where prompts are slow at 4 bits; leave it out")
    if config.precision not in ("int4", "int8"):
        found.append(f"prompt_graph has no effect at precision {config.precision}; it is for int4 and int8")
    elif not any(name in form.nodes for name, _ in products(arch, form) if name != HEAD):
        found.append("prompt_graph: the options leave no product but the head to quantize")
    if any(rope.kind == "longrope" and arch.context_length > rope.original_length for rope in arch.rope_kinds):
        found.append(
            "prompt_graph: at the end of the original context onnxruntime-genai computes the cache of a longrope model "
            "anew, which it does not do for two graphs; leave prompt_graph out"
        )
    if config.padding == "left":
        found.append("prompt_graph is for onnxruntime-genai, which a model with padding: left is not for")
    if config.adapter == "inputs":
        found.append("prompt_graph is not built for adapter: inputs; merge the adapter, or leave prompt_graph out")
    found += [
        f"prompt_graph is for models from tokens to logits alone; leave {name} out"
        for name in ("exclude_embeds", "exclude_lm_head", "include_hidden_states")
        if getattr(config, name)
    ]
    return found


def prompt_note(arch: Arch, form: Form) -> str:
    more = prompt_bytes(arch, form) / 1e6
    return (
        f"a second graph for prompts, in int8 with a scale for each token: {more:.0f} MB more on disk and about as "
        "much in memory; made for x86 CPUs with VNNI or AMX"
    )
