"""The memory that `plan` says a training will take, against the peak that is then measured.

    python benchmarks/estimate_memory.py [--settings NAME ...] [--steps 4] [--rounds 1] [--shared ../shared]

Estimate: `coldpress.plan(...)`, RAM of the step, which is the peak anonymous memory of its process. Measured: the same
of `coldpress.run(...)`. Rows are as long as max_seq_len, but for the setting that says otherwise: nothing is within the
estimate only because the data are short. The bar: every setting within 20 %.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accuracy_seed_data import split
from side_by_side import HERE, machine, markdown, verdict
from training_runs import llama_110m, random_rows, workflow, write_rows

import coldpress
from coldpress.registry import PASSES

BAR = 0.20


@dataclass(frozen=True)
class Setting:
    """One training. `shortest` rows are mixed in where it differs from `length`."""

    type: str
    length: int
    batch: int
    checkpointing: bool = False
    shortest: int | None = None
    step: Mapping[str, Any] = field(default_factory=lambda: {"r": 16, "alpha": 16, "target_modules": "all-linear"})
    seed_model: bool = False
    """phi3-7m on the phrases instead of the 110M Llama on random rows."""

    @property
    def title(self) -> str:
        model = "7M" if self.seed_model else "110M"
        long = f"{self.shortest} to {self.length}" if self.shortest else f"{self.length}"
        return f"{model}, {self.type}, {self.batch} x {long} tokens{', checkpointing' if self.checkpointing else ''}"


SETTINGS = {
    "lora-short": Setting("LoRA", 128, 4),
    "lora-long": Setting("LoRA", 512, 8),
    "lora-checkpointing": Setting("LoRA", 512, 8, checkpointing=True),
    "lora-mixed": Setting("LoRA", 512, 8, shortest=64),
    "qlora": Setting("QLoRA", 256, 4),
    "full": Setting("FullFinetune", 256, 4, step={}),
    "seed": Setting("LoRA", 256, 8, step={"r": 64, "alpha": 64, "target_modules": "all-linear"}, seed_model=True),
}


def config_of(setting: Setting, place: Path, shared: Path, steps: int) -> dict[str, Any]:
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    text: dict[str, Any] = {"strategy": "line-by-line", "max_seq_len": setting.length}
    if setting.seed_model:
        split(shared / "data" / "phrase-classification" / "dataset-classification.json", place, 0)
        model, data = (shared / "models" / "phi3-7m").resolve(), place / "train.jsonl"
        text |= {"text_template": "### Text: {phrase}\n### The tone is:\n{tone}", "strategy": "join"}
    else:
        model = llama_110m(HERE / ".work" / "llama-110m")
        draw = random.Random(0)
        count = (steps + 1) * setting.batch
        lengths = [draw.randint(setting.shortest or setting.length, setting.length) for _ in range(count)]
        data = write_rows(place / "rows.jsonl", random_rows(lengths, 0))
        text |= {"text_cols": ["text"], "add_special_tokens": False}
    training = {
        "per_device_train_batch_size": setting.batch,
        "gradient_checkpointing": setting.checkpointing,
        "max_steps": steps,
    }
    return workflow(model, data, text, {"type": setting.type, **setting.step, "training_args": training}, place)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = os.environ.get("COLDPRESS_SHARED", HERE.parents[1] / "shared")
    parser.add_argument("--shared", type=Path, default=Path(shared))
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    rows, worst = [], 0.0
    for name in options.settings:
        setting = SETTINGS[name]
        if setting.type not in list(PASSES):
            print(f"{setting.title}: there is no pass {setting.type}", flush=True)
            continue
        peaks, resident = [], []
        for _ in range(options.rounds):
            config = config_of(setting, HERE / ".work" / "estimate" / name, options.shared, options.steps)
            (planned,) = coldpress.plan(config).steps
            assert planned.estimate is not None, "the step is not cached: its folder was just emptied"
            (step,) = coldpress.run(config).steps
            peaks.append(step.peak_anonymous_bytes)
            resident.append(step.peak_bytes)
        peak = statistics.median(peaks)
        ratio = planned.estimate.ram / peak
        off = max(ratio - 1, 1 - ratio)
        worst = max(worst, off)
        figures = (f"{value / 1e6:,.0f}" for value in (planned.estimate.ram, peak, statistics.median(resident)))
        rows.append((setting.title, *figures, f"{ratio:.2f}", "yes" if off <= BAR else "NO"))
        print(" | ".join(rows[-1]), flush=True)
    head = ("setting", "estimate MB", "peak anonymous MB", "peak resident MB", "estimate / peak", f"within {BAR:.0%}")
    print(f"\n{machine()}; {options.rounds} rounds, {options.steps} steps each\n\n{markdown(head, rows)}")
    print(f"\nfurthest off: {worst:.0%}; bar {BAR:.0%}: {verdict(worst, BAR)}")


if __name__ == "__main__":
    main()
