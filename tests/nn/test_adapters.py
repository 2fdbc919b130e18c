"""Which layers a config's names mean."""

from __future__ import annotations

import pytest

from coldpress.errors import PlanError
from coldpress.nn.adapters import decoder_linears, four_bit_names, resolve_modules_to_save, resolve_targets

PHI3 = {
    f"model.layers.{layer}.{name}": shape
    for layer in range(2)
    for name, shape in {
        "self_attn.qkv_proj": (128, 64),
        "self_attn.o_proj": (64, 64),
        "mlp.gate_up_proj": (192, 64),
        "mlp.down_proj": (64, 96),
    }.items()
} | {"lm_head": (260, 64)}


def test_names() -> None:
    targets = resolve_targets(("o_proj", "qkv_proj"), PHI3, "phi3")
    assert len(targets.modules) == 4
    assert targets.names == targets.peft == ("o_proj", "qkv_proj")


def test_all_linear_leaves_the_head_out() -> None:
    targets = resolve_targets("all-linear", PHI3, "phi3")
    assert targets.modules == tuple(decoder_linears(PHI3))
    assert "lm_head" not in targets.names


def test_four_bits_need_whole_blocks() -> None:
    assert {name.rpartition(".")[2] for name in four_bit_names(PHI3)} == {"qkv_proj", "o_proj", "gate_up_proj"}
    assert len(four_bit_names(PHI3)) == 6


def test_default_of_the_model() -> None:
    targets = resolve_targets(None, PHI3, "phi3")
    assert targets.names == ("o_proj", "qkv_proj")
    assert targets.note is not None
    assert resolve_targets(None, PHI3, "unheard-of").names == ("down_proj", "gate_up_proj", "o_proj", "qkv_proj")


def test_pattern_for_one_layer_gives_peft_the_full_names() -> None:
    targets = resolve_targets(r".*layers\.1\..*_proj", PHI3, "phi3")
    assert targets.peft == targets.modules == tuple(name for name in PHI3 if ".1." in name)


def test_typos_list_the_real_names() -> None:
    with pytest.raises(PlanError, match=r"q_prj \(did you mean") as error:
        resolve_targets(("o_proj", "q_prj", "zzz"), PHI3, "phi3")
    assert "zzz" in str(error.value)
    assert "it has: down_proj, gate_up_proj, lm_head, o_proj, qkv_proj" in str(error.value)
    with pytest.raises(PlanError, match="matches no linear layer"):
        resolve_targets("nothing.*", PHI3, "phi3")
    with pytest.raises(PlanError, match="not a regular expression"):
        resolve_targets("(", PHI3, "phi3")


def test_an_empty_list_is_said_to_be_empty() -> None:
    with pytest.raises(PlanError, match="target_modules is empty") as error:
        resolve_targets((), PHI3, "phi3")
    assert error.value.hint == "name some of down_proj, gate_up_proj, o_proj, qkv_proj; or all-linear"


def test_modules_to_save() -> None:
    tensors = ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight")
    assert resolve_modules_to_save(("lm_head",), tensors) == ("lm_head",)
    assert resolve_modules_to_save(None, tensors) == ()
    with pytest.raises(PlanError, match="modules_to_save names modules that the model does not have: head"):
        resolve_modules_to_save(("head",), tensors)
