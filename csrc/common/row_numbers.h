// What one row's sums become: its fields and its loss, by the same operations in the same order for the CPU's kernels,
// which work in double, and for the CUDA kernels. The mathematics is in auxkernels/cross_entropy/request.py.
#pragma once

#include <math.h>  // outside of std for float, too, as nvcc has them

#include "cross_entropy.h"

#ifdef __CUDACC__
#define AUXK_ROW_FUNCTION __device__ __forceinline__
#else
#define AUXK_ROW_FUNCTION inline
#endif

namespace auxk {

// -log p of the target: log(denom) - relative, which for a confident row would be the difference of two nearly equal
// numbers. relative: the target's logit less the maximum; e: exp(relative); rest: the denominator without it.
template <class T>
AUXK_ROW_FUNCTION T nll_of(T relative, T e, T rest, T denom) {
  return e > rest ? log1p(rest / e) : log(denom) - relative;
}

// Which fields the sums of a loss alone give, which need its moments too, and which the base's own sums.
constexpr bool is_plain(Field f) { return f == kMax || f == kLogDenom || f == kNll || f == kLse || f == kLogProb; }
constexpr bool is_of_moments(Field f) { return f == kMeanSum || f == kMeanBase || f == kEntropy || f == kKlToBase; }
constexpr bool is_of_base(Field f) {
  return f == kMeanBase || f == kBaseMax || f == kBaseLogDenom || f == kBaseNll || f == kKlToBase ||
         f == kBaseLogProb || f == kBaseArgmax;
}

// The fields of one row, but the argmaxes; what is not known is 0.
template <class T>
struct RowNumbers {
  T max = 0, log_denom = 0, nll = 0;
  T mean_sum = 0, mean_base = 0, base_max = 0, base_log_denom = 0, base_nll = 0, weighted_sum = 0;

  AUXK_ROW_FUNCTION T lse() const { return max + log_denom; }
  AUXK_ROW_FUNCTION T entropy() const { return log_denom - mean_sum; }
  AUXK_ROW_FUNCTION T kl_to_base() const { return (mean_sum - mean_base) + (base_log_denom - log_denom); }
  AUXK_ROW_FUNCTION T log_prob() const { return T(0) - nll; }
  AUXK_ROW_FUNCTION T base_log_prob() const { return T(0) - base_nll; }

  // put(field, value) for those that are plain, and for the others
  template <class Put>
  AUXK_ROW_FUNCTION void put_plain(const Put& put) const {
    put(kMax, max);
    put(kLogDenom, log_denom);
    put(kNll, nll);
    put(kLse, lse());
    put(kLogProb, log_prob());
  }
  template <class Put>
  AUXK_ROW_FUNCTION void put_statistics(const Put& put) const {
    put(kMeanSum, mean_sum);
    put(kMeanBase, mean_base);
    put(kBaseMax, base_max);
    put(kBaseLogDenom, base_log_denom);
    put(kBaseNll, base_nll);
    put(kWeightedSum, weighted_sum);
    put(kEntropy, entropy());
    put(kKlToBase, kl_to_base());
    put(kBaseLogProb, base_log_prob());
  }
};

// One row's share of the loss, before the divisor: kept w_y nll + share sum_v w_v (lse - s_v) + z_loss lse^2.
template <class T>
struct RowLoss {
  T kept = 1, share = 0, z_loss = 0;  // 1 - label_smoothing, label_smoothing / V

  // of_target: the first term, as a caller multiplies its three factors
  AUXK_ROW_FUNCTION T value(T of_target, T sum_of_weights, const RowNumbers<T>& row) const {
    T loss = of_target;
    if (share != 0) loss += share * (sum_of_weights * row.log_denom - row.weighted_sum);
    if (z_loss != 0) loss += z_loss * row.lse() * row.lse();
    return loss;
  }

  // The coefficients of its gradient, see request.py. A is the sum of its parts over the divisor, by which the CPU
  // divides the sum and the CUDA kernels each part.
  AUXK_ROW_FUNCTION T G(T weight, T divisor) const { return kept * weight / divisor; }
  AUXK_ROW_FUNCTION T S(T divisor) const { return -share / divisor; }
  AUXK_ROW_FUNCTION T A_of_smoothing(T sum_of_weights) const { return share * sum_of_weights; }
  AUXK_ROW_FUNCTION T A_of_z_loss(T lse) const { return 2 * z_loss * lse; }
};

inline RowLoss<double> row_loss_of(double label_smoothing, double z_loss, int64_t V) {
  return {1 - label_smoothing, label_smoothing / static_cast<double>(V), z_loss};
}

}  // namespace auxk
