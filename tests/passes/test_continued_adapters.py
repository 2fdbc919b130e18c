"""Going on with an adapter that the model has: the same one, further trained; what does not fit is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coldpress.artifacts.base import Artifact
from coldpress.config.schema import InputModel
from coldpress.engine.places import Places
from coldpress.errors import CheckpointError, PlanError
from coldpress.passes.base import Context, PlanContext
from coldpress.passes.merge_adapter_weights import MergeAdapterWeights, MergeAdapterWeightsConfig
from coldpress.registry import PASSES
from fakes.tiny_models import make_checkpoint
from oracles.trained import IDS, Trained, logits_of_checkpoint, train_with

ARGUMENTS = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 2e-2, "seed": 1, "report_to": "none"}
EXACT = 2e-4
"""Between logits of order 10 that the same float32 numbers give, summed in another order."""

Train = Callable[..., Trained]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("base"), family="llama", dtype="float32", attention_bias=True)


@pytest.fixture
def train(context: Callable[[str], Context], plan_context: PlanContext) -> Train:
    """Train with a pass; only what is given stands in its config."""

    def run(kind: str, model: Artifact, step: str, **given: Any) -> Trained:
        made = PASSES[kind]()
        common = {"train_data_config": "lines", "torch_dtype": "float32", "training_args": ARGUMENTS}
        return train_with(made, made.Config(**common, **given), model, context(step), plan_context)

    return run


FIRST: dict[str, tuple[str, str, dict[str, Any]]] = {
    "LoRA": ("LoRA", "LoRA", {"r": 4, "alpha": 8, "lora_dropout": 0.0}),
    "LoRA with everything": (
        "LoRA", "LoRA",
        {"r": 4, "alpha": 8, "use_rslora": True, "rank_pattern": {"q_proj": 2, "layers.1.*": 3}, "bias": "all",
         "alpha_pattern": {"o_proj": 5}, "modules_to_save": ("norm", "lm_head"), "target_modules": "all-linear",
         "exclude_modules": ("up_proj",)},
    ),
    "PiSSA": ("LoRA", "LoRA", {"r": 4, "alpha": 8, "init_lora_weights": "pissa"}),
    "DoRA": ("DoRA", "DoRA", {"r": 4, "alpha": 8}),
    "DoRA, by LoRA": ("DoRA", "LoRA", {"r": 4, "alpha": 8, "layers_to_transform": 1}),
    "LoHa": ("LoHa", "LoHa", {"r": 4, "alpha": 8}),
    "LoKr": ("LoKr", "LoKr", {"r": 2, "alpha": 8, "decompose_both": True, "decompose_factor": 4}),
    "QLoRA": ("QLoRA", "QLoRA", {"r": 4, "alpha": 8, "double_quant": True}),
    "LoftQ": ("LoftQ", "QLoRA", {"r": 4, "alpha": 8}),
    "LoftQ on a base of its own": ("LoftQ", "QLoRA", {"r": 4, "alpha": 8, "loftq_iter": 2}),
}  # fmt: skip


@pytest.mark.parametrize("name", FIRST)
def test_it_goes_on_where_it_was(name: str, base: Path, train: Train, context: Callable[[str], Context]) -> None:
    first_pass, second_pass, given = FIRST[name]
    if "Q" in second_pass:
        pytest.importorskip("bitsandbytes")
    first = train(first_pass, Artifact.load(base), "first", **given)
    second = train(second_pass, first.artifact, "second")
    assert second.planned.spec.mismatch(second.artifact.describe()) is None
    assert second.planned.spec.adapter == first.planned.spec.adapter
    assert second.planned.spec.base_quantization == first.planned.spec.base_quantization
    assert any("goes on with the" in note for note in second.planned.notes)
    if name != "PiSSA":  # which ends with twice the numbers that it trained
        assert second.parameters == first.parameters
    np.testing.assert_allclose(second.untrained, first.logits, atol=EXACT)
    assert np.abs(second.logits - first.logits).max() > 100 * EXACT, "it was trained further"
    assert second.artifact.adapter is not None
    record = json.loads((second.artifact.adapter / "training.json").read_text())
    assert record["goes_on_with"] == str(first.artifact.adapter)
    merged = MergeAdapterWeights().run(MergeAdapterWeightsConfig(), second.artifact, context("merge"))
    np.testing.assert_allclose(logits_of_checkpoint(merged.path), second.logits, atol=EXACT)


def test_two_steps_of_one_workflow(base: Path, plan_context: PlanContext) -> None:
    """The second step is planned from what the first will yield."""
    made = PASSES["LoRA"]()
    one = made.Config(train_data_config="lines", r=4, rank_pattern={"q_proj": 2}, modules_to_save=("norm",))
    first = made.plan(one, Artifact.load(base).describe(), plan_context).spec
    again = made.plan(made.Config(train_data_config="lines", lora_dropout=0.2), first, plan_context)
    assert again.spec.adapter == first.adapter
    same = made.Config(
        train_data_config="lines", r=4, rank_pattern={".*q_proj": 2}, target_modules=("q_proj", "v_proj")
    )
    assert made.plan(same, first, plan_context).spec.adapter == first.adapter


DIFFERENT: list[tuple[str, dict[str, Any], list[str]]] = [
    ("LoRA", {"r": 8, "alpha": 4, "use_dora": True},
     ["r is 8, the adapter's is 4", "alpha is 4, the adapter's is 8", "use_dora is True, the adapter's is False"]),
    ("LoRA", {"target_modules": ("q_proj", "o_proj")},
     ["names 2 layers that the adapter does not change, the first: .*o_proj",
      "leaves out 2 layers that the adapter changes, the first: .*v_proj"]),
    ("LoRA", {"layers_to_transform": 0}, ["leaves out 2 layers"]),
    ("LoRA", {"rank_pattern": {"q_proj": 2}}, [r"rank_pattern gives \S+q_proj 2, the adapter has 4"]),
    ("LoRA", {"modules_to_save": ("norm",)}, ["modules_to_save is model.norm, the adapter's: none"]),
    ("LoRA", {"init_lora_weights": "pissa"}, ["init_lora_weights says how an adapter begins, and this one has begun"]),
    ("LoRA", {"bias": "all", "use_rslora": True}, ["use_rslora is True", "bias is 'all', the adapter's is 'none'"]),
    ("DoRA", {}, ["use_dora is True, the adapter's is False"]),
    ("LoHa", {}, ["the model has a LoRA adapter, which this pass does not train further"]),
    ("LoftQ", {}, ["the model has an adapter, and LoftQ is a way to begin one"]),
    ("FullFinetune", {}, ["full fine-tuning trains the weights below it"]),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "given", "said"), DIFFERENT, ids=lambda value: str(value)[:40])
def test_what_differs_is_named(
    kind: str, given: dict[str, Any], said: list[str], base: Path, plan_context: PlanContext
) -> None:
    lora, made = PASSES["LoRA"](), PASSES[kind]()
    spec = lora.plan(
        lora.Config(train_data_config="lines", r=4, alpha=8), Artifact.load(base).describe(), plan_context
    ).spec
    with pytest.raises(PlanError) as error:
        made.plan(made.Config(train_data_config="lines", **given), spec, plan_context)
    for one in said:
        assert re.search(one, error.value.message), error.value.message


def test_four_bits_go_on_as_they_were(base: Path, plan_context: PlanContext) -> None:
    qlora, lora = PASSES["QLoRA"](), PASSES["LoRA"]()
    plain = Artifact.load(base).describe()
    spec = qlora.plan(qlora.Config(train_data_config="lines", double_quant=True), plain, plan_context).spec
    with pytest.raises(PlanError, match="trained on nf4 weights"):
        lora.plan(lora.Config(train_data_config="lines"), spec, plan_context)
    other = qlora.Config(train_data_config="lines", double_quant=False, torch_dtype="float32")
    with pytest.raises(PlanError, match="double_quant is False, of the adapter True; torch_dtype is float32, of the"):
        qlora.plan(other, spec, plan_context)
    of_lora = lora.plan(lora.Config(train_data_config="lines"), plain, plan_context).spec
    notes = qlora.plan(qlora.Config(train_data_config="lines"), of_lora, plan_context).notes
    assert any("nothing says that the model's adapter was trained on 4-bit weights" in note for note in notes)


@pytest.mark.parametrize("targets", [r".*\.1\.self_attn\.[qv]_proj", "all-linear", ["o_proj"]])
def test_an_adapter_that_peft_made_elsewhere(targets: Any, base: Path, train: Train, tmp_path: Path) -> None:
    """Its settings are read from its files, whatever form they have there."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, rank_pattern={"no_such_layer": 9})
    made = peft.get_peft_model(model, config)
    for name, value in made.named_parameters():
        if "lora_B" in name:
            value.data.normal_(std=0.1)
    made.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = made.eval()(input_ids=torch.tensor(IDS)).logits.numpy()
    got = train("LoRA", with_adapter(base, tmp_path / "adapter"), "on", lora_dropout=0.0)
    assert got.planned.spec.mismatch(got.artifact.describe()) is None
    np.testing.assert_allclose(got.untrained, expected, atol=EXACT)
    assert np.abs(got.logits - expected).max() > 100 * EXACT


