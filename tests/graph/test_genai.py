"""genai_config.json and tokenizer files, and what onnxruntime-genai makes of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from coldpress.artifacts.arch_config import arch_from_config
from coldpress.errors import CheckpointError
from coldpress.graph.genai import MAX_LENGTH, copy_tokenizer, genai_config

CONFIG = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "vocab_size": 100, "max_position_embeddings": 131072, "eos_token_id": 2,
    "bos_token_id": 1,
}  # fmt: skip
TEXTS = (
    "Once upon a time, there was a little girl.",
    "I'm so happy today! :)",
    "<|user|>\nhi<|end|>\n<|assistant|>\n",
    "  two  spaces\n\nnew lines\t and a tab ",
    "naïve café — “quotes” 日本語 🙂",
    "1234567890 3.14",
    "",
)


def test_ids_come_from_both_configs() -> None:
    arch = arch_from_config(CONFIG)
    found = genai_config(arch, CONFIG, {"eos_token_id": [5, 6], "do_sample": True, "top_p": 0.9}, threads=3)
    assert found["model"]["eos_token_id"] == [5, 6, 2]
    assert found["model"]["pad_token_id"] == 5
    assert found["model"]["bos_token_id"] == 1
    outside = genai_config(arch, {**CONFIG, "pad_token_id": 32000}, {}, threads=3)
    assert outside["model"]["pad_token_id"] == 2
    assert found["search"]["do_sample"] is True
    assert found["search"]["top_p"] == 0.9
    assert found["model"]["decoder"]["session_options"]["intra_op_num_threads"] == 3
    alone = genai_config(arch, {**CONFIG, "bos_token_id": None}, {}, threads=None)
    assert alone["model"]["eos_token_id"] == 2
    assert "bos_token_id" not in alone["model"]
    assert "intra_op_num_threads" not in alone["model"]["decoder"]["session_options"]


def test_max_length_is_bounded_and_can_be_set() -> None:
    arch = arch_from_config(CONFIG)
    assert genai_config(arch, CONFIG, {}, threads=1)["search"]["max_length"] == MAX_LENGTH
    assert genai_config(arch, CONFIG, {}, threads=1, search={"max_length": 9})["search"]["max_length"] == 9
    short = arch_from_config({**CONFIG, "max_position_embeddings": 256})
    assert genai_config(short, CONFIG, {}, threads=1)["search"]["max_length"] == 256


def test_a_tokenizer_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        copy_tokenizer(tmp_path, tmp_path, tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(CheckpointError, match="use_fast"):
        copy_tokenizer(tmp_path, tmp_path, tmp_path)


def test_tokenizer_config_is_completed(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.mkdir(), target.mkdir()
    (source / "tokenizer.json").write_text("{}")
    (source / "special_tokens_map.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    copy_tokenizer(source, source, target)
    assert json.loads((target / "tokenizer_config.json").read_text()) == {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
    }  # fmt: skip
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "X", "bos_token": "<b>", "eos_token": "<e>"}')
    copy_tokenizer(source, source, target)
    assert (target / "tokenizer_config.json").read_text() == (source / "tokenizer_config.json").read_text()


@pytest.mark.parametrize("name", ["phi3-7m", "stories1M-char361", "stories260K-hd16"])
def test_tokens_and_greedy_text_equal_transformers(name: str, shared: Path, tmp_path: Path) -> None:
    og = pytest.importorskip("onnxruntime_genai")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from oracles.passes import build_with_pass

    source = shared / "models" / name
    build_with_pass(source, tmp_path / "out", precision="fp32")
    model = og.Model(str(tmp_path / "out"))
    tokenizer, theirs = og.Tokenizer(model), AutoTokenizer.from_pretrained(source)
    for text in TEXTS:
        plain = theirs.encode(text, add_special_tokens=False)
        assert list(tokenizer.encode(text)) == plain, text
    tokenizer.update_options(add_special_tokens="true")  # without it there is no BOS
    for text in TEXTS:
        assert list(tokenizer.encode(text)) == theirs.encode(text), text
    prompt = theirs.encode("Once upon a time, there was a little")
    reference = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = reference.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, pad_token_id=0)[
            0
        ].tolist()
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(expected))
    generator = og.Generator(model, params)
    generator.append_tokens(np.array(prompt, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    # Only Transformers keeps the end-of-text token that it stopped at.
    found = theirs.decode(list(generator.get_sequence(0)), skip_special_tokens=True)
    assert found == theirs.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_a_damaged_tokenizer_config_is_named(tmp_path: Path, name: str) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (source / "tokenizer.json").write_text("{}")
    (source / name).write_text('{"bos_token": ')
    with pytest.raises(CheckpointError, match=str(source / name)):
        copy_tokenizer(source, source, target)
