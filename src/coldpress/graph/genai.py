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
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coldpress.artifacts.arch import Arch
from coldpress.artifacts.base import read_json
from coldpress.data.tokenizer import TOKENIZER_FILES
from coldpress.errors import CheckpointError, PlanError
from coldpress.registry import nearest

__all__ = ["MAX_LENGTH", "check_search", "copy_tokenizer", "genai_config", "read_generation"]

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
_SEARCH_TYPES: Mapping[str, type] = {
    **{name: type(default) for name, default in _SEARCH.items()},
    "batch_size": int,
    "blank_penalty": float,
    "chunk_size": int,
    "max_length": int,
    "past_present_share_buffer": bool,
    "random_seed": int,
}
"""All that onnxruntime-genai 0.18 reads in the search section, tried one by one; it refuses every other name."""
_TYPE_NAMES: Mapping[type, str] = {bool: "true or false", int: "a whole number", float: "a number"}
_INT32 = 2**31
_SPOKEN = ("bos_token", "eos_token", "unk_token", "chat_template")
"""What of a tokenizer's config names tokens that a prompt will have. A padding token never reaches the model."""
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


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


def check_search(search: Mapping[str, Any] | None, context_length: int | None) -> None:
    """Raise PlanError with all that onnxruntime-genai would not take of `search`; a context of None is not known."""
    problems = []
    for name, value in (search or {}).items():
        if name not in _SEARCH_TYPES:
            close = nearest(name, _SEARCH_TYPES)
            hint = f"did you mean {close}?" if close else f"known: {', '.join(sorted(_SEARCH_TYPES))}"
            problems.append(f"search.{name}: onnxruntime-genai has no such setting; {hint}")
        elif not _fits(value, _SEARCH_TYPES[name]):
            problems.append(f"search.{name} is {_TYPE_NAMES[_SEARCH_TYPES[name]]}, not {value!r}")
        elif name == "max_length" and value < 1:
            problems.append(f"search.max_length is 1 or more, not {value}")
        elif name == "max_length" and context_length is not None and value > context_length:
            problems.append(f"search.max_length {value} is beyond the model's context of {context_length} tokens")
    if problems:
        raise PlanError("ModelBuilder: " + "\n  ".join(problems))


def read_generation(
    folder: Path, config: Mapping[str, Any], search: Mapping[str, Any] | None = None
) -> Mapping[str, Any]:
    """The checkpoint's generation_config.json, {} without one; raises CheckpointError for what cannot be written.

    What `search` sets is not looked at.
    """
    path = folder / "generation_config.json"
    generation = read_json(path) if path.is_file() else {}
    problems = [
        f"{name} of {path} is {_TYPE_NAMES[type(default)]}, not {generation[name]!r}"
        for name, default in _SEARCH.items()
        if name not in (search or {}) and generation.get(name) is not None
        and not _fits(generation[name], type(default))
    ]  # fmt: skip
    for file, content in ((path, generation), (folder / "config.json", config)):
        for name in _TOKEN_IDS:
            value = content.get(name)
            items = value if isinstance(value, list) else [] if value is None else [value]
            if not all(_fits(item, int) for item in items):
                problems.append(f"{name} of {file} is a token id or a list of them, not {value!r}")
    if problems:
        raise CheckpointError(
            "genai_config.json cannot take what the checkpoint says:\n  " + "\n  ".join(problems),
            hint="correct the file; a setting of the search can also be given as `search` of ModelBuilder",
        )
    return generation


def _fits(value: Any, kind: type) -> bool:
    """Whether onnxruntime-genai reads a JSON value as a bool, a 32-bit integer or a number."""
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    if not isinstance(value, int | float) or not math.isfinite(value):
        return False
    return kind is float or (value == int(value) and -_INT32 <= value < _INT32)


def _token_ids(*values: Any) -> list[int]:
    """Ids from an int, a list or nothing each, in order, once."""
    found: dict[int, None] = {}
    for value in values:
        if value is not None:
            found.update(dict.fromkeys(int(item) for item in (value if isinstance(value, list) else [value])))
    return list(found)


def copy_tokenizer(source: Path, checkpoint: Path, target: Path, vocab: int) -> None:
    """Copy tokenizer and chat template from `source`, the configs from `checkpoint`; raises CheckpointError.

    `vocab` is the number of the model's tokens: the tokenizer must not yield ids beyond it.
    """
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
    _check_ids(source, vocab)
    for names, folder in ((TOKENIZER_FILES, source), (_CONFIG_FILES, checkpoint)):
        for name in names:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, target / name)
    _complete_tokenizer_config(target / "tokenizer_config.json")


def _check_ids(source: Path, vocab: int) -> None:
    """Refuse a tokenizer with ids that the model's embedding has no row for.

    A special token that neither the chat template nor a role (bos, eos, unk) names may lie beyond: text yields it only
    by spelling it out. The text models of Gemma 3 have one, for images that they do not take.
    """
    tokenizer = read_json(source / "tokenizer.json")
    named = (tokenizer.get("model") or {}).get("vocab") or {}
    # A unigram model has a list of [piece, score] instead.
    ids = dict(named) if isinstance(named, Mapping) else {item[0]: place for place, item in enumerate(named)}
    spoken = ""
    for name in ("tokenizer_config.json", "special_tokens_map.json", "chat_template.json"):
        beside = read_json(source / name) if (source / name).is_file() else {}
        spoken += json.dumps([beside.get(key) for key in _SPOKEN], ensure_ascii=False)
    template = source / "chat_template.jinja"
    spoken += template.read_text(encoding="utf-8") if template.is_file() else ""
    for token in tokenizer.get("added_tokens") or ():
        ids[token["content"]] = token["id"]
        if token.get("special") and token["content"] not in spoken:
            del ids[token["content"]]
    beyond = {name: token for name, token in ids.items() if token >= vocab}
    if beyond:
        last = max(beyond, key=lambda name: beyond[name])
        raise CheckpointError(
            f"every token must have a row in the embedding: {source / 'tokenizer.json'} goes up to id {beyond[last]} "
            f"({last!r}), and config.json says vocab_size {vocab}; tokens beyond it: {len(beyond)}",
            hint="resize the embedding (model.resize_token_embeddings), or correct vocab_size or the tokenizer",
        )


def _complete_tokenizer_config(path: Path) -> None:
    """onnxruntime-genai opens tokenizer_config.json without asking whether it is there, and knows BOS only from it."""
    config = read_json(path) if path.is_file() else {}
    beside = path.with_name("special_tokens_map.json")
    special = read_json(beside) if beside.is_file() else {}
    missing = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    missing = {key: value for key, value in missing.items() if config.get(key) is None}
    if missing:
        path.write_text(json.dumps({**config, **missing}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
