#include "add.h"

#include <algorithm>

#include "parallel.h"
#include "simd/block_ops.h"

namespace auxk {

void add(const Elements& out, const Elements& a, const Elements& b, int64_t n, int threads) {
  constexpr int64_t kWorthAThread = 1 << 15, kBlocksAtOnce = 16;
  const BlockOps<float>& ops = block_ops<float>();
  const int64_t num_blocks = (n + kBlock - 1) / kBlock;
  const int useful = static_cast<int>(std::clamp<int64_t>(n / kWorthAThread, 1, threads));
  parallel_for(num_blocks, useful, kBlocksAtOnce, [&](int64_t k, int) {
    alignas(64) float sum[kBlock];
    const int64_t size = std::min(kBlock, n - k * kBlock);
    const auto at = [&](const Elements& elements) {
      return static_cast<char*>(elements.values) + k * kBlock * (elements.dtype == DType::kFloat32 ? 4 : 2);
    };
    const auto block = [&](const Elements& elements) { return SourceBlock<float>{at(elements), elements.dtype, 1, 0}; };
    ops.load(block(a), size, sum);
    ops.load_add(block(b), size, sum, sum);
    ops.finish(block(out), sum, size, false, at(out), false);
  });
}

}  // namespace auxk
