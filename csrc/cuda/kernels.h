// The compiled kernels, found by what a call needs. Each file of kernels is compiled by itself.
#pragma once

#include "cross_entropy.h"

namespace auxk {

// what a kernel can do, each including the one before
enum Mode {
  kPlain,       // loss, its gradient, and the fields that the same sums give
  kStatistics,  // all fields but the weighted sum
  kGeneral      // class weights, label smoothing, z-loss, scales, softcaps, any dtypes
};
enum Types { kBFloat16s, kFloat16s, kFloat32s, kAnyTypes, kWithDoubles };

using ForwardKernel = void (*)(cuda::Parameters);
using BackwardKernel = void (*)(cuda::BackwardParameters);
using RescaleKernel = void (*)(cuda::RescaleParameters);

// kAnyTypes and kWithDoubles come with kGeneral; float64 has no resident kernel, null.
ForwardKernel resident_kernel(Mode mode, Types types, const Cut& cut);
ForwardKernel reread_kernel(Mode mode, Types types, const Cut& cut);
BackwardKernel backward_kernel(Mode mode, Types types, int piece);  // of kPlain and kGeneral
RescaleKernel rescale_kernel(bool is_double, int piece);

}  // namespace auxk
