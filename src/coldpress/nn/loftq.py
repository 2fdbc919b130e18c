"""LoftQ: a 4-bit base and the adapter that makes up for what the 4 bits lose (Li et al. 2023, algorithm 1).

    W    weight [out, in]       Q    what 4 bits leave of a matrix       s    scale of the adapter
    R_0 = 0;  Q_t = quantize(W - R_t-1);  R_t = the part of rank r nearest to W - Q_t;  t = 1 .. rounds

The base is Q_rounds, the adapter begins with s B A = R_rounds. PEFT's own leaves the scale out, so that its start is
off by it unless alpha = r; here it is in. After one round the base is the plain quantization of the checkpoint; after
more it is another one, which is written out (`write_base`). Quantizing that again gives the same 4 bits.

The nearest part of rank r comes from the eigenvectors of the smaller Gram matrix of the residual, in float32: a full
decomposition would take several times as long and is not needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coldpress.artifacts.base import BaseQuantization
from coldpress.artifacts.json_file import read_json
from coldpress.artifacts.quantized import open_checkpoint
from coldpress.artifacts.tensors import TensorInfo, TensorSource, numpy_dtype, write_safetensors

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

__all__ = ["begin_with_residual", "nearest_product", "write_base"]

_PREFIX = "base_model.model."


def nearest_product(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """B [out, r] and A [r, in] whose product is the matrix of that rank nearest to `matrix` (float32), and of one size.

    Raises ValueError for a rank that the matrix cannot have.
    """
    import torch

    out, into = matrix.shape
    if not 1 <= rank <= min(out, into):
        raise ValueError(f"a matrix of shape [{out}, {into}] has no part of rank {rank}")
    tall = out >= into
    gram = matrix.T @ matrix if tall else matrix @ matrix.T
    # Eigenvalues come smallest first; they are the squares of the singular values.
    values, vectors = torch.linalg.eigh(gram)
    main = vectors[:, -rank:]
    sizes = values[-rank:].clamp(min=0).sqrt()  # singular values
    roots = sizes.sqrt()
    other = (matrix @ main if tall else matrix.T @ main) / torch.where(roots > 0, roots, torch.ones_like(roots))
    mine = main * roots
    return (other, mine.T) if tall else (mine, other.T)


def write_base(
    source: Path,
    target: Path,
    quantization: BaseQuantization,
    *,
    four_bits: tuple[str, ...],
    ranks: Mapping[str, int],
    rounds: int,
    on_tensor: Callable[[int, int], None],
    device: str = "cpu",
) -> None:
    """Write the weights of `source` with what 4 bits leave of the layers `four_bits`, in their own types.

    Layers with a rank go through `rounds`; the others are quantized as they are. `on_tensor` is told (done, all). Peak
    memory: some five copies of the largest matrix in float32.
    """
    with open_checkpoint(source, read_json(source / "config.json")) as base:
        infos = sorted(base.infos(), key=lambda info: info.name)

        def tensors() -> Iterator[tuple[TensorInfo, Callable[[], npt.NDArray[Any]]]]:
            for place, info in enumerate(infos, start=1):
                yield info, producer(place, info)

        def producer(place: int, info: TensorInfo) -> Callable[[], npt.NDArray[Any]]:
            def produce() -> npt.NDArray[Any]:
                layer = info.name.removesuffix(".weight")
                if layer in four_bits and info.name.endswith(".weight"):
                    made = _quantized(base, info, quantization, ranks.get(layer), rounds, device)
                else:
                    made = base.read(info.name)
                on_tensor(place, len(infos))
                return made

            return produce

        write_safetensors(target / "model.safetensors", tensors(), {"format": "pt"})


def _quantized(
    base: TensorSource, info: TensorInfo, quantization: BaseQuantization, rank: int | None, rounds: int, device: str
) -> npt.NDArray[Any]:
    """Q of the last round, in the type of the checkpoint."""
    import numpy as np
    import torch

    from coldpress.kernels.nf4 import round_trip

    dtype = numpy_dtype(quantization.compute_dtype)  # bitsandbytes quantizes what was loaded in it

    def four_bits(weight: npt.NDArray[Any]) -> npt.NDArray[Any]:
        left = round_trip(
            weight.astype(dtype), quant_type=quantization.quant_type, double_quant=quantization.double_quant
        )
        return left.astype(dtype)

    weight = np.asarray(base.read(info.name), np.float32)
    left = four_bits(weight)
    for _ in range(rounds - 1 if rank is not None else 0):
        assert rank is not None
        residual = torch.from_numpy(weight - left.astype(np.float32)).to(device)
        b, a = nearest_product(residual, rank)
        left = four_bits(weight - (b @ a).cpu().numpy())
    return left.astype(numpy_dtype(info.dtype))


def begin_with_residual(adapted: Any, source: Path, ranks: Mapping[str, int]) -> int:
    """Give each adapter on a 4-bit layer the part of the residual W - Q that its rank can hold; returns their number.

    W is read from `source`, Q is what the layer holds.
    """
    import numpy as np
    import torch

    from coldpress.nn.loading import dequantized

    begun = 0
    with open_checkpoint(source, read_json(source / "config.json")) as base, torch.no_grad():
        for name, rank in ranks.items():
            layer = adapted.get_submodule(_PREFIX + name)
            held = dequantized(layer.get_base_layer())
            if held is None:
                continue
            weight = torch.from_numpy(np.array(base.read(f"{name}.weight"), np.float32)).to(held.device)
            b, a = nearest_product(weight - held.float(), rank)
            first, second = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            root = layer.scaling["default"] ** 0.5
            first.copy_(a / root)
            second.copy_(b / root)
            if "default" in layer.lora_magnitude_vector:  # DoRA: the start's own magnitudes
                total = held.float() + layer.scaling["default"] * (second @ first)
                layer.lora_magnitude_vector["default"].weight.copy_(total.norm(dim=1))
            begun += 1
    return begun
