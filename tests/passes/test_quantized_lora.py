"""Adapters on a base in 4 bits: the merged model is the one that was trained, whatever the adapter's options."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from coldpress.artifacts.base import Artifact, BaseQuantization
from coldpress.errors import PlanError
from coldpress.evaluate.runners import open_runner
from coldpress.nn.adapters import four_bit_names
from coldpress.nn.loading import four_bit_layers, load_dequantized, load_model
from coldpress.nn.loftq import nearest_product
from coldpress.passes.base import Context, PlanContext
from coldpress.passes.merge_adapter_weights import MergeAdapterWeights, MergeAdapterWeightsConfig
from coldpress.passes.quantized_lora import LoftQ, LoftQConfig, QLoRA, QLoRAConfig
from coldpress.registry import PASSES
from fakes.tiny_models import make_checkpoint
from oracles.trained import IDS, Trained, logits_of_checkpoint, train_with

pytest.importorskip("bitsandbytes")

ARGUMENTS = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 2e-2, "seed": 1, "report_to": "none"}
EXACT = 2e-4
"""Between logits of order 10 that the same float32 numbers give, summed in another order."""


def options(**values: Any) -> dict[str, Any]:
    given = {"train_data_config": "lines", "r": 4, "alpha": 8, "lora_dropout": 0.0, "torch_dtype": "float32"}
    return {**given, "training_args": ARGUMENTS, "target_modules": "all-linear", **values}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("base"), family="llama", dtype="float32")


def hold_together(got: Trained, base: Path, context: Callable[[str], Context]) -> None:
    """Trained in memory, described by the proof's reference, and merged: one model, which is not the 16-bit one."""
    assert got.planned.spec.mismatch(got.artifact.describe()) is None
    assert np.abs(got.untrained - logits_of_checkpoint(base)).max() > 100 * EXACT, "4 bits are seen"
    with open_runner(got.artifact, blocks="always") as reference:
        np.testing.assert_allclose(np.stack(reference.logits(IDS)), got.logits, atol=EXACT)
    merged = MergeAdapterWeights().run(MergeAdapterWeightsConfig(), got.artifact, context("merge"))
    np.testing.assert_allclose(logits_of_checkpoint(merged.path), got.logits, atol=EXACT)


@pytest.mark.parametrize(
    "values",
    [
        {"use_dora": True},
        {"use_dora": True, "double_quant": True, "use_rslora": True},
        {"use_rslora": True, "quant_type": "fp4"},
        {"init_lora_weights": "gaussian", "rank_pattern": {"q_proj": 2}, "modules_to_save": ("norm",)},
        {"layers_to_transform": 1, "double_quant": True},
    ],
    ids=str,
)
def test_qlora_with_options(
    values: dict[str, Any], base: Path, context: Callable[[str], Context], plan_context: PlanContext
) -> None:
    config = QLoRAConfig(**options(**values))
    hold_together(train_with(QLoRA(), config, Artifact.load(base), context("qlora"), plan_context), base, context)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_that_changes_the_base_is_refused(start: str, base: Path, plan_context: PlanContext) -> None:
    with pytest.raises(PlanError, match=rf"{start} takes a part out of the base's weights"):
        QLoRA().plan(QLoRAConfig(**options(init_lora_weights=start)), Artifact.load(base).describe(), plan_context)


def distance(got: Trained, base: Path) -> float:
    """Of the model that the training began with, from the 16-bit one."""
    return float(np.abs(got.untrained - logits_of_checkpoint(base)).mean())


def test_loftq_begins_nearer_to_the_base_with_every_round(
    base: Path, context: Callable[[str], Context], plan_context: PlanContext
) -> None:
    model, given = Artifact.load(base), options(r=16, alpha=24)
    plain = train_with(QLoRA(), QLoRAConfig(**given), model, context("qlora"), plan_context)
    once, often = (
        train_with(LoftQ(), LoftQConfig(**given, loftq_iter=n), model, context(f"loftq{n}"), plan_context)
        for n in (1, 5)
    )
    assert distance(once, base) < 0.7 * distance(plain, base)
    assert distance(often, base) < 0.95 * distance(once, base), "little more is to be had: random weights are flat"
    assert once.artifact.model == model.model, "its base is the checkpoint's own"
    assert often.artifact.model == often.artifact.path / "model"
    for got in (once, often):
        hold_together(got, base, lambda step, got=got: context(f"{step} {got.artifact.path.parent.name}"))


@pytest.mark.parametrize(
    "values",
    [
        {"use_dora": True},
        {"use_rslora": True, "loftq_iter": 2},
        {"rank_pattern": {"q_proj": 2}, "target_modules": ("q_proj", "up_proj"), "loftq_iter": 2},
    ],
    ids=str,
)
def test_loftq_with_options(
    values: dict[str, Any], base: Path, context: Callable[[str], Context], plan_context: PlanContext
) -> None:
    got = train_with(LoftQ(), LoftQConfig(**options(**values)), Artifact.load(base), context("loftq"), plan_context)
    hold_together(got, base, context)


