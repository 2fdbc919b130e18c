"""The graph against Transformers: every family and rope kind, prompt and decode steps, padding, real models.

Tolerance 1e-3 on float32 logits of order 1 to 20: the two sum in different orders, which moves them by 1e-5 or so; a
wrong weight, position or scale moves them by more than 0.1.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from coldpress.artifacts.families import FAMILIES
from oracles.decoders import TINY, Stepper, steps_of_transformers, tiny_model

TOLERANCE = 1e-3
STEPS = 16


def tokens(count: int, vocab: int, batch: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, vocab, (batch, count)).astype(np.int64)


def graph_steps(folder: Path, ids: np.ndarray, prompt: int) -> np.ndarray:
    step = Stepper(folder)
    found = [step(ids[:, :prompt])]
    found += [step(ids[:, position : position + 1]) for position in range(prompt, ids.shape[1])]
    return np.concatenate(found, axis=1)


def error(folder: Path, model: object, ids: np.ndarray, prompt: int) -> float:
    return float(np.abs(graph_steps(folder, ids, prompt) - steps_of_transformers(model, ids, prompt)).max())


@pytest.mark.parametrize("name", TINY)
def test_prompt_and_decode_steps(name: str, tmp_path: Path, build: Callable[..., Path]) -> None:
    model = tiny_model(name, tmp_path / "hf")
    ids = tokens(12 + STEPS, model.config.vocab_size, batch=2)
    reference = steps_of_transformers(model, ids, 12)
    assert reference.std() > 0.5  # else the tolerance would say nothing
    assert np.abs(graph_steps(build(tmp_path / "hf"), ids, 12) - reference).max() < TOLERANCE


@pytest.mark.parametrize("switch", ["position_ids", "if"])
@pytest.mark.parametrize("name", ["phi3-longrope", "phi3-longrope-head-8"])
@pytest.mark.parametrize(("prompt", "total"), [(12, 32), (36, 52), (28, 44)], ids=["below", "beyond", "across"])
def test_longrope_on_both_sides_of_the_original_length(
    name: str, switch: str, prompt: int, total: int, tmp_path: Path, build: Callable[..., Path]
) -> None:
    model = tiny_model(name, tmp_path / "hf")
    ids = tokens(total, model.config.vocab_size)
    assert error(build(tmp_path / "hf", rope_switch=switch), model, ids, prompt) < TOLERANCE


def test_longrope_factors_matter(tmp_path: Path, build: Callable[..., Path]) -> None:
    # The twin of the test above: with the long factors in the short table the result must be found wrong.
    model = tiny_model("phi3-longrope", tmp_path / "hf")
    text = (tmp_path / "hf" / "config.json").read_text()
    assert '"short_factor"' in text
    swapped = (
        text.replace('"short_factor"', '"x"').replace('"long_factor"', '"short_factor"').replace('"x"', '"long_factor"')
    )
    (tmp_path / "hf" / "config.json").write_text(swapped)
    assert error(build(tmp_path / "hf"), model, tokens(28, 80), 12) > 10 * TOLERANCE


def test_every_family_has_a_model_here() -> None:
    assert {settings["model_type"] for settings in TINY.values()} == set(FAMILIES)


SWITCHING = ("phi3-longrope", "phi3-longrope-head-8", "phi4-mini")


def rows_of_two_lengths(steps: int) -> tuple[tuple[int, int], list[np.ndarray]]:
    lengths = (14, 9)
    return lengths, [tokens(length + steps, 80, seed=length) for length in lengths]


@pytest.mark.parametrize(
    ("name", "switch"), [*((name, "position_ids") for name in TINY), *((name, "if") for name in SWITCHING)]
)
def test_a_batch_padded_on_the_right(name: str, switch: str, tmp_path: Path, build: Callable[..., Path]) -> None:
    model = tiny_model(name, tmp_path / "hf")
    steps = 6
    lengths, rows = rows_of_two_lengths(steps)
    ids, mask = np.zeros((2, 14), np.int64), np.zeros((2, 14), np.int64)
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        ids[i, :length], mask[i, :length] = row[0, :length], 1
    references = [steps_of_transformers(model, row, length) for row, length in zip(rows, lengths, strict=True)]
    step = Stepper(build(tmp_path / "hf", rope_switch=switch))
    pruned = Stepper(build(tmp_path / "hf", rope_switch=switch, prune_head=True))
    logits, last = step(ids, mask), pruned(ids, mask)
    assert last.shape == (2, 1, logits.shape[2])
    for i, length in enumerate(lengths):
        assert np.abs(logits[i, :length] - references[i][0, :length]).max() < TOLERANCE
        assert np.abs(last[i, 0] - references[i][0, length - 1]).max() < TOLERANCE
    for number in range(steps):
        new = np.array([row[0, length + number] for row, length in zip(rows, lengths, strict=True)])[:, None]
        logits, last = step(new), pruned(new)
        for i, length in enumerate(lengths):
            assert np.abs(logits[i, 0] - references[i][0, length + number]).max() < TOLERANCE
            assert np.abs(last[i, 0] - references[i][0, length + number]).max() < TOLERANCE


@pytest.mark.parametrize(
    "name",
    ["llama-gqa", "llama-head-24", "mistral-window", "phi3-longrope", "phi3-longrope-head-8", "gemma2", "gemma3",
     "qwen3", "smollm3", "gpt-neox", "mixtral-window", "qwen3-moe", "gpt-oss", "gpt-oss-head-24"],
)  # fmt: skip
def test_a_batch_padded_on_the_left(name: str, tmp_path: Path, build: Callable[..., Path]) -> None:
    model = tiny_model(name, tmp_path / "hf")
    steps = 6
    lengths, rows = rows_of_two_lengths(steps)
    ids, mask, positions = (np.zeros((2, 14), np.int64) for _ in range(3))
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        ids[i, 14 - length :], mask[i, 14 - length :] = row[0, :length], 1
        positions[i, 14 - length :] = np.arange(length)
    references = [steps_of_transformers(model, row, length) for row, length in zip(rows, lengths, strict=True)]
    step = Stepper(build(tmp_path / "hf", left_padding=True))
    logits = step(ids, mask, positions)
    for i, length in enumerate(lengths):
        assert np.abs(logits[i, 14 - length :] - references[i][0, :length]).max() < TOLERANCE
    for number in range(steps):
        new = np.array([row[0, length + number] for row, length in zip(rows, lengths, strict=True)])[:, None]
        logits = step(new, None, np.array([[length + number] for length in lengths]))
        for i, length in enumerate(lengths):
            assert np.abs(logits[i, 0] - references[i][0, length + number]).max() < TOLERANCE


@pytest.mark.parametrize("name", ["phi3-longrope", "phi3-longrope-head-8"])
def test_padding_on_the_left_does_not_count_as_length(name: str, tmp_path: Path, build: Callable[..., Path]) -> None:
    # 14 tokens padded to 40, beyond the original context of 32: still the short factors.
    model = tiny_model(name, tmp_path / "hf")
    row = tokens(14, 80)
    ids, mask, positions = (np.zeros((1, 40), np.int64) for _ in range(3))
    ids[0, 26:], mask[0, 26:], positions[0, 26:] = row[0], 1, np.arange(14)
    logits = Stepper(build(tmp_path / "hf", left_padding=True))(ids, mask, positions)
    assert np.abs(logits[:, 26:] - steps_of_transformers(model, row, 14)).max() < TOLERANCE


@pytest.mark.parametrize("name", ["gemma2", "granite"])
def test_inputs_embeds_are_those_of_transformers(name: str, tmp_path: Path, build: Callable[..., Path]) -> None:
    # Gemma's factor is part of its embedding, Granite's comes behind it.
    model = tiny_model(name, tmp_path / "hf")
    row = tokens(9, 80)
    embeds = model.get_input_embeddings()(torch.tensor(row)).detach().numpy()
    session = Stepper(build(tmp_path / "hf", exclude_embeds=True)).session
    feeds = {"inputs_embeds": embeds, "attention_mask": np.ones_like(row)}
    for value in session.get_inputs()[2:]:
        feeds[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
    (logits,) = session.run(["logits"], feeds)
    assert np.abs(logits - steps_of_transformers(model, row, 9)).max() < TOLERANCE


def test_left_padding_is_wrong_in_the_other_form(tmp_path: Path, build: Callable[..., Path]) -> None:
    # Why there are two forms: the twin of the test above.
    model = tiny_model("llama-gqa", tmp_path / "hf")
    ids, mask = tokens(10, 80), np.ones((1, 10), np.int64)
    ids[0, :4], mask[0, :4] = 0, 0
    expected = steps_of_transformers(model, ids[:, 4:], 6)
    assert np.abs(Stepper(build(tmp_path / "hf"))(ids, mask)[:, 4:] - expected).max() > 100 * TOLERANCE


@pytest.mark.parametrize("name", ["llama-biases", "phi3-gqa", "gpt-neox-sequential", "llama-head-24", "gemma2"])
@pytest.mark.parametrize("form", [{"packed_qkv": False}, {"fused_gate_up": True}], ids=["apart", "fused"])
def test_packing_does_not_change_the_function(
    name: str, form: dict[str, bool], tmp_path: Path, build: Callable[..., Path]
) -> None:
    model = tiny_model(name, tmp_path / "hf")
    assert error(build(tmp_path / "hf", **form), model, tokens(20, 80), 12) < TOLERANCE


def test_half_precision_runs_the_same_function(tmp_path: Path, build: Callable[..., Path]) -> None:
    # The form for CUDA, run by the CPU's float16 kernels. A float16 has 11 bits: logits of order 4 move by 0.01 or so.
    model = tiny_model("phi3-longrope", tmp_path / "hf", dtype=torch.float16)
    ids = tokens(28, 80)
    folder = build(tmp_path / "hf", io="float16", rope_switch="if")
    assert error(folder, model, ids, 12) < 0.1


def corrupt(folder: Path, name: str, row: int, factor: float) -> None:
    """Multiply one float32 of a tensor in the data file."""
    tensor = ir.load(folder / "model.onnx").graph.initializers[name].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    assert tensor.dtype == ir.DataType.FLOAT
    place = tensor.offset + 4 * row
    with (folder / "model.onnx.data").open("r+b") as file:
        file.seek(place)
        (value,) = struct.unpack("<f", file.read(4))
        file.seek(place)
        file.write(struct.pack("<f", value * factor))


@pytest.mark.parametrize("name", ["cos_cache", "model.layers.1.input_layernorm.weight", "lm_head.MatMul.weight"])
def test_one_corrupt_value_is_found(name: str, tmp_path: Path, build: Callable[..., Path]) -> None:
    model = tiny_model("llama-gqa", tmp_path / "hf")
    ids, folder = tokens(28, 80), build(tmp_path / "hf")
    assert error(folder, model, ids, 12) < TOLERANCE
    corrupt(folder, name, 40 if name == "cos_cache" else 5, 1.5)  # 40: position 5, fastest frequency
    assert error(folder, model, ids, 12) > TOLERANCE


@pytest.mark.parametrize("name", ["phi3-7m", "stories1M-char361", "stories260K-hd16"])
def test_real_models(name: str, shared: Path, build: Callable[..., Path]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = shared / "models" / name
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(source)
    prompt = np.array([tokenizer.encode("Once upon a time, there was a little girl named Lily.")], np.int64)
    with torch.no_grad():
        ids = model.generate(
            torch.tensor(prompt), max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False, pad_token_id=0
        ).numpy()
    folder = build(source)
    assert error(folder, model, ids, prompt.shape[1]) < TOLERANCE
    step = Stepper(folder)
    found, logits = prompt, step(prompt)
    for _ in range(STEPS):
        logits[:, -1, model.generation_config.eos_token_id] = -np.inf  # as min_new_tokens does above
        found = np.concatenate([found, logits[:, -1:].argmax(-1)], axis=1)
        logits = step(found[:, -1:])
    assert tokenizer.decode(found[0]) == tokenizer.decode(ids[0])
