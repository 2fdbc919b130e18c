"""A whole search, wall time: Coldpress against Olive 0.13 with one config file, one space, the same trials.

    python benchmarks/search_wall_time.py [--rounds 3] [--shared ../shared] [--peer-python PYTHON]

LoRA of two ranks on `phi3-7m`, merged, int4 in two block sizes, with and without zero points, by two algorithms: 16
settings, all tried (`sequential`), ranked by size. Both start from an empty cache. Coldpress also proves every merge,
and every int4 model that may still be chosen, against its input, which Olive has nothing like; a third side leaves the
proofs out. Olive as it was released ends such a search with errors: it runs mended (`peer_olive_search.py`). The bar:
half of Olive's time.
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from accuracy_seed_data import split
from seed_workflow import OLIVE
from side_by_side import HERE, Measured, in_turn, measure, peer_python, report


def workflow(shared: Path, place: Path) -> dict[str, Any]:
    training = {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "max_steps": 40, "learning_rate": 1e-3,
        "lr_scheduler_type": "linear", "gradient_checkpointing": False, "logging_steps": 20, "seed": 0,
    }  # fmt: skip
    text = {"text_template": "### Text: {phrase}\n### The tone is:\n{tone}", "strategy": "line-by-line",
            "max_seq_len": 128, "pad_to_max_len": False}  # fmt: skip
    modules = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    cpu = {"type": "LocalSystem", "accelerators": [{"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}]}
    return {
        "input_model": {"type": "HfModel", "model_path": str((shared / "models" / "phi3-7m").resolve())},
        "systems": {"local": cpu},
        "data_configs": [
            {
                "name": "train",
                "type": "HuggingfaceContainer",
                "load_dataset_config": {
                    "data_name": "json",
                    "data_files": str(place / "train.jsonl"),
                    "split": "train",
                },
                "pre_process_data_config": text,
            }
        ],
        "evaluators": {
            "size": {
                "metrics": [
                    {
                        "name": "size",
                        "type": "size_on_disk",
                        "sub_types": [{"name": "bytes", "priority": 1, "higher_is_better": False}],
                    }
                ]
            }
        },
        "evaluator": "size",
        "evaluate_input_model": False,
        "passes": {
            "lora": {"type": "LoRA", "r": [16, 64], "alpha": 64, "lora_dropout": 0.0, "target_modules": modules,
                     "train_data_config": "train", "training_args": training},
            "merge": {"type": "MergeAdapterWeights"},
            "build": {"type": "ModelBuilder", "precision": "int4", "int4_block_size": [32, 128],
                      "int4_is_symmetric": [True, False], "int4_algo_config": ["rtn", "k_quant_last"]},
        },
        "search_strategy": {"execution_order": "joint", "sampler": "sequential", "max_samples": 0},
        "host": "local",
        "target": "local",
        "cache_dir": "cache",
        "output_dir": "out",
        "log_severity_level": 2,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = os.environ.get("COLDPRESS_SHARED", Path(__file__).resolve().parents[2] / "shared")
    parser.add_argument("--shared", type=Path, default=Path(shared))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer-python")
    options = parser.parse_args()
    peer = options.peer_python or peer_python("olive", OLIVE)
    work = HERE / ".work" / "search-wall-time"
    work.mkdir(parents=True, exist_ok=True)
    split(options.shared / "data" / "phrase-classification" / "dataset-classification.json", work, 0)
    document = json.dumps(workflow(options.shared, work), indent=1)
    ours = [str(Path(sys.executable).with_name("coldpress")), "run", "config.json"]
    commands = {
        "Coldpress": ours,
        "Olive 0.13, mended": [peer, str(HERE / "peer_olive_search.py"), "config.json"],
        "Coldpress without proofs": [*ours, "parity.enabled=false"],
    }
    # This checkout's Coldpress, also where another one is installed; with its bytecode, as pip would install it.
    compileall.compile_dir(HERE.parent / "src", quiet=1)
    quiet = {"HF_HUB_OFFLINE": "1", "OLIVE_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(HERE.parent / "src")}

    def fresh(name: str) -> Measured:
        place = work / name.replace(" ", "-").replace(",", "")
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        (place / "config.json").write_text(document)
        return measure(commands[name], cwd=place, environment=quiet)

    runs = in_turn({name: (lambda name=name: fresh(name)) for name in commands}, options.rounds)
    print(report("A search over 16 settings, from nothing", runs, bar=0.5))


if __name__ == "__main__":
    main()
