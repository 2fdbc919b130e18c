"""The packed loss is the loss of single records: value and gradients, in every family that the builder knows."""

from __future__ import annotations

import random
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from coldpress.data.packing import IGNORED, TokenSequence
from coldpress.nn import imports

imports.load_training()

import peft  # noqa: E402 - after the imports that hide what it would pull in
import torch  # noqa: E402

from coldpress.nn import fused_block  # noqa: E402
from coldpress.nn.batches import cut_step  # noqa: E402
from coldpress.nn.block_math import Dropout, draw_seeds, dropped  # noqa: E402
from coldpress.nn.fused import Product  # noqa: E402
from coldpress.nn.layer_math import dropped_out, random_mask  # noqa: E402
from coldpress.nn.losses import loss_of  # noqa: E402
from coldpress.passes import training_estimate  # noqa: E402
from oracles.decoders import TINY, tiny_model  # noqa: E402

PADDED = {"qwen2-window", "gemma3", "llama-dynamic"}
"""Where the packed form may be refused; the loss must be right all the same."""


def records(vocabulary: int, seed: int = 0) -> list[TokenSequence]:
    draw = random.Random(seed)
    made = []
    for length in (3, 5, 9, 17, 24, 24, 25, 30, 31, 40):
        ids = [draw.randrange(3, vocabulary) for _ in range(length)]
        masked = draw.randrange(length - 1)
        made.append(TokenSequence(ids, [IGNORED] * masked + ids[masked:]))
    return made


def tiny(name: str) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return tiny_model(name, Path(folder))


def adapted(name: str) -> Any:
    model = tiny(name)
    linear = sorted({
        path.rpartition(".")[2] for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings() and path[-4:] != "gate"
    })  # fmt: skip
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=linear, task_type="CAUSAL_LM"))
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.1)
    return model.eval()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad()
    return found


def alone(model: Any, rows: list[TokenSequence]) -> tuple[float, dict[str, torch.Tensor]]:
    """Every record through the model's own forward pass by itself."""
    total = 0.0
    for row in rows:
        logits = model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(row.labels[1:]), reduction="sum")
        loss.backward()
        total += float(loss.detach())
    return total, gradients(model)


