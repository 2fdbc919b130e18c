"""A base with its adapter added, row by row, against PEFT's own merge in float32; and what is refused."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coldpress.artifacts.adapter import AdapterWeights
from coldpress.artifacts.adapter_merged import MergedTensors
from coldpress.artifacts.base import BaseQuantization
from coldpress.artifacts.tensors import TensorInfo, TensorSet, numpy_dtype, write_safetensors
from coldpress.errors import CheckpointError, PlanError
from coldpress.kernels.nf4 import round_trip
from oracles.decoders import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, on tied weights and biases

TOLERANCE = 2e-5
"""Float32 sums of 64 to 96 terms of order 1, in another order."""

# A model with biases, adapted in every way that PEFT can merge: name -> (model, LoraConfig)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama-gqa", {}),
    "rslora": ("llama-gqa", {"use_rslora": True, "r": 8}),
    "patterns": (
        "llama-gqa",
        {"rank_pattern": {"o_proj": 2, "^model.layers.1.mlp.up_proj": 7}, "alpha_pattern": {"1.self_attn.q_proj": 32},
         "target_modules": ["q_proj", "o_proj", "up_proj"]},
    ),
    "packed": ("phi3-gqa", {"target_modules": ["qkv_proj", "gate_up_proj", "down_proj", "lm_head"]}),
    "dora": ("llama-gqa", {"use_dora": True, "target_modules": ["q_proj", "down_proj", "lm_head"]}),
    "dora rslora": ("phi3-gqa", {"use_dora": True, "use_rslora": True, "target_modules": ["qkv_proj", "gate_up_proj"]}),
    "embedding": ("llama-gqa", {"target_modules": ["q_proj", "embed_tokens"]}),
    "dora embedding": ("llama-gqa", {"use_dora": True, "target_modules": ["q_proj", "embed_tokens"]}),
    "modules_to_save": ("llama-gqa", {"modules_to_save": ["lm_head", "embed_tokens"]}),
    "lora_bias": ("llama-biases", {"lora_bias": True, "target_modules": ["q_proj", "o_proj", "up_proj"]}),
    "bias all": ("llama-biases", {"bias": "all"}),
    "tokens": ("llama-gqa", {"trainable_token_indices": [7, 3, 79]}),
    "tokens by name": ("llama-gqa", {"trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [2]}}),
    "tied tokens": ("llama-mha-tied", {"trainable_token_indices": [7, 3]}),
    "tied modules": ("llama-mha-tied", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "loha": ("llama-gqa", {"kind": "LoHa", "target_modules": ["q_proj", "down_proj", "lm_head"]}),
    "loha patterns": (
        "phi3-gqa",
        {"kind": "LoHa", "rank_pattern": {"qkv_proj": 2}, "alpha_pattern": {"1.self_attn.o_proj": 32},
         "target_modules": ["qkv_proj", "o_proj"], "modules_to_save": ["lm_head"]},
    ),
    "lokr": ("llama-gqa", {"kind": "LoKr", "target_modules": ["q_proj", "down_proj", "lm_head"]}),
    "lokr in parts": ("llama-gqa", {"kind": "LoKr", "r": 2, "target_modules": ["q_proj", "k_proj", "up_proj"]}),
    "lokr both in parts": ("llama-gqa", {"kind": "LoKr", "r": 2, "decompose_both": True, "decompose_factor": 8}),
    "lokr flat": ("phi3-gqa", {"kind": "LoKr", "decompose_factor": 2, "target_modules": ["qkv_proj", "gate_up_proj"]}),
    "lokr steep": ("phi3-gqa", {"kind": "LoKr", "decompose_factor": 1, "target_modules": ["qkv_proj", "o_proj"]}),
    "lokr patterns": (
        "llama-gqa",
        {"kind": "LoKr", "rank_pattern": {"q_proj": 1, "up_proj": 3}, "alpha_pattern": {"1.mlp.up_proj": 32},
         "decompose_both": True, "target_modules": ["q_proj", "up_proj"], "modules_to_save": ["norm"]},
    ),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "conv1d dora": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "use_dora": True}),
}  # fmt: skip


def make_base(name: str, folder: Path) -> Path:
    if name != "gpt2":
        tiny_model(name, folder)
        return folder
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=80, n_positions=64)).save_pretrained(folder)
    return folder


def make_adapter(base: Path, folder: Path, **settings: Any) -> tuple[Path, dict[str, np.ndarray]]:
    """An adapter with nothing left at zero, and the merged weights as PEFT makes them from its files."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    made, alpha = {"LoHa": (peft.LoHaConfig, "alpha"), "LoKr": (peft.LoKrConfig, "alpha")}.get(
        settings.pop("kind", "LoRA"), (peft.LoraConfig, "lora_alpha")
    )
    given = {"r": 4, alpha: 6, "target_modules": ["q_proj", "o_proj"], "task_type": "CAUSAL_LM", **settings}
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), made(**given))
    for name, value in model.named_parameters():
        if value.requires_grad:
            noise = torch.randn_like(value) * 0.1
            value.data.mul_(1 + noise) if "magnitude" in name else value.data.add_(noise)
    model.save_pretrained(folder, save_embedding_layers=False)
    again = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = peft.PeftModel.from_pretrained(again, folder).merge_and_unload()
    return folder, {name: value.detach().numpy() for name, value in merged.state_dict().items()}


