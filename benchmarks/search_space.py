"""A search over 48 settings of `phi3-7m` fine-tuned on the seed's data: what a third of the evaluations finds.

    python benchmarks/search_space.py [--shared ../shared] [--seeds 5] [--samples 16] [--place FOLDER]

Two ranks of the adapter times 24 settings of ModelBuilder: precision, block size, symmetry, accuracy level. Goals: at
most 2 points of accuracy less than the adapter of rank 64 has before it is quantized, and at most 45 % of the input's
size; the objective is the median time of an output token.

First every setting is tried (`sequential`), from an empty cache: its best is the optimum, and each step that trials
share must have run once. Then the default sampler searches with each seed; what it measures comes from the same cache,
so that all compare the same figures. The bars: the optimum within 1 % in at most a third of the evaluations (median of
the seeds), each distinct prefix once.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from accuracy_seed_data import split
from side_by_side import HERE, machine, markdown, verdict

import coldpress
from coldpress.cli.display import PlainLines
from coldpress.events import Event, StepFinished

TEXT = {
    "text_template": "### Text: {phrase}\n### The tone is:\n{tone}",
    "label_col": "tone",
    "completion_only_loss": True,
    "strategy": "line-by-line",
    "max_seq_len": 256,
}
WITHIN = 0.01
LOSS = 0.02
SIZE = 0.45
SPACE = {"precision": ["int4", "int8"], "int4_block_size": [32, 64, 128], "int4_is_symmetric": [True, False],
         "int4_accuracy_level": [1, 4]}  # fmt: skip


def workflow(options: argparse.Namespace, place: Path) -> dict[str, Any]:
    """The workflow without a search: LoRA of rank 64, int4."""
    training = {
        "per_device_train_batch_size": 8,
        "num_train_epochs": 6,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "linear",
        "seed": 0,
    }
    lora = {"type": "LoRA", "r": 64, "alpha": 64, "target_modules": "all-linear", "lora_dropout": 0.0}
    return {
        "input_model": {"type": "HfModel", "model_path": str((options.shared / "models" / "phi3-7m").resolve())},
        "data_configs": [
            {
                "name": name,
                "load_dataset_config": {"data_name": "json", "data_files": str(place / f"{name}.jsonl")},
                "pre_process_data_config": TEXT,
            }
            for name in ("train", "test")
        ],
        "evaluators": {"tone": {"metrics": [{"name": "accuracy", "type": "accuracy", "data_config": "test"}]}},
        "passes": {
            "lora": {**lora, "train_data_config": "train", "training_args": training, "evaluator": "tone"},
            "build": {"type": "ModelBuilder", "precision": "int4"},
        },
        "cache_dir": str(place / "cache"),
        "output_dir": str(place / "output"),
    }


def searched(config: dict[str, Any], accuracy: float, strategy: dict[str, Any], place: Path) -> dict[str, Any]:
    """The same as a search over the space."""
    timing = {"max_seconds": 10, "confidence": 0.01}
    token = {"name": "time_per_output_token_p50", "priority": 1, "metric_config": timing}
    metrics = [
        {"name": "size", "type": "size_on_disk",
         "sub_types": [{"name": "bytes", "goal": {"type": "percent-min-improvement", "value": 100 * (1 - SIZE)}}]},
        {"name": "accuracy", "type": "accuracy", "data_config": "test",
         "sub_types": [{"name": "accuracy_score", "goal": {"type": "threshold", "value": accuracy - LOSS}}]},
        {"name": "generation", "type": "generation", "sub_types": [token]},
    ]  # fmt: skip
    lora = {key: value for key, value in config["passes"]["lora"].items() if key != "evaluator"}
    return {
        **config,
        "evaluators": {"all": {"metrics": metrics}},
        "evaluator": "all",
        "passes": {
            "lora": {**lora, "r": [16, 64]},
            "build": {"type": "ModelBuilder", "int4_algo_config": "default", **SPACE},
        },
        "search_strategy": {"include_pass_params": False, **strategy},
        "output_dir": str(place / "output-search"),
    }


class _Steps:
    """Which steps were worked on, by the name of the trial's step."""

    def __init__(self) -> None:
        self.worked: list[str] = []
        self.show = PlainLines(30.0)

    def __call__(self, event: Event) -> None:
        if isinstance(event, StepFinished) and not event.cached:
            self.worked.append(event.output)
        self.show(event)


def loss_of(trial: Any) -> float:
    return next(score.value for score in trial.scores if score.metric == "generation")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = os.environ.get("COLDPRESS_SHARED", Path(__file__).resolve().parents[2] / "shared")
    parser.add_argument("--shared", type=Path, default=Path(shared))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--place", type=Path, default=HERE / ".work" / "search-space")
    parser.add_argument("--keep", action="store_true", help="go on with the cache of the last run")
    options = parser.parse_args()
    place: Path = options.place.resolve()
    if not options.keep:
        shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True, exist_ok=True)
    source = options.shared / "data" / "phrase-classification" / "dataset-classification.json"
    split(source, place, 0)
    plain = workflow(options, place)
    result = coldpress.run(plain, sinks=[PlainLines(30.0)])
    accuracy = result.score("lora", "accuracy").value

    steps = _Steps()
    started = time.perf_counter()
    whole = coldpress.run(searched(plain, accuracy, {"sampler": "sequential"}, place), sinks=[steps]).search
    assert whole is not None
    seconds = time.perf_counter() - started
    measured = [trial for trial in whole.trials if trial.state in ("feasible", "infeasible")]
    feasible = [trial for trial in whole.trials if trial.state == "feasible"]
    best = min(feasible, key=loss_of)
    print(f"\nall {whole.size} settings in {seconds:.0f} s: {len(measured)} measured, {len(feasible)} meet the goals")
    print(f"optimum: trial {best.number} {json.dumps(dict(best.settings))}: {loss_of(best):.4f} ms a token")

    rows = []
    for seed in range(1, options.seeds + 1):
        strategy = {"sampler": "tpe", "sampler_config": {"max_samples": options.samples, "seed": seed}}
        found = coldpress.run(searched(plain, accuracy, strategy, place), sinks=[]).search
        assert found is not None
        tried = [trial for trial in found.trials if trial.state != "pruned"]
        losses = [loss_of(trial) if trial.state == "feasible" else float("inf") for trial in tried]
        winner = min(losses)
        first = next((place for place, one in enumerate(losses, 1) if one <= loss_of(best) * (1 + WITHIN)), None)
        rows.append((seed, len(tried), winner, winner / loss_of(best), first))
    table = [[str(seed), str(tried), f"{value:.4f}", f"{ratio:.4f}", str(first or "not reached")]
             for seed, tried, value, ratio, first in rows]  # fmt: skip
    print(machine())
    print(markdown(["seed", "evaluations", "best found, ms", "of the optimum", "evaluations until within 1 %"], table))
    ratio = statistics.median(row[3] for row in rows)
    evaluations = statistics.median(row[1] for row in rows)
    print(f"median of the optimum {ratio:.4f} in {evaluations:.0f} of {whole.size} evaluations")
    print(f"within 1 % of the optimum: {verdict(ratio, 1 + WITHIN)}")
    print(f"a third of the evaluations: {verdict(evaluations, whole.size / 3)}")
    distinct = len(set(steps.worked))
    print(f"steps worked on: {len(steps.worked)}, distinct: {distinct}")
    print(f"each distinct prefix once: {verdict(len(steps.worked), distinct)}")


if __name__ == "__main__":
    main()
