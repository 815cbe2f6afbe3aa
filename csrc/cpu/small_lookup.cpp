#include "small_lookup.h"

#include <algorithm>
#include <memory>
#include <type_traits>

#include "parallel.h"
#include "simd/block_ops.h"

namespace auxk {
namespace {

constexpr int64_t kWorthAThread = 1 << 18;  // multiplications

template <class T>
T* at(T* values, DType dtype, int64_t i) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return static_cast<Byte*>(values) + i * size_of(dtype);
}

// rows [first, first + count) of the softmax
SoftmaxRows<float> softmax_of(const SmallLookup& p, int64_t first, int64_t count) {
  SoftmaxRows<float> rows;
  rows.scores = {const_cast<void*>(at(p.scores, p.scores_dtype, first * p.K)), p.scores_dtype, p.K};
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

// A matrix of `count` numbers to be read in float32: itself, or a copy.
class Widened {
 public:
  Widened(const BlockOps<float>& ops, const void* values, DType dtype, int64_t count)
      : copy_(dtype == DType::kFloat32 ? nullptr : numbers(count)) {
    if (copy_ != nullptr) ops.load({values, dtype, 1.0f, 0.0f}, count, copy_.get());
    numbers_ = copy_ != nullptr ? copy_.get() : static_cast<const float*>(values);
  }
  const float* get() const { return numbers_; }

 private:
  std::unique_ptr<float[]> copy_;
  const float* numbers_;
};

// Where a product of `count` numbers is summed up in float32: the place that it is for, or room of its own.
class Summed {
 public:
  Summed(void* out, DType dtype, int64_t count)
      : own_(dtype == DType::kFloat32 ? nullptr : numbers(count)),
        sums_(own_ != nullptr ? own_.get() : static_cast<float*>(out)) {}
  float* get() const { return sums_; }
  // `count` of them from `first` on are done
  void put(const BlockOps<float>& ops, void* out, DType dtype, int64_t first, int64_t count) const {
    void* place = at(out, dtype, first);
    if (own_ != nullptr) ops.finish({place, dtype, 1.0f, 0.0f}, sums_ + first, count, false, place, false);
  }

 private:
  std::unique_ptr<float[]> own_;
  float* sums_;
};

}  // namespace

void small_lookup(const SmallLookup& p, void* mixture) {
  if (p.N == 0) return;
  const BlockOps<float>& ops = block_ops<float>();
  const Blocks blocks(p);
  const Widened table(ops, p.table, p.table_dtype, p.K * p.D);
  const Summed sums(mixture, p.table_dtype, p.N * p.D);
  const int64_t buffer_size = blocks.rows * p.K;
  const std::unique_ptr<float[]> buffers = numbers(blocks.threads * buffer_size);
  for_each_block(p.N, blocks.rows, blocks.threads, [&](int64_t first, int64_t count, int thread) {
    float* probabilities = buffers.get() + thread * buffer_size;
    SoftmaxRows<float> rows = softmax_of(p, first, count);
    rows.probabilities = {probabilities, DType::kFloat32, p.K};
    ops.softmax_rows(rows, 0, count, nullptr);
    ops.multiply_small(probabilities, p.K, 1, table.get(), count, p.D, p.K, sums.get() + first * p.D);
    sums.put(ops, mixture, p.table_dtype, first * p.D, count * p.D);
  });
}

void small_lookup_backward(const SmallLookup& p, const void* grad, void* grad_scores, void* grad_table) {
  const BlockOps<float>& ops = block_ops<float>();
  if (p.N == 0) {
    if (grad_table != nullptr) std::fill_n(static_cast<char*>(grad_table), p.K * p.D * size_of(p.table_dtype), char{0});
    return;
  }
  const Blocks blocks(p);
  const Widened of_mixture(ops, grad, p.table_dtype, p.N * p.D);
  const int64_t buffer_size = blocks.rows * p.K,
                num_products = grad_scores == nullptr ? 0 : p.K * p.D + blocks.threads * buffer_size;
  const std::unique_ptr<float[]> storage = numbers(p.N * p.K + num_products);
  float *probabilities = storage.get(), *transposed = probabilities + p.N * p.K, *buffers = transposed + p.K * p.D;
  if (grad_scores != nullptr) {
    const Widened table(ops, p.table, p.table_dtype, p.K * p.D);
    for_each_block(p.K, 16, blocks.threads, [&](int64_t first, int64_t count, int) {
      for (int64_t d = 0; d < p.D; ++d)
        for (int64_t k = first; k < first + count; ++k) transposed[d * p.K + k] = table.get()[k * p.D + d];
    });
  }
  for_each_block(p.N, blocks.rows, blocks.threads, [&](int64_t first, int64_t count, int thread) {
    SoftmaxRows<float> rows = softmax_of(p, first, count);
    rows.probabilities = {probabilities + first * p.K, DType::kFloat32, p.K};
    ops.softmax_rows(rows, 0, count, nullptr);
    if (grad_scores == nullptr) return;
    float* of_probabilities = buffers + thread * buffer_size;
    ops.multiply_small(of_mixture.get() + first * p.D, p.D, 1, transposed, count, p.K, p.D, of_probabilities);
    void* place = at(grad_scores, p.scores_dtype, first * p.K);
    ops.center_rows(probabilities + first * p.K, of_probabilities, p.factor, count, p.K, p.scores_dtype, place);
  });
  if (grad_table == nullptr) return;
  const Summed sums(grad_table, p.table_dtype, p.K * p.D);
  for_each_block(p.K, 8, blocks.threads, [&](int64_t first, int64_t count, int) {
    float* place = sums.get() + first * p.D;
    ops.multiply_small(probabilities + first, 1, p.K, of_mixture.get(), count, p.D, p.N, place);
    sums.put(ops, grad_table, p.table_dtype, first * p.D, count * p.D);
  });
}

}  // namespace auxk
