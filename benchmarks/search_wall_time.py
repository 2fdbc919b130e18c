"""A whole search, wall time: Coldpress against Olive 0.13 with one config file, one user's metric, the same trials.

    python benchmarks/search_wall_time.py [--rounds 3] [--shared ../shared] [--peer-python PYTHON]

LoRA of two ranks on `phi3-7m`, merged, int4 in two block sizes, with and without zero points, by two algorithms: 16
settings, all tried (`sequential`), each measured by the same Python function on held-out phrases in ONNX Runtime. Both
start from an empty cache. Coldpress also proves every merge and every int4 model against its input; Olive does not.
The bar: half of Olive's time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from accuracy_seed_data import split
from seed_workflow import OLIVE
from side_by_side import HERE, Measured, in_turn, measure, peer_python, report

METRIC = '''
import json
from pathlib import Path

import numpy
import onnxruntime
from tokenizers import Tokenizer

ROWS = ROWS_OF_THE_TEST
MOST = 64


def held_out(model, device, execution_providers, **more):
    """Mean loss in nats a token of held-out phrases."""
    place = Path(model.model_path)
    session = onnxruntime.InferenceSession(str(place), providers=["CPUExecutionProvider"])
    files = [place.parent / "tokenizer.json", *place.parent.parent.rglob("tokenizer.json"), Path(TOKENIZER)]
    tokenizer = Tokenizer.from_file(str(next(one for one in files if one.is_file())))
    total = count = 0
    for line in Path(ROWS).read_text().splitlines()[:MOST]:
        row = json.loads(line)
        ids = tokenizer.encode("### Text: " + row["phrase"] + "\\n### The tone is:\\n" + row["tone"]).ids
        feeds = {"input_ids": numpy.array([ids]), "attention_mask": numpy.ones((1, len(ids)), dtype=numpy.int64)}
        for one in session.get_inputs():
            if one.name.startswith("past"):
                feeds[one.name] = numpy.zeros((1, one.shape[1], 0, one.shape[3]), dtype=numpy.float32)
            elif one.name == "position_ids":
                feeds[one.name] = numpy.arange(len(ids))[None]
        logits = session.run(["logits"], feeds)[0][0, :-1].astype(numpy.float64)
        logits -= logits.max(-1, keepdims=True)
        chosen = logits[numpy.arange(len(ids) - 1), ids[1:]]
        total += float((numpy.log(numpy.exp(logits).sum(-1)) - chosen).sum())
        count += len(ids) - 1
    return {"loss": total / count}
'''


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
            "held_out": {
                "metrics": [
                    {
                        "name": "held_out",
                        "type": "custom",
                        "sub_types": [{"name": "loss", "priority": 1, "higher_is_better": False}],
                        "user_config": {"user_script": str(place / "metric.py"), "evaluate_func": "held_out"},
                    }
                ]
            }
        },
        "evaluator": "held_out",
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
    tokenizer = (options.shared / "models" / "phi3-7m" / "tokenizer.json").resolve()
    script = METRIC.replace("ROWS_OF_THE_TEST", repr(str(work / "test.jsonl"))).replace(
        "TOKENIZER", repr(str(tokenizer))
    )
    (work / "metric.py").write_text(script)
    document = json.dumps(workflow(options.shared, work), indent=1)
    commands = {
        "Coldpress": [str(Path(sys.executable).with_name("coldpress")), "run", "--config", "config.json"],
        "Olive 0.13": [str(Path(peer).with_name("olive")), "run", "--config", "config.json"],
    }
    quiet = {"HF_HUB_OFFLINE": "1", "OLIVE_DISABLE_TELEMETRY": "1", "PYTHONPATH": ""}

    def fresh(name: str) -> Measured:
        place = work / name.split()[0]
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        (place / "config.json").write_text(document)
        return measure(commands[name], cwd=place, environment=quiet)

    runs = in_turn({name: (lambda name=name: fresh(name)) for name in commands}, options.rounds)
    print(report("A search over 16 settings, from nothing", runs, bar=0.5))


if __name__ == "__main__":
    main()