def is_tied(base: Path) -> bool:
    return bool(json.loads((base / "config.json").read_text())["tie_word_embeddings"])


def read_in_pieces(merged: MergedTensors, info: TensorInfo, rows: int = 7) -> np.ndarray:
    pieces = [merged.read(info.name, start, start + rows) for start in range(0, info.shape[0], rows)]
    return np.concatenate(pieces)


def distance(base: Path, adapter: Path, expected: dict[str, np.ndarray]) -> tuple[float, set[str]]:
    """Greatest difference between any merged value and PEFT's, and which tensors the adapter changed."""
    worst, changed = 0.0, set()
    with TensorSet.open(base) as tensors, AdapterWeights.open(adapter) as weights:
        merged = MergedTensors(tensors, weights, tied=is_tied(base))
        for info in merged.infos():
            found = read_in_pieces(merged, info)
            assert found.dtype == numpy_dtype(info.dtype) == np.float32
            worst = max(worst, float(np.abs(found - expected[info.name]).max()))
            if (found != tensors.read(info.name)).any():
                changed.add(info.name)
    return worst, changed


def edit(adapter: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    """Rewrite the tensors of an adapter."""
    with TensorSet.open(adapter / "adapter_model.safetensors") as tensors:
        held = {info.name: np.array(tensors.read(info.name)) for info in tensors.infos()}
    change(held)
    entries = [
        (TensorInfo.of(name, str(value.dtype), value.shape), lambda value=value: value) for name, value in held.items()
    ]
    write_safetensors(adapter / "adapter_model.safetensors", entries)


def set_record(adapter: Path, **change: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_pefts_merge(name: str, tmp_path: Path) -> None:
    model, settings = VARIANTS[name]
    base = make_base(model, tmp_path / "base")
    adapter, expected = make_adapter(base, tmp_path / "adapter", **dict(settings))
    worst, changed = distance(base, adapter, expected)
    assert worst < TOLERANCE
    with AdapterWeights.open(adapter) as weights, TensorSet.open(base) as tensors:
        assert changed == {one for one in weights.changed if one in tensors}
    with TensorSet.open(adapter / "adapter_model.safetensors") as own:
        names = sorted(info.name for info in own.infos())
    # The twin: any one tensor of the adapter with one value off by a little is seen.
    for place in {0, len(names) // 2, len(names) - 1}:

        def corrupt(held: dict[str, np.ndarray], place: int = place) -> None:
            held[names[place]].flat[5 % held[names[place]].size] += 0.05

        edit(adapter, corrupt)
        try:
            assert distance(base, adapter, expected)[0] > 10 * TOLERANCE, names[place]
        except CheckpointError as error:
            assert "one matrix" in str(error)  # the tied pair no longer agrees  # noqa: PT017

        def mend(held: dict[str, np.ndarray], place: int = place) -> None:
            held[names[place]].flat[5 % held[names[place]].size] -= 0.05

        edit(adapter, mend)


def test_a_16_bit_adapter_on_a_16_bit_base(tmp_path: Path) -> None:
    """The sum is made in float32, whatever the files hold."""
    import ml_dtypes
    import torch

    tiny_model("llama-gqa", tmp_path / "base", dtype=torch.bfloat16)
    adapter, _ = make_adapter(tmp_path / "base", tmp_path / "adapter")
    edit(adapter, lambda held: held.update({name: value.astype(ml_dtypes.bfloat16) for name, value in held.items()}))
    name = "model.layers.1.self_attn.q_proj"
    with TensorSet.open(tmp_path / "base") as base, AdapterWeights.open(adapter) as weights:
        merged = MergedTensors(base, weights, tied=False)
        pair = weights.pairs[f"{name}.weight"]
        a, b = weights.read(pair.first).astype(np.float64), weights.read(pair.second).astype(np.float64)
        expected = base.read(f"{name}.weight").astype(np.float64) + 1.5 * b @ a
        np.testing.assert_allclose(merged.read(f"{name}.weight"), expected, atol=1e-6)
        assert merged.info(f"{name}.weight").dtype == "float32"
        assert merged.info("model.layers.1.mlp.up_proj.weight").dtype == "bfloat16"


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
def test_rows_of_a_four_bit_base(
    quant_type: Any, double: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row alone gets what the whole tensor gets, though double quantization takes a mean over all of it."""
    import ml_dtypes
    import torch

    monkeypatch.setattr("coldpress.artifacts.adapter_merged.CHUNK_ELEMENTS", 64 * 5)
    tiny_model("llama-gqa", tmp_path / "base", dtype=torch.bfloat16)
    adapter, _ = make_adapter(tmp_path / "base", tmp_path / "adapter", use_dora=True)
    layers = [f"model.layers.1.self_attn.{part}_proj" for part in ("q", "k")]
    with TensorSet.open(tmp_path / "base") as base, AdapterWeights.open(adapter) as weights:
        quantization = BaseQuantization(quant_type, double, "bfloat16")
        merged = MergedTensors(base, weights, tied=False, quantization=quantization, four_bits=layers)
        for layer in layers:
            name = f"{layer}.weight"
            whole = round_trip(base.read(name), quant_type=quant_type, double_quant=double)
            before = whole.astype(ml_dtypes.bfloat16).astype(np.float32)
            assert (before != base.read(name).astype(np.float32)).mean() > 0.5
            for start, stop in ((0, 64), (3, 4), (10, 33)):
                stop = min(stop, len(before))
                found, after = merged.before_and_after(name, start, stop)
                assert np.array_equal(found, before[start:stop])
                assert merged.info(name).dtype == "float32"
                if layer.endswith("k_proj"):  # not adapted, and still no longer the 16-bit weights
                    assert np.array_equal(after, found)
                    continue
                pair = weights.pairs[name]
                total = before + 1.5 * (weights.read(pair.second) @ weights.read(pair.first))
                scale = weights.read(str(pair.magnitude)) / np.linalg.norm(total, axis=1)
                np.testing.assert_allclose(after, (total * scale[:, None])[start:stop], atol=1e-5)


def test_whole_tensor_figures_are_made_once_and_by_one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import coldpress.kernels.nf4 as nf4

    tiny_model("llama-gqa", tmp_path / "base")
    adapter, _ = make_adapter(tmp_path / "base", tmp_path / "adapter")
    calls: list[bool] = []
    real = nf4.block_scales

    def counted(pieces: Any, *, double_quant: bool = False) -> Any:
        calls.append(double_quant)
        return real(pieces, double_quant=double_quant)

    monkeypatch.setattr(nf4, "block_scales", counted)
    name = "model.layers.0.self_attn.q_proj"
    found: dict[int, np.ndarray] = {}
    with TensorSet.open(tmp_path / "base") as base, AdapterWeights.open(adapter) as weights:
        quantization = BaseQuantization("nf4", True, "float32")
        merged = MergedTensors(base, weights, tied=False, quantization=quantization, four_bits=[name])
        barrier = threading.Barrier(8)

        def read(start: int) -> None:
            barrier.wait()
            found[start] = merged.read(f"{name}.weight", start, start + 8)

        threads = [threading.Thread(target=read, args=(start,)) for start in range(0, 64, 8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert calls == [True]
        alone = MergedTensors(base, weights, tied=False, quantization=quantization, four_bits=[name])
        np.testing.assert_allclose(
            np.concatenate([found[start] for start in sorted(found)]), alone.read(f"{name}.weight"), atol=1e-6
        )


def test_only_the_rows_asked_for_are_read(tmp_path: Path) -> None:
    tiny_model("llama-gqa", tmp_path / "base")
    adapter, _ = make_adapter(tmp_path / "base", tmp_path / "adapter", use_dora=True)
    asked: list[tuple[int, int | None]] = []

    class Counted:
        def __init__(self, inner: TensorSet) -> None:
            self.inner = inner
            self.infos, self.info = inner.infos, inner.info

        def __contains__(self, name: object) -> bool:
            return name in self.inner

        def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
            asked.append((start, stop))
            rows: np.ndarray = self.inner.read(name, start, stop)
            return rows

    with TensorSet.open(tmp_path / "base") as base, AdapterWeights.open(adapter) as weights:
        merged = MergedTensors(Counted(base), weights, tied=False)
        merged.read("model.layers.0.self_attn.q_proj.weight", 5, 9)
    assert asked == [(5, 9)]


TIED = [
    {"target_modules": ["q_proj", "embed_tokens"]},
    {"target_modules": ["q_proj", "lm_head"]},
    {"modules_to_save": ["embed_tokens"]},
    {"modules_to_save": ["embed_tokens", "lm_head"]},
]


@pytest.mark.parametrize("settings", TIED, ids=str)
def test_what_would_separate_a_tied_head_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    base = make_base("llama-mha-tied", tmp_path / "base")
    adapter, _ = make_adapter(base, tmp_path / "adapter", **settings)
    with (
        TensorSet.open(base) as tensors,
        AdapterWeights.open(adapter) as weights,
        pytest.raises(CheckpointError, match="one matrix as embedding and head"),
    ):
        MergedTensors(tensors, weights, tied=True)


def test_the_way_out_of_a_tied_head(tmp_path: Path) -> None:
    """The hint's recipe: a base with a head of its own, after which the merge equals the model that was trained."""
    import torch
    from transformers import AutoModelForCausalLM

    base = make_base("llama-mha-tied", tmp_path / "base")
    adapter, _ = make_adapter(base, tmp_path / "adapter", target_modules=["lm_head", "embed_tokens"])
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    model.save_pretrained(tmp_path / "untied")
    with TensorSet.open(tmp_path / "untied") as tensors, AdapterWeights.open(adapter) as weights:
        merged = MergedTensors(tensors, weights, tied=False)
        for name in ("lm_head.weight", "model.embed_tokens.weight"):
            pair = weights.pairs[name]
            delta = 1.5 * (weights.read(pair.second) @ weights.read(pair.first))
            expected = tensors.read(name) + (delta.T if pair.transposed else delta)
            np.testing.assert_allclose(merged.read(name), expected, atol=TOLERANCE)


def test_a_tied_checkpoint_that_holds_its_head_twice(tmp_path: Path) -> None:
    base = make_base("llama-mha-tied", tmp_path / "base")
    adapter, expected = make_adapter(base, tmp_path / "adapter", trainable_token_indices=[4])
    with TensorSet.open(base) as tensors:
        held = {info.name: np.array(tensors.read(info.name)) for info in tensors.infos()}
    held["lm_head.weight"] = held["model.embed_tokens.weight"]
    entries = [
        (TensorInfo.of(name, str(value.dtype), value.shape), lambda value=value: value) for name, value in held.items()
    ]
    write_safetensors(base / "model.safetensors", entries)
    with TensorSet.open(base) as tensors, AdapterWeights.open(adapter) as weights:
        merged = MergedTensors(tensors, weights, tied=True)
        assert np.array_equal(merged.read("lm_head.weight"), expected["model.embed_tokens.weight"])


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "ADALORA"}, "of the type ADALORA; what can be merged: LORA, LOHA, LOKR"),
    ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
    ({"init_lora_weights": "lora_ga"}, "lora_ga"),
    ({"use_qalora": True}, "QA-LoRA"),
    ({"layer_replication": [[0, 2]]}, "layer replication"),
    ({"alora_invocation_tokens": [1]}, "activated LoRA"),
    ({"use_bdlora": {"nblocks": 2}}, "block-diagonal"),
    ({"target_parameters": ["experts.gate_up_proj"]}, "single parameters"),
    ({"kasa_config": {"beta": 1}}, "KaSA"),
    ({"use_dora": True, "lora_bias": True}, "DoRA with lora_bias"),
]


@pytest.mark.parametrize(("change", "said"), REFUSED, ids=lambda value: str(value)[:30])
def test_kinds_that_are_refused_by_name(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    base = make_base("llama-gqa", tmp_path / "base")
    adapter, _ = make_adapter(base, tmp_path / "adapter")
    set_record(adapter, **change)
    with pytest.raises(PlanError, match=said):
        AdapterWeights.open(adapter)


def drop(name: str) -> Callable[[dict[str, np.ndarray]], None]:
    def made(held: dict[str, np.ndarray]) -> None:
        del held[next(key for key in sorted(held) if name in key)]

    return made


def change(name: str, how: Callable[[np.ndarray], np.ndarray]) -> Callable[[dict[str, np.ndarray]], None]:
    def made(held: dict[str, np.ndarray]) -> None:
        key = next(key for key in sorted(held) if name in key)
        held[key] = np.ascontiguousarray(how(held[key]))

    return made


DAMAGED: list[tuple[str, Callable[[dict[str, np.ndarray]], None] | dict[str, Any], str]] = [
    ("wrong rank", {"r": 8}, r"A of \S+ has shape \[4, 64\] and B \[64, 4\]; at rank 8"),
    ("wrong rank of B", change("lora_B", lambda b: b[:, :3]), r"at rank 4, .* must be \[4, in\] and \[out, 4\]"),
    ("too wide", change("lora_A", lambda a: np.tile(a, 2)), r"of shape \[64, 128\], the base has \[64, 64\]"),
    ("no B", drop("lora_B"), r"has no B"),
    ("another type", {"peft_type": "LOHA", "alpha": 6}, r"has \S+lora_\S+, of another type than LOHA"),
    ("not a number", change("lora_A", lambda a: np.where(a == a[1, 9], np.nan, a)), "holds NaN"),
    ("alpha is text", {"lora_alpha": "much"}, "lora_alpha and alpha_pattern must be finite numbers"),
    ("no alpha", {"lora_alpha": None}, "lora_alpha and alpha_pattern must be finite numbers"),
    ("alpha is NaN", {"lora_alpha": float("nan")}, r"finite numbers .*nan for \S+proj"),
    ("alpha is infinite", {"alpha_pattern": {"q_proj": float("inf")}}, r"finite numbers .*inf for \S+q_proj"),
    ("alpha beyond floats", {"lora_alpha": 10**400}, "lora_alpha and alpha_pattern must be finite numbers"),
    ("nothing in it", lambda held: held.clear(), "adapter_model.safetensors holds no tensors"),
    ("dora without magnitude", {"use_dora": True}, "has no magnitude vector"),
    ("foreign tensor", lambda held: held.update({"h": np.ones(3, np.float32)}), "not a tensor of a PEFT adapter"),
    (
        "unknown kind",
        lambda held: held.update({"base_model.model.lm_head.lora_E": np.ones(3, np.float32)}),
        "kind of adapter not known",
    ),
    (
        "another model",
        lambda held: held.update({key.replace("q_p", "qkv_p"): held.pop(key) for key in [*held] if "q_p" in key}),
        "changes 2 weights that the base model does not have: .*qkv_proj.*",
    ),
    (
        "bias without bias",
        lambda held: held.update(
            {key.replace("weight", "bias"): np.ones(64, np.float32) for key in [*held] if "lora_B" in key}
        ),
        "trained with lora_bias, and 4 of its layers have no bias",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("how", "said"), [row[1:] for row in DAMAGED], ids=[row[0] for row in DAMAGED])
def test_an_adapter_that_does_not_fit(how: Any, said: str, tmp_path: Path) -> None:
    base = make_base("llama-gqa", tmp_path / "base")
    adapter, _ = make_adapter(base, tmp_path / "adapter")
    if isinstance(how, dict):
        set_record(adapter, **how)
    else:
        edit(adapter, how)
    with (
        TensorSet.open(base) as tensors,
        pytest.raises(CheckpointError, match=re.compile(said, re.DOTALL)),
        AdapterWeights.open(adapter) as weights,
    ):
        MergedTensors(tensors, weights, tied=False)


@pytest.mark.parametrize("said", [[1, 2, 3], {"lm_head": [1]}, [1, -2], [1, 99], None], ids=str)
def test_token_rows_that_do_not_fit(said: Any, tmp_path: Path) -> None:
    base = make_base("llama-gqa", tmp_path / "base")
    adapter, _ = make_adapter(base, tmp_path / "adapter", trainable_token_indices=[1, 5])
    set_record(adapter, trainable_token_indices=said)
    with (
        TensorSet.open(base) as tensors,
        pytest.raises(CheckpointError, match=r"do not fit|does not say which rows"),
        AdapterWeights.open(adapter) as weights,
    ):
        MergedTensors(tensors, weights, tied=False)


def test_rank_0_is_refused(tmp_path: Path) -> None:
    base = make_base("llama-gqa", tmp_path / "base")
    adapter, _ = make_adapter(base, tmp_path / "adapter")
    set_record(adapter, r=0)
    edit(adapter, lambda held: held.update({key: w[:0] if "lora_A" in key else w[:, :0] for key, w in held.items()}))
    with pytest.raises(CheckpointError, match=r"the rank of \S+proj is 0; least is 1"):
        AdapterWeights.open(adapter)


def test_a_pickled_adapter_is_named(tmp_path: Path) -> None:
    base = make_base("llama-gqa", tmp_path / "base")
    adapter, _ = make_adapter(base, tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin beside it.*is not read") as caught:
        AdapterWeights.open(adapter)
    assert "safe_serialization=True" in str(caught.value.hint)


def test_a_torn_file_is_named(tmp_path: Path) -> None:
    base = make_base("llama-gqa", tmp_path / "base")
    adapter, _ = make_adapter(base, tmp_path / "adapter")
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=re.escape(str(weights))):
        AdapterWeights.open(adapter)
    weights.unlink()
    with pytest.raises(CheckpointError, match="cannot be opened"):
        AdapterWeights.open(adapter)
