"""LoRA with the seed's recipe on the seed's data: Coldpress against Olive 0.13, in real tokens/s and held-out accuracy.

    python benchmarks/finetune_seed_data.py [--shared ../shared] [--rounds 3] [--epochs 6] [--steps N]
                                            [--sides "Olive joined" ...]

`phi3-7m`, all distinct phrases but 250 (the split of accuracy_seed_data.py); batch 1, accumulation 4, rank and alpha 64
on all linear layers, learning rate 1e-3. Round n uses the seed n for the split, the adapter and the order. Tokens are
those of the data, without padding; seconds are those of the training loop, without imports, loading and saving.
The bars, at equal or better accuracy: 4 times Olive line by line, 1.6 times Olive joined.

Olive pads each row to max_seq_len unless told not to. That side runs only `--padded-steps` steps and is not scored.
With `--steps` every side stops there. A round takes about 15 minutes on two quiet cores, half of them Olive's 1,344
steps line by line; each side is told as it ends.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from accuracy_seed_data import HELD_OUT, split
from seed_workflow import OLIVE
from side_by_side import HERE, Measured, in_turn, machine, markdown, measure, peer_python, verdict
from training_runs import adapter_of, record_of, workflow

TEMPLATE = "### Text: {phrase}\n### The tone is:\n{tone}"
OLIVE_TEMPLATE = f"<s> {TEMPLATE} <|endoftext|>"
"""Olive puts the special tokens around a text with spaces; its models are scored on texts of that form."""
CONTEXT = 512
LORA = {"type": "LoRA", "r": 64, "alpha": 64, "lora_dropout": 0.1}
LINEAR = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
PADDED = "Olive line by line, padded to 512"
SIDES = {
    "Olive line by line": {"strategy": "line-by-line", "pad_to_max_len": False},
    "Olive line by line, batch 8": {"strategy": "line-by-line", "pad_to_max_len": False},
    "Olive joined": {"strategy": "join"},
    PADDED: {"strategy": "line-by-line"},
}
BARS = {"Olive line by line": 4.0, "Olive joined": 1.6}


@dataclass(frozen=True)
class Trained:
    """One training of one side."""

    tokens: int
    """Real ones, over all epochs."""
    seconds: float
    """Of the loop."""
    steps: int
    run: Measured
    accuracy: float | None = None
    padding: float = 0.0
    """Share of all positions."""

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Task:
    """One seed's data and settings."""

    model: Path
    place: Path
    seed: int
    epochs: float
    steps: int

    def training(self, batch: int, steps: int | None = None) -> dict[str, Any]:
        found = {
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": 4,
            "num_train_epochs": self.epochs,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "linear",
            "warmup_steps": 0.03,
            "adam_beta2": 0.999,
            "max_grad_norm": 0.3,
            "gradient_checkpointing": False,
            "logging_steps": 50,
            "seed": self.seed,
        }
        limit = steps or self.steps
        return {**found, "max_steps": limit} if limit else found


def prepare_task(options: argparse.Namespace, seed: int) -> Task:
    place = HERE / ".work" / "finetune-seed-data" / str(seed)
    place.mkdir(parents=True, exist_ok=True)
    split(options.shared / "data" / "phrase-classification" / "dataset-classification.json", place, seed)
    return Task((options.shared / "models" / "phi3-7m").resolve(), place, seed, options.epochs, options.steps)


def train_ours(task: Task) -> Trained:
    place = task.place / "coldpress"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    text = {"text_template": TEMPLATE, "label_col": "tone", "completion_only_loss": True, "strategy": "line-by-line",
            "max_seq_len": CONTEXT}  # fmt: skip
    step = {**LORA, "target_modules": "all-linear", "training_args": task.training(1)}
    config = place / "config.json"
    config.write_text(json.dumps(workflow(task.model, task.place / "train.jsonl", text, step, place)))
    run = measure([sys.executable, "-m", "coldpress", "run", str(config)], environment={"HF_HUB_OFFLINE": "1"})
    record = record_of(place / "output")
    found = accuracy(task, adapter_of(place / "output"), TEMPLATE)
    tokens = record["tokens"] if task.steps else round(data_tokens(task, text) * task.epochs)
    if abs(record["tokens"] / tokens - 1) > 0.02:
        print(f"training.json says {record['tokens']} tokens, the data have {tokens}", file=sys.stderr)
    return Trained(tokens, record["seconds"], record["steps"], run, found)


def data_tokens(task: Task, text: Mapping[str, Any]) -> int:
    """Of one epoch, counted here."""
    from coldpress.config.schema import DataConfig
    from coldpress.data.prepare import prepare
    from coldpress.data.tokenizer import Tokenizer

    source = {"data_name": "json", "data_files": str(task.place / "train.jsonl")}
    config = {"name": "train", "load_dataset_config": source, "pre_process_data_config": dict(text)}
    prepared = prepare(DataConfig.model_validate(config), Tokenizer.load(task.model), context_length=CONTEXT)
    return prepared.train.tokens


