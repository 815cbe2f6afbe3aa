// softmax(scores / temperature) @ table and its gradients in one call each, for problems up to those of which a
// library's products are worth their calls. Everything is contiguous; sums are float32, whatever the matrices are, and
// rounded once; results below the normal numbers are 0.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace auxk {

struct SmallLookup {
  const void* scores = nullptr;          // [N, K]
  const void* table = nullptr;           // [K, D]
  DType scores_dtype = DType::kFloat32;  // of their gradient, too
  DType table_dtype = DType::kFloat32;   // of its gradient, of the mixture and of the mixture's gradient
  int64_t N = 0, K = 0, D = 0;
  float factor = 1;      // 1 / temperature
  float* max = nullptr;  // N numbers, written by the forward form; null: not wanted
  float* log_denom = nullptr;
  int threads = 1;
};

void small_lookup(const SmallLookup&, void* mixture);
// null: not wanted
void small_lookup_backward(const SmallLookup&, const void* grad, void* grad_scores, void* grad_table);

}  // namespace auxk
