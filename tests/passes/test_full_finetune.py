"""Training all weights, or a part: what is written is what was trained, under the names and types of before."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coldpress.artifacts.base import Artifact
from coldpress.artifacts.tensors import TensorSet
from coldpress.errors import CheckpointError, PlanError
from coldpress.evaluate.runners import open_runner
from coldpress.nn.loading import load_model
from coldpress.nn.trained_part import trained_part
from coldpress.nn.whole_model import check_names
from coldpress.passes.base import Context, PlanContext
from coldpress.passes.full_finetune import FullFinetune, FullFinetuneConfig
from coldpress.passes.lora import LoRA, LoRAConfig
from coldpress.passes.model_builder import ModelBuilder, ModelBuilderConfig
from fakes.tiny_models import make_checkpoint
from oracles.stored import CASES, quantize_folder
from oracles.trained import IDS, logits_of_checkpoint, train_with

ARGUMENTS = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "seed": 1, "report_to": "none"}
EXACT = 2e-4
"""Between logits of order 10 that the same float32 numbers give, summed in another order."""


def options(**values: Any) -> dict[str, Any]:
    return {"train_data_config": "lines", "torch_dtype": "float32", "training_args": ARGUMENTS, **values}


def read_all(folder: Path) -> dict[str, Any]:
    with TensorSet.open(folder) as tensors:
        return {info.name: np.array(tensors.read(info.name)) for info in tensors.infos()}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    made = {
        "phi3": make_checkpoint(folder / "phi3", dtype="float32"),
        "llama": make_checkpoint(folder / "llama", family="llama", dtype="float32"),
        "tied": make_checkpoint(folder / "tied", family="llama", dtype="float32", tie_word_embeddings=True),
    }
    (made["llama"] / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return made


# name -> (base, options, tensors that change)
PARTS: dict[str, tuple[str, dict[str, Any], Callable[[str], bool]]] = {
    "all": ("llama", {}, lambda name: True),
    "all, tied": ("tied", {}, lambda name: True),
    "the last block": ("phi3", {"trainable_modules": ("layers.1",)}, lambda name: ".layers.1." in name),
    "all but the embedding": ("llama", {"freeze": ("embed_tokens",)}, lambda name: "embed_tokens" not in name),
    "norms by pattern": (
        "llama", {"trainable_modules": (r".*layernorm", "model.norm")}, lambda name: "norm" in name
    ),
    "mlps but one": (
        "llama", {"trainable_modules": ("mlp",), "freeze": ("layers.0.mlp.up_proj",)},
        lambda name: ".mlp." in name and "0.mlp.up_proj" not in name,
    ),
    "tied head": ("tied", {"trainable_modules": ("embed_tokens",)}, lambda name: "embed_tokens" in name),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
def test_what_is_written_is_what_was_trained(
    name: str, bases: dict[str, Path], context: Callable[[str], Context], plan_context: PlanContext
) -> None:
    base, values, changes = PARTS[name]
    model = Artifact.load(bases[base])
    got = train_with(FullFinetune(), FullFinetuneConfig(**options(**values)), model, context("full"), plan_context)
    assert got.planned.spec.mismatch(got.artifact.describe()) is None
    before, after = read_all(bases[base]), read_all(got.artifact.path)
    assert before.keys() == after.keys()
    assert {one for one in after if (after[one] != before[one]).any()} == {one for one in after if changes(one)}
    assert got.parameters == sum(before[one].size for one in before if changes(one))
    np.testing.assert_allclose(logits_of_checkpoint(got.artifact.path), got.logits, atol=EXACT)
    assert np.abs(got.logits - got.untrained).max() > 10 * EXACT
    record = json.loads((got.artifact.path / "training.json").read_text())
    assert record["trained"]["parameters"] == got.parameters
    assert record["trained"]["layers"] == record["trained"]["layers_changed"] > 0


def test_the_checkpoint_is_complete(
    bases: dict[str, Path], context: Callable[[str], Context], plan_context: PlanContext
) -> None:
    got = train_with(
        FullFinetune(), FullFinetuneConfig(**options()), Artifact.load(bases["llama"]), context("full"), plan_context
    )
    names = {path.name for path in got.artifact.path.iterdir()}
    assert names == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "training.json", "README.md",
    }  # fmt: skip
    assert (got.artifact.path / "config.json").read_bytes() == (bases["llama"] / "config.json").read_bytes()
    graph = ModelBuilder().run(ModelBuilderConfig(precision="fp32"), got.artifact, context("build"))
    with open_runner(graph) as built:
        np.testing.assert_allclose(np.stack(built.logits(IDS)), got.logits, atol=5e-4)


def test_updates_smaller_than_a_bf16_step_add_up(
    tmp_path: Path, context: Callable[[str], Context], plan_context: PlanContext
) -> None:
    """Adam moves a weight by about the learning rate. In bf16 the next number above 0.25 is 0.002 away."""
    base = make_checkpoint(tmp_path / "bf16", family="llama")
    steps, rate = 24, 2e-4
    arguments = {**ARGUMENTS, "max_steps": steps, "learning_rate": rate, "lr_scheduler_type": "constant"}
    config = FullFinetuneConfig(**options(torch_dtype="bfloat16", training_args=arguments))
    got = train_with(FullFinetune(), config, Artifact.load(base), context("full"), plan_context)
    name = "model.layers.0.mlp.up_proj.weight"
    before, after = read_all(base)[name], read_all(got.artifact.path)[name]
    assert after.dtype.name == "bfloat16"
    large = np.abs(before.astype(np.float32)) > 0.25
    moved = np.abs(after.astype(np.float32) - before.astype(np.float32))[large]
    assert rate < 2**-3 * 2**-8 / 2, "less than half a step: rounded at once, each update would be lost"
    assert (moved > 0).mean() > 0.5
    assert moved.max() > 10 * rate


def test_a_large_checkpoint_is_written_in_shards(
    bases: dict[str, Path],
    context: Callable[[str], Context],
    plan_context: PlanContext,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("coldpress.passes.full_finetune.SHARD_BYTES", 100_000)
    model = Artifact.load(bases["phi3"])
    got = train_with(FullFinetune(), FullFinetuneConfig(**options()), model, context("full"), plan_context)
    index = json.loads((got.artifact.path / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 2
    assert all((got.artifact.path / name).stat().st_size < 200_000 for name in files)
    assert index["metadata"]["total_size"] == got.artifact.describe().bytes
    np.testing.assert_allclose(logits_of_checkpoint(got.artifact.path), got.logits, atol=EXACT)


def test_what_the_model_does_not_use_is_kept(
    tmp_path: Path, context: Callable[[str], Context], plan_context: PlanContext
) -> None:
    """Old checkpoints hold rotary frequencies, tied ones their head twice: the result holds the same tensors."""
    import torch
    from safetensors.torch import load_file, save_file

    base = make_checkpoint(tmp_path / "tied", family="llama", dtype="float32", tie_word_embeddings=True)
    held = load_file(base / "model.safetensors")
    held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()
    held["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.arange(8.0)
    save_file(held, base / "model.safetensors", {"format": "pt"})
    got = train_with(
        FullFinetune(), FullFinetuneConfig(**options()), Artifact.load(base), context("full"), plan_context
    )
    assert got.planned.spec.mismatch(got.artifact.describe()) is None
    after = read_all(got.artifact.path)
    np.testing.assert_array_equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
    assert (after["lm_head.weight"] != held["lm_head.weight"].numpy()).any()
    np.testing.assert_array_equal(after["model.layers.0.self_attn.rotary_emb.inv_freq"], np.arange(8.0))
    np.testing.assert_allclose(logits_of_checkpoint(got.artifact.path), got.logits, atol=EXACT)


def test_gradient_checkpointing_trains_the_same(
    bases: dict[str, Path], context: Callable[[str], Context], plan_context: PlanContext
) -> None:
    found = []
    for step, more in (("plain", {}), ("saving", {"gradient_checkpointing": True})):
        config = FullFinetuneConfig(**options(training_args={**ARGUMENTS, **more}))
        got = train_with(FullFinetune(), config, Artifact.load(bases["llama"]), context(step), plan_context)
        found.append(got.logits)
    np.testing.assert_allclose(found[0], found[1], atol=EXACT)


def test_refusals(bases: dict[str, Path], plan_context: PlanContext) -> None:
    spec = Artifact.load(bases["llama"]).describe()

    def refused(said: str, given: Any = spec, **values: Any) -> None:
        with pytest.raises(PlanError, match=said):
            FullFinetune().plan(FullFinetuneConfig(**options(**values)), given, plan_context)

    refused(
        r"trainable_modules names .*: layrs\.0 \(did you mean layers\?\); it has: .*mlp", trainable_modules=("layrs.0",)
    )
    refused(r"freeze names .*: norms \(did you mean norm\?\)", freeze=("norms",))
    refused(r"freeze: '\(' is neither a name nor a regular expression", freeze=("(",))
    refused("freeze leaves nothing, so nothing would be trained", freeze=("model", "lm_head"))
    refused("trainable_modules is empty", trainable_modules=())
    quantized = dataclasses.replace(spec, packings={"model.layers.0.self_attn.q_proj.weight": "gptq"})
    refused(r"the model is quantized \(1 matrices\)", quantized)
    refused("trains on GPUs only", torch_dtype="float16")
    adapted = LoRA().plan(LoRAConfig(train_data_config="lines"), spec, plan_context).spec
    refused("the model has an adapter, and full fine-tuning trains the weights below it", adapted)


def test_a_real_quantized_checkpoint_is_refused(tmp_path: Path, plan_context: PlanContext) -> None:
    base = make_checkpoint(tmp_path / "base", family="llama")
    quantize_folder(base, tmp_path / "gptq", CASES["gptq-4"])
    with pytest.raises(PlanError, match=r"the model is quantized \(\d+ matrices\)"):
        FullFinetune().plan(FullFinetuneConfig(**options()), Artifact.load(tmp_path / "gptq").describe(), plan_context)


def test_a_checkpoint_of_other_names_is_refused_before_the_training(
    tmp_path: Path,
) -> None:
    """Were it found out at the end, the training would be lost."""
    base = make_checkpoint(tmp_path / "base", family="llama", dtype="float32")
    model = load_model(base, dtype="float32")
    shapes = Artifact.load(base).describe().tensors
    check_names(model, shapes, base)
    with pytest.raises(CheckpointError, match=r"stores 1 weights in another way .*: lm_head.weight"):
        check_names(model, [info for info in shapes if info.name != "lm_head.weight"], base)


@pytest.mark.parametrize(
    ("entry", "count"), [("a", 2), ("b.0", 1), ("b", 2), (r".*\.0\..*", 1), ("c.weight", 1), ("b.0.c.weight", 1)]
)
def test_how_parts_are_named(entry: str, count: int) -> None:
    names = ("a.weight", "a.bias", "b.0.c.weight", "b.1.d.weight")
    assert len(trained_part(names, (entry,))) == count
    assert len(trained_part(names, None, (entry,))) == 4 - count
