// Elementwise sums of two dtypes, for weight gradients that come in pieces.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace auxk {

struct Elements {
  void* values = nullptr;
  DType dtype = DType::kFloat32;
};

// out = a + b, n elements each, added in float32 and rounded once; out may be a or b. No float64.
void add(const Elements& out, const Elements& a, const Elements& b, int64_t n, int threads);

}  // namespace auxk
