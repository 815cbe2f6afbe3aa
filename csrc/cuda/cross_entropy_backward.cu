#include "backward.cuh"
#include "kernels.h"

namespace auxk {

template <class C, int kMode, template <int> class Types, int kPiece>
static BackwardKernel kernel_of(int piece) {
  return piece > 1 ? cross_entropy_backward_kernel<C, kMode, Types<kPiece>>
                   : cross_entropy_backward_kernel<C, kMode, Types<1>>;
}

BackwardKernel backward_kernel(Mode mode, Types types, int piece) {
  if (types == kWithDoubles) return kernel_of<double, kGeneral, AnyTypes, 4>(piece);
  if (mode == kGeneral) return kernel_of<float, kGeneral, AnyTypes, 4>(piece);
  if (types == kBFloat16s) return kernel_of<float, kPlain, BFloat16s, 8>(piece);
  return types == kFloat16s ? kernel_of<float, kPlain, Float16s, 8>(piece)
                            : kernel_of<float, kPlain, Float32s, 4>(piece);
}

RescaleKernel rescale_kernel(bool is_double, int piece) {
  if (is_double) return piece > 1 ? cross_entropy_rescale_kernel<double, 4> : cross_entropy_rescale_kernel<double, 1>;
  return piece > 1 ? cross_entropy_rescale_kernel<float, 4> : cross_entropy_rescale_kernel<float, 1>;
}

}  // namespace auxk
