// Gradients of rows from their saved state and one number per row for each coefficient; and gradients times a number.
#pragma once

#include "rows.cuh"

namespace auxk {

template <class C>
AUXK_DEVICE C number_at(const void* values, int64_t n) {
  return values == nullptr ? C(0) : static_cast<const C*>(values)[n];
}

template <class C>
AUXK_DEVICE RowGradient<C> gradient_of_row(const BackwardInputs& in, int64_t n, bool is_poisoned) {
  RowGradient<C> k;
  k.max = number_at<C>(in.max, n);
  k.log_denom = number_at<C>(in.log_denom, n);
  k.base_max = number_at<C>(in.base_max, n);
  k.base_log_denom = number_at<C>(in.base_log_denom, n);
  k.A = is_poisoned ? Limit<C>::kNaN : number_at<C>(in.coefficients[kA], n);
  k.C_ = number_at<C>(in.coefficients[kC], n);
  k.D = number_at<C>(in.coefficients[kD], n);
  k.Q = number_at<C>(in.coefficients[kQ], n);
  k.G = number_at<C>(in.coefficients[kG], n);
  k.S = number_at<C>(in.coefficients[kS], n);
  k.Q_b = number_at<C>(in.coefficients[kQ_b], n);
  k.B_b = number_at<C>(in.coefficients[kB_b], n);
  if (k.G != C(0)) k.residual = one_minus_exp(number_at<C>(in.nll, n));
  return k;
}

// A block takes one segment of a row; a whole row where a scale's gradient, a sum over the row, is wanted.
template <class C, int kMode, class K>
__global__ void __launch_bounds__(kBackwardThreads, sizeof(C) == 8  ? 1
                                                    : K::kPiece > 1 ? 3
                                                                    : 2)
    cross_entropy_backward_kernel(const __grid_constant__ cuda::BackwardParameters p) {
  const Problem& problem = p.problem;
  const Cut& cut = p.cut;
  const bool sums_row = p.out.grad_base_scale != nullptr || p.out.grad_aux_scale != nullptr;
  const int num_parts = sums_row ? 1 : cut.num_segments, segments = sums_row ? cut.num_segments : 1;
  const Lane<K::kPiece> lane(cut, hw::thread());
  const bool has_aux = problem.aux.values != nullptr;
  for (int64_t unit = hw::block(); unit < problem.num_rows * num_parts; unit += hw::num_blocks()) {
    const int64_t n = unit / num_parts;
    const int first_segment = static_cast<int>(unit % num_parts);
    const RowTarget at = target_of(problem, n);
    const GradientRows grads = gradient_rows<K>(problem, p.out, n);
    const bool is_last_part = first_segment == num_parts - 1;
    if (at.is_ignored) {
      const int64_t start = int64_t{first_segment} * cut.segment, stop = start + int64_t{segments} * cut.segment;
      const auto end = [&](const Source& source) { return is_last_part || stop > source.width ? source.width : stop; };
      if (start < end(problem.base)) fill_zero(grads.base, start, end(problem.base), hw::thread(), cut.threads);
      if (has_aux && start < end(problem.aux)) fill_zero(grads.aux, start, end(problem.aux), hw::thread(), cut.threads);
      for (void* grad : {p.out.grad_base_scale, p.out.grad_aux_scale})
        if (grad != nullptr && hw::thread() == 0) static_cast<C*>(grad)[n] = C(0);
      continue;
    }
    const SourceRows rows = source_rows<K>(problem, n);
    Transform<C> base_transform, aux_transform;
    if constexpr (kMode == kGeneral) {
      base_transform = transform_of<C>(problem.base, n);
      if (has_aux) aux_transform = transform_of<C>(problem.aux, n);
    }
    RowGradient<C> k = gradient_of_row<C>(p.in, n, at.is_poisoned);
    if constexpr (kMode != kGeneral) k.p_factor = exp_of(-k.log_denom);
    ScaleSums<C> scale_sums;
    for (int segment = first_segment; segment < first_segment + segments; ++segment) {
      for (int i = 0; i < cut.num_tiles; ++i) {
        const Tile tile(problem, cut, segment, i);
        if (lane.first >= tile.num) continue;
        C v_base[kColumns], v_aux[kColumns];
        const char* aux_tile = rows.has_aux ? rows.aux.at(tile.first) : nullptr;
        load_sources<C, K, kGlobalLast>(rows.base.at(tile.first), aux_tile, rows, static_cast<int>(problem.V), lane,
                                        tile.num, v_base, v_aux);
        const int y = (at.y < 0 ? kNowhere : at.y) - tile.first;
        write_gradient<C, kMode, K>(problem, lane, tile, y, k, base_transform, aux_transform, grads, v_base, v_aux,
                                    &scale_sums);
      }
    }
    if constexpr (kMode == kGeneral) {
      for (int i = 0; i < 2; ++i) {
        void* grad = i == 0 ? p.out.grad_base_scale : p.out.grad_aux_scale;
        if (grad == nullptr) continue;
        auto* shared = reinterpret_cast<double*>(hw::shared_memory());
        const double sum = sum_of_group(static_cast<double>(i == 0 ? scale_sums.base : scale_sums.aux), shared, cut);
        if (hw::thread() == 0) static_cast<C*>(grad)[n] = static_cast<C>(sum);
      }
    }
    if (is_last_part) {  // columns from V on belong to nobody
      fill_zero(grads.base, problem.V, problem.base.width, hw::thread(), cut.threads);
      fill_zero(grads.aux, problem.V, problem.aux.width, hw::thread(), cut.threads);
    }
  }
}

// -- rescale ----------------------------------------------------------------------------------------------------------

// grad *= factor on the rows that count: 0 * -1 is -0.0 and 0 * inf NaN, which ignored rows must not become.
template <class C, int kPiece>
__global__ void __launch_bounds__(kRescaleThreads)
    cross_entropy_rescale_kernel(const __grid_constant__ cuda::RescaleParameters p) {
  const C factor = element<C, kAny>(static_cast<const char*>(p.factor), p.factor_dtype);
  if (factor == C(1)) return;
  const int64_t width = p.problem.V, parts = (width + kRescaleColumns - 1) / kRescaleColumns;
  Cut cut = {};
  cut.threads = cut.lanes = kRescaleThreads;
  const Lane<kPiece> lane(cut, hw::thread());
  for (int64_t unit = hw::block(); unit < p.problem.num_rows * parts; unit += hw::num_blocks()) {
    const int64_t n = unit / parts, first = unit % parts * kRescaleColumns;
    if (target_of(p.problem, n).is_ignored) continue;
    const int64_t left = width - first;
    const int num = static_cast<int>(left < kRescaleColumns ? left : kRescaleColumns);
    const RowOf row = {static_cast<char*>(p.grad) + n * width * bytes_of(p.dtype), p.dtype};
    if (lane.first >= num) continue;
    const bool is_wide = has_pieces<kAny, kPiece>(row);
    C x[kColumns];
    char* tile = row.at(first);
    load_columns<C, kAny, kPiece, kGlobalLast>(tile, p.dtype, is_wide, lane, num, x);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) x[i] *= factor;
    store_columns<C, kAny, kPiece>(tile, p.dtype, is_wide, lane, num, x);
  }
}

}  // namespace auxk
