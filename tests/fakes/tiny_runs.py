"""A whole run in seconds: fine-tuned, merged, built and measured on a random model; everything in it is real."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fakes.tiny_models import make_checkpoint

__all__ = ["tiny_document", "tiny_project"]

TONES = ("joy", "fear")
_LOOSE = {"tokens": 256, "max_kl": 9, "max_perplexity_increase": 9}
"""Random weights at int4 are far from their input; here it matters that it is measured."""


def tiny_document(**more: Any) -> dict[str, Any]:
    pre = {
        "text_template": "{phrase} -> {tone}",
        "label_col": "tone",
        "completion_only_loss": True,
        "strategy": "line-by-line",
        "pad_to_max_len": False,
    }
    data = {"data_name": "json", "data_files": "train.jsonl"}
    return {
        "workflow_id": "tiny",
        "input_model": {"type": "HfModel", "model_path": "a-tiny-model"},
        "data_configs": [
            {
                "name": "rows",
                "type": "HuggingfaceContainer",
                "load_dataset_config": data,
                "pre_process_data_config": pre,
            }
        ],
        "evaluators": {"tone": {"metrics": [{"name": "accuracy", "type": "accuracy", "data_config": "rows"}]}},
        "passes": {
            "lora": {
                "type": "LoRA",
                "r": 4,
                "target_modules": "all-linear",
                "train_data_config": "rows",
                "eval_dataset_size": 0.2,
                "evaluator": "tone",
                "training_args": {
                    "max_steps": 30,
                    "learning_rate": 1e-2,
                    "logging_steps": 2,
                    "eval_strategy": "steps",
                    "eval_steps": 10,
                    "per_device_train_batch_size": 4,
                    "gradient_checkpointing": False,
                },
            },
            "merge": {"type": "MergeAdapterWeights", "parity": _LOOSE},
            "int4": {"type": "ModelBuilder", "precision": "int4", "parity": _LOOSE},
        },
        "evaluator": "tone",
        "cache_dir": "cache",
        "output_dir": "output",
        **more,
    }


def tiny_project(folder: Path, **more: Any) -> Path:
    """A model, forty records and a workflow; the path of the last."""
    make_checkpoint(folder / "a-tiny-model")
    rows = [json.dumps({"phrase": f"phrase {number}", "tone": TONES[number % 2]}) for number in range(40)]
    (folder / "train.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    path = folder / "workflow.json"
    path.write_text(json.dumps(tiny_document(**more), indent=1), encoding="utf-8")
    return path
