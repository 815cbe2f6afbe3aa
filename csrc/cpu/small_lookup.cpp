#include "small_lookup.h"

#include <algorithm>
#include <memory>
#include <type_traits>
#include <utility>

#include "parallel.h"
#include "simd/block_ops.h"

namespace auxk {
namespace {

constexpr int64_t kWorthAThread = 1 << 18;  // multiplications
constexpr int64_t kBlockNumbers = 1 << 16;  // of a block's probabilities
constexpr int64_t kChunkNumbers = 1 << 17;  // of the probabilities that wait for the table's gradient, and of theirs
constexpr int64_t kPanel = 32;              // labels that a product of the backward form takes at once

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

// Between rows of buffers: lines of the first-level cache that are 2^n rows apart would take each other's place.
int64_t stride_of(const SmallLookup& p) { return p.K % 128 == 0 ? p.K + 16 : p.K; }

// How the rows are shared out: in blocks whose probabilities stay in the cache, one for each thread at least. A row has
// the same bits in any block, as each of its sums is added up in one order.
struct Blocks {
  int64_t rows;
  int threads;

  explicit Blocks(const SmallLookup& p) {
    threads = static_cast<int>(std::clamp<int64_t>(p.N * p.K * p.D / kWorthAThread, 1, p.threads));
    const int64_t of_a_thread = ((p.N + threads - 1) / threads + 15) / 16 * 16;
    rows = std::min({std::clamp<int64_t>(kBlockNumbers / p.K / 16 * 16, 16, 128), of_a_thread, p.N});
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
  const int64_t stride = stride_of(p), buffer_size = blocks.rows * stride;
  const std::unique_ptr<float[]> buffers = numbers(blocks.threads * buffer_size);
  for_each_block(p.N, blocks.rows, blocks.threads, [&](int64_t first, int64_t count, int thread) {
    float* probabilities = buffers.get() + thread * buffer_size;
    SoftmaxRows<float> rows = softmax_of(p, first, count);
    rows.probabilities = {probabilities, DType::kFloat32, stride};
    ops.softmax_rows(rows, 0, count, nullptr);
    ops.multiply_small({count, p.D, p.K, probabilities, stride, 1, table.get(), p.D, sums.get() + first * p.D, p.D});
    sums.put(ops, mixture, p.table_dtype, first * p.D, count * p.D);
  });
}

namespace {

// What the labels' panels of a chunk of rows are shared out in: as many pieces of each panel as there are threads for
struct Pieces {
  int64_t panels, parts;

  Pieces(int64_t num_labels, int threads) : panels((num_labels + kPanel - 1) / kPanel) {
    parts = std::max<int64_t>(threads / panels, 1);
  }
  // piece `part` of n rows or columns: (first, count), whole panels but for the last
  std::pair<int64_t, int64_t> of(int64_t n, int64_t part) const {
    const int64_t size = ((n + parts - 1) / parts + kPanel - 1) / kPanel * kPanel, first = std::min(part * size, n);
    return {first, std::min(size, n - first)};
  }
};

}  // namespace

void small_lookup_backward(const SmallLookup& p, const void* grad, void* grad_scores, void* grad_table) {
  const BlockOps<float>& ops = block_ops<float>();
  if (p.N == 0) {
    if (grad_table != nullptr) std::fill_n(static_cast<char*>(grad_table), p.K * p.D * size_of(p.table_dtype), char{0});
    return;
  }
  const Blocks blocks(p);
  const Pieces pieces(p.K, blocks.threads);
  const Widened of_mixture(ops, grad, p.table_dtype, p.N * p.D);
  const Summed sums(grad_table, p.table_dtype, grad_table == nullptr ? 0 : p.K * p.D);
  // by the sizes alone: the table's gradient is summed up chunk by chunk
  const int64_t chunk_rows = std::min(std::max<int64_t>(kChunkNumbers / p.K / 64 * 64, 64), p.N), stride = stride_of(p),
                chunk_size = chunk_rows * stride;
  // The product of the scores' gradient needs one operand the other way round: the table, panel by panel, or with fewer
  // numbers the gradient of the mixture, and then its result again.
  const bool transposes_table = p.D * p.K <= chunk_rows * (p.D + p.K);
  const int64_t panel_size = kPanel * (transposes_table ? p.D : chunk_rows),
                of_gradient = transposes_table ? 0 : chunk_rows * p.D;
  const int64_t room = grad_scores == nullptr ? 0 : chunk_size + of_gradient + blocks.threads * panel_size;
  const std::unique_ptr<float[]> storage = numbers(chunk_size + room);
  float *probabilities = storage.get(), *of_probabilities = probabilities + chunk_size,
        *transposed_g = of_probabilities + chunk_size, *panels = transposed_g + of_gradient;
  for (int64_t start = 0; start < p.N; start += chunk_rows) {
    const int64_t num_rows = std::min(chunk_rows, p.N - start);
    const float* g = of_mixture.get() + start * p.D;
    const auto blocks_of_rows = [&](const auto& task) { for_each_block(num_rows, blocks.rows, blocks.threads, task); };
    blocks_of_rows([&](int64_t first, int64_t count, int) {
      SoftmaxRows<float> rows = softmax_of(p, start + first, count);
      rows.probabilities = {probabilities + first * stride, DType::kFloat32, stride};
      ops.softmax_rows(rows, 0, count, nullptr);
      if (grad_scores != nullptr && !transposes_table)
        ops.transpose(g + first * p.D, p.D, count, p.D, transposed_g + first, num_rows);
    });
    parallel_for(pieces.panels * pieces.parts, blocks.threads, 1, [&](int64_t i, int thread) {
      const int64_t label = i / pieces.parts * kPanel, width = std::min(kPanel, p.K - label), part = i % pieces.parts;
      if (grad_scores != nullptr) {
        float *panel = panels + thread * panel_size, *out = of_probabilities + label;
        const Widened table(ops, at(p.table, p.table_dtype, label * p.D), p.table_dtype, width * p.D);
        const auto [first, count] = pieces.of(num_rows, part);
        if (transposes_table) {
          ops.transpose(table.get(), p.D, width, p.D, panel, width);
          ops.multiply_small({count, width, p.D, g + first * p.D, p.D, 1, panel, width, out + first * stride, stride});
        } else {
          ops.multiply_small({width, count, p.D, table.get(), p.D, 1, transposed_g + first, num_rows, panel, count});
          ops.transpose(panel, count, width, count, out + first * stride, stride);
        }
      }
      if (grad_table == nullptr) return;
      const auto [first, count] = pieces.of(p.D, part);
      float* place = sums.get() + label * p.D + first;
      ops.multiply_small(
          {width, count, num_rows, probabilities + label, 1, stride, g + first, p.D, place, p.D, start > 0});
    });
    if (grad_scores == nullptr) continue;
    blocks_of_rows([&](int64_t first, int64_t count, int) {
      void* place = at(grad_scores, p.scores_dtype, (start + first) * p.K);
      const int64_t offset = first * stride;
      ops.center_rows(probabilities + offset, of_probabilities + offset, stride, p.factor, count, p.K, p.scores_dtype,
                      place);
    });
  }
  if (grad_table == nullptr) return;
  for_each_block(p.K, kPanel, blocks.threads, [&](int64_t first, int64_t count, int) {
    sums.put(ops, grad_table, p.table_dtype, first * p.D, count * p.D);
  });
}

}  // namespace auxk
