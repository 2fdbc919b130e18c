"""onnxruntime-genai loads what was built for every family, and its greedy tokens are those of Transformers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from coldpress.artifacts.families import FAMILIES
from oracles.decoders import TINY, tiny_model
from oracles.passes import TOKENIZER, build_with_pass

PROMPTS = ((5, 9, 33, 7, 61, 12, 4), (40, 3, 71))
NEW = 16


def greedy(folder: Path) -> list[list[int]]:
    import onnxruntime_genai as og

    model, found = og.Model(str(folder)), []
    for prompt in PROMPTS:
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=len(prompt) + NEW, do_sample=False)
        generator = og.Generator(model, parameters)
        generator.append_tokens(np.array(prompt, np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        found.append([int(token) for token in generator.get_sequence(0)])
    return found


@pytest.mark.parametrize("name", TINY)
def test_greedy_tokens_equal_transformers(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    source = tmp_path / "hf"
    model = tiny_model(name, source)
    (source / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "eos_token_id": 79}))
    (source / "generation_config.json").unlink(missing_ok=True)
    gated = FAMILIES[config["model_type"]].gated
    for output, options in (("full", {}), ("pruned", {"prune_lm_head": True, "fuse_mlp_gate_up": gated})):
        build_with_pass(source, tmp_path / output, precision="fp32", extra_options=options)
        found = greedy(tmp_path / output)
        for prompt, tokens in zip(PROMPTS, found, strict=True):
            with torch.no_grad():
                expected = model.generate(
                    torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, eos_token_id=79, pad_token_id=0
                )[0].tolist()
            expected = expected[: expected.index(79)] if 79 in expected else expected
            assert [token for token in tokens if token != 79] == [token for token in expected if token != 79]
            assert len(tokens) > len(prompt)
