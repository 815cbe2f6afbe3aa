// Arithmetic of one row: its state while columns are scanned, the one merge of many states, and the numbers that losses
// and gradients are made of. The mathematics is in auxkernels/cross_entropy/request.py.
//
// Lanes each have a running maximum of their own, so that the loop over columns has no reduction across threads. States
// are merged all at once: the largest maximum first, which is exact in any order, then sums in a tree of fixed shape.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "common/row_numbers.h"
#include "hardware.cuh"
#include "kernels.h"

#define AUXK_DEVICE __device__ __forceinline__

namespace auxk {

constexpr int kColumns = 8;  // of a lane in a tile

template <class C>
struct Limit {
  static constexpr C kInf = std::numeric_limits<C>::infinity();
  static constexpr C kNaN = std::numeric_limits<C>::quiet_NaN();
  static constexpr C kLargest = std::numeric_limits<C>::max();
};

// The largest of some columns as torch.argmax sees them: NaN above all, then the value, then the lower column.
constexpr int kNowhere = std::numeric_limits<int>::max();
template <class C>
struct Best {
  C value = -Limit<C>::kInf;
  int column = kNowhere;  // also where every column is -inf
};

// Sums over some columns v, relative to r = max and r_b = base_max (0 while these are -inf).
template <class C>
struct PlainState {
  C max = -Limit<C>::kInf;  // of s
  C denom = 0;              // sum exp(s - r)
};
template <class C>
struct FullState : PlainState<C> {
  C mean_sum = 0;   // sum exp(s - r) (s - r)
  C mean_base = 0;  // sum exp(s - r) (z_b - r_b)
  C base_max = -Limit<C>::kInf;
  C base_denom = 0;    // sum exp(z_b - r_b)
  C weighted_sum = 0;  // sum w (s - r)
  C weight = 0;        // sum w
  Best<C> argmax;      // of s, and of z_b
  Best<C> base_argmax;
  int num_above = 0;  // how many s are greater than the target's
};
template <class C, int kMode>
using State = std::conditional_t<kMode == kPlain, PlainState<C>, FullState<C>>;

// -- scalar functions -------------------------------------------------------------------------------------------------

AUXK_DEVICE float exp_of(float x) { return hw::exp2_approximate(x * 1.4426950408889634f); }
AUXK_DEVICE double exp_of(double x) { return exp(x); }

// a row may hold whole blocks of -inf (masked classes): subtracting their maximum would make NaN of exp(-inf + inf)
template <class C>
AUXK_DEVICE C finite_or_zero(C m) {
  return m == -Limit<C>::kInf ? C(0) : m;
}

// Infinities as the largest numbers: 0 times these is 0. NaN is lost, so the other factor must have it.
template <class C>
AUXK_DEVICE C finite(C x) {
  return fmin(fmax(x, -Limit<C>::kLargest), Limit<C>::kLargest);
}

// 1 - exp(-x), to full relative accuracy also for x near 0
template <class C>
AUXK_DEVICE C one_minus_exp(C x) {
  return -expm1(-x);
}

// cap * tanh(z / cap) and its derivative
template <class C>
AUXK_DEVICE C soft_cap(C z, C cap, C* slope) {
  const C x = z / cap;
  const C e = exp_of(C(-2) * fabs(x)), r = C(1) / (C(1) + e);
  *slope = C(4) * e * r * r;
  return cap * tanh(x);
}

// -- argmax -----------------------------------------------------------------------------------------------------------

template <class C>
AUXK_DEVICE Best<C> better(const Best<C>& a, const Best<C>& b) {
  const bool a_is_nan = a.value != a.value, b_is_nan = b.value != b.value;
  const bool is_tie = a_is_nan ? b_is_nan : a.value == b.value;
  const bool takes_b = is_tie ? b.column < a.column : b_is_nan || b.value > a.value;
  return takes_b ? b : a;
}

template <class C>
AUXK_DEVICE Best<C> better_column(const Best<C>& best, C value, int column) {
  // a column of -inf is nowhere: where all are, the argmax is column 0, which one lane alone cannot know
  return value == -Limit<C>::kInf ? best : better(best, Best<C>{value, column});
}

// -- states -----------------------------------------------------------------------------------------------------------

template <class C>
AUXK_DEVICE C sum_of(const C (&x)[kColumns]) {
  return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
}
template <class C>
AUXK_DEVICE C max_of(const C (&x)[kColumns]) {
  return fmax(fmax(fmax(x[0], x[1]), fmax(x[2], x[3])), fmax(fmax(x[4], x[5]), fmax(x[6], x[7])));
}

// The same sums relative to other, not smaller, maxima.
template <class C>
AUXK_DEVICE void rebase(PlainState<C>& a, C new_max) {
  a.denom *= exp_of(a.max - finite_or_zero(new_max));
  a.max = new_max;
}
template <class C>
AUXK_DEVICE void rebase(FullState<C>& a, C new_max, C new_base_max) {
  const C ref = finite_or_zero(new_max), shift = finite_or_zero(a.max) - ref, factor = exp_of(a.max - ref);
  const C base_ref = finite_or_zero(new_base_max), base_shift = finite_or_zero(a.base_max) - base_ref;
  // what has underflowed to nothing stays nothing: the shift may be infinite there
  a.mean_sum = factor == 0 ? C(0) : factor * (a.mean_sum + shift * a.denom);
  a.mean_base = factor == 0 ? C(0) : factor * (a.mean_base + base_shift * a.denom);
  a.denom *= factor;
  a.base_denom *= exp_of(a.base_max - base_ref);
  a.weighted_sum += shift * a.weight;
  a.max = new_max, a.base_max = new_base_max;
}

// Eight columns of a row, ascending: column(i) of s[i], z[i] (the base's part) and w[i] (its class weight). What is not
// to be counted (no column of the row, or the target's) has s = z = -inf and its bit of `counted` cleared.
template <class C>
struct Columns {
  C s[kColumns], z[kColumns], w[kColumns];
  uint32_t counted;
  C target;  // the target's s, if its rank is wanted; otherwise what is counted has no meaning
};

template <class C, class ColumnOf>
AUXK_DEVICE void absorb(PlainState<C>& a, Columns<C>& x, bool, const ColumnOf&) {
  rebase(a, fmax(a.max, max_of(x.s)));
  const C ref = finite_or_zero(a.max);
#pragma unroll
  for (int i = 0; i < kColumns; ++i) x.s[i] = exp_of(x.s[i] - ref);
  a.denom += sum_of(x.s);
}

template <class C, class ColumnOf>
AUXK_DEVICE void absorb(FullState<C>& a, Columns<C>& x, bool is_weighted, const ColumnOf& column) {
  const C old_max = a.max, old_base_max = a.base_max;
#pragma unroll
  for (int i = 0; i < kColumns; ++i) a.num_above += x.s[i] > x.target ? 1 : 0;
  rebase(a, fmax(a.max, max_of(x.s)), fmax(a.base_max, max_of(x.z)));
  const C ref = finite_or_zero(a.max), base_ref = finite_or_zero(a.base_max);
  C e[kColumns], moments[kColumns];
#pragma unroll
  for (int i = 0; i < kColumns; ++i) e[i] = exp_of(x.s[i] - ref);
  const C sum = sum_of(e);
  a.denom += sum;
  // looked at column by column only where there is something new: a larger value, or no number
  if (a.max != old_max || sum != sum) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) a.argmax = better_column(a.argmax, x.s[i], column(i));
  }
