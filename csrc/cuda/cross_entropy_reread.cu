#include "cross_entropy.cuh"
#include "kernels.h"

namespace auxk {

template <class Even, class Other>
static ForwardKernel kernel_of(Mode mode, const Cut& cut) {
  if (mode == kPlain)
    return cut.is_ragged ? cross_entropy_reread_kernel<float, kPlain, Other>
                         : cross_entropy_reread_kernel<float, kPlain, Even>;
  return cut.is_ragged ? cross_entropy_reread_kernel<float, kStatistics, Other>
                       : cross_entropy_reread_kernel<float, kStatistics, Even>;
}

ForwardKernel reread_kernel(Mode mode, Types types, const Cut& cut) {
  const bool has_pieces = cut.piece > 1;
  if (types == kWithDoubles)
    return has_pieces ? cross_entropy_reread_kernel<double, kGeneral, AnyTypes<4>>
                      : cross_entropy_reread_kernel<double, kGeneral, AnyTypes<1>>;
  if (mode == kGeneral)
    return has_pieces ? cross_entropy_reread_kernel<float, kGeneral, AnyTypes<4>>
                      : cross_entropy_reread_kernel<float, kGeneral, AnyTypes<1>>;
  if (types == kBFloat16s) return kernel_of<BFloat16s<8>, BFloat16s<8, true>>(mode, cut);
  if (types == kFloat16s) return kernel_of<Float16s<8>, Float16s<8, true>>(mode, cut);
  return kernel_of<Float32s<4>, Float32s<1>>(mode, cut);
}

}  // namespace auxk
