// softmax(scores / temperature) @ table and its gradients in one call each: for problems so small that a library's
// product costs more in calls than in work. Everything is float32 and contiguous; results below the normal numbers are 0.
#pragma once

#include <cstdint>

namespace auxk {

struct SmallLookup {
  const float* scores = nullptr;  // [N, K]
  const float* table = nullptr;   // [K, D]
  int64_t N = 0, K = 0, D = 0;
  float factor = 1;      // 1 / temperature
  float* max = nullptr;  // N numbers: written by the forward form, null if not wanted; read by the backward form
  float* log_denom = nullptr;
  int threads = 1;
};

void small_lookup(const SmallLookup&, float* mixture);
// null: not wanted
void small_lookup_backward(const SmallLookup&, const float* grad, float* grad_scores, float* grad_table);

}  // namespace auxk