def test_loftq_without_a_record_hands_over_what_it_was_trained_on(
    tmp_path: Path, context: Callable[[str], Context], plan_context: PlanContext
) -> None:
    """The base that is written is what the 4 bits stand for, so it needs no record of them. In bf16: bit for bit."""
    base = make_checkpoint(tmp_path / "bf16", family="llama")
    config = LoftQConfig(**options(save_quant_config=False, torch_dtype="bfloat16", loftq_iter=2))
    got = train_with(LoftQ(), config, Artifact.load(base), context("loftq"), plan_context)
    assert got.planned.spec.mismatch(got.artifact.describe()) is None
    assert got.artifact.base_quantization is None
    assert any("the base is written anew" in note for note in got.planned.notes)
    plain = load_model(got.artifact.model, dtype="float32").state_dict()
    again = load_dequantized(got.artifact.model, BaseQuantization("nf4", False, "bfloat16")).state_dict()
    assert all(bool((plain[name] == again[name]).all()) for name in plain)
    first = load_model(base, dtype="float32").state_dict()
    changed = {name for name in plain if bool((plain[name] != first[name]).any())}
    assert {name.rpartition(".")[0] for name in changed} == set(
        four_bit_names(Artifact.load(base).describe().linear_layers())
    )
    merged = MergeAdapterWeights().run(MergeAdapterWeightsConfig(), got.artifact, context("merge"))
    with open_runner(merged) as runner, open_runner(got.artifact) as reference:
        found, expected = np.stack(runner.logits(IDS)), np.stack(reference.logits(IDS))
    assert np.abs(found - expected).mean() < 0.05 * np.abs(expected).mean(), "rounded once to bf16"


@pytest.mark.parametrize(
    ("kind", "values"),
    [("QLoRA", {"use_dora": True, "double_quant": True}), ("LoftQ", {"use_dora": True}), ("LoftQ", {"loftq_iter": 2})],
)
def test_evaluating_in_between_leaves_the_weights_alone(
    kind: str,
    values: dict[str, Any],
    tmp_path: Path,
    context: Callable[[str], Context],
    plan_context: PlanContext,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """bitsandbytes repacks 4-bit weights in eval mode on some CPUs: what is proved later would not be what trained."""
    import coldpress.nn.train

    base = make_checkpoint(tmp_path / "bf16", family="llama")
    kept: list[tuple[Any, Any]] = []
    whole = coldpress.nn.train.train

    def watched(model: Any, *args: Any, **kwargs: Any) -> Any:
        layers = four_bit_layers(model)
        before = [layer.weight.data.clone() for layer in layers.values()]
        report = whole(model, *args, **kwargs)
        kept.extend(zip(before, layers.values(), strict=True))
        return report

    monkeypatch.setattr(coldpress.nn.train, "train", watched)
    made = PASSES[kind]()
    arguments = {**ARGUMENTS, "eval_strategy": "steps", "eval_steps": 1}
    config = made.Config(**options(torch_dtype="bfloat16", eval_dataset_size=0.25, training_args=arguments, **values))
    got = train_with(made, config, Artifact.load(base), context("train"), plan_context)
    assert len(kept) == 12, "down_proj, 96 wide, has no whole blocks of 64"
    for before, layer in kept:
        assert layer.weight.data.equal(before)
        assert layer.weight.quant_state.nested == values.get("double_quant", False)
    # bf16 products of the training against float32 ones of the proof: near, and not the model without its adapter.
    with open_runner(got.artifact, blocks="always") as reference:
        found = np.stack(reference.logits(IDS))
    away = np.abs(found - logits_of_checkpoint(got.artifact.model)).mean()
    assert np.abs(found - got.logits).mean() < 0.3 * away


def test_loftq_refusals(base: Path, plan_context: PlanContext) -> None:
    spec = Artifact.load(base).describe()
    with pytest.raises(PlanError, match=r"rank 65 is beyond \S+ of shape"):
        LoftQ().plan(LoftQConfig(**options(r=65)), spec, plan_context)
    with pytest.raises(PlanError, match="compute_dtype bfloat16 differs from torch_dtype float32"):
        LoftQ().plan(LoftQConfig(**options(compute_dtype="bfloat16")), spec, plan_context)
    quantized = dataclasses.replace(spec, packings={"model.layers.0.self_attn.q_proj.weight": "gptq"})
    with pytest.raises(PlanError, match="quantized already"):
        LoftQ().plan(LoftQConfig(**options()), quantized, plan_context)
    with pytest.raises(ValidationError, match="init_lora_weights"):
        LoftQConfig(**options(init_lora_weights="gaussian"))


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (30, 30)])
def test_the_nearest_product(shape: tuple[int, int]) -> None:
    """Against NumPy's decomposition in float64: no product of that rank is nearer."""
    rng = np.random.default_rng(5)
    matrix = rng.normal(size=shape) @ np.diag(rng.uniform(0.1, 3, shape[1]))
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    for rank in (1, 5, min(shape)):
        b, a = nearest_product(torch.tensor(matrix, dtype=torch.float32), rank)
        assert (tuple(b.shape), tuple(a.shape)) == ((shape[0], rank), (rank, shape[1]))
        best = (u[:, :rank] * s[:rank]) @ vt[:rank]
        np.testing.assert_allclose((b @ a).numpy(), best, atol=2e-4)
        # The least singular value is a thousandth of the greatest, whose float32 error it carries: CPUs differ.
        np.testing.assert_allclose(b.norm(dim=0).numpy(), a.norm(dim=1).numpy(), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="has no part of rank"):
        nearest_product(torch.zeros(shape), min(shape) + 1)
    b, a = nearest_product(torch.zeros(shape), 2)
    assert not (b @ a).any()