@pytest.mark.parametrize("name", sorted(TINY))
def test_packed_is_single(name: str) -> None:
    model = adapted(name)
    rows = records(TINY[name]["vocab_size"])
    expected, expected_gradients = alone(model, rows)
    forward = model.get_base_model().forward
    with loss_of(model, rows, autocast=None) as loss:
        assert loss.form == "packed" or name in PADDED
        total = 0.0
        for micro in cut_step(list(enumerate(rows)), form=loss.form, tokens=96, apart=loss.apart).micro:
            one = loss(model, micro)
            one.backward()
            total += float(one.detach())
    assert model.get_base_model().forward == forward, "all is put back"
    # 1e-5: float32 sums in another order.
    assert total == pytest.approx(expected, rel=1e-5)
    found = gradients(model)
    assert found.keys() == expected_gradients.keys()
    for key, gradient in expected_gradients.items():
        assert (found[key] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, key


@pytest.mark.parametrize("name", sorted(TINY))
def test_what_records_begin_with_is_computed_once(name: str) -> None:
    """Loss and gradients are those of single records, though the row holds their first six tokens once."""
    model = adapted(name)
    plain = records(TINY[name]["vocab_size"])
    beginning = plain[-1].ids[:6]
    rows = [TokenSequence(beginning + row.ids, [IGNORED] * 7 + row.ids[1:]) for row in plain]
    expected, expected_gradients = alone(model, rows)
    with loss_of(model, rows, autocast=None) as loss:
        assert loss.sharing == (loss.form == "packed")
        step = cut_step(list(enumerate(rows)), form=loss.form, tokens=150, apart=loss.apart, sharing=loss.sharing)
        total, placed = 0.0, 0
        for micro in step.micro:
            one = loss(model, micro)
            one.backward()
            total += float(one.detach())
            placed += micro.inputs["input_ids"].numel()
            assert not loss.sharing or micro.segments is None or micro.segments.shared == 6
    assert len(step.micro) > 1
    assert not loss.sharing or placed < step.tokens, "of which each is counted, wherever it is computed"
    assert total == pytest.approx(expected, rel=1e-5)
    found = gradients(model)
    for key, gradient in expected_gradients.items():
        assert (found[key] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, key


def test_most_families_are_packed_and_fused() -> None:
    """What makes training quick is used where it should be."""
    for name in ("llama-gqa", "phi3-gqa", "qwen3", "mistral-window", "olmo2"):
        model = adapted(name)
        with loss_of(model, records(80), autocast=None) as loss:
            layers = TINY[name]["num_hidden_layers"]
            assert loss.form == "packed"
            assert loss.fused.counts["adapted linear"] >= 4 * layers, name
            assert loss.fused.counts["norm"] > 2 * layers, name
            assert loss.fused.counts["gated"] == layers, name
            assert loss.own_types(model)


@pytest.mark.parametrize(
    "name", ["llama-gqa", "llama-mha-tied", "llama-biases", "llama-head-8", "phi3-gqa", "phi3-mha"]
)
def test_layers_are_fused_whole(name: str) -> None:
    """The answer's loss alone: the last layer computes some rows, and all gradients stay what they were."""
    model = adapted(name)
    rows = [last_only(row) for row in records(TINY[name]["vocab_size"])]
    expected, expected_gradients = alone(model, rows)
    seen = []
    with loss_of(model, rows, autocast=None) as loss:
        assert loss.fused.counts["decoder layer"] == TINY[name]["num_hidden_layers"]
        hook = model.get_base_model().model.norm.register_forward_pre_hook(
            lambda _, args: seen.append(args[0].shape[1])
        )
        (micro,) = cut_step(list(enumerate(rows)), form=loss.form, tokens=4096).micro
        one = loss(model, micro)
        one.backward()
        hook.remove()
    assert seen == [16], "of 208 tokens: ten with loss, and six that fill up"
    assert float(one.detach()) == pytest.approx(expected, rel=1e-5)
    found = gradients(model)
    for key, gradient in expected_gradients.items():
        assert (found[key] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, key


@pytest.mark.parametrize("name", ["llama-gqa", "phi3-gqa"])
def test_long_records_are_computed_whole(name: str) -> None:
    """Beyond 64 tokens the shares of attention are computed again on the way back."""
    model, draw = adapted(name), random.Random(0)
    made = [[draw.randrange(3, TINY[name]["vocab_size"]) for _ in range(length)] for length in (300, 170, 66)]
    rows = [TokenSequence(ids, list(ids)) for ids in made]
    expected, expected_gradients = alone(model, rows)
    with loss_of(model, rows, autocast=None) as loss:
        assert loss.fused.counts["decoder layer"]
        for layer in model.get_base_model().model.layers:
            layer.self_attn.forward = None  # its own code is not run
        (micro,) = cut_step(list(enumerate(rows)), form=loss.form, tokens=4096).micro
        one = loss(model, micro)
        one.backward()
    assert float(one.detach()) == pytest.approx(expected, rel=1e-5)
    found = gradients(model)
    for key, gradient in expected_gradients.items():
        assert (found[key] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, key


def test_whole_layers_are_checkpointed(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are computed again on the way back, as Transformers' own would be, and the gradients stay what they were."""
    model, rows = adapted("llama-gqa").train(), records(80)
    runs, own = [], fused_block._Layer.forward
    monkeypatch.setattr(fused_block._Layer, "forward", lambda *given: (runs.append(1), own(*given))[1])
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with loss_of(model, rows, autocast=None) as loss:
            assert loss.fused.counts["decoder layer"]
            (micro,) = cut_step(list(enumerate(rows)), form=loss.form, tokens=4096).micro
            runs.clear()
            loss(model, micro).backward()
            assert len(runs) == TINY["llama-gqa"]["num_hidden_layers"] * (1 + checkpointing)
            found.append(gradients(model))
    for key, gradient in found[0].items():
        assert torch.equal(gradient, found[1][key]), key


def test_the_estimate_knows_which_records_are_computed_whole() -> None:
    """It is made without torch, so it cannot ask."""
    assert training_estimate._WHOLE_LENGTH == fused_block.LONGEST


def test_layers_built_otherwise_keep_their_own_code() -> None:
    for name in ("qwen3", "olmo2", "phi3-partial-16-of-32", "granite"):
        model = adapted(name)
        with loss_of(model, records(80), autocast=None) as loss:
            assert loss.form == "packed", name
            assert not loss.fused.counts["decoder layer"], name


@pytest.mark.parametrize("name", ["llama-gqa", "phi3-gqa"])
def test_a_whole_layer_drops_what_its_parts_drop(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same masks, drawn in the same order, one random state is one loss, whether layers are whole or not."""

    def mask(product: Product, x: torch.Tensor) -> tuple[torch.Tensor | None, float]:
        if not product.module.training:
            return None, product.scale
        (seeds,) = draw_seeds(1)
        stays = dropped(torch.ones_like(x), Dropout(seeds, product.dropped))
        return -stays.to(torch.int8), product.scale / (1 - product.dropped)

    monkeypatch.setattr(Product, "mask", mask)
    model = adapted(name).train()
    for module in model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = torch.nn.Dropout(0.3)
    rows = [TokenSequence(row.ids, list(row.ids)) for row in records(TINY[name]["vocab_size"])]
    found = []
    for whole in (True, False):
        if not whole:
            monkeypatch.setattr("coldpress.nn.losses.fused_blocks", lambda *_: nullcontext(0))
        with loss_of(model, rows, autocast=None) as loss:
            assert bool(loss.fused.counts["decoder layer"]) == whole
            torch.manual_seed(3)
            one = loss(model, cut_step(list(enumerate(rows)), form=loss.form, tokens=4096).micro[0])
            one.backward()
            found.append((float(one.detach()), gradients(model)))
    (loss_whole, whole_gradients), (loss_parts, parts_gradients) = found
    assert loss_whole == pytest.approx(loss_parts, rel=1e-5)
    for key, gradient in parts_gradients.items():
        assert (whole_gradients[key] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, key


def test_a_step_without_loss_has_the_loss_0() -> None:
    model = adapted("llama-gqa")
    with loss_of(model, records(80), autocast=None) as loss:
        assert "decoder layer" in loss.fused.counts
        (micro,) = cut_step([(0, TokenSequence([5, 6, 7], [IGNORED] * 3))], form=loss.form, tokens=96).micro
        one = loss(model, micro)
        one.backward()
        assert float(one.detach()) == 0
    assert all(float(gradient.norm()) == 0 for gradient in gradients(model).values())


def test_random_masks() -> None:
    """As many are dropped as the rate says, and what stays is itself."""
    x = torch.ones(1000, 1001, dtype=torch.bfloat16)
    torch.manual_seed(0)
    stays = dropped_out(x, random_mask(x, 0.1))
    assert set(stays.unique().tolist()) == {0.0, 1.0}
    # Six standard errors of a million draws.
    assert float(stays.float().mean()) == pytest.approx(0.9, abs=0.0018)


def test_a_record_sees_no_other() -> None:
    """Changing one record leaves the others' losses as they are; a mask that leaked would not."""
    model = adapted("llama-gqa")
    rows = records(80)
    with loss_of(model, rows, autocast=None) as loss, torch.no_grad():

        def losses(rows: list[TokenSequence]) -> float:
            others = [
                TokenSequence(row.ids, [IGNORED] * len(row.ids)) if place == 4 else row
                for place, row in enumerate(rows)
            ]
            # The changed record stays in the row, without a loss of its own but for its last token.
            others[4].labels[-1] = 5
            return float(loss(model, cut_step(list(enumerate(others)), form="packed", tokens=4096).micro[0]))

        changed = [*rows[:4], TokenSequence([7] * len(rows[4].ids), rows[4].labels), *rows[5:]]
        alone_before = float(loss(model, cut_step([(0, last_only(rows[4]))], form="packed", tokens=4096).micro[0]))
        alone_after = float(loss(model, cut_step([(0, last_only(changed[4]))], form="packed", tokens=4096).micro[0]))
        assert losses(rows) - alone_before == pytest.approx(losses(changed) - alone_after, rel=1e-5)
        assert alone_before != pytest.approx(alone_after, rel=1e-3), "the change is seen at all"


def last_only(row: TokenSequence) -> TokenSequence:
    return TokenSequence(row.ids, [IGNORED] * (len(row.ids) - 1) + [5])


def test_a_model_that_looks_across_records_is_padded() -> None:
    """Its embedding counts along the whole row, whatever position_ids say."""
    model = adapted("llama-gqa")
    table = model.get_base_model().model.embed_tokens
    own = table.forward
    table.forward = lambda ids: own(ids) * (1 + torch.arange(ids.shape[1]).unsqueeze(1) / 10)
    rows = records(80)
    expected, _ = alone(model, rows)
    with loss_of(model, rows, autocast=None) as loss, torch.no_grad():
        assert loss.form == "padded"
        micro = cut_step(list(enumerate(rows)), form="padded", tokens=96).micro
        assert sum(float(loss(model, one)) for one in micro) == pytest.approx(expected, rel=1e-5)


def test_a_trained_head() -> None:
    """modules_to_save: the head itself trains, so its gradient is summed over slices."""
    base = tiny("llama-gqa")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config).eval()
    rows = records(80)
    expected, expected_gradients = alone(model, rows)
    with loss_of(model, rows, autocast=None) as loss:
        one = loss(model, cut_step(list(enumerate(rows)), form=loss.form, tokens=4096).micro[0])
        one.backward()
    assert loss.form == "packed"
    assert float(one.detach()) == pytest.approx(expected, rel=1e-5)
    found = gradients(model)
    for key, gradient in expected_gradients.items():
        assert (found[key] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, key
