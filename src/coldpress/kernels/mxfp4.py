"""MXFP4: weights of 4 bits in blocks of 32 that share a power of two.

    W       weights [n, k], G = k / 32 blocks in a row
    codes   uint8 [n, G, 16]: two E2M1 numbers a byte, the even column in the low half; sign, two exponent bits, one
            of mantissa
    scales  uint8 [n, G]: E8M0, 2^(scale - 127); 255 is NaN
    w'      e2m1(code) * 2^(scale - 127), exact in float32

Format: OCP Microscaling Formats (MX) Specification 1.0, sections 5.3 and 5.4.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["BLOCK", "E2M1", "dequantize_mxfp4"]

BLOCK = 32
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)

Floats = npt.NDArray[np.float32]

_PAIRS = np.array([(E2M1[byte & 15], E2M1[byte >> 4]) for byte in range(256)], np.float32)
_POWERS = np.array([2.0 ** (scale - 127) for scale in range(255)] + [np.nan], np.float32)


def dequantize_mxfp4(codes: npt.NDArray[Any], scales: npt.NDArray[Any]) -> Floats:
    """W [n, k] in float32; a block whose scale is NaN becomes NaN. Peak memory is the result."""
    n, blocks, width = codes.shape
    values = _PAIRS[codes].reshape(n, blocks, 2 * width)
    values *= _POWERS[scales][:, :, None]
    result: Floats = values.reshape(n, -1)
    return result
