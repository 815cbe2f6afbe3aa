#include "cross_entropy.cuh"
#include "kernels.h"

namespace auxk {

template <template <int> class Types, int kPiece>
static ForwardKernel kernel_of(Mode mode, int piece) {
  if (mode == kPlain)
    return piece > 1 ? cross_entropy_resident_kernel<float, kPlain, Types<kPiece>>
                     : cross_entropy_resident_kernel<float, kPlain, Types<1>>;
  return piece > 1 ? cross_entropy_resident_kernel<float, kStatistics, Types<kPiece>>
                   : cross_entropy_resident_kernel<float, kStatistics, Types<1>>;
}

ForwardKernel resident_kernel(Mode mode, Types types, int piece) {
  if (types == kWithDoubles) return nullptr;
  if (mode == kGeneral)
    return piece > 1 ? cross_entropy_resident_kernel<float, kGeneral, AnyTypes<4>>
                     : cross_entropy_resident_kernel<float, kGeneral, AnyTypes<1>>;
  if (types == kBFloat16s) return kernel_of<BFloat16s, 8>(mode, piece);
  return types == kFloat16s ? kernel_of<Float16s, 8>(mode, piece) : kernel_of<Float32s, 4>(mode, piece);
}

}  // namespace auxk
