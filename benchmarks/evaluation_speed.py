"""Classifying by label likelihood against writing answers one by one, on one runner: records a second, and accuracy.

    python benchmarks/evaluation_speed.py [--model FOLDER] [--rounds 5] [--records 200] [--shots 0]

The model is the example's fine-tuned one (made at the first run, under benchmarks/.work), its data the example's test
set. Each runner in a process of its own, both ways in turn there. The bar: 5 times the records a second, the same
accuracy (within two standard errors of their difference, from the records on which the two ways disagree). `--shots`
puts so many examples before every record, as prompts of untuned models have: they are computed once for all.

Both ways read the prompt. The runner reading all prompts in batches, and doing nothing else, is a third side: its
ratio to writing is the most that likelihood could reach on that runner. How fast a prompt's matrix products alone can
be computed here, in batches and in float32, is measured as well: no runner in float32 is quicker than that.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from operator import truediv
from pathlib import Path
from typing import Any

from side_by_side import HERE, in_turn, machine, verdict

EXAMPLE = HERE.parent / "examples" / "phrase-classification"
WORK = HERE / ".work" / "evaluation-speed"
BAR = 5.0
RUNNERS = (
    ("Transformers, fp32", "tuned", "transformers"),
    ("ONNX Runtime, fp32", "fp32", "onnxruntime"),
    ("ONNX Runtime, int4", "int4", "onnxruntime"),
    ("ONNX Runtime GenAI, fp32", "fp32", "onnxruntime-genai"),
    ("ONNX Runtime GenAI, int4", "int4", "onnxruntime-genai"),
)


def models(tuned: Path | None) -> dict[str, Path]:
    """The fine-tuned checkpoint and two builds of it."""
    import coldpress
    from coldpress.cli.display import PlainLines

    if tuned is None:
        document = json.loads((EXAMPLE / "workflow.json").read_text())
        document["input_model"]["model_path"] = str(EXAMPLE / "model")
        for config in document["data_configs"]:
            files = config["load_dataset_config"]["data_files"]
            config["load_dataset_config"]["data_files"] = str(EXAMPLE / files)
        for key in ("evaluator", "evaluators"):
            document.pop(key)
        document["passes"].pop("int4")
        document["passes"]["lora"].pop("evaluator")
        document |= {"cache_dir": str(WORK / "cache"), "output_dir": str(WORK / "tuned")}
        coldpress.run(document, sinks=[PlainLines()])
        tuned = WORK / "tuned" / "model"
    found = {"tuned": tuned}
    for precision in ("fp32", "int4"):
        coldpress.run(
            {
                "input_model": {"type": "HfModel", "model_path": str(tuned)},
                "passes": {"build": {"type": "ModelBuilder", "precision": precision}},
                "cache_dir": str(WORK / "cache"),
                "output_dir": str(WORK / precision),
            }
        )
        found[precision] = WORK / precision / "model"
    return found


def measure(model: Path, kind: str, rounds: int, records: int, shots: int) -> dict[str, Any]:
    """Both ways in turn, in this process."""
    from coldpress.artifacts.base import Artifact
    from coldpress.config.schema import DataConfig
    from coldpress.data.tokenizer import Tokenizer
    from coldpress.evaluate.answers import read_answers
    from coldpress.evaluate.predictions import by_generation, by_likelihood
    from coldpress.evaluate.runners import batches_of, open_runner

    document = json.loads((EXAMPLE / "workflow.json").read_text())["data_configs"][1]
    document["load_dataset_config"]["data_files"] = str(EXAMPLE / "dataset" / "test.jsonl")
    document["load_dataset_config"]["split"] = f"train[:{records}]"
    template = document["pre_process_data_config"]["text_template"]
    lines = (EXAMPLE / "dataset" / "train.jsonl").read_text().splitlines()[:shots]
    shown = [template.replace("<|endoftext|>", "\n\n").format(**json.loads(line)) for line in lines]
    document["pre_process_data_config"]["text_template"] = (
        "".join(shown).replace("{", "{{").replace("}", "}}") + template
    )
    document["pre_process_data_config"]["max_seq_len"] = 512
    artifact = Artifact.load(model)
    tokenizer = Tokenizer.load(artifact.tokenizer_path)
    answers = read_answers(DataConfig.model_validate(document), tokenizer)
    needs: Any = ("log-likelihood", "generation")
    encoded = tokenizer.backend.encode_batch(list(dict.fromkeys(answers.prompts)))
    prompts = [list(one.ids) for one in encoded]
    right: dict[str, list[bool]] = {}
    with open_runner(artifact, needs=needs, runner=kind) as runner:  # type: ignore[arg-type]

        def timed(name: str, ask: Any) -> float:
            started = time.perf_counter()
            found = ask()
            seconds = time.perf_counter() - started
            right[name] = [said == true for said, true in zip(found.predicted, found.truth, strict=True)]
            return len(found.truth) / seconds

        def read() -> float:
            started = time.perf_counter()
            for batch in batches_of([len(one) for one in prompts], 32):
                runner.forward([prompts[place] for place in batch])
            return len(answers.truth) / (time.perf_counter() - started)

        sides = {
            **({} if shots else {"prompts": read}),
            "likelihood": lambda: timed("likelihood", lambda: by_likelihood(runner, tokenizer, answers)),
            "writing": lambda: timed("writing", lambda: by_generation(runner, tokenizer, answers, batch_size=1)),
        }
        for run in sides.values():  # a first round warms up
            run()
        speeds = in_turn(sides, rounds)
    return {"speeds": speeds, "right": right, "tokens": statistics.mean(map(len, prompts))}


def products_alone(model: Path, tokens: float) -> float:
    """Seconds that the products of a prompt of so many tokens take in float32, of 32 prompts at a time, head aside."""
    import torch
    from safetensors import safe_open

    count, shapes = round(32 * tokens), list[tuple[int, ...]]()
    for file in model.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            names = [name for name in weights.keys() if name.endswith("_proj.weight")]  # noqa: SIM118 - no mapping
            shapes += [tuple(weights.get_slice(name).get_shape()) for name in names]
    made = {shape: (torch.randn(count, shape[1]), torch.randn(shape[1], shape[0])) for shape in set(shapes)}
    seconds = []
    for _ in range(7):
        started = time.perf_counter()
        for shape in shapes:
            torch.mm(*made[shape])
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[2:]) / 32


def row(name: str, found: dict[str, Any]) -> tuple[str, bool]:
    """A line of the table, and whether the bar is reached."""
    speeds, right = found["speeds"], found["right"]
    fast, slow = (statistics.median(speeds[side]) for side in ("likelihood", "writing"))
    ratios = [a / b for a, b in zip(speeds["likelihood"], speeds["writing"], strict=True)]
    ratio = statistics.median(ratios)
    alone = speeds.get("prompts")  # with shots most of them is read once for all
    most = f"{statistics.median(map(truediv, alone, speeds['writing'])):.1f}" if alone else "-"
    n = len(right["writing"])
    both = [sum(right[side]) / n for side in ("likelihood", "writing")]
    differ = sum(a != b for a, b in zip(right["likelihood"], right["writing"], strict=True))
    same = abs(both[0] - both[1]) <= 2 * math.sqrt(max(differ, 1)) / n
    reached = ratio >= BAR and same
    text = (
        f"| {name} | {fast:.0f} | {slow:.0f} | {ratio:.1f} ({min(ratios):.1f}-{max(ratios):.1f}), "
        f"{verdict(ratio, BAR, most=False)} | {most} | {both[0]:.1%} | {both[1]:.1%} |"
    )
    return text, reached


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="A fine-tuned checkpoint instead of the example's.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--records", type=int, default=200)
    parser.add_argument("--shots", type=int, default=0)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        folder, kind = options.one
        print(json.dumps(measure(Path(folder), kind, options.rounds, options.records, options.shots)))
        return
    import psutil

    found = models(options.model)
    print(f"\n{machine()}; {options.rounds} rounds in turn, {options.records} records, {options.shots} shots\n")
    print("| runner | by likelihood, records/s | written one by one | ratio | prompts alone | accuracy | written |")
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    loads, slowest = [], {}
    for name, model, kind in RUNNERS:
        command = [sys.executable, __file__, "--one", str(found[model]), kind]
        command += ["--rounds", str(options.rounds), "--records", str(options.records)]
        command += ["--shots", str(options.shots)]
        loads.append(psutil.getloadavg()[0])
        # As the engine's workers have it: GNU OpenMP's threads otherwise spin against whatever else runs.
        environment = {**os.environ, "GOMP_SPINCOUNT": "1000"}
        out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
        measured = json.loads(out.splitlines()[-1])
        slowest[name] = 1 / statistics.median(measured["speeds"]["writing"])
        print(row(name, measured)[0], flush=True)
    if not options.shots:  # else most of the prompt is computed once for all
        alone = products_alone(found["tuned"], measured["tokens"])
        most = ", ".join(f"{name} {slow / alone:.1f}" for name, slow in slowest.items() if name.endswith("fp32"))
        print(f"\nproducts of a prompt alone: {1e3 * alone:.2f} ms, {1 / alone:.0f} records/s; so at most: {most}")
    print(f"\nload {min(loads):.1f} to {max(loads):.1f}")


if __name__ == "__main__":
    main()
