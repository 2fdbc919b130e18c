"""Block by block is the same model as whole, for every family, and holds one block in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coldpress.artifacts.tensors import TensorInfo, TensorSet, write_safetensors
from coldpress.errors import CheckpointError, UnsupportedModelError
from coldpress.evaluate.runners import LayerwiseRunner, TorchRunner, in_batches
from fakes.tiny_models import VOCABULARY
from oracles.stored import CASES, quantize_folder

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 16,
    "num_key_value_heads": 2, "vocab_size": 80, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0 + 0.02 * i for i in range(8)],
    "long_factor": [1.5 + 0.4 * i for i in range(8)],
}  # fmt: skip
FAMILIES: Mapping[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 7},
    "phi3": {"sliding_window": None, "original_max_position_embeddings": 32, "rope_parameters": _LONGROPE},
    "qwen2": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
    "qwen3": {"tie_word_embeddings": True},
    "gemma": {},
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 16},
    "gemma3_text": {"sliding_window": 8, "query_pre_attn_scalar": 16, "sliding_window_pattern": 2},
    "olmo2": {},
    "granite": {"embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.22},
    "smollm3": {},
    "starcoder2": {"sliding_window": 8},
    "gpt_neox": {},
    "phi": {},
    "mixtral": _EXPERTS,
    "qwen3_moe": _EXPERTS,
    "gpt_oss": {**_EXPERTS, "sliding_window": 8},
}
LENGTHS = (5, 40, 13, 64, 33)
"""In batches of two, so that four of the sequences are padded or stand beside a padded one."""


def sequences(vocabulary: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, vocabulary, length).tolist() for length in LENGTHS]


def make_family(name: str, folder: Path) -> Path:
    """A random model in bf16 with nothing left at its neutral value."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        config = AutoConfig.for_model(name, **{**SIZES, **FAMILIES[name]})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.copy_(torch.randn_like(parameter) * 1.2 / parameter.shape[-1] ** 0.5)
        model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def difference(found: Any, expected: Any, vocabulary: int) -> float:
    texts = sequences(vocabulary)
    one, other = dict(in_batches(found, texts, 2)), dict(in_batches(expected, texts, 2))
    assert [one[place].shape for place in range(len(texts))] == [(length, vocabulary) for length in LENGTHS]
    assert max(float(np.abs(other[place]).max()) for place in other) > 0.1, "logits of nothing prove nothing"
    return max(float(np.abs(one[place] - other[place]).max()) for place in one)


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_whole_model(family: str, tmp_path: Path) -> None:
    folder = make_family(family, tmp_path)
    # 1e-4: the head's products are summed in another order when it is cut.
    assert difference(LayerwiseRunner(folder), TorchRunner(folder), 80) < 1e-4


