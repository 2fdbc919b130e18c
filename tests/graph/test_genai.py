"""genai_config.json and tokenizer files, and what onnxruntime-genai makes of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coldpress.artifacts.arch_config import arch_from_config
from coldpress.errors import CheckpointError, PlanError
from coldpress.graph.genai import MAX_LENGTH, check_search, copy_tokenizer, genai_config, read_generation

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
        copy_tokenizer(tmp_path, tmp_path, tmp_path, 100)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(CheckpointError, match="use_fast"):
        copy_tokenizer(tmp_path, tmp_path, tmp_path, 100)


def test_tokenizer_config_is_completed(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.mkdir(), target.mkdir()
    (source / "tokenizer.json").write_text("{}")
    (source / "special_tokens_map.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    copy_tokenizer(source, source, target, 100)
    assert json.loads((target / "tokenizer_config.json").read_text()) == {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
    }  # fmt: skip
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "X", "bos_token": "<b>", "eos_token": "<e>"}')
    copy_tokenizer(source, source, target, 100)
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
        copy_tokenizer(source, source, target, 100)


@pytest.mark.parametrize(
    ("search", "says"),
    [
        ({"max_lenght": 5}, "search.max_lenght: onnxruntime-genai has no such setting; did you mean max_length?"),
        ({"temperature": "hot"}, "search.temperature is a number, not 'hot'"),
        ({"temperature": None}, "search.temperature is a number, not None"),
        ({"temperature": float("nan")}, "search.temperature is a number, not nan"),
        ({"do_sample": 1}, "search.do_sample is true or false, not 1"),
        ({"top_k": True}, "search.top_k is a whole number, not True"),
        ({"top_k": 1.5}, "search.top_k is a whole number, not 1.5"),
        ({"max_length": -1}, "search.max_length is 1 or more"),
        ({"max_length": 257}, "search.max_length 257 is beyond the model's context of 256"),
    ],
)
def test_search_settings_that_genai_would_not_take(search: dict[str, Any], says: str) -> None:
    with pytest.raises(PlanError, match=re.escape(says)):
        check_search(search, 256)


def test_genai_reads_all_search_settings_in_the_table_and_no_other(shared: Path, tmp_path: Path) -> None:
    og = pytest.importorskip("onnxruntime_genai")
    from oracles.passes import build_with_pass

    search = {"max_length": 9, "random_seed": 1, "batch_size": 1, "blank_penalty": 0.5, "chunk_size": 8, "top_k": 5.0}
    check_search(search, 9)
    build_with_pass(shared / "models" / "phi3-7m", tmp_path, precision="fp32", search=search)
    og.Config(str(tmp_path))
    path = tmp_path / "genai_config.json"
    path.write_text(path.read_text().replace('"max_length"', '"max_lenght"'))
    with pytest.raises(RuntimeError, match="max_lenght"):
        og.Config(str(tmp_path))


def test_a_plan_refuses_them(shared: Path) -> None:
    from oracles.passes import plan_with_pass

    with pytest.raises(PlanError, match="did you mean max_length"):
        plan_with_pass(shared / "models" / "phi3-7m", precision="fp32", search={"max_lenght": 5})
    with pytest.raises(PlanError, match="beyond the model's context"):
        plan_with_pass(shared / "models" / "phi3-7m", precision="fp32", search={"max_length": 10**6})


def test_a_wrong_generation_config_is_named(tmp_path: Path) -> None:
    wrong = {"do_sample": "yes", "temperature": "hot", "top_k": None, "top_p": 1, "eos_token_id": ["a"]}
    (tmp_path / "generation_config.json").write_text(json.dumps(wrong))
    with pytest.raises(CheckpointError) as caught:
        read_generation(tmp_path, {"bos_token_id": "1"}, {"do_sample": True})
    file = tmp_path / "generation_config.json"
    assert [line.strip() for line in caught.value.message.splitlines()[1:]] == [
        f"temperature of {file} is a number, not 'hot'",
        f"eos_token_id of {file} is a token id or a list of them, not ['a']",
        f"bos_token_id of {tmp_path / 'config.json'} is a token id or a list of them, not '1'",
    ]
    file.write_text('{"do_sample": true, "eos_token_id": [1, 2], "top_k": 50.0}')
    assert read_generation(tmp_path, {"eos_token_id": 1})["eos_token_id"] == [1, 2]


def _tokenizer(vocab: Any, *added: tuple[str, int, bool]) -> str:
    tokens = [{"content": name, "id": number, "special": special} for name, number, special in added]
    return json.dumps({"model": {"vocab": vocab}, "added_tokens": tokens})


@pytest.mark.parametrize(
    ("tokenizer", "config", "says"),
    [
        (_tokenizer({"a": 0, "b": 99}), "{}", None),
        (_tokenizer({"a": 0, "b": 100}), "{}", r"up to id 100 \('b'\), and config.json says vocab_size 100"),
        (_tokenizer([["x", 0.0]] * 101), "{}", "up to id 100 .*tokens beyond it: 1"),
        (_tokenizer({"a": 0}, ("<new>", 120, False)), "{}", "up to id 120"),
        (_tokenizer({"a": 0}, ("<image>", 100, True)), '{"image_token": "<image>"}', None),
        (_tokenizer({"a": 0}, ("<turn>", 100, True)), '{"chat_template": "<turn>{{ m }}"}', "up to id 100"),
        (_tokenizer({"a": 0}, ("<bos>", 100, True)), '{"bos_token": {"content": "<bos>"}}', "up to id 100"),
    ],
)
def test_tokens_without_a_row_in_the_embedding(tmp_path: Path, tokenizer: str, config: str, says: str | None) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir(), target.mkdir()
    (source / "tokenizer.json").write_text(tokenizer)
    (source / "tokenizer_config.json").write_text(config)
    if says is None:
        copy_tokenizer(source, source, target, 100)
        assert (target / "tokenizer.json").is_file()
        return
    with pytest.raises(CheckpointError, match=says):
        copy_tokenizer(source, source, target, 100)
    assert not list(target.iterdir())
