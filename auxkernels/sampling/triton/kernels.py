"""The kernel of sampling: one program a row, which reads the row's sources once for each bit or two of a threshold.

Every pass forms the same sums, so that nothing of a row is stored. Reasoned and compiled for, not measured: after the
first pass a row's sources come from the second-level cache.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...tritonlib.primitives import soft_cap
from .exact import exp32, gumbel64, log64, log_of_probability

WIDTH = tl.constexpr(4)  # columns of one counter of the noise
LOWEST = tl.constexpr(-3.4028234663852886e38)
LARGEST = tl.constexpr(3.4028234663852886e38)
SMALLEST_NORMAL = tl.constexpr(1.1754943508222875e-38)
WEIGHT_UNITS = tl.constexpr(1099511627776.0)  # 2**40
HUGE_TEMPERATURE = tl.constexpr(1152921504606846976.0)  # 2**60, see offered()
LEAST_NOISE = tl.constexpr(-3.2)
NO_COLUMN = tl.constexpr(0x7FFFFFFF)


class Source(NamedTuple):
    """Rows of logits of one side. scale: numbers, or None for 1."""

    ptr: Any
    stride: Any
    scale: Any
    scale_stride: Any
    softcap: Any  # or None


class Given(NamedTuple):
    """Parameters, see ../request.py: a pointer and a stride of 0 or 1 each; None and 0: no such filter."""

    temperature: Any
    temperature_stride: Any
    top_k: Any
    top_k_stride: Any
    top_p: Any
    top_p_stride: Any
    min_p: Any
    min_p_stride: Any
    plausibility: Any
    plausibility_stride: Any
    seed: Any
    seed_stride: Any
    position: Any  # None: the row's number
    position_stride: Any


class Fields(NamedTuple):
    """One number per row each; all but the token None: not wanted."""

    token: Any
    log_prob: Any
    kept_log_prob: Any
    num_kept: Any
    base_rank: Any


# -- reading -----------------------------------------------------------------------------------------------------------


@triton.jit
def side_at(source, row):
    """Pointer to the row's logits, and its scale."""
    scale = 1.0
    if source.scale is not None:
        scale = tl.load(source.scale + row * source.scale_stride)
    return source.ptr + row * source.stride, scale


@triton.jit
def side_values(source, ptr, scale, cols, V):
    """scale * softcap(values), -inf beyond the row's end."""
    v = tl.load(ptr + cols, mask=cols < V, other=float("-inf")).to(tl.float32)
    if source.softcap is not None:
        v, _ = soft_cap(v, source.softcap)
    if source.scale is not None:
        v = v * scale
    return tl.where(cols < V, v, float("-inf"))


@triton.jit
def columns_at(at, LANES: tl.constexpr):
    return at + tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def summed(base, aux, places, cols, V):
    """(z, s) of some columns. places: what side_at() has found of base and auxiliary."""
    z = side_values(base, places[0], places[1], cols, V)
    s = z
    if aux is not None:
        other = side_values(aux, places[2], places[3], cols, V)
        s = tl.where(cols < V, z + tl.where(cols < V, other, 0.0), float("-inf"))
    return z, s


@triton.jit
def allowed_sum(base, aux, places, base_floor, cols, V):
    """s where the base is at or above the floor, else -inf."""
    z, s = summed(base, aux, places, cols, V)
    return tl.where(z >= base_floor, s, float("-inf"))


@triton.jit
def number(ptr, stride, row):
    return tl.load(ptr + row * stride)


# -- numbers in their order --------------------------------------------------------------------------------------------


