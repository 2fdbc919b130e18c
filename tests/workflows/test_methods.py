"""Fine-tuning methods in whole workflows: what the engine proves is the model that was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import coldpress
from coldpress.passes.merge_adapter_weights import MERGE_LIMITS
from fakes.tiny_models import make_checkpoint

CASES: dict[str, dict[str, dict[str, Any]]] = {
    "a base in 4 bits of its own, streamed into the graph": {
        "tune": {"type": "LoftQ", "r": 4, "use_dora": True, "loftq_iter": 2},
        "build": {"type": "ModelBuilder", "precision": "fp32"},
    },
    "two adapters' trainings, merged": {
        "first": {"type": "LoKr", "r": 2, "decompose_both": True},
        "second": {"type": "LoKr", "rank_dropout": 0.1},
        "merge": {"type": "MergeAdapterWeights"},
    },
    "all weights, then an adapter": {
        "first": {"type": "FullFinetune", "freeze": ["embed_tokens"]},
        "second": {"type": "LoRA", "r": 4, "init_lora_weights": "pissa"},
        "build": {"type": "ModelBuilder", "precision": "fp32"},
    },
}


@pytest.mark.parametrize("name", CASES)
def test_it_runs_and_is_proved(name: str, tmp_path: Path) -> None:
    if "LoftQ" in str(CASES[name]):
        pytest.importorskip("bitsandbytes")
    base = make_checkpoint(tmp_path / "base", family="llama")
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": f"line {number} of a small file"}) + "\n" for number in range(24)))
    passes: dict[str, Any] = {}
    for step, given in CASES[name].items():
        training = {"max_steps": 3, "learning_rate": 1e-3, "per_device_train_batch_size": 4}
        more = {} if given["type"] in ("ModelBuilder", "MergeAdapterWeights") else {
            "train_data_config": "train", "training_args": training}  # fmt: skip
        passes[step] = {**given, **more}
    config = {
        "input_model": {"type": "HfModel", "model_path": str(base)},
        "data_configs": [
            {
                "name": "train",
                "load_dataset_config": {"data_name": "json", "data_files": str(data)},
                "pre_process_data_config": {"text_field": "text", "strategy": "line-by-line", "max_seq_len": 48},
            }
        ],
        "passes": passes,
        "parity": {"tokens": 1024},
        "cache_dir": str(tmp_path / "cache"),
        "output_dir": str(tmp_path / "out"),
    }
    result = coldpress.run(config)
    assert [step.name for step in result.steps] == list(passes)
    proofs = [step.parity for step in result.steps if step.parity is not None]
    assert proofs
    for proof in proofs:
        assert proof.kl < MERGE_LIMITS.kl
        assert proof.tokens >= 1024
    again = coldpress.run(config)
    assert all(step.cached for step in again.steps)
