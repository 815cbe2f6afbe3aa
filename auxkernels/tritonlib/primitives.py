"""Accurate scalar functions, and sums and searches over tiles whose bits do not depend on how threads hold them."""

from __future__ import annotations

import triton
import triton.language as tl

LARGEST = tl.constexpr(3.4028234663852886e38)


# -- scalar functions --------------------------------------------------------------------------------------------------


@triton.jit
def exp(x):
    """To a few ulp, results below the smallest normal number as 0: one instruction, where tl.exp has four."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def finite_or_zero(m):
    # a row may hold whole blocks of -inf (masked classes): subtracting their maximum would make NaN of exp(-inf + inf)
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def finite(x):
    """Infinities as the largest numbers: 0 times these is 0. NaN is lost, so the other factor must have it."""
    return tl.minimum(tl.maximum(x, -LARGEST), LARGEST)


@triton.jit
def log1p(x):
    """log(1 + x) for x in [0, 1], to full relative accuracy: 2 atanh(x / (2 + x)), a series of ratio at most 1/9."""
    t = tl.math.div_rn(x, 2.0 + x)
    u = t * t
    series = 1.0 / 17
    series = series * u + 1.0 / 15
    series = series * u + 1.0 / 13
    series = series * u + 1.0 / 11
    series = series * u + 1.0 / 9
    series = series * u + 1.0 / 7
    series = series * u + 1.0 / 5
    series = series * u + 1.0 / 3
    return 2.0 * t + 2.0 * t * (u * series)


@triton.jit
def one_minus_exp(x):
    """1 - exp(-x), to full relative accuracy also for x near 0, where it is a Taylor series."""
    series = 1.0 / 39916800
    series = 1.0 / 3628800 - x * series
    series = 1.0 / 362880 - x * series
    series = 1.0 / 40320 - x * series
    series = 1.0 / 5040 - x * series
    series = 1.0 / 720 - x * series
    series = 1.0 / 120 - x * series
    series = 1.0 / 24 - x * series
    series = 1.0 / 6 - x * series
    series = 0.5 - x * series
    return tl.where(tl.abs(x) < 1.0, x - x * (x * series), 1.0 - exp(-x))


@triton.jit
def soft_cap(z, cap):
    """cap * tanh(z / cap) and its derivative, each to a few ulp: tanh.approx of the hardware has 11 bits."""
    x = z * tl.math.div_rn(1.0, cap)
    size = tl.abs(x)
    e = exp(-2.0 * size)
    r = 1.0 / (1.0 + e)
    u = x * x
    series = -5.70498872745e-3 * u + 2.06390887954e-2
    series = series * u - 5.37397155531e-2
    series = series * u + 1.33314422036e-1
    series = series * u - 3.33332819422e-1
    far = (1.0 - e) * r
    capped = cap * tl.where(size < 0.625, size + size * (u * series), far)
    sign = x.to(tl.int32, bitcast=True) & -0x80000000
    return (capped.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True), 4.0 * e * r * r


# -- tiles and lanes ---------------------------------------------------------------------------------------------------


@triton.jit
def first_columns(LANES: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """[LANES, 1]: where each lane's columns in a tile begin; `+ within(...)` are the columns.

    EVEN, where rows are aligned: WIDTH neighbours, a 128-bit load. Otherwise LANES apart, so that neighbouring
    threads load neighbouring columns, and a lane is still one thread's.
    """
    return (tl.arange(0, LANES) * (WIDTH if EVEN else 1))[:, None]


@triton.jit
def within(LANES: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """[1, WIDTH]: distance of each column from the lane's first."""
    return (tl.arange(0, WIDTH) * (1 if EVEN else LANES))[None, :]


@triton.jit
def tile_sum(x):
    """[LANES, WIDTH] to [LANES]."""
    for _ in tl.static_range(8):
        if x.shape[1] > 1:
            x = tl.sum(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)), axis=2)
    return tl.sum(x, axis=1)


@triton.jit
def tile_max(x):
    return tl.max(x, axis=1)


@triton.jit
def lane_sum(x):
    """[LANES] to a scalar."""
    for _ in tl.static_range(16):
        if x.shape[0] > 1:
            x = tl.sum(tl.reshape(x, (x.shape[0] // 2, 2)), axis=1)
    return tl.sum(x, axis=0)


# -- argmax ------------------------------------------------------------------------------------------------------------


@triton.jit
def tile_argmax(z, first, in_row, EVEN: tl.constexpr):
    """Value and column of each lane's torch.argmax, as one int64 that is compared as such.

    NaN is above all, then comes the value, then the lower column.
    """
    bits = (z + 0.0).to(tl.int32, bitcast=True)  # -0.0 is 0.0
    key = tl.where(z != z, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    key = tl.where(in_row, key, -0x80000000)
    best = tile_max(key)
    behind = tl.where(key == best[:, None], 0x7FFFFFFF - within(z.shape[0], z.shape[1], EVEN), 0)
    behind = tile_max(behind) - tl.reshape(first, (first.shape[0],))
    return (best.to(tl.int64) << 32) | behind.to(tl.int64)


@triton.jit
def column_of(packed):
    return 0x7FFFFFFF - (packed & 0x7FFFFFFF)
