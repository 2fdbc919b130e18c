"""Merging against PEFT's own merge, against the model that was trained, and what cannot be merged."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coldpress.artifacts.base import Artifact, BaseQuantization
from coldpress.artifacts.tensors import TensorSet
from coldpress.errors import CheckpointError, PlanError
from coldpress.events import Event, Message
from coldpress.nn.loading import load_dequantized, load_model
from coldpress.passes.base import Context, PlanContext
from coldpress.passes.merge_adapter_weights import (
    ROWS_BYTES,
    MergeAdapterWeights,
    MergeAdapterWeightsConfig,
)

CONFIG = MergeAdapterWeightsConfig()
NF4 = BaseQuantization("nf4", True, "bfloat16")


def make_adapter(folder: Path, base: Path, **settings: Any) -> Path:
    """An adapter with random B, saved by PEFT."""
    import peft
    import torch

    torch.manual_seed(3)
    model = load_model(base, dtype="float32")
    given = {"r": 4, "lora_alpha": 6, "target_modules": ["qkv_proj", "o_proj"], "task_type": "CAUSAL_LM", **settings}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**given))
    for name, value in adapted.named_parameters():
        if "lora_B" in name or "lora_embedding_B" in name or "modules_to_save" in name:
            value.data.normal_(std=0.1)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder


def artifact(base: Path, adapter: Path, quantization: BaseQuantization | None = None) -> Artifact:
    return Artifact(path=adapter, kind="checkpoint", model=base, adapter=adapter, base_quantization=quantization)


def read_all(folder: Path) -> dict[str, Any]:
    with TensorSet.open(folder) as tensors:
        return {info.name: np.array(tensors.read(info.name)) for info in tensors.infos()}


def merged_by_peft(model: Any, adapter: Path) -> dict[str, Any]:
    """In float32, by PEFT."""
    import peft

    merged = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return {name: value.detach().numpy() for name, value in merged.state_dict().items()}


SETTINGS: list[dict[str, Any]] = [
    {},
    {"target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head"]},
    {"use_rslora": True, "r": 8},
    {"rank_pattern": {"o_proj": 2}, "alpha_pattern": {"layers.1.self_attn.o_proj": 32}},
    {"target_modules": ["o_proj", "embed_tokens"], "modules_to_save": ["lm_head"]},
    {"use_dora": True, "target_modules": ["qkv_proj", "down_proj", "embed_tokens"]},
    {"trainable_token_indices": [3, 259]},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda one: " ".join(one) or "plain")
def test_equals_pefts_merge(
    tiny_phi3: Path, tmp_path: Path, context: Callable[[str], Context], settings: dict[str, Any]
) -> None:
    adapter = make_adapter(tmp_path / "adapter", tiny_phi3, **settings)
    made = MergeAdapterWeights().run(CONFIG, artifact(tiny_phi3, adapter), context("merge"))
    found = read_all(made.path)
    expected = merged_by_peft(load_model(tiny_phi3, dtype="float32"), adapter)
    before = read_all(tiny_phi3)
    assert found.keys() == before.keys() == expected.keys()
    changed = 0
    for name, tensor in found.items():
        assert tensor.dtype == before[name].dtype, "the base's type"
        rounded = expected[name].astype(tensor.dtype)
        # Float32 sums in another order may round the other way: never by more than one bf16 step (2^-8).
        np.testing.assert_allclose(tensor.astype(np.float32), rounded.astype(np.float32), rtol=2**-7, atol=1e-7)
        assert (tensor != rounded).mean() < 0.001
        changed += int((tensor != before[name]).any())
    assert changed >= 2


def test_after_qlora_the_base_is_the_one_that_was_trained_on(
    tiny_phi3: Path, tmp_path: Path, context: Callable[[str], Context], events: list[Event]
) -> None:
    pytest.importorskip("bitsandbytes")
    adapter = make_adapter(tmp_path / "adapter", tiny_phi3)
    made = MergeAdapterWeights().run(CONFIG, artifact(tiny_phi3, adapter, NF4), context("merge"))
    found = read_all(made.path)
    expected = merged_by_peft(load_dequantized(tiny_phi3, NF4), adapter)
    for name, tensor in found.items():
        rounded = expected[name].astype(tensor.dtype)
        np.testing.assert_allclose(tensor.astype(np.float32), rounded.astype(np.float32), rtol=0.02, atol=1e-6)
        assert (tensor != rounded).mean() < 0.002, name
    text = [event.text for event in events if isinstance(event, Message)][-1]
    assert text.startswith("the adapter changed 4 of 8 linear layers; the base is the nf4 weights")
    original = MergeAdapterWeights().run(
        MergeAdapterWeightsConfig(base="original"), artifact(tiny_phi3, adapter, NF4), context("original")
    )
    expected = merged_by_peft(load_model(tiny_phi3, dtype="float32"), adapter)
    for name, tensor in read_all(original.path).items():
        assert (tensor != expected[name].astype(tensor.dtype)).mean() < 0.001
    assert "config.json" in {path.name for path in original.path.iterdir()}


def test_rows_are_merged_in_pieces(
    tiny_phi3: Path, tmp_path: Path, context: Callable[[str], Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(tmp_path / "adapter", tiny_phi3)
    whole = MergeAdapterWeights().run(CONFIG, artifact(tiny_phi3, adapter), context("whole"))
    assert ROWS_BYTES > 4 * 64 * 7
    monkeypatch.setattr("coldpress.passes.merge_adapter_weights.ROWS_BYTES", 4 * 64 * 7)
    pieces = MergeAdapterWeights().run(CONFIG, artifact(tiny_phi3, adapter), context("pieces"))
    first, second = read_all(whole.path), read_all(pieces.path)
    # 1e-6 of the values may round the other way: BLAS sums a smaller matrix in another order.
    assert all((first[name] != second[name]).mean() < 1e-3 for name in first)


def test_the_result_is_a_complete_checkpoint(
    tiny_phi3: Path, tmp_path: Path, context: Callable[[str], Context], plan_context: PlanContext
) -> None:
    adapter = make_adapter(tmp_path / "adapter", tiny_phi3)
    given = artifact(tiny_phi3, adapter)
    planned = MergeAdapterWeights().plan(CONFIG, given.describe(), plan_context)
    made = MergeAdapterWeights().run(CONFIG, given, context("merge"))
    assert planned.spec.mismatch(made.describe()) is None
    assert planned.spec.adapter is None
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in made.path.iterdir()
    }
    load_model(made.path)


def test_an_untrained_adapter_is_told(
    tiny_phi3: Path, tmp_path: Path, context: Callable[[str], Context], events: list[Event]
) -> None:
    from safetensors.numpy import load_file, save_file

    adapter = make_adapter(tmp_path / "adapter", tiny_phi3)
    path = adapter / "adapter_model.safetensors"
    save_file({name: value * ("lora_A" in name) for name, value in load_file(path).items()}, path)
    MergeAdapterWeights().run(CONFIG, artifact(tiny_phi3, adapter), context("merge"))
    message = next(event for event in reversed(events) if isinstance(event, Message))
    assert message == Message("warning", "the adapter changed 0 of 8 linear layers: it was not trained", "merge")


def test_an_adapter_of_another_model(tiny_phi3: Path, tmp_path: Path, context: Callable[[str], Context]) -> None:
    from fakes.tiny_models import make_checkpoint

    llama = make_checkpoint(tmp_path / "llama", family="llama")
    adapter = make_adapter(tmp_path / "adapter", llama, target_modules=["q_proj", "v_proj"])
    with pytest.raises(CheckpointError, match=r"changes 4 weights that the base model does not have: .*q_proj"):
        MergeAdapterWeights().run(CONFIG, artifact(tiny_phi3, adapter), context("merge"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"peft_type": "ADALORA"}, "of the type ADALORA"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"use_qalora": True}, "QA-LoRA"),
    ],
)
def test_kinds_that_cannot_be_merged(
    tiny_phi3: Path, tmp_path: Path, context: Callable[[str], Context], change: dict[str, Any], said: str
) -> None:
    adapter = make_adapter(tmp_path / "adapter", tiny_phi3)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(PlanError, match=said):
        MergeAdapterWeights().run(CONFIG, artifact(tiny_phi3, adapter), context("merge"))


def test_damaged_adapter(tiny_phi3: Path, tmp_path: Path, context: Callable[[str], Context]) -> None:
    adapter = make_adapter(tmp_path / "adapter", tiny_phi3)
    weights = adapter / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    with pytest.raises(CheckpointError, match=re.escape(str(weights))):
        MergeAdapterWeights().run(CONFIG, artifact(tiny_phi3, adapter), context("merge"))
    assert not (tmp_path / "merge" / "out" / "model.safetensors").exists()


def test_plan(tiny_phi3: Path, tmp_path: Path, plan_context: PlanContext) -> None:
    merge = MergeAdapterWeights()
    spec = Artifact.load(tiny_phi3).describe()
    with pytest.raises(PlanError, match="has no adapter to merge"):
        merge.plan(CONFIG, spec, plan_context)
    adapter = make_adapter(tmp_path / "adapter", tiny_phi3)
    plain, trained = artifact(tiny_phi3, adapter).describe(), artifact(tiny_phi3, adapter, NF4).describe()
    dequantized, original = (MergeAdapterWeightsConfig(base=base) for base in ("dequantized", "original"))  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="trained with QLoRA; this one was not"):
        merge.plan(dequantized, plain, plan_context)
    assert "4-bit weights it was trained on" in merge.plan(CONFIG, trained, plan_context).notes[0]
    assert "not to the 4-bit ones" in merge.plan(original, trained, plan_context).notes[0]
    strict, loose = merge.limits(CONFIG, trained), merge.limits(original, trained)
    assert strict is not None
    assert loose is not None
    assert strict.kl == 1e-3 < loose.kl


def test_merging_needs_no_torch(tiny_phi3: Path, tmp_path: Path) -> None:
    import subprocess
    import sys

    adapter = make_adapter(tmp_path / "adapter", tiny_phi3)
    (tmp_path / "out").mkdir()
    program = (
        "import sys\nfrom pathlib import Path\n"
        "from coldpress.artifacts.base import Artifact, BaseQuantization\n"
        "from coldpress.config.schema import Accelerator\n"
        "from coldpress.hardware import detect\nfrom coldpress.passes.base import Context\n"
        "from coldpress.passes.merge_adapter_weights import *\n"
        f"here = Path({str(tmp_path)!r})\n"
        f"base = Path({str(tiny_phi3)!r})\n"
        "four_bits = BaseQuantization('nf4', True, 'bfloat16')\n"
        "given = Artifact(here, 'checkpoint', base, here / 'adapter', four_bits)\n"
        "ctx = Context('m', here / 'out', here, detect(), Accelerator(), {}, lambda event: None)\n"
        "MergeAdapterWeights().run(MergeAdapterWeightsConfig(), given, ctx)\n"
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    assert (tmp_path / "out" / "model.safetensors").is_file()
    shutil.rmtree(tmp_path / "out")
    assert adapter.is_dir()
