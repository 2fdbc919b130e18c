"""Perplexity by the ONNX runner against Transformers' in float32: the same number, at no more memory.

    python benchmarks/perplexity_parity.py [--shared ../shared] [--rounds 3] [--windows 20]

`phi3-7m` and its fp32 build on the validation text of WikiText-2: windows of 512 tokens, half of each is context. Each
side is a process of its own, in turn. The bars: equal to 1e-4 (relative), and peak memory no higher than Transformers'.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

from side_by_side import Measured, in_turn, machine, measure, verdict

BAR = 1e-4


def perplexity(model: Path, text: Path, windows: int) -> None:
    """In this process, as the metric does it."""
    from coldpress.artifacts.base import Artifact
    from coldpress.config.metrics import PerplexityMetric
    from coldpress.config.schema import DataConfig, LoadDataset, PreProcess
    from coldpress.evaluate.bench import Bench, OpenRunners
    from coldpress.evaluate.perplexity import measure as of_text

    data = DataConfig(
        name="text",
        load_dataset_config=LoadDataset(data_name="text", data_files=str(text)),
        pre_process_data_config=PreProcess(strategy="join", joiner="\n", max_seq_len=512, max_samples=windows),
    )
    metric = PerplexityMetric.model_validate(
        {"name": "text", "type": "perplexity", "data_config": "text", "batch_size": 4,
         "sub_types": [{"name": "perplexity"}, {"name": "bits_per_byte"}]}
    )  # fmt: skip
    found = of_text(metric, Bench(Artifact.load(model), OpenRunners(), {"text": data}))
    print(json.dumps({one.sub_type: [one.value, one.standard_error, one.n] for one in found}))


def values(run: Measured) -> dict[str, list[float]]:
    found: dict[str, list[float]] = json.loads(run.output.strip().splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = os.environ.get("COLDPRESS_SHARED", Path(__file__).resolve().parents[2] / "shared")
    parser.add_argument("--shared", type=Path, default=Path(shared))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    text = options.shared / "data" / "wikitext-2" / "valid.txt"
    if options.one:
        perplexity(options.one, text, options.windows)
        return
    import coldpress

    model = options.shared / "models" / "phi3-7m"
    with tempfile.TemporaryDirectory(prefix="coldpress-perplexity-") as scratch:
        coldpress.run(
            {
                "input_model": {"type": "HfModel", "model_path": str(model)},
                "passes": {"build": {"type": "ModelBuilder", "precision": "fp32"}},
                "cache_dir": f"{scratch}/cache",
                "output_dir": f"{scratch}/built",
            }
        )

        def side(folder: Path) -> Measured:
            command = [sys.executable, __file__, "--one", str(folder), "--windows", str(options.windows)]
            return measure([*command, "--shared", str(options.shared)])

        sides = {"ONNX Runtime": Path(scratch, "built", "model"), "Transformers": model}
        runs = in_turn({name: lambda folder=folder: side(folder) for name, folder in sides.items()}, options.rounds)
    loads = [run.load for each in runs.values() for run in each]
    print(f"\n{machine()}; {options.rounds} rounds in turn, load {min(loads):.1f} to {max(loads):.1f}\n")
    print("| runner | perplexity | bits a byte | tokens | wall s | peak anonymous MB | peak resident MB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, each in runs.items():
        found = values(each[0])
        seconds = [run.seconds for run in each]
        peaks = [statistics.median(getattr(run, kind) for run in each) for kind in ("peak_anonymous", "peak_resident")]
        print(
            f"| {name} | {found['perplexity'][0]:.6f} | {found['bits_per_byte'][0]:.6f} | {found['perplexity'][2]:,} "
            f"| {statistics.median(seconds):.1f} | {peaks[0] / 1e6:.0f} | {peaks[1] / 1e6:.0f} |"
        )
    ours, theirs = (values(runs[name][0])["perplexity"][0] for name in runs)
    difference = abs(ours / theirs - 1)
    anonymous, resident = (
        statistics.median(getattr(run, kind) for run in runs["ONNX Runtime"])
        / statistics.median(getattr(run, kind) for run in runs["Transformers"])
        for kind in ("peak_anonymous", "peak_resident")
    )
    print(
        f"\nrelative difference {difference:.1e} (bar {BAR:g}: {verdict(difference, BAR)}); memory: anonymous "
        f"{anonymous:.2f}, resident {resident:.2f} of Transformers' (bar 1: {verdict(max(anonymous, resident), 1)})"
    )


if __name__ == "__main__":
    main()