@triton.jit
def key_of(v):
    """int32 that compare as the numbers do; -0 is 0."""
    bits = (v + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def value_of(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def smallest_within(m, distance):
    """The smallest t with t - m >= distance in float64."""
    wide = m.to(tl.float64)
    low, high = key_of(tl.full([], LOWEST, tl.float32)).to(tl.int64) - 1, key_of(m).to(tl.int64)
    for _ in range(33):
        middle = (low + high) >> 1
        is_within = value_of(middle.to(tl.int32)).to(tl.float64) - wide >= distance
        is_open = high - low > 1
        high = tl.where(is_open & is_within, middle, high)
        low = tl.where(is_open & (is_within == 0), middle, low)
    return value_of(high.to(tl.int32))


# -- thresholds --------------------------------------------------------------------------------------------------------


@triton.jit
def weight_of(s, m, inverse, floor):
    """int64, in units of 2**-40."""
    w = (exp32((s - m) * inverse) * WEIGHT_UNITS).to(tl.int64)
    return tl.where(s >= floor, w, 0)


@triton.jit
def counted(s, m, inverse, floor, IS_MASS: tl.constexpr):
    """What each column counts: its weight, or 1."""
    if IS_MASS:
        return weight_of(s, m, inverse, floor)
    else:
        return (s >= floor).to(tl.int64)


@triton.jit
def threshold(base, aux, places, base_floor, m, inverse, floor, limit, V, IS_MASS: tl.constexpr, LANES: tl.constexpr):
    """The smallest number of which the greater columns count less than the limit: two bits of it in a pass."""
    low, high = key_of(tl.full([], LOWEST, tl.float32)).to(tl.int64) - 1, key_of(m).to(tl.int64)
    while high - low > 1:  # what is above `low` counts too much, what is above `high` does not
        step = (high - low + 3) >> 2
        one = value_of(tl.minimum(low + step, high).to(tl.int32))
        two = value_of(tl.minimum(low + 2 * step, high).to(tl.int32))
        three = value_of(tl.minimum(low + 3 * step, high).to(tl.int32))
        above_one = tl.zeros([LANES, WIDTH], tl.int64)
        above_two = tl.zeros([LANES, WIDTH], tl.int64)
        above_three = tl.zeros([LANES, WIDTH], tl.int64)
        for at in range(0, V, LANES * WIDTH):
            s = allowed_sum(base, aux, places, base_floor, columns_at(at, LANES), V)
            counts = counted(s, m, inverse, floor, IS_MASS)
            above_one += tl.where(s > one, counts, 0)
            above_two += tl.where(s > two, counts, 0)
            above_three += tl.where(s > three, counts, 0)
        num_below = (total_of(above_one) >= limit).to(tl.int64)
        num_below += (total_of(above_two) >= limit).to(tl.int64)
        num_below += (total_of(above_three) >= limit).to(tl.int64)
        high = tl.where(num_below < 3, tl.minimum(low + (num_below + 1) * step, high), high)
        low = low + num_below * step
    return value_of(high.to(tl.int32))


# -- choice ------------------------------------------------------------------------------------------------------------


@triton.jit
def random_bits(seed, position, at, LANES: tl.constexpr):
    """uint32 [LANES, WIDTH]: one counter for each lane."""
    counter = (tl.arange(0, LANES) + at // WIDTH).to(tl.uint32)
    low, high = position.to(tl.uint32), (position >> 32).to(tl.uint32)
    a, b, c, d = tl.philox(seed, counter, low, high, tl.full([], 0, tl.uint32))
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (LANES, WIDTH))


@triton.jit
def noise_bound(bits):
    """What the noise is at most, but for 2e-5: see csrc/cpu/simd/sample_ops.inl."""
    w = ((bits ^ 0xFFFFFFFF) >> 1).to(tl.int32).to(tl.float32)
    log_w = w.to(tl.int32, bitcast=True).to(tl.float32)
    return 109.5173545 - log_w * 8.262958405176314e-08


@triton.jit
def chosen(base, aux, places, base_floor, m, inverse, floor, T, seed, position, V, LANES: tl.constexpr):
    """The column of the largest (s - m) / T + noise. In float64 only where a bound of it is above the best so far."""
    best = tl.full([], float("-inf"), tl.float64)
    place = tl.full([], NO_COLUMN, tl.int32)
    for at in range(0, V, LANES * WIDTH):
        cols = columns_at(at, LANES)
        s = allowed_sum(base, aux, places, base_floor, cols, V)
        bits = random_bits(seed, position, at, LANES)
        bound = tl.where(s >= floor, (s - m) * inverse + noise_bound(bits), float("-inf"))
        largest = tl.max(tl.max(bound, 1), 0)
        # differences of floats divided by a huge temperature: their float may have overflowed
        if (largest.to(tl.float64) >= tl.maximum(best, LEAST_NOISE)) | (T >= HUGE_TEMPERATURE):
            v = (s.to(tl.float64) - m.to(tl.float64)) / T + gumbel64(bits)
            v = tl.where(s >= floor, v, float("-inf"))
            here = tl.max(tl.max(v, 1), 0)
            column = tl.min(tl.min(tl.where((v == here) & (s >= floor), cols, NO_COLUMN), 1), 0)
            place = tl.where((here > best) | (place == NO_COLUMN), column, place)
            best = tl.maximum(best, here)
    return place


@triton.jit
def first_of(base, aux, places, base_floor, m, V, LANES: tl.constexpr):
    """The first column whose s is m."""
    place = tl.full([], NO_COLUMN, tl.int32)
    for at in range(0, V, LANES * WIDTH):
        cols = columns_at(at, LANES)
        s = allowed_sum(base, aux, places, base_floor, cols, V)
        place = tl.minimum(place, tl.min(tl.min(tl.where(s == m, cols, NO_COLUMN), 1), 0))
    return place


@triton.jit
def total_of(counts):
    return tl.sum(tl.sum(counts, 1), 0).to(tl.float64)


# -- a row -------------------------------------------------------------------------------------------------------------


@triton.jit
def is_fraction(p):
    return (p >= 0.0) & (p <= 1.0)


@triton.jit
def put_statistics(fields, row, base, aux, places, base_floor, m, largest, floor, T, place, V, LANES: tl.constexpr):
    """place: of a token; in a row that is no distribution this is written over."""
    is_greedy = T == 0.0
    divisor = tl.where(is_greedy, tl.full([], 1.0, tl.float64), T)
    inverse = tl.minimum(1.0 / divisor, LARGEST).to(tl.float32)
    token_z, token_s = summed(base, aux, places, place, V)
    all_sum = tl.zeros([LANES, WIDTH], tl.float32)
    kept_sum = tl.zeros([LANES, WIDTH], tl.float32)
    num_kept = tl.zeros([LANES, WIDTH], tl.int32)
    rank = tl.zeros([LANES, WIDTH], tl.int32)
    for at in range(0, V, LANES * WIDTH):
        cols = columns_at(at, LANES)
        z, s = summed(base, aux, places, cols, V)
        is_kept = (s >= floor) & (z >= base_floor)
        all_sum += exp32((s - largest) * inverse)
        kept_sum += tl.where(is_kept, exp32((s - m) * inverse), 0.0)
        num_kept += is_kept.to(tl.int32)
        rank += ((z > token_z) & (cols < V)).to(tl.int32)
    log_all = log64(total_of(all_sum))
    log_kept = log64(total_of(kept_sum))
    ahead, ahead_of_kept = (token_s.to(tl.float64) - largest.to(tl.float64)), token_s.to(tl.float64) - m.to(tl.float64)
    kept_log_prob = tl.where(is_greedy, 0.0, ahead_of_kept / divisor - log_kept)
    tl.store(fields.log_prob + row, (ahead / divisor - log_all).to(tl.float32))
    tl.store(fields.kept_log_prob + row, kept_log_prob.to(tl.float32))
    tl.store(fields.num_kept + row, tl.where(is_greedy, 1, tl.sum(tl.sum(num_kept, 1), 0)).to(tl.int64))
    tl.store(fields.base_rank + row, tl.sum(tl.sum(rank, 1), 0).to(tl.int64))


@triton.jit
def sample_kernel(base, aux, given, fields, first_row, V, VLLM: tl.constexpr, LANES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    base_ptr, base_scale = side_at(base, row)
    places = (base_ptr, base_scale)
    if aux is not None:
        places = places + side_at(aux, row)
    T = number(given.temperature, given.temperature_stride, row)
    is_valid = (T >= 0.0) & (float("inf") > T)
    base_floor = tl.full([], float("-inf"), tl.float32)
    if given.plausibility is not None:
        plausibility = number(given.plausibility, given.plausibility_stride, row)
        is_valid = is_valid & is_fraction(plausibility)
        if plausibility > 0.0:
            largest_z = tl.full([LANES, WIDTH], float("-inf"), tl.float32)
            for at in range(0, V, LANES * WIDTH):
                cols = columns_at(at, LANES)
                largest_z = tl.maximum(largest_z, side_values(base, base_ptr, base_scale, cols, V))
            base_floor = smallest_within(tl.max(tl.max(largest_z, 1), 0), log_of_probability(plausibility))

    # maxima: of what is allowed, and of all
    allowed_max = tl.full([LANES, WIDTH], float("-inf"), tl.float32)
    all_max = tl.full([LANES, WIDTH], float("-inf"), tl.float32)
    num_bad = tl.zeros([LANES, WIDTH], tl.int32)
    for at in range(0, V, LANES * WIDTH):
        z, s = summed(base, aux, places, columns_at(at, LANES), V)
        num_bad += (s < float("inf")).to(tl.int32) ^ 1
        all_max = tl.maximum(all_max, s)
        allowed_max = tl.maximum(allowed_max, tl.where(z >= base_floor, s, float("-inf")))
    m, largest = tl.max(tl.max(allowed_max, 1), 0), tl.max(tl.max(all_max, 1), 0)
    is_valid = is_valid & (tl.sum(tl.sum(num_bad, 1), 0) == 0) & (m > float("-inf"))

    floor = tl.full([], LOWEST, tl.float32)
    if given.top_k is not None:
        k = number(given.top_k, given.top_k_stride, row)
        is_valid = is_valid & (k >= 0)
    if given.min_p is not None:
        min_p = number(given.min_p, given.min_p_stride, row)
        is_valid = is_valid & is_fraction(min_p)
    if given.top_p is not None:
        top_p = number(given.top_p, given.top_p_stride, row)
        is_valid = is_valid & is_fraction(top_p)
    place = tl.full([], 0, tl.int32)
    if is_valid:
        if T == 0.0:
            floor = m
            place = first_of(base, aux, places, base_floor, m, V, LANES)
        else:
            wide = tl.minimum(tl.maximum(1.0 / T, SMALLEST_NORMAL), LARGEST)
            inverse = wide.to(tl.float32)
            shared = (base, aux, places, base_floor, m, inverse)
            if given.top_k is not None:  # noqa: SIM102 - known when it is compiled, which what follows is not
                if (k > 0) & (k < V):
                    floor = threshold(*shared, floor, k.to(tl.float64), V, False, LANES)
            min_p_floor = tl.full([], LOWEST, tl.float32)
            if given.min_p is not None:  # noqa: SIM102
                if min_p > 0.0:
                    min_p_floor = smallest_within(m, T * log_of_probability(min_p))
            if given.top_p is not None:  # noqa: SIM102
                if top_p < 1.0:
                    of_mass = tl.maximum(floor, min_p_floor) if VLLM else floor
                    weights = tl.zeros([LANES, WIDTH], tl.int64)
                    for at in range(0, V, LANES * WIDTH):
                        s = allowed_sum(base, aux, places, base_floor, columns_at(at, LANES), V)
                        weights += weight_of(s, m, inverse, of_mass)
                    limit = top_p * total_of(weights)
                    floor = tl.maximum(floor, threshold(*shared, of_mass, limit, V, True, LANES))
            floor = tl.minimum(tl.maximum(floor, min_p_floor), m)
            position = first_row + row
            if given.position is not None:
                position = number(given.position, given.position_stride, row)
            seed = number(given.seed, given.seed_stride, row)
            place = chosen(*shared, floor, T, seed, position, V, LANES)
    if fields.log_prob is not None:
        if is_valid:
            put_statistics(fields, row, base, aux, places, base_floor, m, largest, floor, T, place, V, LANES)
        else:
            tl.store(fields.log_prob + row, float("nan"))
            tl.store(fields.kept_log_prob + row, float("nan"))
            tl.store(fields.num_kept + row, 0)
            tl.store(fields.base_rank + row, -1)
    tl.store(fields.token + row, tl.where(is_valid, place, -1).to(tl.int64))