def with_adapter(base: Path, adapter: Path) -> Artifact:
    return Artifact.load(base).with_adapter(adapter)


def test_an_adapter_of_another_model(base: Path, train: Train, tmp_path: Path) -> None:
    first = train("LoRA", Artifact.load(base), "first", r=4)
    adapter = first.artifact.adapter
    assert adapter is not None

    def refused(model: Path, said: str) -> None:
        with pytest.raises(CheckpointError, match=said):
            with_adapter(model, adapter).describe()

    refused(make_checkpoint(tmp_path / "phi3"), "changes 4 weights that the base model does not have: .*q_proj")
    wide = make_checkpoint(tmp_path / "wide", family="llama", hidden_size=128)
    refused(wide, r"is for a weight of shape \[64, 64\], the base has \[128, 128\]")
    sister = make_checkpoint(tmp_path / "sister", family="llama", dtype="float32", attention_bias=True, seed=9)
    refused(sister, f"was trained on {re.escape(str(base))}, whose weights are not those of {re.escape(str(sister))}")
    half = make_checkpoint(tmp_path / "half", family="llama", dtype="bfloat16", attention_bias=True)
    assert with_adapter(half, adapter).describe().adapter == first.planned.spec.adapter, "the same, rounded"
    copied = Path(shutil.copytree(base, tmp_path / "copied"))
    assert with_adapter(copied, adapter).describe().adapter is not None
    moved = Path(shutil.copytree(adapter, tmp_path / "moved"))
    record = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps({**record, "base_model_name_or_path": "some/hub-model"}))
    assert with_adapter(sister, moved).describe().adapter is not None, "nothing is known of a base that is not here"


