"""The light tokenizer yields the ids that Transformers yields."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from coldpress.data.tokenizer import Tokenizer, copy_tokenizer
from coldpress.errors import CheckpointError, DataError
from fakes.tiny_models import make_tokenizer

TEXTS = ["### Text: I'm thrilled!\n### The tone is:\njoy", "  two  spaces, é, 日本, 🙂\n\n", "<s>already</s>", "a"]
CHAT = [{"role": "user", "content": "hi {{ name }}"}, {"role": "assistant", "content": "hello"}]


@pytest.mark.parametrize("model", ["phi3-7m", "stories260K-hd16", "stories1M-char361"])
def test_same_ids_as_transformers(shared: Path, model: str) -> None:
    from transformers import AutoTokenizer

    ours, theirs = Tokenizer.load(shared / "models" / model), AutoTokenizer.from_pretrained(shared / "models" / model)
    for text in TEXTS:
        assert ours.ids(text) == theirs(text, add_special_tokens=False)["input_ids"], text
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    if ours.chat_template is not None:
        for prompt in (False, True):
            expected = theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=prompt)
            assert ours.chat(CHAT, generation_prompt=prompt) == expected


def test_decode_is_the_inverse(tokenizer: Tokenizer) -> None:
    for text in TEXTS[:2]:
        assert tokenizer.decode(tokenizer.ids(text)) == text


def test_special_tokens(tokenizer: Tokenizer) -> None:
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (256, 257, 258)


def test_damaged_and_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not a tokenizer"):
        Tokenizer.load(tmp_path)


def test_copy(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "a")
    copy_tokenizer(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "a")
    assert Tokenizer.load(tmp_path / "b").ids("ab") == Tokenizer.load(tmp_path / "b").ids("ab")
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def test_no_chat_template(tokenizer: Tokenizer) -> None:
    bare = Tokenizer(tokenizer.backend, None, None, 0)
    with pytest.raises(DataError, match="the tokenizer has none"):
        bare.chat(CHAT)
    assert bare.chat(CHAT, template="{{ messages|length }}") == "2"
    with pytest.raises(DataError, match="cannot render"):
        bare.chat(CHAT, template="{{ raise_exception('no') }}")
