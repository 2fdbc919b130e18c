"""Loading checkpoints: damaged ones are named, 4-bit ones keep their weights."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest

from coldpress.artifacts.base import BaseQuantization
from coldpress.errors import CheckpointError, UnsupportedModelError
from coldpress.nn.loading import four_bit_layers, load_adapter, load_dequantized, load_model

NF4 = BaseQuantization("nf4", True, "bfloat16")


def copy(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target / "model"))


def test_types(tiny_phi3: Path) -> None:
    import torch

    assert {p.dtype for p in load_model(tiny_phi3).parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load_model(tiny_phi3, dtype="float32").parameters()} == {torch.float32}


def test_truncated(tiny_phi3: Path, tmp_path: Path) -> None:
    model = copy(tiny_phi3, tmp_path)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_model(model)


def test_missing_weights_are_not_made_up(tiny_phi3: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    model = copy(tiny_phi3, tmp_path)
    import ml_dtypes  # noqa: F401 - lets NumPy read bf16

    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.self_attn.o_proj.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 weights of the model, the first: model\.layers\.1\.self_attn"):
        load_model(model)


def test_unknown_type_and_own_code(tiny_phi3: Path, tmp_path: Path) -> None:
    model = copy(tiny_phi3, tmp_path)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "unheard_of"}))
    with pytest.raises(UnsupportedModelError, match="does not know the model type 'unheard_of'"):
        load_model(model)
    (model / "config.json").write_text(
        json.dumps({**config, "model_type": "unheard_of", "auto_map": {"AutoModelForCausalLM": "code.Model"}})
    )
    with pytest.raises(UnsupportedModelError, match="own Python code"):
        load_model(model)


def changed_config(source: Path, target: Path, change: dict[str, Any]) -> Path:
    model = copy(source, target)
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    return model


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rope_parameters": None, "rope_scaling": {"type": "wobble"}}, "wobble"),
        ({"num_hidden_layers": "six"}, "num_hidden_layers"),
    ],
)
def test_a_config_that_transformers_refuses(
    tiny_phi3: Path, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    model = changed_config(tiny_phi3, tmp_path, change)
    with pytest.raises(CheckpointError, match=words) as caught:
        load_model(model)
    assert str(model) in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("pad", [32000, "absent"])
def test_a_padding_id_outside_the_vocabulary_is_dropped(tiny_phi3: Path, tmp_path: Path, pad: int | str) -> None:
    model = changed_config(tiny_phi3, tmp_path, {"pad_token_id": pad})
    if pad == "absent":
        record = json.loads((model / "config.json").read_text())
        for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
            del record[key]
        (model / "config.json").write_text(json.dumps(record))
    loaded = load_model(model)
    assert loaded.config.pad_token_id is None
    assert loaded.get_input_embeddings().padding_idx is None


def test_an_adapter_loads_without_a_word(tiny_phi3: Path, tmp_path: Path) -> None:
    import peft

    made = peft.get_peft_model(
        load_model(tiny_phi3), peft.LoraConfig(r=2, target_modules=["o_proj"], task_type="CAUSAL_LM")
    )
    made.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    base = load_model(tiny_phi3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        load_adapter(base, tmp_path / "adapter")


def snapshot(model: Any) -> dict[str, tuple[bytes, bool, Any]]:
    found = {}
    for name, layer in four_bit_layers(model).items():
        state = layer.weight.quant_state
        found[name] = (layer.weight.data.numpy().tobytes(), state.nested, state.absmax.clone())
    return found


def test_four_bit_weights_survive_a_forward_in_eval_mode(tiny_phi3: Path) -> None:
    pytest.importorskip("bitsandbytes")
    import torch

    model = load_model(tiny_phi3, dtype="bfloat16", quantization=NF4).eval()
    before = snapshot(model)
    assert len(before) == 6, "down_proj, 96 wide, has no whole blocks of 64"
    assert all(nested for _, nested, _ in before.values()), "double quantization"
    with torch.inference_mode():
        model(input_ids=torch.tensor([[1, 2, 3, 4]]))
        model(input_ids=torch.tensor([[1]]))
    after = snapshot(model)
    assert all(after[name][:2] == before[name][:2] for name in before)
    assert all(torch.equal(after[name][2], before[name][2]) for name in before)


def test_a_tied_head_stays_out_of_the_four_bits(tmp_path: Path) -> None:
    """Its weight is the embedding's, so no tensor of the checkpoint bears its name."""
    pytest.importorskip("bitsandbytes")
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype="bfloat16", quantization=NF4)
    assert len(four_bit_layers(model)) == 7
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_the_dequantized_model_is_the_four_bit_one(tiny_phi3: Path) -> None:
    pytest.importorskip("bitsandbytes")
    import torch

    ids = torch.tensor([[256, 10, 20, 30, 40]])
    with torch.inference_mode():
        packed = load_model(tiny_phi3, dtype="bfloat16", quantization=NF4).eval()(input_ids=ids).logits.float()
        plain = load_dequantized(tiny_phi3, NF4).eval()(input_ids=ids).logits
        original = load_model(tiny_phi3, dtype="float32").eval()(input_ids=ids).logits
    assert plain.dtype == torch.float32
    # The packed model computes in bf16, three digits; the original is off by the 4 bits.
    assert (plain - packed).abs().mean() < 0.1 * (plain - original).abs().mean() + 0.02
    assert (plain - original).abs().mean() > 0.02
