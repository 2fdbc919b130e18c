"""Random tiny decoders made with Transformers, and stepping an ONNX graph with its KV cache in plain ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from transformers import AutoConfig, AutoModelForCausalLM

__all__ = ["TINY", "Stepper", "steps_of_transformers", "tiny_model"]

_SHORT, _LONG = [1.0 + 0.02 * i for i in range(8)], [1.5 + 0.4 * i for i in range(8)]
_LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 80, "max_position_embeddings": 128, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_PHI3 = {**_LLAMA, "model_type": "phi3", "original_max_position_embeddings": 128, "pad_token_id": 0}
_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
_LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
_LONGROPE = {"rope_type": "longrope", "short_factor": _SHORT, "long_factor": _LONG}


def _rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


TINY: Mapping[str, dict[str, Any]] = {
    "llama-gqa": _LLAMA,
    "llama-mha-tied": {**_LLAMA, "num_key_value_heads": 4, "tie_word_embeddings": True},
    "llama-head-32": {**_LLAMA, "head_dim": 32},
    "llama-biases": {**_LLAMA, "attention_bias": True, "mlp_bias": True},
    "llama-linear": {**_LLAMA, **_rope("linear", factor=4.0)},
    "llama-dynamic": {**_LLAMA, **_rope("dynamic", factor=2.0)},
    "llama-llama3": {**_LLAMA, **_rope("llama3", **_LLAMA3)},
    "llama-yarn": {**_LLAMA, **_rope("yarn", factor=4.0, original_max_position_embeddings=32)},
    "llama-head-24": {**_LLAMA, "head_dim": 24},
    "llama-head-8": {**_LLAMA, "head_dim": 8},
    "llama-ragged": {
        **_LLAMA, "hidden_size": 72, "head_dim": 16, "intermediate_size": 100, "tie_word_embeddings": True},
    "mistral-window": {**_LLAMA, "model_type": "mistral", "sliding_window": 7},
    "phi3-gqa": _PHI3,
    "phi3-mha": {**_PHI3, "num_key_value_heads": 4},
    "phi3-window": {**_PHI3, "sliding_window": 9},
    "phi3-partial-16-of-32": {**_PHI3, "hidden_size": 128, **_rope("default", partial_rotary_factor=0.5)},
    "phi3-partial-24-of-32": {**_PHI3, "hidden_size": 128, **_rope("default", partial_rotary_factor=0.75)},
    "phi3-longrope": {**_PHI3, "original_max_position_embeddings": 32, **_rope(kind="longrope", **{
        key: value for key, value in _LONGROPE.items() if key != "rope_type"})},
    "phi3-longrope-head-8": {
        **_PHI3, "num_attention_heads": 8, "num_key_value_heads": 4, "original_max_position_embeddings": 32,
        **_rope("longrope", short_factor=_SHORT[:4], long_factor=_LONG[:4])},
    "ministral-alternating": {
        **_LLAMA, "model_type": "ministral", "head_dim": 16, "sliding_window": 7, "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "phi4-mini": {
        **_PHI3, "hidden_size": 128, "num_key_value_heads": 1, "tie_word_embeddings": True, "sliding_window": None,
        "original_max_position_embeddings": 32, **_rope("longrope", partial_rotary_factor=0.75,
        short_factor=[1.0] * 12, long_factor=[1.2 + 0.3 * i for i in range(12)])},
    "qwen2": {**_LLAMA, "model_type": "qwen2"},
    "qwen2-window": {**_LLAMA, "model_type": "qwen2", "num_hidden_layers": 3, "use_sliding_window": True,
                     "sliding_window": 5, "max_window_layers": 1, "tie_word_embeddings": True},
    "qwen3": {**_LLAMA, "model_type": "qwen3", "head_dim": 32},
    "qwen3-head-24": {**_LLAMA, "model_type": "qwen3", "head_dim": 24, "attention_bias": True},
    "gemma": {**_LLAMA, "model_type": "gemma", "num_key_value_heads": 1, "head_dim": 32, "tie_word_embeddings": True},
    "gemma2": {**_LLAMA, "model_type": "gemma2", "head_dim": 32, "num_hidden_layers": 3, "sliding_window": 7,
               "query_pre_attn_scalar": 24, "tie_word_embeddings": True},
    "gemma3": {**_LLAMA, "model_type": "gemma3_text", "head_dim": 32, "num_hidden_layers": 7, "sliding_window": 6,
               "query_pre_attn_scalar": 40, "tie_word_embeddings": True, "rope_parameters": {
                   "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
                   "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "smollm2": {**_LLAMA, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 144,
                "tie_word_embeddings": True, **_rope("default")},
    "smollm3": {**_LLAMA, "model_type": "smollm3", "pad_token_id": 0, "num_hidden_layers": 5,
                "tie_word_embeddings": True},
    "smollm3-window": {**_LLAMA, "model_type": "smollm3", "pad_token_id": 0, "num_hidden_layers": 3,
                       "no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 6},
    "olmo2": {**_LLAMA, "model_type": "olmo2", "num_hidden_layers": 3},
    "olmo3": {**_LLAMA, "model_type": "olmo3", "num_hidden_layers": 5, "sliding_window": 6,
              **_rope("yarn", factor=4.0, original_max_position_embeddings=32)},
    "granite": {**_LLAMA, "model_type": "granite", "embedding_multiplier": 3.0, "residual_multiplier": 0.4,
                "attention_multiplier": 0.1, "logits_scaling": 2.0, "attention_bias": True},
    "starcoder2": {**_LLAMA, "model_type": "starcoder2", "sliding_window": 8, "tie_word_embeddings": True},
    "stablelm": {**_LLAMA, "model_type": "stablelm", "hidden_size": 128, "use_qkv_bias": True,
                 "num_key_value_heads": 4},
    "phi-2": {**_LLAMA, "model_type": "phi", "num_key_value_heads": 4, "hidden_size": 128,
              "partial_rotary_factor": 0.5},
    "phi-2-partial-12-of-32": {**_LLAMA, "model_type": "phi", "num_key_value_heads": 4, "hidden_size": 128,
                               "partial_rotary_factor": 0.4},
    "gpt-neox": {**_LLAMA, "model_type": "gpt_neox", "hidden_size": 128, "num_key_value_heads": 4,
                 **_rope("default", partial_rotary_factor=0.25)},
    "gpt-neox-sequential": {**_LLAMA, "model_type": "gpt_neox", "num_key_value_heads": 4,
                            "use_parallel_residual": False, "attention_bias": False,
                            **_rope("default", partial_rotary_factor=1.0)},
    "qwen3-moe": {**_LLAMA, "model_type": "qwen3_moe", "head_dim": 32, **_MOE, "moe_intermediate_size": 48,
                  "norm_topk_prob": True},
    "qwen3-moe-some-layers": {**_LLAMA, "model_type": "qwen3_moe", "num_hidden_layers": 5, **_MOE,
                              "moe_intermediate_size": 40, "mlp_only_layers": [3], "decoder_sparse_step": 2,
                              "norm_topk_prob": False, "attention_bias": True, "tie_word_embeddings": True},
    "mixtral": {**_LLAMA, "model_type": "mixtral", **_MOE},
    "mixtral-window": {**_LLAMA, "model_type": "mixtral", **_MOE, "sliding_window": 7, "hidden_size": 72,
                       "head_dim": 16, "intermediate_size": 100},
    "gpt-oss": {**_LLAMA, "model_type": "gpt_oss", "head_dim": 16, **_MOE, "sliding_window": 7,
                "num_hidden_layers": 3, **_rope("yarn", factor=4.0, original_max_position_embeddings=32,
                                                beta_fast=32.0, beta_slow=1.0, truncate=False)},
    "gpt-oss-head-24": {**_LLAMA, "model_type": "gpt_oss", "head_dim": 24, **_MOE, "swiglu_limit": 1.0,
                        "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 5,
                        **_rope("yarn", factor=4.0, original_max_position_embeddings=32, truncate=False)},
}  # fmt: skip
"""Configs by family and what is special about them."""


def tiny_model(name: str, folder: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A model with logits of order 1 and nothing left at its neutral value, saved in `folder`; returned in float32."""
    torch.manual_seed(seed)
    settings = dict(TINY[name])
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.copy_(torch.randn_like(parameter) * 1.2 / parameter.shape[1] ** 0.5)
        model.get_input_embeddings().weight.mul_(3.0)
        model.to(dtype).save_pretrained(folder)
    # Read again: narrowing also narrowed the rope's frequencies, which a checkpoint does not hold.
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


