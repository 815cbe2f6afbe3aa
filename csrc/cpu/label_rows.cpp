// Sums of table rows that labels name, their products and gradients: what hard and selected lookups are made of.
#include "soft_row.h"

namespace auxk {
namespace {

template <class C>
SourceBlock<C> label_block(const Tables& t, int64_t table, int64_t label, int64_t first, C factor) {
  const int64_t place = table * t.stride_table + label * t.tables.stride + first;
  return {static_cast<const char*>(t.tables.values) + place * size_of(t.tables.dtype), t.tables.dtype, factor, C(0)};
}

template <class C>
SourceBlock<C> row_block(const Tables& t, const Matrix& rows, int64_t table, int64_t n, int64_t first, C factor) {
  const int64_t place = table * t.stride_rows_table + n * rows.stride + first;
  return {static_cast<const char*>(rows.values) + place * size_of(rows.dtype), rows.dtype, factor, C(0)};
}

bool is_label(const Tables& t, int64_t label) {
  return static_cast<uint64_t>(label) < static_cast<uint64_t>(t.num_labels);
}

template <class Task>
void for_each_column_block(int64_t D, const Task& task) {
  for (int64_t first = 0; first < D; first += kBlock) task(first, std::min(kBlock, D - first));
}

}  // namespace

template <class C>
void gather_labels(const Tables& t, const Selection& s, int64_t num_rows, const Matrix& rows, int threads) {
  const BlockOps<C>& ops = block_ops<C>();
  const int64_t num_tasks = t.num_tables * num_rows;
  const bool stream = num_tasks * t.D * size_of(rows.dtype) >= (int64_t{2} << 20);
  parallel_for(num_tasks, threads_for(num_tasks * s.k * t.D, threads), 16, [&](int64_t task, int) {
    alignas(64) C sum[kBlock];
    const int64_t table = task / num_rows, n = task % num_rows;
    for_each_column_block(t.D, [&](int64_t first, int64_t size) {
      bool is_empty = true;
      for (int64_t j = 0; j < s.k; ++j) {
        const int64_t label = s.labels[n * s.k + j];
        if (!is_label(t, label)) continue;
        const C weight = s.weights == nullptr ? C(1) : static_cast<const C*>(s.weights)[n * s.k + j];
        const SourceBlock<C> block = label_block<C>(t, table, label, first, weight);
        is_empty ? ops.load(block, size, sum) : ops.load_add(block, size, sum, sum);
        is_empty = false;
      }
      if (is_empty) std::fill(sum, sum + size, C(0));
      const SourceBlock<C> place = row_block<C>(t, rows, table, n, first, C(1));
      ops.finish(place, sum, size, false, const_cast<void*>(place.values), stream);
    });
  });
}

template <class C>
void gather_products(const Tables& t, const Selection& s, int64_t num_rows, const Matrix& rows, void* out,
                     int threads) {
  const BlockOps<C>& ops = block_ops<C>();
  parallel_for(num_rows, threads_for(t.num_tables * num_rows * s.k * t.D, threads), 16, [&](int64_t n, int) {
    alignas(64) C row[kBlock], label_row[kBlock];
    C* products = static_cast<C*>(out) + n * s.k;
    std::fill(products, products + s.k, C(0));
    for (int64_t table = 0; table < t.num_tables; ++table) {
      for_each_column_block(t.D, [&](int64_t first, int64_t size) {
        ops.load(row_block<C>(t, rows, table, n, first, C(1)), size, row);
        for (int64_t j = 0; j < s.k; ++j) {
          const int64_t label = s.labels[n * s.k + j];
          if (!is_label(t, label)) continue;
          ops.load(label_block<C>(t, table, label, first, C(1)), size, label_row);
          products[j] += ops.dot(row, label_row, size);
        }
      });
    }
  });
}

template <class C>
void scatter_labels(const Tables& t, const Selection& s, int64_t num_rows, const Matrix& rows, int threads) {
  // threads share the columns, so that each number of the tables has its terms in the order of the rows
  if (t.D == 0) return;
  constexpr int64_t kFewest = 64;
  const BlockOps<C>& ops = block_ops<C>();
  const int64_t num_slices = std::max<int64_t>(1, std::min<int64_t>(threads, t.D / kFewest));
  const int64_t slice = std::min((t.D + num_slices - 1) / num_slices, kBlock), per_table = (t.D + slice - 1) / slice;
  const int useful = threads_for(t.num_tables * num_rows * s.k * t.D, threads);
  parallel_for(t.num_tables * per_table, useful, 1, [&](int64_t task, int) {
    const int64_t table = task / per_table, first = task % per_table * slice, size = std::min(slice, t.D - first);
    C* tables = static_cast<C*>(t.tables.values) + table * t.stride_table + first;
    for (int64_t n = 0; n < num_rows; ++n) {
      for (int64_t j = 0; j < s.k; ++j) {
        const int64_t label = s.labels[n * s.k + j];
        if (!is_label(t, label)) continue;
        const C weight = s.weights == nullptr ? C(1) : static_cast<const C*>(s.weights)[n * s.k + j];
        C* place = tables + label * t.tables.stride;
        ops.load_add(row_block<C>(t, rows, table, n, first, weight), size, place, place);
      }
    }
  });
}

#define AUXK_INSTANTIATE(C)                                                                              \
  template void gather_labels<C>(const Tables&, const Selection&, int64_t, const Matrix&, int);          \
  template void gather_products<C>(const Tables&, const Selection&, int64_t, const Matrix&, void*, int); \
  template void scatter_labels<C>(const Tables&, const Selection&, int64_t, const Matrix&, int);
AUXK_INSTANTIATE(float)
AUXK_INSTANTIATE(double)

}  // namespace auxk
