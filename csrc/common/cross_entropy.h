// What a call of cross-entropy is given, on CPU and on CUDA devices: pointers, sizes, strides in elements.
#pragma once

#include "dtype.h"

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

// the order of auxkernels.cross_entropy.ops.FIELDS
enum Field {
  kMax,
  kLogDenom,
  kNll,
  kMeanSum,
  kMeanBase,
  kBaseMax,
  kBaseLogDenom,
  kBaseNll,
  kWeightedSum,
  kLse,
  kEntropy,
  kKlToBase,
  kLogProb,
  kBaseLogProb,
  kArgmax,
  kBaseArgmax,
  kNumFields
};
constexpr int kNumFloatFields = kArgmax;
// the order of auxkernels.cross_entropy.ops.COEFFICIENTS
enum Coefficient { kA, kC, kD, kQ, kG, kS, kQ_b, kB_b, kNumCoefficients };

struct Problem {
  Source base, aux;              // aux.values null: none
  const void* target = nullptr;  // null: none
  bool target_is_int32 = false;
  int64_t ignore_index = -100;
  const void* weight = nullptr;  // compute dtype, V entries; null: 1
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
