"""Exponential and logarithm as sequences of operations that IEEE 754 rounds in one way, in plain torch.

csrc/cpu/simd/exact.h and the Triton kernels have the same sequences, without fused multiplications and additions.
"""

from __future__ import annotations

import torch
from torch import Tensor

LN_2_HIGH = float.fromhex("0x1.62e42feep-1")  # the first 32 bits of log(2): n times it is exact
_LN_2_LOW = 1.9082149292705877e-10
_SQRT_HALF = 0x3FE6A09E667F3BCD
# 1 / (2 i + 1), of atanh's series: 3e-18 is left out for x**2 < 0.0295
_ATANH = tuple(1.0 / (2 * i + 1) for i in range(10, 0, -1))


def log(x: Tensor) -> Tensor:
    """log(x) of normal positive float64 numbers, within 2 ulp; relative to log(x) also near 1.

    x = 2**n (1 + f) with sqrt(1/2) <= 1 + f < sqrt(2), and log(1 + f) = 2 atanh(f / (2 + f)).
    """
    shifted = x.view(torch.int64) - _SQRT_HALF
    n = (shifted >> 52).to(torch.float64)
    f = ((shifted & 0x000FFFFFFFFFFFFF) + _SQRT_HALF).view(torch.float64) - 1.0
    q = f / (f + 2.0)
    z = q * q
    series = torch.full_like(z, _ATANH[0])
    for coefficient in _ATANH[1:]:
        series = series * z + coefficient
    q = q + q
    tail = n * _LN_2_LOW + q * (z * series)
    return n * LN_2_HIGH + (q + tail)


def log_of_probability(p: Tensor) -> Tensor:
    """log(p) of float64 numbers in [0, 1]: -inf for those below the normal ones."""
    smallest = torch.finfo(torch.float64).smallest_normal
    return torch.where(p < smallest, -torch.inf, log(p.clamp(min=smallest)))


# exp_of in csrc/cpu/simd/vector_math.h, from the highest power down
_EXP = (1.381446674e-3, 8.368780429e-3, 4.166839422e-2, 1.666652011e-1, 4.999999341e-1, 1.0, 1.0)
_ROUND = 12583039.0  # 1.5 * 2**23 + 127: adding it leaves round(x) in the low bits, biased as an exponent is


def exp(x: Tensor) -> Tensor:
    """exp(x) of float32 numbers up to 88, 0 below -87.7; within 1 ulp and |x| / 2 ulp."""
    x = x.clamp(min=-88.0)
    shifted = x * 1.44269504089 + _ROUND
    r = x - (shifted - _ROUND) * 0.69314718056
    q = torch.full_like(r, _EXP[0])
    for coefficient in _EXP[1:]:
        q = q * r + coefficient
    return q * (shifted.view(torch.int32) << 23).view(torch.float32)


def gumbel(bits: Tensor) -> Tensor:
    """Gumbel noise in float64 of 32 random bits, held in int64: -log(-log(u)), u = (bits + 0.5) * 2**-32."""
    u = (bits.to(torch.float64) + 0.5) * 2.0**-32
    return -log(-log(u))
