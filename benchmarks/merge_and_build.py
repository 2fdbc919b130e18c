"""LoRA merge and int4 build in one stream against the plain int4 build of the same base.

    python benchmarks/merge_and_build.py [--shape phi-3-mini] [--rounds 3] [--rank 16] [--model FOLDER]

The adapter is random, of PEFT's layout, over all linear layers but the head. Both sides are ours, and each is a process
of its own that only writes. The merged checkpoint must never be on disk: what lies in the output is printed.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from shapes import SHAPES, folder_bytes, make_adapter, make_model, read_through
from side_by_side import HERE, Measured, in_turn, measure, report

BAR = 1.2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="phi-3-mini")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--model", type=Path)
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    model = options.model or Path(tempfile.gettempdir()) / f"coldpress-{options.shape}-shape"
    make_model(shape, model)
    adapter = make_adapter(model, model.with_name(model.name + "-adapter"), rank=options.rank)
    out = model.with_name(model.name + "-out")

    def run(side: str, source: Path) -> Measured:
        shutil.rmtree(out, ignore_errors=True)
        read_through(model / "model.safetensors")
        measured = measure([sys.executable, str(HERE / "shapes.py"), str(source), str(out)])
        print(f"{side}: {measured.seconds:.2f} s, {measured.peak_anonymous / 1e6:.0f} MB anonymous, "
              f"{folder_bytes(out) / 1e6:.0f} MB written, load {measured.load:.1f}", flush=True)  # fmt: skip
        return measured

    sides = {"merge and build": lambda: run("merge and build", adapter), "build": lambda: run("build", model)}
    runs = in_turn(sides, options.rounds)
    shutil.rmtree(out, ignore_errors=True)
    title = f"Rank-{options.rank} adapter merged while building int4, {shape.title} shape"
    print("\n" + report(title, runs, bar=BAR))
    pairs = [merged.seconds / plain.seconds for merged, plain in zip(*runs.values(), strict=True)]
    each = ", ".join(f"{pair:.2f}" for pair in pairs)
    print(f"ratio within each round: {each}; median {statistics.median(pairs):.3f}")


if __name__ == "__main__":
    main()
