"""What onnxruntime-genai wants beside the graph: genai_config.json and the tokenizer's files.

Measured with onnxruntime-genai 0.18:
- its tokenizer gives the ids of the Hugging Face one without special tokens; `tokenizer.update_options(
  add_special_tokens="true")` makes it add BOS where the Hugging Face tokenizer does;
- without `intra_op_num_threads` it runs on one thread of a two-core machine;
- the KV cache is allocated for `search.max_length` tokens when a generator is made: 131,072 of them take 8.6 GB for
  Llama-3.2-1B in float32, hence `MAX_LENGTH`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coldpress.artifacts.arch import Arch
from coldpress.artifacts.base import read_json
from coldpress.data.tokenizer import TOKENIZER_FILES
from coldpress.errors import CheckpointError

__all__ = ["MAX_LENGTH", "copy_tokenizer", "genai_config"]

MAX_LENGTH = 4096
"""Default of `search.max_length` where the model's context is longer; a user can raise it up to the context length."""

_CONFIG_FILES = ("config.json", "generation_config.json")

# Search settings that a generation_config may set, and what holds without one.
_SEARCH: Mapping[str, Any] = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "diversity_penalty": 0.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "early_stopping": True,
}


def genai_config(
    arch: Arch,
    config: Mapping[str, Any],
    generation: Mapping[str, Any],
    *,
    threads: int | None,
    spinning: bool = True,
    search: Mapping[str, Any] | None = None,
    provider_options: tuple[Mapping[str, Mapping[str, str]], ...] = (),
    session_options: Mapping[str, str] | None = None,
    position_ids: bool = False,
    inputs_embeds: bool = False,
    outputs: tuple[str, ...] = ("logits",),
    prompt_file: str | None = None,
) -> dict[str, Any]:
    """The content of genai_config.json.

    `config` and `generation` are the checkpoint's config.json and generation_config.json; `threads` those of the CPU
    provider, None elsewhere, and whether they spin; `session_options` are ONNX Runtime's own, by name; `search` is laid
    over the search settings, `outputs` are the graph's besides the KV cache.
    `prompt_file` is a graph of the same inputs and outputs that runs in place of model.onnx for more than one token.
    Rows count: with two of them or more it runs in every step. `rewind_to` is refused for such a pair.
    """
    session: dict[str, Any] = {
        "log_id": "onnxruntime-genai",
        "provider_options": [dict(each) for each in provider_options],
        **(session_options or {}),
    }
    if threads is not None:
        session["intra_op_num_threads"] = threads
        if not spinning:
            session["session.intra_op.allow_spinning"] = "0"
    eos = _token_ids(generation.get("eos_token_id"), config.get("eos_token_id"))
    pad = _token_ids(generation.get("pad_token_id"), config.get("pad_token_id"))
    pad = [token for token in pad if 0 <= token < arch.vocab] or eos
    bos = _token_ids(generation.get("bos_token_id"), config.get("bos_token_id"))
    first = "inputs_embeds" if inputs_embeds else "input_ids"
    model: dict[str, Any] = {
        "type": arch.family.genai_type,
        "context_length": arch.context_length,
        "vocab_size": arch.vocab,
        "decoder": {
            "session_options": session,
            "filename": "model.onnx",
            "head_size": arch.head_dim,
            "hidden_size": arch.hidden,
            "num_attention_heads": arch.heads,
            "num_hidden_layers": arch.layers,
            "num_key_value_heads": arch.kv_heads,
            "inputs": {
                first: first,
                "attention_mask": "attention_mask",
                **({"position_ids": "position_ids"} if position_ids else {}),
                "past_key_names": "past_key_values.%d.key",
                "past_value_names": "past_key_values.%d.value",
            },
            "outputs": {
                **{name: name for name in outputs},
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
        },
    }
    if prompt_file is not None:
        model["type"] = "decoder-pipeline"
        model["decoder"]["pipeline"] = [_pipeline(arch, prompt_file)]
    for name, ids in (("bos_token_id", bos[:1]), ("eos_token_id", eos), ("pad_token_id", pad[:1])):
        if ids:
            model[name] = ids[0] if len(ids) == 1 else ids
    settings = {
        name: default if generation.get(name) is None else generation[name] for name, default in _SEARCH.items()
    }
    settings["max_length"] = min(arch.context_length, MAX_LENGTH)
    settings["past_present_share_buffer"] = True
    return {"model": model, "search": {**settings, **(search or {})}}


def _pipeline(arch: Arch, prompt_file: str) -> dict[str, Any]:
    """Two graphs over one KV cache: onnxruntime-genai runs the first where it is given more than one token."""
    caches = [f"{layer}.{part}" for layer in range(arch.layers) for part in ("key", "value")]
    names = {
        "inputs": ["input_ids", "attention_mask", *(f"past_key_values.{cache}" for cache in caches)],
        "outputs": ["logits", *(f"present.{cache}" for cache in caches)],
    }
    return {
        "prompt": {"filename": prompt_file, **names, "run_on_prompt": True, "run_on_token_gen": False},
        "decode": {"filename": "model.onnx", **names, "run_on_prompt": False, "run_on_token_gen": True},
    }


def _token_ids(*values: Any) -> list[int]:
    """Ids from an int, a list or nothing each, in order, once."""
    found: dict[int, None] = {}
    for value in values:
        if value is not None:
            found.update(dict.fromkeys(int(item) for item in (value if isinstance(value, list) else [value])))
    return list(found)


def copy_tokenizer(source: Path, checkpoint: Path, target: Path) -> None:
    """Copy tokenizer and chat template from `source`, the configs from `checkpoint`; raises CheckpointError."""
    if not (source / "tokenizer.json").is_file():
        slow = (source / "tokenizer.model").is_file()
        raise CheckpointError(
            f"{source} has no tokenizer.json, which onnxruntime-genai reads",
            hint="save it with AutoTokenizer.from_pretrained(..., use_fast=True).save_pretrained(...)"
            if slow
            else "is the download complete?",
        )
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (source / name).is_file():
            read_json(source / name)  # a damaged one is named where it lies
    for names, folder in ((TOKENIZER_FILES, source), (_CONFIG_FILES, checkpoint)):
        for name in names:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, target / name)
    _complete_tokenizer_config(target / "tokenizer_config.json")


def _complete_tokenizer_config(path: Path) -> None:
    """onnxruntime-genai opens tokenizer_config.json without asking whether it is there, and knows BOS only from it."""
    config = read_json(path) if path.is_file() else {}
    beside = path.with_name("special_tokens_map.json")
    special = read_json(beside) if beside.is_file() else {}
    missing = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    missing = {key: value for key, value in missing.items() if config.get(key) is None}
    if missing:
        path.write_text(json.dumps({**config, **missing}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
