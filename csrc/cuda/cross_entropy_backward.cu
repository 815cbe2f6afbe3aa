#include "backward.cuh"
#include "kernels.h"

namespace auxk {

template <class C, int kMode, class Even, class Other>
static BackwardKernel kernel_of(int piece) {
  return piece > 1 ? cross_entropy_backward_kernel<C, kMode, Even> : cross_entropy_backward_kernel<C, kMode, Other>;
}

BackwardKernel backward_kernel(Mode mode, Types types, int piece) {
  if (types == kWithDoubles) return kernel_of<double, kGeneral, AnyTypes<4>, AnyTypes<1>>(piece);
  if (mode == kGeneral) return kernel_of<float, kGeneral, AnyTypes<4>, AnyTypes<1>>(piece);
  if (types == kBFloat16s) return kernel_of<float, kPlain, BFloat16s<8>, BFloat16s<1>>(piece);
  return types == kFloat16s ? kernel_of<float, kPlain, Float16s<8>, Float16s<1>>(piece)
                            : kernel_of<float, kPlain, Float32s<4>, Float32s<1>>(piece);
}

RescaleKernel rescale_kernel(bool is_double, int piece) {
  if (is_double) return piece > 1 ? cross_entropy_rescale_kernel<double, 4> : cross_entropy_rescale_kernel<double, 1>;
  return piece > 1 ? cross_entropy_rescale_kernel<float, 4> : cross_entropy_rescale_kernel<float, 1>;
}

}  // namespace auxk