#pragma unroll
  for (int i = 0; i < kColumns; ++i) moments[i] = e[i] * finite(x.s[i] - ref);
  a.mean_sum += sum_of(moments);
#pragma unroll
  for (int i = 0; i < kColumns; ++i) moments[i] = e[i] * finite(x.z[i] - base_ref);
  a.mean_base += sum_of(moments);
  if (is_weighted) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const bool is_counted = (x.counted >> i & 1u) != 0;
      moments[i] = is_counted ? x.w[i] * (x.s[i] - ref) : C(0);
      x.w[i] = is_counted ? x.w[i] : C(0);
    }
    a.weighted_sum += sum_of(moments);
    a.weight += sum_of(x.w);
  }
#pragma unroll
  for (int i = 0; i < kColumns; ++i) e[i] = exp_of(x.z[i] - base_ref);
  const C base_sum = sum_of(e);
  a.base_denom += base_sum;
  if (a.base_max != old_base_max || base_sum != base_sum) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) a.base_argmax = better_column(a.base_argmax, x.z[i], column(i));
  }
}

template <class T>
AUXK_DEVICE T sum_over(T value, int lanes) {
  for (int mask = lanes / 2; mask > 0; mask /= 2) value += hw::shuffle_xor(value, mask);
  return value;
}
template <class C>
AUXK_DEVICE Best<C> best_over(Best<C> best, int lanes) {
  for (int mask = lanes / 2; mask > 0; mask /= 2)
    best = better(best, Best<C>{hw::shuffle_xor(best.value, mask), hw::shuffle_xor(best.column, mask)});
  return best;
}

