"""LoRA on a 110M Llama, sequences of 64 to 512 tokens, CPU: Coldpress against Transformers' Trainer with PEFT.

    python benchmarks/finetune_llama_110m.py [--rounds 3] [--steps 6] [--batch 8] [--seed 1]

Random weights (hidden 768, 12 layers, vocabulary 32,000, tied), rank 16 on all linear layers, 8 rows a step. The peer
has its defaults in float32, its batches padded to the longest row; Coldpress has its own defaults. Both train on the
same rows in the same order from the same adapter. Tokens are real ones, seconds those between the end of the first step
and of the last; memory is that of the process that trains. The bars: 3 times the tokens/s, half the peak memory.

The losses of both are printed: they must agree to what bfloat16 rounds away, or the speed is of another training.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seed_workflow import OLIVE
from side_by_side import HERE, Measured, in_turn, machine, markdown, measure, peer_python, verdict
from training_runs import llama_110m, random_rows, workflow, write_rows

SPEED_BAR, MEMORY_BAR = 3.0, 0.5
LOSS_NOISE = 0.01
"""Nats, mean over a batch: a bfloat16 logit of about 2 is off by up to 0.008, up or down."""
PEER = "Trainer + PEFT, float32, padded"


@dataclass(frozen=True)
class Trained:
    """One training of one side."""

    tokens: int
    """Real ones, of all steps but the first."""
    seconds: float
    losses: Sequence[float]
    run: Measured

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def train_ours(model: Path, rows: Path, place: Path, settings: Mapping[str, Any], own: Mapping[str, Any]) -> Trained:
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    text = {"text_cols": ["text"], "strategy": "line-by-line", "max_seq_len": 512, "add_special_tokens": False}
    lora = settings["lora"]
    step = {
        "type": "LoRA",
        "r": lora["r"],
        "alpha": lora["lora_alpha"],
        "lora_dropout": lora["lora_dropout"],
        "target_modules": lora["target_modules"],
        "training_args": {**settings["training"], "seed": settings["seed"], **own},
    }
    config, result = place / "config.json", place / "result.json"
    config.write_text(json.dumps(workflow(model, rows, text, step, place)))
    run = measure([sys.executable, str(HERE / "training_runs.py"), str(config), str(result)])
    found = json.loads(result.read_text())
    (began, first), (ended, last) = found["progress"][0], found["progress"][-1]
    batch = settings["training"]["per_device_train_batch_size"]
    lengths = [len(json.loads(line)["ids"]) for line in rows.read_text().splitlines()]
    tokens = sum(lengths[int(first) * batch : int(last) * batch])
    return Trained(tokens, ended - began, found["record"]["losses"], run)


def train_peer(python: str, model: Path, rows: Path, place: Path, settings: Mapping[str, Any]) -> Trained:
    place.mkdir(parents=True, exist_ok=True)
    result = place / "peer.json"
    command = [python, str(HERE / "peer_trainer.py"), str(model), str(rows), str(result), json.dumps(settings)]
    run = measure(command, environment={"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""})
    found = json.loads(result.read_text())
    return Trained(sum(found["tokens"][1:]), found["ended"][-1] - found["ended"][0], found["losses"], run)


def report(runs: Mapping[str, Sequence[Trained]]) -> str:
    ours, peer = runs.values()
    loads = [one.run.load for each in runs.values() for one in each]
    head = (
        "side",
        "real tokens/s (min-max)",
        "peak anonymous MB",
        "peak resident MB",
        "whole run s",
        "MB, all processes",
    )
    rows = []
    for name, each in runs.items():
        rates = [one.rate for one in each]
        rows.append(
            (
                name,
                f"{statistics.median(rates):,.0f} ({min(rates):,.0f}-{max(rates):,.0f})",
                f"{statistics.median(one.run.largest_anonymous for one in each) / 1e6:,.0f}",
                f"{statistics.median(one.run.largest_resident for one in each) / 1e6:,.0f}",
                f"{statistics.median(one.run.seconds for one in each):.1f}",
                f"{statistics.median(one.run.peak_anonymous for one in each) / 1e6:,.0f}",
            )
        )
    pairs = list(zip(ours, peer, strict=True))
    speed = statistics.median(mine.rate / other.rate for mine, other in pairs)
    anonymous = statistics.median(mine.run.largest_anonymous / other.run.largest_anonymous for mine, other in pairs)
    resident = statistics.median(mine.run.largest_resident / other.run.largest_resident for mine, other in pairs)
    rows.append(
        (
            "ratio",
            f"{speed:.2f}, bar {SPEED_BAR:g}: {verdict(speed, SPEED_BAR, most=False)}",
            f"{anonymous:.2f}, bar {MEMORY_BAR:g}: {verdict(anonymous, MEMORY_BAR)}",
            f"{resident:.2f}, bar {MEMORY_BAR:g}: {verdict(resident, MEMORY_BAR)}",
            "",
            "",
        )
    )
    about = f"{machine()}; {len(ours)} rounds in turn, load {min(loads):.1f} to {max(loads):.1f}"
    return f"{about}\n\n{markdown(head, rows)}"


def losses(mine: Trained, other: Trained) -> str:
    """Step by step, and whether they agree."""
    steps = list(zip(mine.losses, other.losses, strict=True))
    rows = [(f"{place}", f"{a:.4f}", f"{b:.4f}", f"{a - b:+.4f}") for place, (a, b) in enumerate(steps, 1)]
    far = max(abs(a - b) for a, b in steps)
    said = f"largest difference {far:.4f}, bfloat16 noise {LOSS_NOISE}: {verdict(far, LOSS_NOISE)}"
    return f"{markdown(('step', 'loss of Coldpress', 'loss of the peer', 'difference'), rows)}\n\n{said}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="measured, after one that is not")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ours", type=json.loads, default={}, help="JSON: training_args of Coldpress alone")
    parser.add_argument("--peer-python")
    options = parser.parse_args()
    python = options.peer_python or peer_python("olive", OLIVE)
    place = HERE / ".work" / "finetune-110m"
    model = llama_110m(HERE / ".work" / "llama-110m")
    place.mkdir(parents=True, exist_ok=True)
    draw = random.Random(options.seed)
    steps = options.steps + 1
    lengths = [draw.randint(64, 512) for _ in range(steps * options.batch)]
    rows = write_rows(place / "rows.jsonl", random_rows(lengths, options.seed))
    settings = {
        "lora": {"r": 16, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "all-linear"},
        "training": {
            "per_device_train_batch_size": options.batch,
            "max_steps": steps,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "train_sampling_strategy": "sequential",
        },
        "seed": options.seed,
    }
    runs = in_turn(
        {
            "Coldpress": lambda: train_ours(model, rows, place / "coldpress", settings, options.ours),
            PEER: lambda: train_peer(python, model, rows, place, settings),
        },
        options.rounds,
    )
    print(f"{report(runs)}\n\n{losses(runs['Coldpress'][0], runs[PEER][0])}")


if __name__ == "__main__":
    main()
