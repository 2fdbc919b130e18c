"""Quantizing throughput: bf16 weights to symmetric int4 blocks of 32 by round-to-nearest, on all cores, in memory.

    python benchmarks/quantize_throughput.py [--rounds 7] [--rows 16384] [--columns 8192]

    Coldpress       kernels/quantize.py, one thread a core, each on its rows
    torch           eager, on the whole matrix, threads of its own
    torch, blocked  the same on blocks of rows that fit the cache, one Python thread a core, one torch thread each
    ONNX Runtime    quantize_matmul_4bits, the C++ behind its MatMulNBits quantizer: takes float32 [k, n] in memory, so
                    converting and transposing come with it; "kernel alone" has them done before

What comes out is compared once: the codes of both torch forms must be those of Coldpress but for ties (in bf16 a block
often has two peaks of opposite sign; at most 1 % of the bytes), all weights as close to the input as ours.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from side_by_side import in_turn, machine, verdict

from coldpress.hardware import detect
from coldpress.kernels.quantize import Quantized, dequantize, quantize

BLOCK = 32
BAR = 0.9
KERNEL = "ONNX Runtime, kernel alone"
Array = npt.NDArray[Any]


def by_coldpress(weights: Array, threads: int) -> tuple[Array, Array]:
    n, k = weights.shape
    codes, scales = np.empty((n, k // BLOCK, BLOCK // 2), np.uint8), np.empty((n, k // BLOCK), np.float32)
    step = max(1, (4 << 20) // k)

    def rows(start: int) -> None:
        made = quantize(weights[start : start + step], bits=4, block_size=BLOCK)
        codes[start : start + step], scales[start : start + step] = made.codes, made.scales

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(rows, range(0, n, step)))
    return codes, scales


def _torch_rows(weights: Any) -> tuple[Any, Any]:
    """As torch programs write it: peak with its sign, scale, round, clamp, pack."""
    import torch

    n, k = weights.shape
    blocks = weights.float().view(n, k // BLOCK, BLOCK)
    low, high = blocks.aminmax(dim=-1, keepdim=True)
    peak = torch.where(high > -low, high, low)
    scales = peak / -8
    inverse = torch.where(scales == 0, 0.0, 1 / scales)
    codes = (blocks * inverse + 8.5).clamp_(0, 15.5).to(torch.uint8)
    return codes[..., 0::2] | (codes[..., 1::2] << 4), scales[..., 0]


def by_torch(weights: Array, threads: int) -> tuple[Array, Array]:
    import torch

    torch.set_num_threads(threads)
    codes, scales = _torch_rows(torch.from_numpy(weights.view(np.int16)).view(torch.bfloat16))
    return codes.numpy(), scales.numpy()


def by_torch_blocks(weights: Array, threads: int) -> tuple[Array, Array]:
    import torch

    torch.set_num_threads(1)
    n, k = weights.shape
    codes, scales = np.empty((n, k // BLOCK, BLOCK // 2), np.uint8), np.empty((n, k // BLOCK), np.float32)
    source, step = torch.from_numpy(weights.view(np.int16)).view(torch.bfloat16), max(1, (128 << 10) // k)

    def rows(start: int) -> None:
        torch.set_num_threads(1)  # it is a setting of each thread
        made = _torch_rows(source[start : start + step])
        codes[start : start + step], scales[start : start + step] = made[0].numpy(), made[1].numpy()

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(rows, range(0, n, step)))
    return codes, scales


def _columns(weights: Array) -> Array:
    return np.ascontiguousarray(weights.astype(np.float32).T)


def by_onnxruntime_kernel(across: Array, threads: int) -> tuple[Array, Array]:
    """It uses all cores by itself."""
    from onnxruntime.capi._pybind_state import quantize_matmul_4bits

    k, n = across.shape
    codes, scales = np.zeros((n, k // BLOCK, BLOCK // 2), np.uint8), np.zeros((n, k // BLOCK), np.float32)
    zeros = np.zeros((n, k // BLOCK // 2), np.uint8)
    quantize_matmul_4bits(codes, across, scales, zeros, BLOCK, n, k, True)
    return codes, scales


def by_onnxruntime(weights: Array, threads: int) -> tuple[Array, Array]:
    return by_onnxruntime_kernel(_columns(weights), threads)


SIDES: dict[str, Callable[[Array, int], tuple[Array, Array]]] = {
    "Coldpress": by_coldpress,
    "torch": by_torch,
    "torch, blocked": by_torch_blocks,
    "ONNX Runtime": by_onnxruntime,
    KERNEL: by_onnxruntime_kernel,
}


def _check(weights: Array) -> None:
    ours = by_coldpress(weights, 1)
    wanted = weights.astype(np.float32)

    def error(codes: Array, scales: Array) -> float:
        found = dequantize(Quantized(codes, scales, None), bits=4, k=wanted.shape[1])
        return float(np.square(found - wanted).mean())

    for name, side in SIDES.items():
        codes, scales = side(_columns(weights) if name == KERNEL else weights, 1)
        equal, ratio = float((codes == ours[0]).mean()), error(codes, scales) / error(*ours)
        print(f"{name}: {equal:.2%} of the bytes equal, squared error {ratio:.4f} of ours")
        if abs(ratio - 1) > 0.01 or ("torch" in name and equal < 0.99):
            raise SystemExit(f"{name} computes something else")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--columns", type=int, default=8192)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((options.rows, options.columns), dtype=np.float32).astype(ml_dtypes.bfloat16)
    _check(weights[:64])
    threads = detect().cores

    across = _columns(weights)

    def timed(name: str) -> float:
        start = time.perf_counter()
        SIDES[name](across if name == KERNEL else weights, threads)
        return weights.size / (time.perf_counter() - start) / 1e9

    for name in SIDES:
        timed(name)
    before = os.getloadavg()[0]
    runs = in_turn({name: lambda name=name: timed(name) for name in SIDES}, options.rounds)
    packages = ", ".join(f"{name} {version(name)}" for name in ("numba", "numpy", "torch", "onnxruntime"))
    print(f"\n{machine()}; {packages}; [{options.rows}, {options.columns}], {threads} threads; "
          f"load {before:.1f} before, {os.getloadavg()[0]:.1f} after\n")  # fmt: skip
    print("| RTN, symmetric, block 32, bf16 in | Gparam/s, median (min-max) | Coldpress is faster by |")
    print("| --- | --- | --- |")
    ours = statistics.median(runs["Coldpress"])
    for name, found in runs.items():
        median = statistics.median(found)
        print(f"| {name} | {median:.3f} ({min(found):.3f}-{max(found):.3f}) | {ours / median:.2f} |")
    print(f"\nbar {BAR} Gparam/s: {ours:.2f}, {verdict(ours, BAR, most=False)}")


if __name__ == "__main__":
    main()
