"""The seed's local workflow (LoRA, merge, int4 ONNX) on a 3M-parameter Phi-3: Coldpress against Olive 0.13.

    python benchmarks/seed_workflow.py [--rounds 3] [--peer-python PYTHON]

Olive rejects the seed's config as it stands, so it gets the same settings in its own language of today; its telemetry
is off. Both start from an empty cache in the first table, and find everything cached in the second.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from side_by_side import HERE, in_turn, measure, peer_python, report

OLIVE = (
    "olive-ai==0.13.0",
    "onnxruntime-genai==0.14.1",
    "onnxruntime",
    "torch==2.13.0",
    "transformers==5.23.0",
    "peft",
    "accelerate",
    "datasets",
    "bitsandbytes",
    "scipy",
    "requests",
    "scikit-learn",
)
ROOT = HERE.parent
TRAINING = {
    "seed": 0, "data_seed": 42, "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 4, "gradient_checkpointing": False, "learning_rate": 0.0001, "num_train_epochs": 3,
    "max_steps": 10, "logging_steps": 10, "adam_beta2": 0.999, "max_grad_norm": 0.3,
}  # fmt: skip


def make_model(folder: Path) -> None:
    """A random Phi-3 of 3.3M parameters with the tokenizer of the example."""
    if (folder / "config.json").exists():
        return
    import torch
    from transformers import Phi3Config, Phi3ForCausalLM

    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=4096, hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512, original_max_position_embeddings=512, bos_token_id=1,
        eos_token_id=0, pad_token_id=6, sliding_window=None, tie_word_embeddings=False,
    )  # fmt: skip
    Phi3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(ROOT / "examples" / "phrase-classification" / "model" / name, folder / name)


def olive_config(data: Path) -> dict[str, object]:
    return {
        "input_model": {"type": "HfModel", "model_path": "model-cache/microsoft/phi-3-mini"},
        "systems": {
            "local_system": {
                "type": "LocalSystem",
                "accelerators": [{"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}],
            }
        },
        "data_configs": [
            {
                "name": "train",
                "type": "HuggingfaceContainer",
                "load_dataset_config": {"data_name": "json", "data_files": str(data), "split": "train"},
                "pre_process_data_config": {
                    "text_cols": ["phrase", "tone"],
                    "text_template": "### Text: {phrase}\n### The tone is:\n{tone}",
                    "strategy": "join",
                    "max_seq_len": 512,
                    "pad_to_max_len": False,
                    "use_attention_mask": False,
                },
            }
        ],
        "passes": {
            "lora": {
                "type": "LoRA",
                "target_modules": ["o_proj", "qkv_proj"],
                "r": 64,
                "alpha": 64,
                "lora_dropout": 0.1,
                "train_data_config": "train",
                "training_args": TRAINING,
            },
            "merge": {"type": "MergeAdapterWeights"},
            "builder": {"type": "ModelBuilder", "precision": "int4"},
        },
        "host": "local_system",
        "target": "local_system",
        "search_strategy": False,
        "cache_dir": "olive-cache",
        "output_dir": "olive-out",
        "log_severity_level": 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer-python")
    parser.add_argument(
        "--data", type=Path, default=ROOT / "examples" / "phrase-classification" / "dataset" / "train.jsonl"
    )
    options = parser.parse_args()
    peer = options.peer_python or peer_python("olive", OLIVE)
    work = HERE / ".work" / "seed"
    place = work / "project"
    make_model(place / "model-cache" / "microsoft" / "phi-3-mini")
    (place / "dataset").mkdir(parents=True, exist_ok=True)
    shutil.copy(options.data, place / "dataset" / "dataset-classification.json")
    seed = ROOT / "tests" / "workflows" / "seed" / "olive-config.local.json"
    shutil.copy(seed, place / "seed.json")
    (place / "olive.json").write_text(json.dumps(olive_config(place / "dataset" / "dataset-classification.json")))
    quiet = {"HF_HUB_OFFLINE": "1", "OLIVE_DISABLE_TELEMETRY": "1"}
    ours = [str(Path(sys.executable).with_name("coldpress")), "run", "--config", "seed.json"]
    theirs = [str(Path(peer).with_name("olive")), "run", "--config", "olive.json"]

    def fresh_ours():  # type: ignore[no-untyped-def]
        shutil.rmtree(work / "model-cache", ignore_errors=True)
        return measure(ours, cwd=place, environment=quiet)

    def fresh_peer():  # type: ignore[no-untyped-def]
        for name in ("olive-cache", "olive-out"):
            shutil.rmtree(place / name, ignore_errors=True)
        return measure(theirs, cwd=place, environment=quiet)

    peer_name = "Olive 0.13, telemetry off"
    runs = in_turn({"Coldpress": fresh_ours, peer_name: fresh_peer}, options.rounds)
    print(report("The seed's local workflow, from nothing", runs, bar=0.6))
    cached = {
        "Coldpress": lambda: measure(ours, cwd=place, environment=quiet),
        peer_name: lambda: measure(theirs, cwd=place, environment=quiet),
    }
    print(report("The same again, everything cached (bar: 2 s)", in_turn(cached, options.rounds)))


if __name__ == "__main__":
    main()
