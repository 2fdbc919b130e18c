"""int4 build of the Llama-3.2-1B shape: Coldpress against onnxruntime-genai's builder.

    python benchmarks/build_int4.py [--rounds 3] [--model FOLDER] [--peer-python PYTHON] [--json FILE]

The model has the sizes of Llama-3.2-1B and random bf16 weights (2.5 GB); it is made once. Both sides start as a process
of their own, in turn, on files that are in the page cache, and only write: nothing is proved here. Peaks are sampled every
20 ms over the process tree: anonymous memory, and resident memory with the mapped files in it. The peer lives in
`benchmarks/.envs/genai`, made when it is missing.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
PEER_PACKAGES = ("torch==2.13.0", "transformers==5.23.0", "onnxruntime==1.32.0", "onnxruntime-genai==0.18.0",
                 "onnx==1.23.2", "onnx-ir==1.1.0")  # fmt: skip
BAR_TIME, BAR_ANONYMOUS = 0.3, 1.5e9
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 1,
}
TOKENIZER = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": None,
    "post_processor": None,
    "decoder": None,
    "model": {"type": "BPE", "vocab": {"<s>": 0, "</s>": 1, "a": 2}, "merges": []},
}


@dataclass(frozen=True)
class Measured:
    side: str
    seconds: float
    anonymous: int
    """Peak, bytes."""
    resident: int
    """Peak, bytes, mapped files included."""
    output: int
    """Bytes written."""


def make_model(folder: Path) -> None:
    """Random bf16 weights, one tensor at a time; standard deviation 0.02."""
    import ml_dtypes
    import numpy as np

    from coldpress.artifacts.arch import arch_from_config
    from coldpress.artifacts.tensors import TensorInfo, write_safetensors

    if (folder / "model.safetensors").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    print(f"making the model in {folder}", flush=True)
    rng = np.random.default_rng(0)

    def produce(shape: tuple[int, ...]) -> np.ndarray:
        if len(shape) == 1:
            return np.ones(shape, ml_dtypes.bfloat16)
        return (rng.standard_normal(shape, dtype=np.float32) * np.float32(0.02)).astype(ml_dtypes.bfloat16)

    listed = [TensorInfo.of(name, "bfloat16", shape) for name, shape in arch_from_config(CONFIG).expected()]
    tensors = [(info, lambda shape=info.shape: produce(shape)) for info in listed]
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2))
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"})
    )
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})


def write_only(source: Path, target: Path) -> None:
    """Our side: the pass alone, without engine and proof."""
    from coldpress.artifacts.base import Artifact
    from coldpress.config.schema import Accelerator
    from coldpress.hardware import detect
    from coldpress.passes.base import Context
    from coldpress.passes.model_builder import ModelBuilder, ModelBuilderConfig

    config = ModelBuilderConfig(precision="int4")
    context = Context("build", target, target, detect(), Accelerator(), {}, lambda event: None)
    ModelBuilder().run(config, Artifact.load(source), context)
    if "torch" in sys.modules:
        raise SystemExit("the builder imported torch")


def measure(side: str, command: list[str], target: Path) -> Measured:
    """Run a command that fills `target`, and watch its process tree."""
    import psutil

    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    anonymous = resident = 0
    with tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        root = psutil.Process(process.pid)
        while process.poll() is None:
            a = r = 0
            try:
                for each in [root, *root.children(recursive=True)]:
                    memory = each.memory_info()
                    r += memory.rss
                    a += memory.rss - getattr(memory, "shared", 0)
            except psutil.Error:
                continue
            anonymous, resident = max(anonymous, a), max(resident, r)
            time.sleep(0.02)
        seconds = time.perf_counter() - start
        if process.returncode:
            log.seek(0)
            raise SystemExit(f"{side} ended with {process.returncode}:\n{log.read().decode(errors='replace')[-4000:]}")
    output = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    return Measured(side, seconds, anonymous, resident, output)


def peer_python(given: str | None) -> str:
    if given is not None:
        return given
    folder = HERE / ".envs" / "genai"
    program = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if not program.exists():
        print(f"making the peer's environment in {folder}", flush=True)
        venv.create(folder, with_pip=True)
        subprocess.run([str(program), "-m", "pip", "install", "--quiet", *PEER_PACKAGES], check=True)
    return str(program)


def table(rows: list[Measured]) -> None:
    from importlib.metadata import version

    from coldpress.hardware import detect

    machine = detect()
    sides = {side: [row for row in rows if row.side == side] for side in ("genai", "coldpress")}
    middle = {
        side: [statistics.median(getattr(row, key) for row in found) for key in ("seconds", "anonymous", "resident", "output")]
        for side, found in sides.items()
    }
    print(f"\n{machine.processor}, {machine.cores} cores; Python {platform.python_version()}, "
          + ", ".join(f"{name} {version(name)}" for name in ("numpy", "numba", "onnx-ir"))
          + f"; peer {', '.join(PEER_PACKAGES[2:4])}; median of {len(sides['genai'])} rounds")  # fmt: skip
    print(f"{'':12}{'seconds':>10}{'anonymous GB':>14}{'resident GB':>13}{'written GB':>12}")
    for side, (seconds, anonymous, resident, output) in middle.items():
        print(f"{side:12}{seconds:>10.2f}{anonymous / 1e9:>14.3f}{resident / 1e9:>13.3f}{output / 1e9:>12.3f}")
    ratios = [ours / theirs for ours, theirs in zip(middle["coldpress"], middle["genai"], strict=True)]
    print(f"{'ratio':12}{ratios[0]:>10.3f}{ratios[1]:>14.3f}{ratios[2]:>13.3f}{ratios[3]:>12.3f}")
    held = ratios[0] <= BAR_TIME and middle["coldpress"][1] <= BAR_ANONYMOUS
    print(f"bar: {BAR_TIME} of the time, {BAR_ANONYMOUS / 1e9} GB anonymous: {'held' if held else 'MISSED'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", type=Path, default=Path(tempfile.gettempdir()) / "coldpress-llama-1b-shape")
    parser.add_argument("--peer-python", help="a Python that has onnxruntime-genai 0.18")
    parser.add_argument("--json", type=Path, help="write every measurement there")
    parser.add_argument("--write-only", nargs=2, type=Path, metavar=("MODEL", "OUTPUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write_only is not None:
        write_only(*options.write_only)
        return
    make_model(options.model)
    python, out = peer_python(options.peer_python), options.model.with_name(options.model.name + "-out")
    builder = ["-m", "onnxruntime_genai.models.builder", "-p", "int4", "-e", "cpu"]
    commands = {
        "coldpress": [sys.executable, str(Path(__file__)), "--write-only", str(options.model), str(out / "coldpress")],
        "genai": [python, *builder, "-i", str(options.model), "-o", str(out / "genai"), "-c", str(out / "cache")],
    }
    rows = []
    for number in range(options.rounds):
        for side, command in commands.items():
            row = measure(side, command, out / side)
            rows.append(row)
            print(f"round {number + 1} {side:10} {row.seconds:7.2f} s, {row.anonymous / 1e9:.3f} GB anonymous, "
                  f"{row.resident / 1e9:.3f} GB resident, {row.output / 1e9:.3f} GB written", flush=True)  # fmt: skip
    table(rows)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=2))
    shutil.rmtree(out, ignore_errors=True)


if __name__ == "__main__":
    main()