class Stepper:
    """A graph with its KV cache, fed token by token."""

    def __init__(self, folder: Path, *, threads: int = 1) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
        self.past: dict[str, np.ndarray] = {}
        self.mask: np.ndarray | None = None

    def __call__(
        self, ids: np.ndarray, mask: np.ndarray | None = None, positions: np.ndarray | None = None
    ) -> np.ndarray:
        """Logits [B, S, V] of new tokens [B, S]; `mask` says which count (all), `positions` where they stand."""
        new = np.ones_like(ids) if mask is None else mask
        self.mask = new if self.mask is None else np.concatenate([self.mask, new], axis=1)
        feed: dict[str, np.ndarray] = {"input_ids": ids, "attention_mask": self.mask}
        if positions is not None:
            feed["position_ids"] = positions
        kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        for value in self.session.get_inputs():
            if value.name.startswith("past_key_values"):
                shape = (len(ids), value.shape[1], 0, value.shape[3])
                feed[value.name] = self.past.get(value.name, np.zeros(shape, kinds[value.type]))
        names = [value.name for value in self.session.get_outputs()]
        found = dict(zip(names, self.session.run(names, feed), strict=True))
        self.past = {
            name.replace("present.", "past_key_values."): array for name, array in found.items() if "present" in name
        }
        return found["logits"]


@torch.no_grad()
def steps_of_transformers(model: Any, ids: np.ndarray, prompt: int) -> np.ndarray:
    """Logits [B, T, V] of a prompt and then one token after the other, with Transformers' own KV cache."""
    out = model(torch.tensor(ids[:, :prompt]), use_cache=True)
    found = [out.logits]
    for position in range(prompt, ids.shape[1]):
        out = model(torch.tensor(ids[:, position : position + 1]), past_key_values=out.past_key_values, use_cache=True)
        found.append(out.logits)
    return torch.cat(found, dim=1).numpy()
