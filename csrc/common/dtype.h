// The element types that tensors come in.
#pragma once

#include <cstdint>

namespace auxk {

// the codes of auxkernels.native.DTYPE_CODES
enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };
constexpr int64_t size_of(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

}  // namespace auxk
