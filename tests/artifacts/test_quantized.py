"""Quantized checkpoints under the names of the model: every format against an encoder that works one code at a time."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from coldpress.artifacts.quantized import Checkpoint, agreed_packing, open_checkpoint
from coldpress.artifacts.stored import Packing
from coldpress.artifacts.tensors import TensorInfo
from coldpress.errors import CheckpointError, PlanError
from oracles.stored import CASES, Case, Grid, as_torch, on_grid, store

N, K = 64, 192
WEIGHTS = np.random.default_rng(0).normal(0, 1, (N, K)).astype(np.float32)
ORDER = np.random.default_rng(1).permutation(K)


def order(case: Case) -> np.ndarray:
    return ORDER // (K if case.group == -1 else case.group)


def write(folder: Path, tensors: dict[str, np.ndarray]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({name: as_torch(array) for name, array in tensors.items()}, folder / "model.safetensors")
    return folder


def opened(folder: Path, case: Case, **extra: np.ndarray) -> tuple[Checkpoint, Any]:
    tensors, found = store(case, "x", WEIGHTS, order(case))
    write(folder, {**tensors, **extra})
    return open_checkpoint(folder, {"quantization_config": case.settings()}), found


@pytest.mark.parametrize("name", CASES)
def test_rows_are_dequantized(name: str, tmp_path: Path) -> None:
    bias, plain = np.ones(N, np.float16), np.ones((3, 4), np.float32)
    source, found = opened(tmp_path, CASES[name], **{"x.bias": bias, "norm.weight": plain})
    values = found.values() if isinstance(found, Grid) else found
    with source:
        assert {info.name: info.shape for info in source.infos()} == {
            "x.weight": (N, K), "x.bias": (N,), "norm.weight": (3, 4)
        }  # fmt: skip
        assert source.info("x.weight") == TensorInfo.of("x.weight", "float32", (N, K))
        assert "x.weight" in source
        assert "x.qweight" not in source
        for start, stop in ((0, N), (0, 1), (5, 23), (63, 64), (17, 17), (60, 99)):
            rows = source.read("x.weight", start, stop)
            assert rows.dtype == np.float32
            # A code times a scale is exact in float32 but for scales of full width: one rounding.
            np.testing.assert_allclose(rows, values[start:stop], rtol=2e-7, atol=0)
        np.testing.assert_array_equal(source.read("x.weight"), source.read("x.weight", 0, N))
        np.testing.assert_array_equal(source.read("x.bias", 3), bias[3:])


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith(("fp8", "nf4"))])
def test_packings(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    source, _ = opened(tmp_path, case)
    with source:
        packing = source.packings["x.weight"]
    assert isinstance(packing, Packing)
    group = K if case.group == -1 else case.group
    block = 64 if case.group == -1 else case.group  # 192 = 3 * 64
    assert (packing.method, packing.bits, packing.group, packing.block_size) == (case.method, case.bits, group, block)
    assert (packing.symmetric, packing.scale_dtype) == (case.symmetric, case.scale_dtype)
    assert bool(packing.order) == case.act_order


@pytest.mark.parametrize("name", ["fp8-blocks", "fp8-row", "nf4"])
def test_values_that_are_no_codes_say_so(name: str, tmp_path: Path) -> None:
    source, _ = opened(tmp_path, CASES[name])
    with source:
        assert "no integer codes" in str(source.packings["x.weight"])
        with pytest.raises(TypeError, match="no integer codes"):
            source.codes("x.weight", 0, 1)


def test_groups_that_are_no_blocks_say_so(tmp_path: Path) -> None:
    source, found = opened(tmp_path, Case("gptq", group=8, form="gptq"))
    with source:
        assert "groups of 8" in str(source.packings["x.weight"])
        np.testing.assert_allclose(source.read("x.weight"), found.values(), rtol=1e-7)


def test_an_order_of_unequal_groups_says_so(tmp_path: Path) -> None:
    case = Case("gptq", form="gptq", act_order=True)
    uneven = np.minimum(ORDER // 20, K // 32 - 1)
    tensors, grid = store(case, "x", WEIGHTS, uneven)
    with open_checkpoint(write(tmp_path, tensors), {"quantization_config": case.settings()}) as source:
        assert "different sizes" in str(source.packings["x.weight"])
        np.testing.assert_allclose(source.read("x.weight"), grid.values(), rtol=1e-7)


def test_a_plain_checkpoint_is_what_it_is(tmp_path: Path) -> None:
    with open_checkpoint(write(tmp_path, {"a.weight": WEIGHTS, "a.k_scale": WEIGHTS[0]}), {}) as source:
        assert not source.packings
        assert sorted(info.name for info in source.infos()) == ["a.k_scale", "a.weight"]
        np.testing.assert_array_equal(source.read("a.weight", 3, 5), WEIGHTS[3:5])


def test_scales_of_activations_and_cache_are_dropped(tmp_path: Path) -> None:
    one = np.ones(1, np.float32)
    source, _ = opened(tmp_path, CASES["int8-row"], **{"x.input_scale": one, "attn.k_scale": one, "attn.v_scale": one})
    with source:
        assert [info.name for info in source.infos()] == ["x.weight"]


def test_a_layer_may_have_other_bits_and_groups_than_config_json_says(tmp_path: Path) -> None:
    first, grid = store(Case("gptq", form="gptq"), "a", WEIGHTS)
    second, wide = store(Case("gptq", bits=8, group=64, form="gptq"), "b", WEIGHTS)
    folder = write(tmp_path, {**first, **second})
    with open_checkpoint(folder, {"quantization_config": Case("gptq", form="gptq").settings()}) as source:
        np.testing.assert_allclose(source.read("a.weight"), grid.values(), rtol=1e-7)
        np.testing.assert_allclose(source.read("b.weight"), wide.values(), rtol=1e-7)
        found = source.packings["b.weight"]
        assert isinstance(found, Packing)
        assert (found.bits, found.block_size) == (8, 64)


def test_gptq_without_an_index_of_groups(tmp_path: Path) -> None:
    case = CASES["gptq-4"]
    tensors, grid = store(case, "x", WEIGHTS)
    del tensors["x.g_idx"]
    with open_checkpoint(write(tmp_path, tensors), {"quantization_config": case.settings()}) as source:
        np.testing.assert_allclose(source.read("x.weight"), grid.values(), rtol=1e-7)


def test_zero_points_of_compressed_tensors_that_are_not_packed(tmp_path: Path) -> None:
    case = CASES["packed-4-asymmetric"]
    tensors, grid = store(case, "x", WEIGHTS)
    tensors["x.weight_zero_point"] = (grid.zeros - 8).astype(np.int8)
    with open_checkpoint(write(tmp_path, tensors), {"quantization_config": case.settings()}) as source:
        np.testing.assert_allclose(source.read("x.weight"), grid.values(), rtol=1e-7)


def test_an_order_of_columns_in_compressed_tensors(tmp_path: Path) -> None:
    case = Case("compressed-tensors", form="pack-quantized", symmetric=False, act_order=True)
    tensors, grid = store(case, "x", WEIGHTS, order(case))
    tensors["x.weight_g_idx"] = grid.group_of.astype(np.int32)
    with open_checkpoint(write(tmp_path, tensors), {"quantization_config": case.settings()}) as source:
        np.testing.assert_allclose(source.read("x.weight"), grid.values(), rtol=1e-7)
        packing = source.packings["x.weight"]
        assert isinstance(packing, Packing)
        assert packing.order
        found = source.order("x.weight")
        assert found is not None
        assert list(grid.group_of[found]) == sorted(grid.group_of)


def test_rows_of_compressed_tensors_that_end_inside_a_word(tmp_path: Path) -> None:
    case = Case("compressed-tensors", group=-1, form="pack-quantized")
    tensors, grid = store(case, "x", WEIGHTS[:, :37])
    with open_checkpoint(write(tmp_path, tensors), {"quantization_config": case.settings()}) as source:
        assert source.info("x.weight").shape == (N, 37)
        np.testing.assert_allclose(source.read("x.weight"), grid.values(), rtol=1e-7)
        assert "no whole blocks" in str(source.packings["x.weight"])


def test_int8_with_one_scale(tmp_path: Path) -> None:
    case = CASES["int8-row"]
    tensors, grid = store(case, "x", WEIGHTS)
    tensors["x.weight_scale"] = np.array([0.125], np.float16)
    with open_checkpoint(write(tmp_path, tensors), {"quantization_config": case.settings()}) as source:
        np.testing.assert_array_equal(source.read("x.weight", 3, 9), (grid.codes[3:9] - 128) * 0.125)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_bitsandbytes_reads_the_same(quant_type: str, double_quant: bool, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.from_numpy(np.random.default_rng(2).normal(0, 1, (40, 72)).astype(np.float32))
    packed, state = functional.quantize_4bit(weight, quant_type=quant_type, compress_statistics=double_quant)
    tensors = {f"x.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    save_file({"x.weight": packed, **tensors}, tmp_path / "model.safetensors")
    expected = functional.dequantize_4bit(packed, state).numpy()
    with open_checkpoint(tmp_path, {"quantization_config": CASES["nf4"].settings()}) as source:
        # Its kernel may fuse the product with the offset: a unit in the last place of float32.
        np.testing.assert_allclose(source.read("x.weight"), expected, rtol=2e-7, atol=0)
        np.testing.assert_allclose(source.read("x.weight", 7, 30), expected[7:30], rtol=2e-7, atol=0)


def test_memory_is_that_of_the_rows(tmp_path: Path) -> None:
    case = Case("gptq", group=-1, form="gptq")
    n, k = 1 << 14, 1 << 9
    tensors = {
        "x.qweight": np.full((k // 8, n), 0x12345678, np.int32),
        "x.qzeros": np.full((1, n // 8), 0x77777777, np.int32),
        "x.scales": np.ones((1, n), np.float16),
    }
    with open_checkpoint(write(tmp_path, tensors), {"quantization_config": case.settings()}) as source:
        tracemalloc.start()
        try:
            total = sum(float(source.read("x.weight", at, at + 128).sum()) for at in range(0, n, 128))
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert total == n * k // 8 * (sum(range(1, 9)) - 8 * 8)
    assert peak < 2 << 20  # of 32 MB as float32


def parts(first: Packing | str | None, second: Packing | str | None) -> Packing | str:
    found = {"a": first, "b": second}
    return agreed_packing({name: value for name, value in found.items() if value is not None}, ["a", "b", "a"])


def test_parts_must_agree() -> None:
    one = Packing("gptq", 4, 128, 128, True, "float16")
    assert parts(one, one) == one
    assert parts(one, Packing("gptq", 4, 64, 64, True, "float16")) == (
        "a and b are packed differently, but run as one product"
    )
    assert parts(one, Packing("gptq", 4, 128, 128, True, "float16", "another order")) == (
        "a and b are packed differently, but run as one product"
    )
    assert parts(one, None) == "b: it is stored in floating point"
    assert parts("fp8", one) == "a: fp8"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "hqq"}, "quantized by hqq; read are gptq, awq"),
        ({"bits": 4}, "an unnamed method"),
        (CASES["gptq-4"].settings() | {"checkpoint_format": "marlin"}, "format of the checkpoint is 'marlin'"),
        (CASES["gptq-4"].settings() | {"is_marlin_format": True}, "marlin"),
        (CASES["gptq-4"].settings() | {"pack_dtype": "int64"}, "int64"),
        (CASES["awq"].settings() | {"version": "gemv"}, "gemv"),
        (CASES["packed-4"].settings() | {"transform_config": {"config_groups": {}}}, "transform_config"),
        (CASES["packed-4"].settings() | {"format": "nvfp4-pack-quantized"}, "nvfp4"),
        (
            CASES["packed-4"].settings()
            | {"config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 32, "type": "float"}}}},
            r"type of 4-bit compressed-tensors weights \(pack-quantized\) of the checkpoint is 'float'",
        ),
    ],
)
def test_what_is_not_read_is_refused_by_name(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    tensors, _ = store(CASES["gptq-4"], "x", WEIGHTS)
    with pytest.raises(PlanError, match=message):
        open_checkpoint(write(tmp_path, tensors), {"quantization_config": settings})


def test_three_bits_are_refused(tmp_path: Path) -> None:
    tensors = {
        "x.qweight": np.zeros((K * 3 // 32, N), np.int32),
        "x.qzeros": np.zeros((K // 32, N * 3 // 32), np.int32),
        "x.scales": np.ones((K // 32, N), np.float16),
    }
    with pytest.raises(PlanError, match="codes of 3 bits"):
        open_checkpoint(write(tmp_path, tensors), {"quantization_config": CASES["gptq-4"].settings()})


@pytest.mark.parametrize(
    ("name", "tensor", "shape", "message"),
    [
        ("gptq-4", "x.qzeros", (5, N // 8), "contradict each other: x.qzeros"),
        ("gptq-4", "x.g_idx", (K - 1,), "x.g_idx has shape"),
        ("gptq-4", "x.scales", (6,), "x.scales must be a matrix"),
        ("awq", "x.qzeros", (1, N // 8), "x.qzeros has shape"),
        ("packed-4", "x.weight_packed", (N, 5), "no matrix"),
        ("packed-4", "x.weight_scale", (N - 1, 6), "x.weight_scale has shape"),
        ("int8-row", "x.weight_scale", (N - 1, 1), "has 64 rows"),
        ("fp8-blocks", "x.weight_scale_inv", (3, 5), "does not fit x.weight"),
        ("nf4", "x.weight.absmax", (7,), "for a matrix"),
        ("packed-4", "x.weight_shape", (3,), r"x.weight_shape has shape \[3\] instead of \[2\]"),
    ],
)
def test_parts_that_contradict_each_other(
    name: str, tensor: str, shape: tuple[int, ...], message: str, tmp_path: Path
) -> None:
    tensors, _ = store(CASES[name], "x", WEIGHTS)
    tensors[tensor] = np.resize(tensors[tensor], shape)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(write(tmp_path, tensors), {"quantization_config": CASES[name].settings()})


@pytest.mark.parametrize(("name", "tensor"), [("gptq-4", "x.qzeros"), ("packed-4", "x.weight_shape"),
                                              ("fp8-blocks", "x.weight_scale_inv"), ("nf4", "x.weight.quant_map"),
                                              ("nf4", "x.weight.absmax")])  # fmt: skip
def test_missing_parts(name: str, tensor: str, tmp_path: Path) -> None:
    tensors, _ = store(CASES[name], "x", WEIGHTS)
    del tensors[tensor]
    with pytest.raises(CheckpointError, match=r"no tensor|neither weight_scale"):
        open_checkpoint(write(tmp_path, tensors), {"quantization_config": CASES[name].settings()})


@pytest.mark.parametrize(
    ("name", "tensor", "dtype"),
    [
        ("gptq-4", "x.qweight", "float32"),
        ("gptq-4", "x.qzeros", "float32"),
        ("gptq-4", "x.g_idx", "float32"),
        ("awq", "x.qweight", "float32"),
        ("awq", "x.qzeros", "int64"),
        ("packed-4", "x.weight_packed", "float32"),
        ("packed-4", "x.weight_shape", "float32"),
        ("packed-4-asymmetric", "x.weight_zero_point", "float32"),
        ("nf4", "x.weight", "int8"),
    ],
)
def test_codes_of_another_type_are_refused(name: str, tensor: str, dtype: str, tmp_path: Path) -> None:
    tensors, _ = store(CASES[name], "x", WEIGHTS)
    tensors[tensor] = tensors[tensor].astype(dtype)
    with pytest.raises(CheckpointError, match=f"{tensor} is {dtype} instead of "):
        open_checkpoint(write(tmp_path, tensors), {"quantization_config": CASES[name].settings()})


def test_zero_points_of_int8_codes_of_another_type_are_refused(tmp_path: Path) -> None:
    case, zeros = CASES["int8-row"], np.zeros((N, 1), np.float32)
    with pytest.raises(CheckpointError, match=r"x\.weight_zero_point is float32 instead of int8"):
        opened(tmp_path, case, **{"x.weight_zero_point": zeros})


def test_an_order_of_columns_that_is_promised_must_be_there(tmp_path: Path) -> None:
    tensors, _ = store(CASES["gptq-4"], "x", WEIGHTS, ORDER // 32)
    del tensors["x.g_idx"]
    settings = CASES["gptq-4"].settings() | {"desc_act": True}
    with pytest.raises(CheckpointError, match=r"desc_act, .* columns of x lie in 6 groups .* x.g_idx.* is missing"):
        open_checkpoint(write(tmp_path, tensors), {"quantization_config": settings})


def test_one_group_needs_no_order(tmp_path: Path) -> None:
    case = Case("gptq", group=-1, form="gptq")
    tensors, grid = store(case, "x", WEIGHTS)
    tensors.pop("x.g_idx", None)
    settings = case.settings() | {"desc_act": True}
    with open_checkpoint(write(tmp_path, tensors), {"quantization_config": settings}) as source:
        np.testing.assert_allclose(source.read("x.weight"), grid.values(), rtol=2e-7)


@pytest.mark.parametrize("groups", [None, {}, {"group_0": {"targets": ["Linear"]}}], ids=str)
def test_packed_codes_whose_bits_nobody_says(groups: Any, tmp_path: Path) -> None:
    tensors, _ = store(CASES["packed-4"], "x", WEIGHTS)
    settings = CASES["packed-4"].settings() | {"config_groups": groups}
    with pytest.raises(CheckpointError, match=r"no group of config_groups in config\.json says of how many bits"):
        open_checkpoint(write(tmp_path, tensors), {"quantization_config": settings})


@pytest.mark.parametrize("said", ["128by128", [64], [0, 64], ["a", "b"], 64], ids=str)
def test_fp8_blocks_that_are_no_sizes(said: Any, tmp_path: Path) -> None:
    tensors, _ = store(CASES["fp8-blocks"], "x", WEIGHTS)
    settings = CASES["fp8-blocks"].settings() | {"weight_block_size": said}
    with pytest.raises(CheckpointError, match=r"weight_block_size in config\.json must be two whole numbers"):
        open_checkpoint(write(tmp_path, tensors), {"quantization_config": settings})


def test_fp8_blocks_as_text(tmp_path: Path) -> None:
    """As compressed-tensors reads them (`validate_block_structure` in quant_args.py)."""
    tensors, found = store(CASES["fp8-blocks"], "x", WEIGHTS)
    tensors["x.weight_scale"] = tensors.pop("x.weight_scale_inv")
    rows, columns = CASES["fp8-blocks"].settings()["weight_block_size"]
    weights = {"num_bits": 8, "type": "float", "block_structure": f"{rows}x{columns}"}
    settings = {"quant_method": "compressed-tensors", "format": "float-quantized",
                "config_groups": {"group_0": {"weights": weights}}}  # fmt: skip
    with open_checkpoint(write(tmp_path, tensors), {"quantization_config": settings}) as source:
        np.testing.assert_allclose(source.read("x.weight"), found, rtol=2e-7)


def test_an_index_of_groups_out_of_range(tmp_path: Path) -> None:
    tensors, _ = store(CASES["gptq-4"], "x", WEIGHTS)
    tensors["x.g_idx"][3] = 6
    with pytest.raises(CheckpointError, match="names group 6 of 6"):
        open_checkpoint(write(tmp_path, tensors), {"quantization_config": CASES["gptq-4"].settings()})


def test_config_json_promises_codes_that_are_not_there(tmp_path: Path) -> None:
    folder = write(tmp_path, {"x.weight": WEIGHTS})
    with pytest.raises(CheckpointError, match="quantized by gptq, but no tensor"):
        open_checkpoint(folder, {"quantization_config": CASES["gptq-4"].settings()})
    # bitsandbytes' settings may only ask for quantization on loading.
    with open_checkpoint(folder, {"quantization_config": CASES["nf4"].settings()}) as source:
        np.testing.assert_array_equal(source.read("x.weight"), WEIGHTS)


def test_codes_called_symmetric_that_are_not(tmp_path: Path) -> None:
    case = CASES["gptq-4-asymmetric"]
    tensors, _ = store(case, "x", WEIGHTS)
    settings = case.settings() | {"sym": True}
    with (
        open_checkpoint(write(tmp_path, tensors), {"quantization_config": settings}) as source,
        pytest.raises(
            CheckpointError, match=r"calls the gptq codes symmetric, but row \d+ of x\.weight has zero point"
        ),
    ):
        source.codes("x.weight", 0, N)


def test_one_flipped_code_is_seen(tmp_path: Path) -> None:
    """The twin of the first test: it can fail."""
    case = CASES["gptq-4"]
    tensors, grid = store(case, "x", WEIGHTS)
    tensors["x.qweight"][3, 5] ^= 1 << 8
    with open_checkpoint(write(tmp_path, tensors), {"quantization_config": case.settings()}) as source:
        differs = np.abs(source.read("x.weight") - grid.values()) > 1e-6
    assert list(zip(*np.nonzero(differs), strict=True)) == [(5, 26)]


def test_pickled_weights_may_be_quantized(tmp_path: Path) -> None:
    import torch

    case = CASES["awq"]
    tensors, grid = store(case, "x", WEIGHTS)
    write(tmp_path, tensors)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with open_checkpoint(tmp_path, json.loads(json.dumps({"quantization_config": case.settings()}))) as source:
        np.testing.assert_allclose(source.read("x.weight", 9, 21), grid.values()[9:21], rtol=1e-7)


def test_grid_of_the_oracle_is_close_to_the_weights() -> None:
    for symmetric in (True, False):
        grid = on_grid(WEIGHTS, bits=8, group=32, symmetric=symmetric)
        assert np.abs(grid.values() - WEIGHTS).max() < 0.05