// One state of those of a warp's lanes, all 32, or 16 in which case the others have the same states or none; every lane
// gets it.
template <class C>
AUXK_DEVICE PlainState<C> merged(PlainState<C> a, int lanes) {
  rebase(a, hw::max_of_warp(a.max));
  a.denom = sum_over(a.denom, lanes);
  return a;
}
template <class C>
AUXK_DEVICE FullState<C> merged(FullState<C> a, int lanes) {
  rebase(a, hw::max_of_warp(a.max), hw::max_of_warp(a.base_max));
  a.denom = sum_over(a.denom, lanes);
  a.mean_sum = sum_over(a.mean_sum, lanes);
  a.mean_base = sum_over(a.mean_base, lanes);
  a.base_denom = sum_over(a.base_denom, lanes);
  a.weighted_sum = sum_over(a.weighted_sum, lanes);
  a.weight = sum_over(a.weight, lanes);
  a.argmax = best_over(a.argmax, lanes);
  a.base_argmax = best_over(a.base_argmax, lanes);
  a.num_above = sum_over(a.num_above, lanes);
  return a;
}

// -- the end of a row, where the target joins -------------------------------------------------------------------------

// The target's column; without a target, no column.
template <class C>
struct Target {
  C s = -Limit<C>::kInf, z = -Limit<C>::kInf, weight = 0;
  int column = kNowhere;

  AUXK_DEVICE bool exists() const { return column != kNowhere; }
};

// A row of -inf alone has no distribution; a running maximum steps over NaN, a sum does not.
template <class C>
AUXK_DEVICE void check(C* max, C* denom) {
  if (*max == -Limit<C>::kInf) *denom = Limit<C>::kNaN;
  if (*denom != *denom && fabs(*max) != Limit<C>::kInf) *max = Limit<C>::kNaN;
}

// The same with the target's column. `rest` receives exp(s - max) summed without it, from which neither the loss of a
// confident row nor the gradient at its target cancels.
template <class C>
AUXK_DEVICE void join(PlainState<C>& a, const Target<C>& y, C* rest) {
  rebase(a, fmax(a.max, y.s));
  *rest = a.denom;
  a.denom += exp_of(y.s - finite_or_zero(a.max));
  check(&a.max, &a.denom);
}
template <class C>
AUXK_DEVICE void join(FullState<C>& a, const Target<C>& y, C* rest, C* base_rest) {
  rebase(a, fmax(a.max, y.s), fmax(a.base_max, y.z));
  const C s = y.s - finite_or_zero(a.max), z = y.z - finite_or_zero(a.base_max), e = exp_of(s);
  *rest = a.denom, *base_rest = a.base_denom;
  a.denom += e;
  a.base_denom += exp_of(z);
  if (y.exists()) {
    a.mean_sum += e * finite(s);
    a.mean_base += e * finite(z);
    a.weighted_sum += y.weight * s;
    a.weight += y.weight;
    a.argmax = better_column(a.argmax, y.s, y.column);
    a.base_argmax = better_column(a.base_argmax, y.z, y.column);
  }
  check(&a.max, &a.denom);
  check(&a.base_max, &a.base_denom);
}

// -log p of the target from the sums without it and with it
template <class C>
AUXK_DEVICE C nll_of_logit(C logit, C max, C rest, C denom) {
  return nll_of(logit - max, exp_of(logit - finite_or_zero(max)), rest, denom);
}

}  // namespace auxk
