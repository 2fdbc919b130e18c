"""How long the command line takes to answer: Coldpress against Olive 0.13.

python benchmarks/startup.py [--rounds 7] [--peer-python PYTHON]
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
from pathlib import Path

from seed_workflow import OLIVE
from side_by_side import HERE, in_turn, measure, peer_python, report

ROOT = HERE.parent


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peer-python")
    options = parser.parse_args()
    peer = options.peer_python or peer_python("olive", OLIVE)
    ours, theirs = str(Path(sys.executable).with_name("coldpress")), str(Path(peer).with_name("olive"))
    quiet = {"OLIVE_DISABLE_TELEMETRY": "1"}
    sides = {
        "Coldpress": lambda: measure([ours, "--help"]),
        "Olive 0.13, telemetry off": lambda: measure([theirs, "--help"], environment=quiet),
    }
    print(report("--help (bar: 0.3 s)", in_turn(sides, options.rounds)))

    place = HERE / ".work" / "startup"
    model = place / "model-cache" / "microsoft" / "phi-3-mini"
    if not model.exists():
        shutil.copytree(ROOT / "examples" / "phrase-classification" / "model", model)
    (place / "dataset").mkdir(parents=True, exist_ok=True)
    data = ROOT / "examples" / "phrase-classification" / "dataset" / "train.jsonl"
    shutil.copy(data, place / "dataset" / "dataset-classification.json")
    for name in ("local", "local.qlora"):
        config = place / f"olive-config.{name}.json"
        shutil.copy(ROOT / "tests" / "workflows" / "seed" / config.name, config)
        for verb in ("check", "plan"):
            seconds = [measure([ours, verb, str(config)]).seconds for _ in range(options.rounds)]
            spread = f"({min(seconds):.2f}-{max(seconds):.2f})"
            print(f"coldpress {verb} {config.name}: {statistics.median(seconds):.2f} s {spread}")
    print("bar: check + plan of a seed config in 1 s; Olive 0.13 rejects all four seed configs")


if __name__ == "__main__":
    main()
