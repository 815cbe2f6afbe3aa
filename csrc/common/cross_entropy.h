// What a call of cross-entropy is given, on CPU and on CUDA devices: pointers, sizes, strides in elements.
#pragma once

#include "dtype.h"
#include "names.h"

namespace auxk {

// row n starts at element (n / num_inner) * stride_outer + (n % num_inner) * stride_inner
struct Source {
  const void* values = nullptr;
  DType dtype = DType::kFloat32;
  int64_t width = 0;
  int64_t num_inner = 1, stride_outer = 0, stride_inner = 0;
  const void* scale = nullptr;  // compute dtype; null: scale_value
  double scale_value = 1;
  int64_t scale_stride = 0;  // 0: one for all rows, 1: one per row
  double softcap = 0;        // 0: none
};

// auxkernels.cross_entropy.request.FIELDS, where each is defined
#define AUXK_FIELDS(X)            \
  X(Max, max)                     \
  X(LogDenom, log_denom)          \
  X(Nll, nll)                     \
  X(MeanSum, mean_sum)            \
  X(MeanBase, mean_base)          \
  X(BaseMax, base_max)            \
  X(BaseLogDenom, base_log_denom) \
  X(BaseNll, base_nll)            \
  X(WeightedSum, weighted_sum)    \
  X(Lse, lse)                     \
  X(Entropy, entropy)             \
  X(KlToBase, kl_to_base)         \
  X(LogProb, log_prob)            \
  X(BaseLogProb, base_log_prob)   \
  X(Argmax, argmax)               \
  X(BaseArgmax, base_argmax)      \
  X(TargetRank, target_rank)
enum Field { AUXK_FIELDS(AUXK_ENUMERATOR) kNumFields };
constexpr int kNumFloatFields = kArgmax;
// auxkernels.cross_entropy.request.COEFFICIENTS, of its formula for the gradients
#define AUXK_COEFFICIENTS(X) X(A, A) X(C, C) X(D, D) X(Q, Q) X(G, G) X(S, S) X(Q_b, Q_b) X(B_b, B_b)
enum Coefficient { AUXK_COEFFICIENTS(AUXK_ENUMERATOR) kNumCoefficients };

struct Problem {
  Source base, aux;              // aux.values null: none
  const void* target = nullptr;  // null: none
  bool target_is_int32 = false;
  int64_t ignore_index = -100;
  const void* weight = nullptr;  // compute dtype, V entries; null: 1
  // CPU: the sources' sum at the target of each row, compute dtype, where it is known more exactly than as they are
  // stored; null: as they are stored
  const void* target_logit = nullptr;
  int64_t num_rows = 0, V = 0;
  int threads = 1;  // CPU
};

// Null pointers mean not wanted. Gradients are contiguous [num_rows, width], on CPU in their source's dtype.
struct Outputs {
  void* fields[kNumFields] = {};
  void* grad_base = nullptr;
  void* grad_aux = nullptr;
  void* grad_base_scale = nullptr;  // per row, compute dtype
  void* grad_aux_scale = nullptr;
  DType grad_base_dtype = DType::kFloat32, grad_aux_dtype = DType::kFloat32;
};

struct LossOptions {
  double label_smoothing = 0, z_loss = 0;
  bool mean = true;
  bool has_normalizer = false;
  double normalizer = 1;
};

// Row state and upstream coefficients of the backward form, each null or num_rows numbers of the compute dtype.
struct BackwardInputs {
  const void* max = nullptr;
  const void* log_denom = nullptr;
  const void* nll = nullptr;
  const void* base_max = nullptr;
  const void* base_log_denom = nullptr;
  const void* coefficients[kNumCoefficients] = {};
};

}  // namespace auxk
