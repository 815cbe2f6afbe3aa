// Tokens from summed logits on CPU. The mathematics is in auxkernels/sampling/request.py.
#pragma once

#include <cstdint>
#include <vector>

#include "common/cross_entropy.h"

namespace auxk {

// one number for all rows, or one for each
template <class T>
struct RowParameter {
  const T* values = nullptr;  // null: value
  T value = 0;
  int64_t stride = 0;  // 0: one for all rows, 1: one per row
  T of(int64_t n) const { return values == nullptr ? value : values[n * stride]; }
};

struct SampleProblem {
  std::vector<Source> base, aux;
  int64_t num_rows = 0, V = 0;
  RowParameter<double> temperature, top_p, min_p, plausibility;
  RowParameter<int64_t> top_k, seed, position;
  bool has_position = false;  // else the row's number, from first_row on
  int64_t first_row = 0;
  bool mass_after_min_p = false;  // the order of vllm
  int threads = 1;
};

// one number per row each; all but the token null: not wanted
struct SampleFields {
  int64_t* token = nullptr;
  void* log_prob = nullptr;  // compute dtype
  void* kept_log_prob = nullptr;
  int64_t* num_kept = nullptr;
  int64_t* base_rank = nullptr;
};

// C: float, or double if a source is float64
template <class C>
void sample(const SampleProblem&, const SampleFields&);

}  // namespace auxk
