"""Exponential and logarithm of fixed operations, as in ../arithmetic.py. Constants of float64 by tl.full: no rounding.

Launched without fused multiply-add, as everything here is.
"""

from __future__ import annotations

import triton
import triton.language as tl

_SQRT_HALF = tl.constexpr(0x3FE6A09E667F3BCD)
_MANTISSA = tl.constexpr(0x000FFFFFFFFFFFFF)
_LN_2_HIGH = tl.constexpr(0.6931471803691238)
_LN_2_LOW = tl.constexpr(1.9082149292705877e-10)


@triton.jit
def log64(x):
    """log(x) of normal positive float64 numbers."""
    shifted = x.to(tl.int64, bitcast=True) - _SQRT_HALF
    n = (shifted >> 52).to(tl.float64)
    f = ((shifted & _MANTISSA) + _SQRT_HALF).to(tl.float64, bitcast=True) - 1.0
    q = f / (f + 2.0)
    z = q * q
    series = z * 0.0 + tl.full([], 1.0 / 21, tl.float64)
    for i in tl.static_range(9):
        series = series * z + tl.full([], 1.0 / (2 * (9 - i) + 1), tl.float64)
    q = q + q
    tail = n * tl.full([], _LN_2_LOW, tl.float64) + q * (z * series)
    return n * tl.full([], _LN_2_HIGH, tl.float64) + (q + tail)


@triton.jit
def log_of_probability(p):
    """log(p) of float64 numbers in [0, 1]: -inf below the normal ones."""
    smallest = tl.full([], 2.2250738585072014e-308, tl.float64)
    return tl.where(p < smallest, float("-inf"), log64(tl.maximum(p, smallest)))


@triton.jit
def gumbel64(bits):
    """-log(-log(u)) of uint32, u = (bits + 0.5) * 2**-32."""
    u = (bits.to(tl.int64).to(tl.float64) + 0.5) * 2.3283064365386963e-10
    return 0.0 - log64(0.0 - log64(u))


@triton.jit
def exp32(x):
    """exp(x) of float32 numbers up to 88."""
    x = tl.maximum(x, -88.0)
    shifted = x * 1.44269504089 + 12583039.0
    r = x - (shifted - 12583039.0) * 0.69314718056
    q = r * 0.0 + 1.381446674e-3
    q = q * r + 8.368780429e-3
    q = q * r + 4.166839422e-2
    q = q * r + 1.666652011e-1
    q = q * r + 4.999999341e-1
    q = q * r + 1.0
    q = q * r + 1.0
    return q * (shifted.to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)
