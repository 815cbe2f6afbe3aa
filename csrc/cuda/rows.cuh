// What all kernels over rows do alike: targets, the divisor, gradients by coefficients.
#pragma once

#include "columns.cuh"

namespace auxk {

struct RowTarget {
  int y;                         // -1: none
  bool is_ignored, is_poisoned;  // poisoned: a target that names no class
};

// A row's target as it is stored. Whoever compares it waits for memory: it is asked for a row ahead, and looked at when
// its row's turn has come. Two widths, because choosing between them would look at it.
struct StoredTarget {
  int32_t narrow = 0;
  int64_t wide = 0;

  StoredTarget() = default;
  AUXK_DEVICE StoredTarget(const Problem& p, int64_t n) {
    if (p.target == nullptr) return;
    if (p.target_is_int32)
      narrow = static_cast<const int32_t*>(p.target)[n];
    else
      wide = static_cast<const int64_t*>(p.target)[n];
  }
  AUXK_DEVICE int64_t value(const Problem& p) const { return p.target_is_int32 ? narrow : wide; }
};

AUXK_DEVICE RowTarget target_of(const Problem& p, const StoredTarget& stored) {
  if (p.target == nullptr) return {-1, false, false};
  const int64_t y = stored.value(p);
  const bool in_range = static_cast<uint64_t>(y) < static_cast<uint64_t>(p.V);
  const bool is_ignored = y == p.ignore_index;
  return {in_range ? static_cast<int>(y) : -1, is_ignored, !in_range && !is_ignored};
}

AUXK_DEVICE RowTarget target_of(const Problem& p, int64_t n) { return target_of(p, StoredTarget(p, n)); }

template <class C>
AUXK_DEVICE C weight_of(const Problem& p, int64_t column) {
  return p.weight == nullptr ? C(1) : static_cast<const C*>(p.weight)[column];
}

// Over the first `cut.threads` threads of a block, which all call it: in an order that depends on their number alone.
AUXK_DEVICE double sum_of_group(double value, double* shared, const Cut& cut) {
  value = sum_over(value, hw::kWarp);
  hw::sync_group(cut.threads);  // earlier readers of `shared`
  if (hw::thread() % hw::kWarp == 0) shared[hw::thread() / hw::kWarp] = value;
  hw::sync_group(cut.threads);
  double total = 0;
  for (int i = 0; i < cut.threads / hw::kWarp; ++i) total += shared[i];
  return total;
}

// value(n) summed over all rows; values of eight rows are asked for before the first is waited for.
template <class Value>
AUXK_DEVICE double sum_over_rows(int64_t num_rows, double* shared, const Cut& cut, const Value& value) {
  constexpr int kAtOnce = 8;
  double sum = 0;
  for (int64_t first = hw::thread(); first < num_rows; first += kAtOnce * cut.threads) {
    double values[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t n = first + int64_t{i} * cut.threads;
      values[i] = n < num_rows ? value(n) : 0.0;
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) sum += values[i];
  }
  return sum_of_group(sum, shared, cut);
}

// the number of rows that count, or the sum of their targets' weights
template <class C>
AUXK_DEVICE double kept_rows(const Problem& p, double* shared, const Cut& cut) {
  return sum_over_rows(p.num_rows, shared, cut, [&](int64_t n) {
    const int64_t y = StoredTarget(p, n).value(p);
    if (p.weight == nullptr) return y == p.ignore_index ? 0.0 : 1.0;
    const bool is_class = static_cast<uint64_t>(y) < static_cast<uint64_t>(p.V) && y != p.ignore_index;
    return is_class ? static_cast<double>(static_cast<const C*>(p.weight)[y]) : 0.0;
  });
}

template <class C>
AUXK_DEVICE double divisor_of(const Problem& p, const cuda::LossTerms& terms, double* shared, const Cut& cut) {
  switch (terms.divisor) {
    case cuda::kByNumber:
      return terms.number;
    case cuda::kByTensor:
      return *terms.tensor;
    case cuda::kByKeptRows:
      return kept_rows<C>(p, shared, cut);
    default:
      return 1;
  }
}

// -- gradients --------------------------------------------------------------------------------------------------------

// What a row's gradient is made of, see request.py; p = exp(s - max - log_denom) * p_factor.
template <class C>
struct RowGradient {
  C max = 0, log_denom = 0, p_factor = 1;
  C A = 0, C_ = 0, D = 0, Q = 0, G = 0, S = 0, Q_b = 0, B_b = 0;
  C residual = 0;  // 1 - p of the target
  C base_max = 0, base_log_denom = 0;
};

// The row's gradients of the values: null where not wanted.
struct GradientRows {
  RowOf base, aux;
  bool is_wide;
};

template <class K>
AUXK_DEVICE GradientRows gradient_rows(const Problem& p, const Outputs& out, int64_t n) {
  const RowOf base = gradient_row(out.grad_base, out.grad_base_dtype, p.base, n);
  const RowOf aux = gradient_row(out.grad_aux, out.grad_aux_dtype, p.aux, n);
  return {base, aux, has_pieces<K::kBase, K::kPiece>(base) && has_pieces<K::kAux, K::kPiece>(aux)};  // of null: true
}

template <class C>
struct ScaleSums {
  C base = 0, aux = 0;
};

// The gradient of eight columns with respect to the sum: p (A + G), and at the target A p - G (1 - p).
template <class C>
AUXK_DEVICE void plain_gradient(const RowGradient<C>& k, C (&s)[kColumns]) {
  const C factor = k.p_factor * (k.A + k.G);
#pragma unroll
  for (int i = 0; i < kColumns; ++i) s[i] = factor * exp_of(s[i] - k.max);
}

// One column of the general form: ds, and what the base's gets on top.
template <class C>
AUXK_DEVICE C general_gradient(const RowGradient<C>& k, C s, C z, C w, bool is_target, C* extra) {
  const C x = s - k.max, p = exp_of(x - k.log_denom) * k.p_factor;
  C dz = is_target ? -k.G * k.residual : k.G * p;
  dz += k.A * p + k.S * w;
  *extra = is_target ? k.B_b : C(0);
  if (k.C_ != C(0)) dz += k.C_ * p * finite(x);
  if (k.D != C(0) || k.Q != C(0) || k.Q_b != C(0)) {
    const C z_relative = z - k.base_max, q = exp_of(z_relative - k.base_log_denom);
    if (k.D != C(0)) dz += k.D * p * finite(z_relative), *extra += k.D * p;
    if (k.Q != C(0)) dz += k.Q * q;
    if (k.Q_b != C(0)) *extra += k.Q_b * q;
  }
  return dz;
}

// Writes eight columns' gradients. v_base, v_aux: the sources' values; y: the target's column from the tile's first on.
template <class C, int kMode, class K>
AUXK_DEVICE void write_gradient(const Problem& p, const Lane<K::kPiece>& lane, const Tile& tile, int y,
                                const RowGradient<C>& k, const Transform<C>& base_transform,
                                const Transform<C>& aux_transform, const GradientRows& grads, C (&v_base)[kColumns],
                                C (&v_aux)[kColumns], ScaleSums<C>* scale_sums) {
  if constexpr (kMode != kGeneral) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) v_base[i] += v_aux[i];
    const bool has_target = static_cast<uint32_t>(y) < static_cast<uint32_t>(tile.num);
    C at_target = 0;
    if (has_target) {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        if (lane.column(i) == y) at_target = k.A * k.p_factor * exp_of(v_base[i] - k.max) - k.G * k.residual;
      }
    }
    plain_gradient(k, v_base);
    if (has_target) {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) v_base[i] = lane.column(i) == y ? at_target : v_base[i];
    }
    if (grads.base.first != nullptr) store_gradient<C, K, K::kBase>(grads.base, tile, grads.is_wide, lane, v_base);
    if (grads.aux.first != nullptr) store_gradient<C, K, K::kAux>(grads.aux, tile, grads.is_wide, lane, v_base);
  } else {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const int column = lane.column(i);
      C capped_base, capped_aux, slope_base, slope_aux, extra;
      const C z = base_transform(v_base[i], &capped_base, &slope_base);
      const C s = z + aux_transform(v_aux[i], &capped_aux, &slope_aux);
      const C w = k.S != C(0) && column < tile.num ? weight_of<C>(p, tile.first + column) : C(0);
      const C dz = general_gradient(k, s, z, w, column == y, &extra);
      if (column < tile.num) {
        // a masked class, 0 * (-inf), counts nothing
        scale_sums->base += (dz + extra) * finite(capped_base);
        scale_sums->aux += dz * finite(capped_aux);
      }
      v_base[i] = (dz + extra) * base_transform.scale * slope_base;
      v_aux[i] = dz * aux_transform.scale * slope_aux;
    }
    if (grads.base.first != nullptr) store_gradient<C, K, K::kBase>(grads.base, tile, grads.is_wide, lane, v_base);
    if (grads.aux.first != nullptr) store_gradient<C, K, K::kAux>(grads.aux, tile, grads.is_wide, lane, v_aux);
  }
}

}  // namespace auxk
