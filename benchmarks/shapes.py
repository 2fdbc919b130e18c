"""Models with the sizes of public ones and random weights, adapters for them, and the process that builds them.

    python benchmarks/shapes.py MODEL OUTPUT [OPTIONS]

builds MODEL with the options (JSON) of ModelBuilder and does nothing else: no engine, no proof. What the other
benchmarks measure as Coldpress is this process, from its start to its end.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["SHAPES", "Shape", "build", "folder_bytes", "make_adapter", "make_model", "read_through"]

POOL = 16_777_213
"""Random numbers that all weights are cut from, 32 MB: a prime, so that no two rows of a tensor are alike."""
LLAMA = {
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
PHI = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32064,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "sliding_window": 2047,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
PHI_4 = {
    **PHI,
    "hidden_size": 5120,
    "intermediate_size": 17920,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 10,
    "vocab_size": 100352,
    "max_position_embeddings": 16384,
    "original_max_position_embeddings": 16384,
    "sliding_window": None,
    "rope_theta": 250000.0,
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
class Shape:
    """Sizes of a public model."""

    title: str
    config: Mapping[str, Any]


SHAPES: Mapping[str, Shape] = {
    "llama-1b": Shape("Llama-3.2-1B", LLAMA),
    "phi-3-mini": Shape("Phi-3-mini", PHI),
    "phi-4": Shape("Phi-4 (14B)", PHI_4),
}


class _Pool:
    """Random numbers of standard deviation 0.02, cut from the pool at an offset that moves on."""

    def __init__(self, seed: int, dtype: Any) -> None:
        import numpy as np

        values = np.random.default_rng(seed).standard_normal(POOL, dtype=np.float32)
        self._values: npt.NDArray[Any] = (values * np.float32(0.02)).astype(dtype)
        self._first = 0

    def cut(self, sizes: tuple[int, ...]) -> npt.NDArray[Any]:
        import numpy as np

        result = np.empty(sizes, self._values.dtype)
        flat, done = result.reshape(-1), 0
        while done < flat.size:
            count = min(flat.size - done, POOL - self._first)
            flat[done : done + count] = self._values[self._first : self._first + count]
            done, self._first = done + count, (self._first + count) % POOL
        return result


def make_model(shape: Shape, folder: Path, *, sparse: bool = False) -> Path:
    """A checkpoint in bf16. Sparse: the weights are a hole of the right size, which reads as zeros."""
    import ml_dtypes
    import numpy as np

    from coldpress.artifacts.arch_config import arch_from_config
    from coldpress.artifacts.tensors import TensorInfo, write_safetensors

    weights = folder / "model.safetensors"
    if weights.is_file():
        return folder
    print(f"making {'an empty' if sparse else 'a'} model of the shape of {shape.title} in {folder}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape.config, indent=2))
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"})
    )
    listed = [TensorInfo.of(name, "bfloat16", sizes) for name, sizes in arch_from_config(shape.config).expected()]
    if sparse:
        _write_hole(weights, listed)
        return folder
    pool = _Pool(0, ml_dtypes.bfloat16)

    def produce(sizes: tuple[int, ...]) -> Any:
        if len(sizes) == 1:
            return np.ones(sizes, ml_dtypes.bfloat16)
        return pool.cut(sizes)

    tensors = [(info, lambda sizes=info.shape: produce(sizes)) for info in listed]
    write_safetensors(weights, tensors, {"format": "pt"})
    return folder


def _write_hole(path: Path, infos: list[Any]) -> None:
    header, end = {}, 0
    for info in infos:
        header[info.name] = {"dtype": "BF16", "shape": list(info.shape), "data_offsets": [end, end + info.nbytes]}
        end += info.nbytes
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def make_adapter(model: Path, folder: Path, *, rank: int) -> Path:
    """A random adapter of PEFT's layout over all linear layers but the head, weights in float32."""
    import numpy as np

    from coldpress.artifacts.base import Artifact
    from coldpress.artifacts.tensors import TensorInfo, write_safetensors

    linears = {name: sizes for name, sizes in Artifact.load(model).describe().linear_layers().items() if "." in name}
    folder.mkdir(parents=True, exist_ok=True)
    pool, tensors = _Pool(1, np.float32), []
    for name, (n, k) in linears.items():
        for letter, sizes in (("A", (rank, k)), ("B", (n, rank))):
            info = TensorInfo.of(f"base_model.model.{name}.lora_{letter}.weight", "float32", sizes)
            tensors.append((info, lambda sizes=sizes: pool.cut(sizes)))
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model),
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in linears}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    return folder


def build(source: Path, target: Path, options: Mapping[str, Any]) -> None:
    """The pass alone. `source` may be an adapter's folder."""
    from coldpress.artifacts.base import Artifact
    from coldpress.config.schema import Accelerator
    from coldpress.hardware import detect
    from coldpress.passes.base import Context
    from coldpress.passes.model_builder import ModelBuilder, ModelBuilderConfig

    target.mkdir(parents=True, exist_ok=True)
    config = ModelBuilderConfig.model_validate({"precision": "int4", **options})
    context = Context("build", target, target, detect(), Accelerator(), {}, lambda event: None)
    ModelBuilder().run(config, Artifact.load(source), context)
    if "torch" in sys.modules:
        raise SystemExit("the builder imported torch")


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink())


def read_through(file: Path) -> None:
    """So that the file lies in the page cache, as far as it fits."""
    with file.open("rb", buffering=0) as source:
        while source.read(8 << 20):
            pass


if __name__ == "__main__":
    build(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]) if len(sys.argv) > 3 else {})
