"""How peak memory grows with the model: int4 builds of the shapes of Llama-3.2-1B, Phi-3-mini and Phi-4 (14B).

    python benchmarks/memory_growth.py [--models FOLDER] [--shapes llama-1b phi-3-mini phi-4] [--full phi-4 ...]

Ours only: what is asked is whether the peak is flat. A model that is not in FOLDER yet is made there as a hole of the
right size, which takes no disk and reads as zeros; zeros quantize faster than numbers, so its seconds are too low, its
bytes are not. `--full` makes a model of random numbers instead (29 GB for phi-4). The output of phi-4 takes 9.4 GB.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from shapes import SHAPES, folder_bytes, make_model
from side_by_side import HERE, machine, measure, verdict

BAR = 1.25
"""Peak of the largest model over that of the smallest; the models themselves differ by a factor of 12."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "coldpress-shapes")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--full", nargs="*", choices=list(SHAPES), default=[])
    parser.add_argument("--options", type=json.loads, default={}, help="JSON, of ModelBuilder")
    options = parser.parse_args()
    rows, peaks = [], []
    for name in options.shapes:
        model = make_model(SHAPES[name], options.models / name, sparse=name not in options.full)
        weights = (model / "model.safetensors").stat()
        kind = "numbers" if weights.st_blocks * 512 >= weights.st_size // 2 else "zeros"
        out = options.models / f"{name}-out"
        shutil.rmtree(out, ignore_errors=True)
        run = measure([sys.executable, str(HERE / "shapes.py"), str(model), str(out), json.dumps(options.options)])
        peaks.append(run.peak_anonymous)
        rows.append(
            f"| {SHAPES[name].title}, {kind} | {weights.st_size / 1e9:.1f} | {folder_bytes(out) / 1e9:.2f} "
            f"| {run.seconds:.1f} | {run.peak_anonymous / 1e6:.0f} | {run.peak_resident / 1e6:.0f} |"
        )
        print(f"{rows[-1]} load {run.load:.1f}", flush=True)
        shutil.rmtree(out)
    head = ("shape", "input GB", "written GB", "wall s", "peak anonymous MB", "peak resident MB")
    print(f"\n{machine()}\n\n| {' | '.join(head)} |\n|{' --- |' * len(head)}")
    print("\n".join(rows))
    ratio = peaks[-1] / peaks[0]
    print(f"\npeak of the last over that of the first: {ratio:.2f}; bar {BAR}: {verdict(ratio, BAR)}")


if __name__ == "__main__":
    main()