def train_olive(task: Task, name: str, python: str, padded_steps: int) -> Trained:
    place = task.place / name.replace(" ", "-").replace(",", "")
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    text = {"text_template": TEMPLATE, "max_seq_len": CONTEXT, **SIDES[name]}
    few = min(padded_steps, task.steps or padded_steps) if name == PADDED else None
    training = task.training(8 if "batch 8" in name else 1, few)
    step = {**LORA, "target_modules": LINEAR, "training_args": training}
    config = workflow(task.model, task.place / "train.jsonl", text, step, place)
    cpu = {"type": "LocalSystem", "accelerators": [{"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}]}
    config |= {"systems": {"local": cpu}, "host": "local", "target": "local"}
    file, result = place / "config.json", place / "seen.json"
    file.write_text(json.dumps(config))
    quiet = {"HF_HUB_OFFLINE": "1", "OLIVE_DISABLE_TELEMETRY": "1", "PYTHONPATH": ""}
    run = measure([python, str(HERE / "peer_olive_lora.py"), str(file), str(result)], cwd=place, environment=quiet)
    seen = json.loads(result.read_text())
    found = None if name == PADDED else accuracy(task, adapter_of(place), OLIVE_TEMPLATE)
    padding = 1 - seen["tokens"] / seen["positions"]
    return Trained(seen["tokens"], seen["seconds"], seen["steps"], run, found, padding)


def accuracy(task: Task, adapter: Path | None, template: str) -> float:
    """By label likelihood, in float32, the same code for every side."""
    from coldpress.artifacts.base import Artifact
    from coldpress.config.metrics import AccuracyMetric
    from coldpress.config.schema import DataConfig
    from coldpress.evaluate.session import evaluate_models

    config = DataConfig.model_validate(
        {
            "name": "test",
            "load_dataset_config": {"data_name": "json", "data_files": str(task.place / "test.jsonl")},
            "pre_process_data_config": {"text_template": template, "label_col": "tone", "strategy": "line-by-line",
                                        "max_seq_len": CONTEXT},
        }
    )  # fmt: skip
    model = Artifact(task.model, "checkpoint", task.model, adapter=adapter)
    metric = AccuracyMetric(name="accuracy", type="accuracy", data_config="test")
    (score,) = evaluate_models({"tuned": model}, [metric], {"test": config})
    return score.value


def table(runs: Mapping[str, Sequence[Trained]]) -> str:
    loads = [one.run.load for each in runs.values() for one in each]
    rounds = len(next(iter(runs.values())))
    head = ("side", "loss on", "real tokens/s (min-max)", "padding", "steps", "loop s", "whole run s",
            "peak anonymous MB", "peak resident MB", "held-out accuracy (min-max)")  # fmt: skip
    rows = []
    for name, each in runs.items():
        rates, scores = [one.rate for one in each], [one.accuracy for one in each if one.accuracy is not None]
        rows.append(
            (
                name,
                "the answer" if name == "Coldpress" else "the whole text",
                f"{statistics.median(rates):,.0f} ({min(rates):,.0f}-{max(rates):,.0f})",
                f"{statistics.median(one.padding for one in each):.0%}",
                str(each[0].steps),
                f"{statistics.median(one.seconds for one in each):.1f}",
                f"{statistics.median(one.run.seconds for one in each):.1f}",
                f"{statistics.median(one.run.peak_anonymous for one in each) / 1e6:.0f}",
                f"{statistics.median(one.run.peak_resident for one in each) / 1e6:.0f}",
                f"{statistics.median(scores):.1%} ({min(scores):.1%}-{max(scores):.1%})" if scores else "-",
            )
        )
    about = f"{machine()}; {rounds} rounds in turn, load {min(loads):.1f} to {max(loads):.1f}"
    return f"{about}\n\n{markdown(head, rows)}"


def ratios(runs: Mapping[str, Sequence[Trained]]) -> str:
    """Of tokens/s, and the difference in accuracy: medians over the rounds, in each of which both had one machine."""
    ours, *peers = runs
    rows = []
    for name in peers:
        pairs = list(zip(runs[ours], runs[name], strict=True))
        ratio = statistics.median(mine.rate / other.rate for mine, other in pairs)
        bar = f"{BARS[name]:g}: {verdict(ratio, BARS[name], most=False)}" if name in BARS else "-"
        scores = [(mine.accuracy, other.accuracy) for mine, other in pairs]
        gained = [mine - other for mine, other in scores if mine is not None and other is not None]
        more = statistics.median(gained) if gained else 0.0
        said = f"{100 * more:+.1f}: {verdict(more, 0, most=False)}" if gained else "-"
        rows.append((name, f"{ratio:.2f}", bar, said))
    return markdown(("Coldpress to", "tokens/s", "bar", "accuracy, points (bar: 0)"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = os.environ.get("COLDPRESS_SHARED", HERE.parents[1] / "shared")
    parser.add_argument("--shared", type=Path, default=Path(shared))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=6)
    parser.add_argument("--steps", type=int, default=0, help="optimizer steps of every side; 0 is all epochs")
    parser.add_argument("--padded-steps", type=int, default=40)
    parser.add_argument("--sides", nargs="+", choices=tuple(SIDES), help="of Olive; all if not given")
    parser.add_argument("--peer-python")
    options = parser.parse_args()
    python = options.peer_python or peer_python("olive", OLIVE)
    tasks = [prepare_task(options, seed) for seed in range(options.rounds)]

    def by_seed(name: str, train: Callable[[Task], Trained]) -> Callable[[], Trained]:
        turn = count()

        def run() -> Trained:
            found = train(tasks[next(turn)])
            scored = "" if found.accuracy is None else f", accuracy {found.accuracy:.1%}"
            print(f"{name}: {found.rate:,.0f} tokens/s in {found.seconds:.0f} s{scored}", file=sys.stderr, flush=True)
            return found

        return run

    sides = {"Coldpress": by_seed("Coldpress", train_ours)}
    for name in options.sides or SIDES:
        train = functools.partial(train_olive, name=name, python=python, padded_steps=options.padded_steps)
        sides[name] = by_seed(name, train)
    runs = in_turn(sides, options.rounds)
    base = statistics.median(accuracy(task, None, TEMPLATE) for task in tasks)
    print(table(runs))
    print(f"\naccuracy of the base model {base:.1%}; {HELD_OUT} phrases\n\n{ratios(runs)}")


if __name__ == "__main__":
    main()