def test_a_damaged_adapter(base: Path, train: Train) -> None:
    first = train("LoHa", Artifact.load(base), "first", r=4)
    assert first.artifact.adapter is not None
    weights = first.artifact.adapter / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=re.escape(str(weights))):
        first.artifact.describe()
    weights.write_bytes(whole)
    config = first.artifact.adapter / "adapter_config.json"
    record = json.loads(config.read_text())
    config.write_text(json.dumps({**record, "r": 5}))
    with pytest.raises(CheckpointError, match=r"do not make up an adapter of rank 5: hada_w1_a \[64, 4\]"):
        first.artifact.describe()
    config.write_text(json.dumps(record)[:-20])
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        first.artifact.describe()


def test_adapter_path_of_a_config(base: Path, train: Train, tmp_path: Path) -> None:
    """An output folder of a fine-tuning, as `input_model.adapter_path`: its record of 4 bits comes along."""
    pytest.importorskip("bitsandbytes")
    first = train("QLoRA", Artifact.load(base), "first", r=4)
    first.artifact.save()
    output = tmp_path / "output"
    output.mkdir()
    shutil.copytree(first.artifact.path, output / "model")
    model = InputModel(model_path=str(base), adapter_path=str(output))
    found = Places(tmp_path, tmp_path).model(model).artifact
    assert found is not None
    assert found.base_quantization == first.artifact.base_quantization
    assert train("QLoRA", found, "second").planned.spec.base_quantization == first.artifact.base_quantization


def test_the_base_of_an_adapter_folder_may_lie_beside_it(base: Path, train: Train, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    first = train("LoftQ", Artifact.load(base), "first", r=4, loftq_iter=2)
    moved = Path(shutil.move(first.artifact.path, tmp_path / "moved"))
    loaded = Artifact.load(moved / "adapter")
    assert loaded.model == moved / "model"
    assert loaded.describe().adapter == first.planned.spec.adapter