def test_the_head_is_cut_and_weights_are_read_again(tiny_phi3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coldpress.nn.layerwise.HEAD_BYTES", 4 * 64 * 33)
    monkeypatch.setattr("coldpress.evaluate.torch_runner.STATES_BYTES", 4 * 64 * 64 * 2)
    calls: list[tuple[int, int]] = []
    runner = LayerwiseRunner(tiny_phi3, on_block=lambda done, blocks: calls.append((done, blocks)))
    assert difference(runner, TorchRunner(tiny_phi3), VOCABULARY) < 1e-4
    # Batches (64, 40), (33, 13), (5): the first alone fills what may wait, the others fit together.
    assert calls == [(1, 2), (2, 2)] * 2


def make_adapter(folder: Path, base: Path, **settings: Any) -> Path:
    import peft
    import torch

    from coldpress.nn.loading import load_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", **settings)
        model = peft.get_peft_model(load_model(base, dtype="float32"), config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["o_proj"], "use_dora": True},
        {"target_modules": ["down_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    ],
    ids=["lora", "dora", "saved modules"],
)
def test_an_adapter_counts(settings: dict[str, Any], tiny_phi3: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", tiny_phi3, **settings)
    runner = LayerwiseRunner(tiny_phi3, adapter=adapter)
    assert difference(runner, TorchRunner(tiny_phi3, adapter=adapter), VOCABULARY) < 1e-4
    assert difference(runner, TorchRunner(tiny_phi3), VOCABULARY) > 0.1


def rewrite(source: Path, target: Path, change: Mapping[str, Any]) -> Path:
    """A checkpoint with some tensors replaced, or left out where the new value is None."""
    target.mkdir()
    (target / "config.json").write_text((source / "config.json").read_text())
    with TensorSet.open(source) as tensors:
        kept = {info.name: tensors.read(info.name) for info in tensors.infos()}
    kept = {name: value for name, value in {**kept, **change}.items() if value is not None}
    infos = [TensorInfo.of(name, str(value.dtype), value.shape) for name, value in kept.items()]
    write_safetensors(
        target / "model.safetensors", [(info, lambda name=info.name: kept[name]) for info in infos], {"format": "pt"}
    )
    return target


def test_weights_from_another_source(tiny_phi3: Path, tmp_path: Path) -> None:
    """What a merge in the stream or a dequantizer gives is what is run, whatever config.json says of the files."""
    rng = np.random.default_rng(3)
    name = "model.layers.1.mlp.down_proj.weight"
    other = rewrite(tiny_phi3, tmp_path / "other", {name: rng.standard_normal((64, 96), np.float32) * 0.1})
    marked = tmp_path / "marked"
    marked.mkdir()
    config = json.loads((tiny_phi3 / "config.json").read_text())
    (marked / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with TensorSet.open(other) as tensors:
        runner = LayerwiseRunner(marked, tensors=tensors)
        assert difference(runner, TorchRunner(other), VOCABULARY) < 1e-4
        assert difference(runner, TorchRunner(tiny_phi3), VOCABULARY) > 0.01


@pytest.mark.parametrize("case", ["gptq-4-order", "nf4-nested", "fp8-blocks"])
def test_a_quantized_checkpoint(case: str, tmp_path: Path) -> None:
    make_family("llama", tmp_path / "plain")
    quantize_folder(tmp_path / "plain", tmp_path / "stored", CASES[case])
    runner = LayerwiseRunner(tmp_path / "stored")
    assert difference(runner, TorchRunner(tmp_path / "stored"), 80) < 1e-4
    assert difference(runner, TorchRunner(tmp_path / "plain"), 80) > 0.01, "the codes are not the weights"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model.layers.1.self_attn.o_proj.weight": None}, r"lacks 1 weights.*model\.layers\.1\.self_attn\.o_proj"),
        ({"model.layers.1.mlp.down_proj.weight": np.zeros((64, 95), np.float32)}, "cannot be loaded"),
        ({"lm_head.weight": None}, "lacks 1 weights"),
    ],
)
def test_weights_that_do_not_fit(change: dict[str, Any], words: str, tiny_phi3: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=words):
        LayerwiseRunner(rewrite(tiny_phi3, tmp_path / "broken", change))


def test_nan_is_passed_on(tiny_phi3: Path, tmp_path: Path) -> None:
    """A model that yields NaN is for parity to refuse, with its figures."""
    name = "model.layers.0.mlp.down_proj.weight"
    broken = rewrite(tiny_phi3, tmp_path / "broken", {name: np.full((64, 96), np.nan, np.float32)})
    (found,) = LayerwiseRunner(broken).logits([[1, 2, 3]])
    assert np.isnan(found).all()


OWN_CODE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class Config(PretrainedConfig):
    model_type = "own"


class Block(torch.nn.Module):
    def __init__(self, size):
        super().__init__()
        self.product = torch.nn.Linear(size, size)

    def forward(self, hidden):
        return (hidden + torch.tanh(self.product(hidden)), None)


class Model(PreTrainedModel):
    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        self.embedding = torch.nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = torch.nn.ModuleList(Block(config.hidden_size) for _ in range(4))
        self.head = torch.nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.embedding

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, use_cache=False):
        hidden, seen = self.embedding(input_ids), []
        for block in self.blocks:
            hidden = block(hidden)[0]
            seen.append(hidden)
            if self.config.skips and len(seen) == 3:
                hidden = hidden + seen[0]
        return CausalLMOutput(logits=self.head(hidden))
"""


def make_own_code(folder: Path, *, skips: bool) -> Path:
    folder.mkdir()
    config = {
        "architectures": ["Model"], "model_type": "own", "vocab_size": 50, "hidden_size": 16, "skips": skips,
        "auto_map": {"AutoConfig": "modeling_own.Config", "AutoModelForCausalLM": "modeling_own.Model"},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_own.py").write_text(OWN_CODE)
    rng = np.random.default_rng(0)
    shapes = {f"blocks.{place}.product.{part}": sizes for place in range(4) for part, sizes in
              (("weight", (16, 16)), ("bias", (16,)))}  # fmt: skip
    shapes |= {"embedding.weight": (50, 16), "head.weight": (50, 16), "head.bias": (50,)}
    made = {name: rng.standard_normal(sizes, np.float32) for name, sizes in shapes.items()}
    infos = [TensorInfo.of(name, "float32", value.shape) for name, value in made.items()]
    write_safetensors(
        folder / "model.safetensors", [(info, lambda name=info.name: made[name]) for info in infos], {"format": "pt"}
    )
    return folder


@pytest.fixture
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Transformers copies a checkpoint's code before it imports it; not into the user's cache."""
    place = str(tmp_path / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", place)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("transformers_modules"):
            del sys.modules[name]


@pytest.mark.usefixtures("own_modules")
def test_the_checkpoints_own_code(tmp_path: Path) -> None:
    """Blocks that return tuples, a head with a bias; and a block that reads more than the one before it is noticed."""
    folder = make_own_code(tmp_path / "plain", skips=False)
    with pytest.raises(UnsupportedModelError, match="own Python code"):
        LayerwiseRunner(folder)
    runner = LayerwiseRunner(folder, trust_remote_code=True)
    assert difference(runner, TorchRunner(folder, trust_remote_code=True), 50) < 1e-4
    runner = LayerwiseRunner(make_own_code(tmp_path / "skipping", skips=True), trust_remote_code=True)
    with pytest.raises(UnsupportedModelError, match="block 3 reads more than the output of the block before it"):
        runner.logits([[1, 2, 3]])


LAYERS, HIDDEN, INNER = 24, 512, 2048
MEASURE = """
import sys
from pathlib import Path
from coldpress.memory import PeakMeter
from coldpress.evaluate import runners
from coldpress.nn import imports
imports.load_inference()
import transformers.models.llama.modeling_llama
import transformers.generation
kind, folder, ready = sys.argv[1], Path(sys.argv[2]), PeakMeter()
with ready:
    pass
peak = PeakMeter()
with peak:
    runner = getattr(runners, kind)(folder)
    for place, logits in runners.in_batches(runner, [[1, 2, 3] * 40] * 8, 4):
        del logits
print(peak.anonymous - ready.anonymous)
"""


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 equal layers in bf16."""
    import ml_dtypes

    folder = tmp_path_factory.mktemp("deep")
    layer = {
        **{f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"},
        "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER),
        "input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,),
    }  # fmt: skip
    shapes = {f"model.layers.{i}.{name}.weight": sizes for i in range(LAYERS) for name, sizes in layer.items()}
    shapes |= {"model.embed_tokens.weight": (100, HIDDEN), "model.norm.weight": (HIDDEN,)}
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "vocab_size": 100,
        "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": 8, "tie_word_embeddings": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    infos = [TensorInfo.of(name, "bfloat16", sizes) for name, sizes in shapes.items()]
    write_safetensors(
        folder / "model.safetensors",
        [(info, lambda info=info: np.full(info.shape, 0.01, ml_dtypes.bfloat16)) for info in infos],
        {"format": "pt"},
    )
    return folder


def growth(kind: str, folder: Path) -> int:
    """Bytes of anonymous memory that a runner adds to a process that has the libraries."""
    command = [sys.executable, "-c", MEASURE, kind, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is read from /proc")
def test_memory_is_bounded_by_a_block(deep: Path) -> None:
    block = 4 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER)
    # Four blocks and 60 MB for everything else; the whole model has 24 of 17 MB.
    assert growth("LayerwiseRunner", deep) < 4 * block + (60 << 20) < LAYERS * block / 3
    assert growth("TorchRunner", deep) > LAYERS * block * 0.9, "the meter sees nothing"
