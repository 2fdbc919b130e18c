"""What the fine-tuning benchmarks share: a 110M Llama, rows of known length, and the record of a finished training.

    python benchmarks/training_runs.py CONFIG RESULT

runs a workflow of one step and writes the JSON of what it measured and of when which training step was done.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

__all__ = [
    "VOCABULARY",
    "adapter_of",
    "llama_110m",
    "random_rows",
    "record_of",
    "watched_run",
    "workflow",
    "write_rows",
]

VOCABULARY = 32_000
SPECIAL = ("<s>", "</s>", "<pad>")


def llama_110m(folder: Path) -> Path:
    """109.5M random weights in bf16, and a tokenizer with one token a word: the text `w7 w9` is the ids 7 and 9."""
    if (folder / "model.safetensors").is_file():
        return folder
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        num_key_value_heads=12, max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1,
        pad_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    words = [*SPECIAL, *(f"w{place}" for place in range(len(SPECIAL), VOCABULARY))]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": place, "content": text, "special": True, "normalized": False, "lstrip": False, "rstrip": False,
             "single_word": False}
            for place, text in enumerate(SPECIAL)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "unk_token": "<pad>", "vocab": {word: n for n, word in enumerate(words)}},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": "<pad>"}), encoding="utf-8")
    return folder


def random_rows(lengths: Sequence[int], seed: int) -> list[list[int]]:
    """Token ids by Zipf's law: word number n with a weight of 1 / n. There is something to learn, so the loss moves."""
    draw = random.Random(seed)
    ids = range(len(SPECIAL), VOCABULARY)
    weights = list(accumulate(1 / (1 + place) for place in range(len(ids))))
    return [draw.choices(ids, cum_weights=weights, k=length) for length in lengths]


def write_rows(path: Path, rows: Sequence[Sequence[int]]) -> Path:
    """JSON lines: `text` is what the tokenizer of `llama_110m` turns into `ids`."""
    lines = (json.dumps({"text": " ".join(f"w{one}" for one in row), "ids": list(row)}) for row in rows)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def workflow(model: Path, data: Path, text: Mapping[str, Any], step: Mapping[str, Any], place: Path) -> dict[str, Any]:
    """A workflow of one training step; cache and output lie in `place`."""
    return {
        "input_model": {"type": "HfModel", "model_path": str(model)},
        "data_configs": [
            {
                "name": "train",
                "type": "HuggingfaceContainer",
                "load_dataset_config": {"data_name": "json", "data_files": str(data), "split": "train"},
                "pre_process_data_config": dict(text),
            }
        ],
        "passes": {"train": {"train_data_config": "train", **step}},
        "cache_dir": str(place / "cache"),
        "output_dir": str(place / "output"),
    }


def record_of(output: Path) -> dict[str, Any]:
    """What Coldpress says of the training whose output folder this is."""
    found: dict[str, Any] = json.loads(next(output.rglob("training.json")).read_text(encoding="utf-8"))
    return found


def adapter_of(output: Path) -> Path:
    """The PEFT folder in an output folder, of Coldpress or of Olive."""
    return next(output.rglob("adapter_model.safetensors")).parent


def watched_run(config: Path, result: Path) -> None:
    """Run a workflow; the clock is read as each progress event comes in."""
    import coldpress
    from coldpress.events import Event, Progress

    seen: list[tuple[float, float]] = []

    def watch(event: Event) -> None:
        if isinstance(event, Progress) and event.unit == "steps":
            seen.append((time.perf_counter(), event.done))

    run = coldpress.run(config, sinks=[watch])
    (step,) = run.steps
    found = {
        "progress": seen,
        "peak_anonymous_bytes": step.peak_anonymous_bytes,
        "peak_bytes": step.peak_bytes,
        "record": record_of(run.output),
    }
    result.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    watched_run(Path(sys.argv[1]), Path(sys.argv[2]))
