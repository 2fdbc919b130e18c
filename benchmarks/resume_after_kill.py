"""A training killed with SIGKILL again and again, against the same left alone: final loss and adapter must be equal.

    python benchmarks/resume_after_kill.py [--rounds 2] [--kills 3] [--steps 60] [--save-steps 5] [--shared ../shared]

`phi3-7m` on the seed's phrases, LoRA with dropout, batch 4, on the CPU. Each round draws the steps to kill at from its
own seed; the whole process tree is killed, then the same command is given again, until it ends by itself. The bar: a
difference under 1e-6 in the final loss.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from accuracy_seed_data import split
from side_by_side import HERE, machine, markdown, verdict
from training_runs import adapter_of, record_of, workflow

BAR = 1e-6


@dataclass(frozen=True)
class Attempt:
    """One process of a training. `killed_at` is the last step it was seen to finish."""

    began_at: int
    killed_at: int | None


def attempt(config: Path, kill_at: int | None) -> Attempt:
    """Run until the end, or until that step is done. Raises RuntimeError when it ends otherwise."""
    command = [sys.executable, "-m", "coldpress", "run", str(config), "--log-format", "json"]
    lines: list[str] = []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    began: int | None = None
    for line in process.stdout:
        lines.append(line)
        event = json.loads(line) if line.startswith("{") else {}
        if event.get("event") != "Progress" or event.get("unit") != "steps":
            continue
        done = int(event["done"])
        began = done - 1 if began is None else began
        if kill_at is not None and kill_at <= done < event["total"]:
            kill(process.pid)
            process.wait()
            return Attempt(began, done)
    if process.wait() != 0:
        raise RuntimeError(f"the run ended with {process.returncode}:\n{''.join(lines[-20:])}")
    return Attempt(began or 0, None)


def kill(pid: int) -> None:
    """SIGKILL for a process and all below it, the root first so that it cannot tidy up."""
    root = psutil.Process(pid)
    for one in (root, *root.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()


def config_in(place: Path, options: argparse.Namespace) -> Path:
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    split(options.shared / "data" / "phrase-classification" / "dataset-classification.json", place, 0)
    text = {
        "text_template": "### Text: {phrase}\n### The tone is:\n{tone}",
        "label_col": "tone",
        "completion_only_loss": True,
        "strategy": "line-by-line",
        "max_seq_len": 256,
    }
    training = {
        "per_device_train_batch_size": 4,
        "max_steps": options.steps,
        "save_steps": options.save_steps,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "gradient_checkpointing": False,
        "seed": 7,
    }
    step = {"type": "LoRA", "r": 16, "alpha": 16, "lora_dropout": 0.1, "target_modules": "all-linear"}
    model = (options.shared / "models" / "phi3-7m").resolve()
    config = place / "config.json"
    made = workflow(model, place / "train.jsonl", text, {**step, "training_args": training}, place)
    config.write_text(json.dumps(made))
    return config


def adapter_distance(one: Path, other: Path) -> float:
    """The largest difference of any weight."""
    from safetensors.numpy import load_file

    mine, its = (load_file(adapter_of(folder) / "adapter_model.safetensors") for folder in (one, other))
    if mine.keys() != its.keys():
        raise RuntimeError(f"the adapters have other tensors: {sorted(mine.keys() ^ its.keys())[:3]}")
    return max(float(abs(mine[name] - its[name]).max()) for name in mine)


def killed_training(place: Path, options: argparse.Namespace, seed: int) -> list[Attempt]:
    draw = random.Random(seed)
    targets = sorted(draw.sample(range(options.save_steps + 1, options.steps), options.kills))
    config = config_in(place, options)
    attempts = [attempt(config, target) for target in targets]
    return [*attempts, attempt(config, None)]


def compare(alone: dict[str, Any], killed: dict[str, Any]) -> tuple[float, float]:
    """Difference of the last step's loss, and the largest of any step's."""
    pairs = list(zip(alone["losses"], killed["losses"], strict=True))
    return abs(pairs[-1][0] - pairs[-1][1]), max(abs(a - b) for a, b in pairs)


def said(attempts: Sequence[Attempt]) -> str:
    parts = [f"{one.began_at}-{one.killed_at} killed" for one in attempts if one.killed_at is not None]
    return ", ".join([*parts, f"{attempts[-1].began_at}-end"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = os.environ.get("COLDPRESS_SHARED", HERE.parents[1] / "shared")
    parser.add_argument("--shared", type=Path, default=Path(shared))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--save-steps", type=int, default=5)
    options = parser.parse_args()
    place = HERE / ".work" / "resume"
    attempt(config_in(place / "alone", options), None)
    alone = record_of(place / "alone" / "output")
    rows, worst = [], 0.0
    for seed in range(options.rounds):
        attempts = killed_training(place / "killed", options, seed)
        killed = record_of(place / "killed" / "output")
        last, largest = compare(alone, killed)
        distance = adapter_distance(place / "alone" / "output", place / "killed" / "output")
        worst = max(worst, last)
        figures = (f"{alone['losses'][-1]:.8f}", f"{last:.1e}", f"{largest:.1e}", f"{distance:.1e}")
        rows.append((str(seed), said(attempts), *figures))
        print(" | ".join(rows[-1]), flush=True)
    head = ("round", "steps of each process", "final loss, left alone", "difference", "largest of any step", "adapter")
    print(f"\n{machine()}; {options.steps} steps, a checkpoint every {options.save_steps}\n\n{markdown(head, rows)}")
    print(f"\nfinal loss: {worst:.1e}, bar {BAR:g}: {verdict(worst, BAR)}")


if __name__ == "__main__":
    main()
