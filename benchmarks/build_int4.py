"""int4 build: Coldpress against onnxruntime-genai's builder, and against llama.cpp's convert and Q4_0 (Llama only).

    python benchmarks/build_int4.py [--shape llama-1b | phi-3-mini] [--rounds 3] [--peers genai ...]
                                    [--model FOLDER] [--peer-python PYTHON]

The model has the sizes of Llama-3.2-1B (2.5 GB) or Phi-3-mini (7.6 GB) and random bf16 weights; it is made once. Each
side is a process of its own that only writes: nothing is proved here. The input is read into the page cache before each
run, as far as it fits.
onnxruntime-genai's builder takes 22 GB for Phi-3-mini: a peer that the system kills is reported as killed.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import peer_llama_cpp
from shapes import SHAPES, folder_bytes, make_model, read_through
from side_by_side import HERE, Measured, in_turn, measure, peer_python, report, verdict

GENAI = (
    "torch==2.13.0", "transformers==5.23.0", "onnxruntime==1.32.0", "onnxruntime-genai==0.18.0", "onnx==1.23.2",
    "onnx-ir==1.1.0",
)  # fmt: skip
GENAI_NAME = "onnxruntime-genai 0.18"
BARS = {"llama-1b": (6.0, 43.0, 1.0e9), "phi-3-mini": (25.0, 135.0, 1.5e9)}
"""Seconds of ours and of the peer when the bar was set, so that their ratio is the bar; bytes of anonymous memory."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(BARS), default="llama-1b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", nargs="*", choices=["genai", "llama.cpp"], default=["genai"])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--peer-python", help="a Python that has onnxruntime-genai 0.18")
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    model = options.model or Path(tempfile.gettempdir()) / f"coldpress-{options.shape}-shape"
    if "llama.cpp" in options.peers and options.shape != "llama-1b":
        parser.error("llama.cpp's converter wants a real tokenizer for Phi-3; it is a peer for llama-1b only")
    make_model(shape, model)
    out = model.with_name(model.name + "-out")
    source, failed = str(model), []

    def run(side: str, command: list[str], environment: dict[str, str] | None = None) -> Measured:
        shutil.rmtree(out, ignore_errors=True)
        (out / side).mkdir(parents=True)
        read_through(model / "model.safetensors")
        measured = measure([*command, str(out / side)], environment=environment, allow_failure=side != "coldpress")
        written = folder_bytes(out / side)
        print(f"{side}: {measured.seconds:.2f} s, {measured.peak_anonymous / 1e6:.0f} MB anonymous, "
              f"{measured.peak_resident / 1e6:.0f} MB resident, {written / 1e6:.0f} MB written, "
              f"load {measured.load:.1f}", flush=True)  # fmt: skip
        if measured.status:
            failed.append(side)
            print(f"{side} ended with status {measured.status}:\n{measured.output[-1500:]}", flush=True)
        return measured

    sides = {"Coldpress": lambda: run("coldpress", [sys.executable, str(HERE / "shapes.py"), source])}
    if "genai" in options.peers:
        theirs = options.peer_python or peer_python("genai", GENAI)
        builder = ["-m", "onnxruntime_genai.models.builder", "-p", "int4", "-e", "cpu"]
        cache = str(out / "cache")
        sides[GENAI_NAME] = lambda: run("genai", [theirs, *builder, "-i", source, "-c", cache, "-o"])
    if "llama.cpp" in options.peers:
        command = [peer_llama_cpp.python(), str(HERE / "peer_llama_cpp.py"), "build", source]
        sides[peer_llama_cpp.NAME] = lambda: run("llama.cpp", command, {"LLAMA_CPP": str(peer_llama_cpp.source())})
    runs = in_turn(sides, options.rounds)
    shutil.rmtree(out, ignore_errors=True)
    seconds, peer_seconds, anonymous = BARS[options.shape]
    bar = round(seconds / peer_seconds, 3) if "genai" in options.peers and not failed else None
    print("\n" + report(f"int4 build, {shape.title} shape", runs, bar=bar))
    print(", ".join(f"{name} {version(name)}" for name in ("numpy", "numba", "onnx-ir")))
    print(f"peers: {', '.join((*GENAI, *peer_llama_cpp.REQUIREMENTS))}")
    if failed:
        print(f"NOT finished, so no ratio counts: {', '.join(failed)}")
    ours = statistics.median(run.seconds for run in runs["Coldpress"])
    print(f"bar {seconds:g} s (on the machine of the bar): {ours:.2f} s, {verdict(ours, seconds)}")
    peak = max(run.peak_anonymous for run in runs["Coldpress"])
    print(f"bar {anonymous / 1e9:g} GB anonymous: {peak / 1e9:.3f} GB, {verdict(peak, anonymous)}")


if __name__ == "__main__":
    main()
