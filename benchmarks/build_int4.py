"""int4 build of the Llama-3.2-1B shape: Coldpress against onnxruntime-genai's builder.

    python benchmarks/build_int4.py [--rounds 3] [--model FOLDER] [--peer-python PYTHON]

The model has the sizes of Llama-3.2-1B and random bf16 weights (2.5 GB); it is made once. Each side is a process of its
own that only writes: nothing is proved here. The input is in the page cache.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from side_by_side import Measured, alternate, measure, peer_python, report

PEER = (
    "torch==2.13.0", "transformers==5.23.0", "onnxruntime==1.32.0", "onnxruntime-genai==0.18.0", "onnx==1.23.2",
    "onnx-ir==1.1.0",
)  # fmt: skip
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

    def produce(shape: tuple[int, ...]) -> Any:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", type=Path, default=Path(tempfile.gettempdir()) / "coldpress-llama-1b-shape")
    parser.add_argument("--peer-python", help="a Python that has onnxruntime-genai 0.18")
    parser.add_argument("--write-only", nargs=2, type=Path, metavar=("MODEL", "OUTPUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write_only is not None:
        write_only(*options.write_only)
        return
    make_model(options.model)
    theirs = options.peer_python or peer_python("genai", PEER)
    out = options.model.with_name(options.model.name + "-out")

    def run(side: str, command: list[str]) -> Measured:
        shutil.rmtree(out / side, ignore_errors=True)
        (out / side).mkdir(parents=True)
        measured = measure([*command, str(out / side)])
        written = sum(file.stat().st_size for file in (out / side).rglob("*") if file.is_file())
        print(f"{side}: {measured.seconds:.2f} s, {measured.peak_anonymous / 1e6:.0f} MB anonymous, "
              f"{measured.peak_resident / 1e6:.0f} MB resident, {written / 1e6:.0f} MB written",
              flush=True)  # fmt: skip
        return measured

    builder = ["-m", "onnxruntime_genai.models.builder", "-p", "int4", "-e", "cpu"]
    source = str(options.model)
    ours, peer = alternate(
        lambda: run("coldpress", [sys.executable, __file__, "--write-only", source]),
        lambda: run("genai", [theirs, *builder, "-i", source, "-c", str(out / "cache"), "-o"]),
        options.rounds,
    )
    print("\n" + report("int4 build, Llama-3.2-1B shape", ours, peer, peer_name="onnxruntime-genai 0.18", bar=BAR_TIME))
    print(", ".join(f"{name} {version(name)}" for name in ("numpy", "numba", "onnx-ir")) + f"; peer: {', '.join(PEER)}")
    anonymous = statistics.median(run.peak_anonymous for run in ours)
    print(f"bar {BAR_ANONYMOUS / 1e9} GB anonymous: {'reached' if anonymous <= BAR_ANONYMOUS else 'NOT reached'}")
    shutil.rmtree(out, ignore_errors=True)


if __name__ == "__main__":
    main()
