"""Generation on all cores, Llama-3.2-1B shape: our models and onnxruntime-genai's in its runtime, and llama.cpp.

    python benchmarks/generation.py [--rounds 5] [--repeats 2] [--prompt 128] [--new 48] [--only NAME ...]
                                    [--variant NAME=JSON ...] [--models FOLDER] [--rebuild]

Sides, each in a process of its own, in turn, so that a drifting machine hits all alike:

    genai, as shipped     the model and the genai_config.json of onnxruntime-genai 0.18's builder, int4
    genai, all cores      the same with intra_op_num_threads
    coldpress ...         models of ModelBuilder, with the options in OURS and those given with --variant; one that the
                          builder refuses is left out, with its reason
    llama.cpp Q4_0, Q4_K_M

Prefill is the prompt up to its first new token, decode the greedy tokens after it, both in tokens a second. Models are
made once, in FOLDER; --rebuild makes ours anew. The machine must be quiet: the load is printed with each round.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peer_llama_cpp
import psutil
from build_int4 import GENAI
from shapes import SHAPES, folder_bytes, make_model
from side_by_side import HERE, in_turn, machine, measure, peer_python, verdict

from coldpress.hardware import detect

OURS: Mapping[str, Mapping[str, Any]] = {
    "coldpress": {},
    "coldpress fast": {"profile": "fast"},
    "coldpress fast, int8 prompts": {"profile": "fast", "prompt_graph": "int8"},
    "coldpress accurate": {"profile": "accurate"},
}
SHIPPED, ALL_CORES = "genai, as shipped", "genai, all cores"
LLAMA_CPP = {"llama.cpp Q4_0": "q4_0", "llama.cpp Q4_K_M": "q4_k_m"}
BARS = {
    ("coldpress fast", "prefill", SHIPPED): 176 / 48,
    ("coldpress fast", "prefill", "llama.cpp Q4_0"): 176 / 227,
    ("coldpress fast", "decode", SHIPPED): 28 / 12,
    ("coldpress fast", "decode", "llama.cpp Q4_0"): 1.1,
    ("coldpress fast, int8 prompts", "prefill", "llama.cpp Q4_0"): 2.5,
    ("coldpress fast, int8 prompts", "decode", "llama.cpp Q4_0"): 1.1,
}
"""Tokens a second of one side over those of another."""


def build_ours(model: Path, folder: Path, options: Mapping[str, Any]) -> str | None:
    """Why it is not there, or None."""
    record = folder / "options.json"
    if record.is_file() and json.loads(record.read_text()) == options:
        return None
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, str(HERE / "shapes.py"), str(model), str(folder), json.dumps(options)]
    run = measure(command, allow_failure=True)
    if run.status:
        shutil.rmtree(folder, ignore_errors=True)
        lines = run.output.strip().splitlines()
        first = next((i for i, line in enumerate(lines) if "Error" in line), len(lines) - 1)
        return " ".join(lines[first : first + 4])
    record.write_text(json.dumps(options))
    return None


def build_genai(model: Path, folder: Path, python: str) -> None:
    if not (folder / "genai_config.json").is_file():
        builder = [python, "-m", "onnxruntime_genai.models.builder", "-p", "int4", "-e", "cpu"]
        measure([*builder, "-i", str(model), "-o", str(folder), "-c", str(folder) + "-cache"])


def build_llama_cpp(model: Path, folder: Path, python: str) -> None:
    wanted = {kind: folder / f"{kind}.gguf" for kind in LLAMA_CPP.values()}
    if all(file.is_file() for file in wanted.values()):
        return
    folder.mkdir(parents=True, exist_ok=True)
    bf16, script = folder / "bf16.gguf", str(HERE / "peer_llama_cpp.py")
    convert = [python, script, "convert", str(model), str(bf16)]
    measure(convert, environment={"LLAMA_CPP": str(peer_llama_cpp.source())})
    for kind, file in wanted.items():
        measure([python, script, "quantize", str(bf16), str(file), kind])
    bf16.unlink()


def print_tables(runs: Mapping[str, list[dict[str, Any]]], sizes: Mapping[str, int], ours: set[str]) -> None:
    """Medians, their ratios and the bars."""
    print("\n| side | MB | peak resident MB | prefill tokens/s, median (min-max) | decode tokens/s, median (min-max) |")
    print("| --- | --- | --- | --- | --- |")
    median: dict[tuple[str, str], float] = {}
    for name, each in runs.items():
        cells = []
        for phase in ("prefill", "decode"):
            values = [run[phase] for run in each]
            median[phase, name] = statistics.median(values)
            cells.append(f"{median[phase, name]:.1f} ({min(values):.1f}-{max(values):.1f})")
        resident = statistics.median(run["resident"] for run in each) / 1e6
        print(f"| {name} | {sizes[name] / 1e6:.0f} | {resident:.0f} | {' | '.join(cells)} |")
    mine, theirs = [n for n in runs if n in ours], [n for n in runs if n not in ours]
    print(f"\n| prefill / decode ratio to | {' | '.join(theirs)} |\n" + "| --- " * (len(theirs) + 1) + "|")
    for name in mine:
        cells = [
            " / ".join(f"{median[phase, name] / median[phase, peer]:.2f}" for phase in ("prefill", "decode"))
            for peer in theirs
        ]
        print(f"| {name} | {' | '.join(cells)} |")
    for (side, phase, peer), bar in BARS.items():
        if side in runs and peer in runs:
            ratio = median[phase, side] / median[phase, peer]
            print(f"{side}: bar {phase} {bar:.2f} of {peer}: {ratio:.2f}, {verdict(ratio, bar, most=False)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=2, help="in each process, after one that warms up")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=48)
    parser.add_argument("--only", nargs="*", help="sides to run")
    parser.add_argument("--variant", action="append", default=[], metavar="NAME=JSON", help="options of ModelBuilder")
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "coldpress-shapes")
    parser.add_argument("--rebuild", action="store_true")
    options = parser.parse_args()
    threads = detect().cores
    genai, llama_cpp = peer_python("genai", GENAI), peer_llama_cpp.python()
    work = options.models / "generation"
    model = make_model(SHAPES["llama-1b"], options.models / "llama-1b")
    lengths = [str(options.prompt), str(options.new)]
    sizes: dict[str, int] = {}
    sides: dict[str, Callable[[], dict[str, Any]]] = {}

    def chosen(name: str) -> bool:
        return not options.only or name in options.only

    def add(name: str, place: Path, command: list[str], threads: int) -> None:
        sizes[name] = folder_bytes(place) if place.is_dir() else place.stat().st_size
        sides[name] = lambda: generate(name, [*command, str(place), *lengths, str(threads), str(options.repeats)])

    def generate(name: str, command: list[str]) -> dict[str, Any]:
        load = psutil.getloadavg()[0]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"{name} failed:\n{run.stderr[-3000:]}")
        found = json.loads(run.stdout.strip().splitlines()[-1])
        prefill = statistics.median(options.prompt / seconds for seconds, _ in found["rounds"])
        decode = statistics.median(options.new / seconds for _, seconds in found["rounds"])
        print(f"{name}: {prefill:.1f} / {decode:.1f}, load {load:.1f}", flush=True)
        return {"prefill": prefill, "decode": decode, "load": load, "system": found.get("system"),
                "resident": found["resident"]}  # fmt: skip

    ort = [genai, str(HERE / "peer_genai.py")]
    for name, count in ((SHIPPED, 0), (ALL_CORES, threads)):
        if chosen(name):
            build_genai(model, work / "genai", genai)
            add(name, work / "genai", ort, count)
    variants = {**OURS, **{name: json.loads(text) for name, text in (item.split("=", 1) for item in options.variant)}}
    for name, choice in variants.items():
        if not chosen(name):
            continue
        folder = work / name.replace(" ", "-")
        if options.rebuild:
            shutil.rmtree(folder, ignore_errors=True)
        refusal = build_ours(model, folder, choice)
        if refusal:
            print(f"{name}: left out, {refusal}", flush=True)
            continue
        add(name, folder, ort, 0)
    for name, kind in LLAMA_CPP.items():
        if chosen(name):
            build_llama_cpp(model, work / "llama.cpp", llama_cpp)
            command = [llama_cpp, str(HERE / "peer_llama_cpp.py"), "generate"]
            add(name, work / "llama.cpp" / f"{kind}.gguf", command, threads)

    runs = in_turn(sides, options.rounds)
    loads = [run["load"] for each in runs.values() for run in each]
    print(f"\n{machine()}; {threads} threads; prompt {options.prompt}, {options.new} new; {options.rounds} rounds of "
          f"{options.repeats} repeats in turn, load {min(loads):.1f} to {max(loads):.1f}")  # fmt: skip
    print(f"{', '.join((*GENAI, *peer_llama_cpp.REQUIREMENTS))}; {peer_llama_cpp.NAME}")
    for system in {run["system"] for each in runs.values() for run in each if run["system"]}:
        print(system)
    print_tables(runs, sizes, set(variants))


if __name__ == "__main__":
    main()
