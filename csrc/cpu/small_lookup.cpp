#include "small_lookup.h"

#include <algorithm>
#include <memory>

#include "parallel.h"
#include "simd/block_ops.h"

namespace auxk {
namespace {

constexpr int64_t kWorthAThread = 1 << 18;  // multiplications

// rows [first, first + count) of the softmax
SoftmaxRows<float> softmax_of(const SmallLookup& p, int64_t first, int64_t count) {
  SoftmaxRows<float> rows;
  rows.scores = {const_cast<float*>(p.scores + first * p.K), DType::kFloat32, p.K};
  rows.num_rows = count, rows.K = p.K, rows.factor = p.factor;
  if (p.max != nullptr) rows.max = p.max + first, rows.log_denom = p.log_denom + first;
  return rows;
}

std::unique_ptr<float[]> numbers(int64_t count) {
  return std::unique_ptr<float[]>(new float[static_cast<size_t>(count)]);
}

// How the rows are shared out: in blocks of whole tiles of the products, whose probabilities stay in the cache.
struct Blocks {
  int64_t rows;
  int threads;

  explicit Blocks(const SmallLookup& p) {
    rows = std::min(std::clamp<int64_t>((int64_t{1} << 14) / p.K / 4 * 4, 16, 128), p.N);
    const int64_t useful = std::min(p.N * p.K * p.D / kWorthAThread, (p.N + rows - 1) / rows);
    threads = static_cast<int>(std::clamp<int64_t>(useful, 1, p.threads));
  }
};

// task(first, count, thread) for blocks of so many rows
template <class Task>
void for_each_block(int64_t num_rows, int64_t rows, int threads, const Task& task) {
  parallel_for((num_rows + rows - 1) / rows, threads, 1,
               [&](int64_t i, int thread) { task(i * rows, std::min(rows, num_rows - i * rows), thread); });
}

}  // namespace

void small_lookup(const SmallLookup& p, float* mixture) {
  if (p.N == 0) return;
  const BlockOps<float>& ops = block_ops<float>();
  const Blocks blocks(p);
  const int64_t buffer_size = blocks.rows * p.K;
  const std::unique_ptr<float[]> buffers = numbers(blocks.threads * buffer_size);
  for_each_block(p.N, blocks.rows, blocks.threads, [&](int64_t first, int64_t count, int thread) {
    float* probabilities = buffers.get() + thread * buffer_size;
    SoftmaxRows<float> rows = softmax_of(p, first, count);
    rows.probabilities = {probabilities, DType::kFloat32, p.K};
    ops.softmax_rows(rows, 0, count, nullptr);
    ops.multiply_small(probabilities, p.K, 1, p.table, count, p.D, p.K, mixture + first * p.D);
  });
}

void small_lookup_backward(const SmallLookup& p, const float* grad, float* grad_scores, float* grad_table) {
  if (p.N == 0) {
    if (grad_table != nullptr) std::fill(grad_table, grad_table + p.K * p.D, 0.0f);
    return;
  }
  const BlockOps<float>& ops = block_ops<float>();
  const Blocks blocks(p);
  const int64_t buffer_size = blocks.rows * p.K,
                num_products = grad_scores == nullptr ? 0 : p.K * p.D + blocks.threads * buffer_size;
  const std::unique_ptr<float[]> storage = numbers(p.N * p.K + num_products);
  float *probabilities = storage.get(), *transposed = probabilities + p.N * p.K, *buffers = transposed + p.K * p.D;
  if (grad_scores != nullptr) {
    for_each_block(p.K, 16, blocks.threads, [&](int64_t first, int64_t count, int) {
      for (int64_t d = 0; d < p.D; ++d)
        for (int64_t k = first; k < first + count; ++k) transposed[d * p.K + k] = p.table[k * p.D + d];
    });
  }
  for_each_block(p.N, blocks.rows, blocks.threads, [&](int64_t first, int64_t count, int thread) {
    SoftmaxRows<float> rows = softmax_of(p, first, count);
    rows.probabilities = {probabilities + first * p.K, DType::kFloat32, p.K};
    if (grad_scores != nullptr) {
      float* of_probabilities = buffers + thread * buffer_size;
      ops.multiply_small(grad + first * p.D, p.D, 1, transposed, count, p.K, p.D, of_probabilities);
      rows.grad_probabilities = {of_probabilities, DType::kFloat32, p.K};
      rows.grad_scores = {grad_scores + first * p.K, DType::kFloat32, p.K};
    }
    ops.softmax_rows_backward(rows, 0, count, nullptr);
  });
  if (grad_table == nullptr) return;
  for_each_block(p.K, 8, blocks.threads, [&](int64_t first, int64_t count, int) {
    ops.multiply_small(probabilities + first, 1, p.K, grad, count, p.D, p.N, grad_table + first * p.D);
  });
}

}  // namespace auxk
