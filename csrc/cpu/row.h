// The work on one row, and on one block of it: scan, merge, gradient. Which thread does what is decided in
// cross_entropy.cpp.
#pragma once

#include <algorithm>
#include <memory>
#include <utility>

#include "common/row_numbers.h"
#include "cross_entropy.h"
#include "simd/block_ops.h"

namespace auxk {

constexpr double kMinusInf = -std::numeric_limits<double>::infinity();

// What one block of one row adds to the row state, relative to the block's own maxima; without the target's column.
struct BlockState {
  double max, base_max;  // with the target's column
  double sum, sum_times_s, sum_times_base, base_sum;
  double weighted_sum, weights;
  double others, base_others;  // with moments: as in ScanSums
  int64_t num_above;           // columns whose sum is greater than the target's
};

// log(denom). For a confident row from `others`, which is denom - 1 not rounded beside a 1 (negative: not known): its
// entropy is no larger than what float loses there.
inline double log_of_denom(double denom, double others) {
  return others >= 0 && others < 1 ? std::log1p(others) : std::log(denom);
}

// A denominator without the 1 of a largest column, from those of blocks.
struct Others {
  double sum = 0, num_largest = 0;

  void add(double block_max, double row_max, double factor, double block_sum, double block_others) {
    const bool has_largest = block_max == row_max;
    sum += has_largest ? block_others : factor * block_sum;
    if (has_largest) num_largest += std::rint(block_sum - block_others);  // how many ones are not among them
  }
  double without_largest() const { return sum + (num_largest - 1); }
};

struct RowState {
  double max = kMinusInf, denom = 0, rest = 0;  // rest: the denominator without the target's column
  double base_max = kMinusInf, base_denom = 0, base_rest = 0;
  double others = -1, base_others = -1;  // the denominators without the 1 of a largest column; negative: not known
  double mean_sum = 0, mean_base = 0, weighted_sum = 0;
  double target_logit = kMinusInf, base_target_logit = kMinusInf;
  double target_sum = 0;  // where the target's rank is wanted: known before the scan, as target_logit is after it
  int64_t num_above = 0;

  // a row without a distribution has none
  int64_t target_rank() const { return denom == denom ? num_above : -1; }
  double nll() const { return nll_of(target_logit - max, std::exp(target_logit - max), rest, denom); }
  double base_nll() const {
    const double relative = base_target_logit - base_max;
    return nll_of(relative, std::exp(relative), base_rest, base_denom);
  }
  double log_denom() const { return log_of_denom(denom, others); }
  double base_log_denom() const { return log_of_denom(base_denom, base_others); }
};

struct ScaleShares {
  double base = 0, aux = 0;
};

struct ScanWants {
  bool moments = false, base = false, weighted = false, rank = false;
};

// One thread's working memory; uninitialised, so that its pages are touched by the thread that uses them.
template <class C>
struct Buffers {
  std::unique_ptr<C[]> storage;
  std::unique_ptr<BlockState[]> blocks;
  C *s, *z_b, *ds, *ds_b, *row;

  // `row`: exp(s - m) of a whole row, where the gradient is made from it
  Buffers(int64_t V, bool keeps_row) : blocks(new BlockState[static_cast<size_t>((V + kBlock - 1) / kBlock)]) {
    const int64_t block = (std::min(V, kBlock) + 15) / 16 * 16;
    storage.reset(new C[static_cast<size_t>(4 * block + (keeps_row ? V : 0) + 16)]);
    s = reinterpret_cast<C*>((reinterpret_cast<uintptr_t>(storage.get()) + 63) & ~uintptr_t{63});
    z_b = s + block, ds = z_b + block, ds_b = ds + block, row = ds_b + block;
  }
};

template <class C>
class Kernel {
 public:
  explicit Kernel(const Problem& problem) : p(problem), ops(block_ops<C>()), num_blocks((p.V + kBlock - 1) / kBlock) {}

  const Problem& p;
  const BlockOps<C>& ops;
  const int64_t num_blocks;

  bool has_aux() const { return p.aux.values != nullptr; }
  bool ignored(int64_t n) const { return p.target != nullptr && target_of(p, n) == p.ignore_index; }
  int64_t target(int64_t n) const { return p.target == nullptr ? -1 : target_of(p, n); }
  // the sum at the target, given as it is stored
  C target_logit(int64_t n, C stored) const {
    return p.target_logit == nullptr ? stored : static_cast<const C*>(p.target_logit)[n];
  }
  int64_t size(int64_t k) const { return std::min(kBlock, p.V - k * kBlock); }
  const C* weights(int64_t k) const {
    return p.weight == nullptr ? nullptr : static_cast<const C*>(p.weight) + k * kBlock;
  }

  static int64_t row_start(const Source& source, int64_t n) {
    return (n / source.num_inner) * source.stride_outer + (n % source.num_inner) * source.stride_inner;
  }
  static C scale(const Source& source, int64_t n) {
    return source.scale == nullptr ? static_cast<C>(source.scale_value)
                                   : static_cast<const C*>(source.scale)[n * source.scale_stride];
  }
  SourceBlock<C> columns(const Source& source, int64_t n, int64_t first) const {
    const char* values = static_cast<const char*>(source.values);
    return {values + (row_start(source, n) + first) * size_of(source.dtype), source.dtype, scale(source, n),
            static_cast<C>(source.softcap)};
  }
  SourceBlock<C> block(const Source& source, int64_t n, int64_t k) const { return columns(source, n, k * kBlock); }

  // What is read after block k, the next one or the next row's first: the share of it, in percent, that is fetched while
  // something else is done.
  Ahead ahead(const Source& source, int64_t n, int64_t k, int64_t from, int64_t to) const {
    if (++k == num_blocks) {
      k = 0;
      ++n;
    }
    if (source.values == nullptr || n >= p.num_rows) return {};
    const int64_t bytes = size(k) * size_of(source.dtype), begin = bytes * from / 100;
    return {static_cast<const char*>(block(source, n, k).values) + begin, bytes * to / 100 - begin};
  }

  // A row before its scan. The target's sum is made by the loops that make a block's, so that its equals are ties.
  RowState start(int64_t n, const ScanWants& wants) const {
    RowState row;
    const int64_t y = target(n);
    if (!wants.rank || y < 0 || y >= p.V) return row;
    const SourceBlock<C> base = columns(p.base, n, y);
    C s = 0;
    has_aux() ? ops.load_sum(base, columns(p.aux, n, y), 1, &s) : ops.load(base, 1, &s);
    row.target_sum = static_cast<double>(s);
    return row;
  }

  // s (and z_b, if wanted) of one block; their maxima in the result. `fetched`: percent of the next block, meanwhile
  std::pair<C, C> load(int64_t n, int64_t k, C* s, C* z_b, int64_t fetched = 0) const {
    const int64_t size = this->size(k);
    SourceBlock<C> base = block(p.base, n, k);
    base.ahead = ahead(p.base, n, k, 0, fetched);
    if (z_b == nullptr && !has_aux()) return {ops.load(base, size, s), C(0)};
    if (!has_aux()) {
      const C base_max = ops.load(base, size, z_b);
      std::copy(z_b, z_b + size, s);
      return {base_max, base_max};
    }
    SourceBlock<C> aux = block(p.aux, n, k);
    aux.ahead = ahead(p.aux, n, k, 0, fetched);
    if (z_b == nullptr) return {ops.load_sum(base, aux, size, s), C(0)};
    const C base_max = ops.load(base, size, z_b);
    return {ops.load_add(aux, size, z_b, s), base_max};
  }

  // Scans one block. `s` receives exp(s - block maximum), 0 at the target's column.
  BlockState scan_block(int64_t n, int64_t k, const ScanWants& wants, C* s, C* z_b, RowState* row) const {
    constexpr int64_t kWhileLoading = 33;  // percent: as much as loading takes of the time
    const int64_t size = this->size(k), y = target(n) - k * kBlock;
    const auto [max, base_max] = load(n, k, s, wants.base ? z_b : nullptr, kWhileLoading);
    BlockState state{max, base_max, 0, 0, 0, 0, 0, 0, 0, 0, 0};
    if (wants.weighted) {
      state.weighted_sum = ops.weighted_sum(s, weights(k), max, size);
      state.weights = sum_of_weights(k);
    }
    if (p.target != nullptr && y >= 0 && y < size) {
      row->target_logit = target_logit(n, s[y]);
      s[y] = static_cast<C>(kMinusInf);
      if (wants.base) {
        row->base_target_logit = z_b[y];
        z_b[y] = static_cast<C>(kMinusInf);
      }
    }
    if (wants.rank) state.num_above = ops.count_above(s, static_cast<C>(row->target_sum), size);
    const Ahead first = ahead(p.base, n, k, kWhileLoading, 100), second = ahead(p.aux, n, k, kWhileLoading, 100);
    if (!wants.moments && !wants.base) {
      state.sum = ops.exp_sum(s, max, size, first, second);
      return state;
    }
    const ScanSums<C> sums = ops.scan_sums(s, z_b, max, base_max, size, wants.moments, wants.base, first, second);
    state.sum = sums.sum, state.sum_times_s = sums.sum_times_s, state.sum_times_base = sums.sum_times_base;
    state.base_sum = sums.base_sum, state.others = sums.others, state.base_others = sums.base_others;
    return state;
  }

  double sum_of_weights(int64_t k) const {
    const C* w = weights(k);
    if (w == nullptr) return static_cast<double>(size(k));
    double total = 0;
    for (int64_t i = 0; i < size(k); ++i) total += static_cast<double>(w[i]);
    return total;
  }

  // Blocks in their order into the row's state: the same bits whichever thread scanned them.
  void merge(const BlockState* blocks, const ScanWants& wants, RowState* row) const {
    for (int64_t k = 0; k < num_blocks; ++k) {
      row->max = std::max(row->max, blocks[k].max);
      row->base_max = std::max(row->base_max, blocks[k].base_max);
    }
    Others others, base_others;
    for (int64_t k = 0; k < num_blocks; ++k) {
      const BlockState& block = blocks[k];
      row->num_above += block.num_above;
      const double factor = std::exp(block.max - row->max);
      row->rest += factor * block.sum;
      others.add(block.max, row->max, factor, block.sum, block.others);
      if (block.max != kMinusInf) {  // a block of -inf alone has probability 0, and its maximum times that is NaN
        row->mean_sum += factor * (block.sum_times_s + (block.max - row->max) * block.sum);
        row->mean_base += factor * (block.sum_times_base + (block.base_max - row->base_max) * block.sum);
      }
      if (wants.base) {
        const double base_factor = std::exp(block.base_max - row->base_max);
        row->base_rest += base_factor * block.base_sum;
        base_others.add(block.base_max, row->base_max, base_factor, block.base_sum, block.base_others);
      }
      if (wants.weighted)
        row->weighted_sum += block.weighted_sum + (finite_or_zero(block.max) - row->max) * block.weights;
    }
    const double s_y = row->target_logit - row->max, e_y = p.target == nullptr ? 0 : std::exp(s_y);
    row->denom = row->rest + e_y;
    const double z_y = row->base_target_logit - row->base_max;
    if (wants.base) row->base_denom = row->base_rest + (p.target == nullptr ? 0 : std::exp(z_y));
    if (!wants.moments) return;
    if (p.target != nullptr) {
      others.add(row->target_logit, row->max, e_y, 1, 0);
      base_others.add(row->base_target_logit, row->base_max, wants.base ? std::exp(z_y) : 0, 1, 0);
    }
    if (row->denom == row->denom) row->others = others.without_largest();
    if (wants.base && row->base_denom == row->base_denom) row->base_others = base_others.without_largest();
    if (e_y > 0) {
      row->mean_sum += e_y * s_y;
      row->mean_base += e_y * z_y;
    }
    row->mean_sum /= row->denom;
    row->mean_base /= row->denom;
  }

  static double finite_or_zero(double m) { return m == kMinusInf ? 0 : m; }

  RowNumbers<double> numbers_of(const RowState& row, const ScanWants& wants) const {
    RowNumbers<double> numbers;
    numbers.max = row.max, numbers.log_denom = row.log_denom();
    numbers.mean_sum = row.mean_sum, numbers.mean_base = row.mean_base;
    numbers.weighted_sum = row.weighted_sum;
    numbers.base_max = row.base_max;
    if (wants.base) numbers.base_log_denom = row.base_log_denom();
    if (p.target != nullptr) numbers.nll = row.nll();
    if (wants.base && p.target != nullptr) numbers.base_nll = row.base_nll();
    return numbers;
  }

  void store_fields(int64_t n, const Outputs& out, const RowNumbers<double>& numbers, const RowState& row,
                    const BlockState* blocks, const Buffers<C>& b) const {
    const auto put = [&](Field field, double value) {
      if (out.fields[field] != nullptr) static_cast<C*>(out.fields[field])[n] = static_cast<C>(value);
    };
    numbers.put_plain(put);
    numbers.put_statistics(put);
    if (out.fields[kArgmax] != nullptr)
      static_cast<int64_t*>(out.fields[kArgmax])[n] = argmax(n, false, row.max, row.denom, blocks, b);
    if (out.fields[kBaseArgmax] != nullptr)
      static_cast<int64_t*>(out.fields[kBaseArgmax])[n] = argmax(n, true, row.base_max, row.base_denom, blocks, b);
    if (out.fields[kTargetRank] != nullptr) static_cast<int64_t*>(out.fields[kTargetRank])[n] = row.target_rank();
  }

  void store_ignored_fields(int64_t n, const Outputs& out) const {
    for (int f = 0; f < kNumFields; ++f) {
      if (out.fields[f] == nullptr) continue;
      if (f < kNumFloatFields)
        static_cast<C*>(out.fields[f])[n] = 0;
      else
        static_cast<int64_t*>(out.fields[f])[n] = -1;
    }
  }

  // The first NaN of a row that has one, else the first column at the maximum. The scan knows which block holds that, so
  // one block is read again, a part at a time.
  int64_t argmax(int64_t n, bool of_base, double max, double denom, const BlockState* blocks,
                 const Buffers<C>& b) const {
    constexpr int64_t kPart = 512;
    // the first column found by first_in(sums, size), which says `size` for none, in the blocks that may have it
    const auto find = [&](const auto& may_have, const auto& first_in) -> int64_t {
      for (int64_t k = 0; k < num_blocks; ++k) {
        if (!may_have(blocks[k])) continue;
        const int64_t end = k * kBlock + size(k);
        for (int64_t first = k * kBlock; first < end; first += kPart) {
          const int64_t part = std::min(kPart, end - first);
          const SourceBlock<C> base = columns(p.base, n, first);
          if (of_base || !has_aux())
            ops.load(base, part, b.s);
          else
            ops.load_sum(base, columns(p.aux, n, first), part, b.s);
          const int64_t i = first_in(b.s, part);
          if (i < part) return first + i;
        }
      }
      return -1;
    };
    if (denom != denom) {
      const int64_t i = find([](const BlockState&) { return true; }, ops.first_nan);
      if (i >= 0) return i;  // or its maximum is +inf
    }
    return find([&](const BlockState& block) { return (of_base ? block.base_max : block.max) == max; },
                [&](const C* s, int64_t size) { return ops.first_equal(s, static_cast<C>(max), size); });
  }

  // -- gradients ----------------------------------------------------------------------------------

  char* grad_row(void* grad, const Source& source, int64_t n) const {
    return static_cast<char*>(grad) + n * source.width * size_of(source.dtype);
  }

  static bool stream(int64_t num_rows, const Source& source) {
    // larger than what a core's caches could still hold when the gradient is read
    return num_rows * source.width * size_of(source.dtype) >= (int64_t{2} << 20);
  }

  void zero_row(const Outputs& out, int64_t n) const {
    for (const auto& [grad, source] : {std::make_pair(out.grad_base, &p.base), std::make_pair(out.grad_aux, &p.aux)})
      if (grad != nullptr)
        std::memset(grad_row(grad, *source, n), 0, static_cast<size_t>(source->width * size_of(source->dtype)));
    for (void* grad : {out.grad_base_scale, out.grad_aux_scale})
      if (grad != nullptr) static_cast<C*>(grad)[n] = 0;
  }

  // columns beyond V belong to nobody
  void zero_tail(void* grad, const Source& source, int64_t n) const {
    if (grad == nullptr || source.width == p.V) return;
    const int64_t bytes = size_of(source.dtype);
    std::memset(grad_row(grad, source, n) + p.V * bytes, 0, static_cast<size_t>((source.width - p.V) * bytes));
  }

  struct Gradient {
    RowCoefficients<C> row;
    double A = 0;                                  // row.p_factor is A + G, which at v = y would have to lose G again
    double target_term = 0, base_target_term = 0;  // what is added at v = y: -G (1 - p_y), B_b
  };

  // ds at the target, in double: for a confident row it is target_term alone, far below G p_y. ds_b goes to *ds_b.
  double at_target(const Gradient& g, int64_t k, int64_t y, const Buffers<C>& b, bool has_base, C* ds_b) const {
    const RowCoefficients<C>& row = g.row;
    const double x = static_cast<double>(b.s[y] - row.max);
    const double p_y = std::exp(x - static_cast<double>(row.log_denom));
    double ds = g.target_term + p_y * g.A;
    if (row.S != 0) ds += static_cast<double>(row.S) * (p.weight == nullptr ? 1 : static_cast<double>(weights(k)[y]));
    double q_y = 0;
    if (has_base) {
      const double x_b = static_cast<double>(b.z_b[y] - row.base_max);
      if (p_y != 0) ds += p_y * (static_cast<double>(row.C_) * x + static_cast<double>(row.D) * x_b);
      if (row.Q != 0 || row.Q_b != 0) q_y = std::exp(x_b - static_cast<double>(row.base_log_denom));
      ds += static_cast<double>(row.Q) * q_y;
    }
    *ds_b =
        static_cast<C>(ds + static_cast<double>(row.D) * p_y + static_cast<double>(row.Q_b) * q_y + g.base_target_term);
    return ds;
  }

  // One block of the general form; returns its share of dscale.
  ScaleShares backward_block(int64_t n, int64_t k, const Gradient& g, const Outputs& out, Buffers<C>& b) const {
    const int64_t size = this->size(k), y = target(n) - k * kBlock;
    const bool needs_base_values = g.row.C_ != 0 || g.row.D != 0 || g.row.Q != 0 || g.row.Q_b != 0;
    load(n, k, b.s, needs_base_values ? b.z_b : nullptr);
    ops.backward(b.s, b.z_b, weights(k), g.row, size, b.ds, b.ds_b);
    if (p.target != nullptr && y >= 0 && y < size) {
      b.s[y] = target_logit(n, b.s[y]);
      b.ds[y] = static_cast<C>(at_target(g, k, y, b, needs_base_values, &b.ds_b[y]));
    }
    const auto finish = [&](const Source& source, const C* ds, void* grad, const void* grad_scale) {
      if (grad == nullptr && grad_scale == nullptr) return 0.0;
      void* place = grad == nullptr ? nullptr : grad_row(grad, source, n) + k * kBlock * size_of(source.dtype);
      return static_cast<double>(
          ops.finish(block(source, n, k), ds, size, grad_scale != nullptr, place, stream(p.num_rows, source)));
    };
    ScaleShares shares;
    shares.base = finish(p.base, b.ds_b, out.grad_base, out.grad_base_scale);
    if (has_aux()) shares.aux = finish(p.aux, b.ds, out.grad_aux, out.grad_aux_scale);
    if (k + 1 == num_blocks) {
      zero_tail(out.grad_base, p.base, n);
      zero_tail(out.grad_aux, p.aux, n);
    }
    return shares;
  }

  // One block where only p and constants count (no softcap, no dscale): from e = exp(s - block maximum).
  void scaled_block(int64_t n, int64_t k, const Gradient& g, const RowState& row, double block_max, const C* e,
                    const Outputs& out) const {
    const int64_t size = this->size(k), y = target(n) - k * kBlock;
    const double share = std::exp(block_max - row.max) / row.denom;
    const double w_y = p.weight == nullptr ? 1 : (y >= 0 && y < size ? static_cast<double>(weights(k)[y]) : 0);
    const double p_y = std::exp(row.target_logit - row.max) / row.denom;
    const double at_y = g.target_term + p_y * g.A + static_cast<double>(g.row.S) * w_y;
    const C* smoothing = g.row.S == 0 ? nullptr : weights(k);  // else only the target's is used
    for (const auto& [grad, source] : {std::make_pair(out.grad_base, &p.base), std::make_pair(out.grad_aux, &p.aux)}) {
      if (grad == nullptr) continue;
      const double scale = static_cast<double>(Kernel::scale(*source, n));
      ops.store_scaled(e, static_cast<C>(share * static_cast<double>(g.row.p_factor) * scale),
                       static_cast<C>(static_cast<double>(g.row.S) * scale), smoothing, size, y,
                       static_cast<C>(at_y * scale), source->dtype,
                       grad_row(grad, *source, n) + k * kBlock * size_of(source->dtype), stream(p.num_rows, *source));
      if (k + 1 == num_blocks) zero_tail(grad, *source, n);
    }
  }

  // Few long rows are split over the threads, by blocks; many rows are not.
  bool split_rows() const { return p.threads > 1 && num_blocks > 1 && p.num_rows < 4 * p.threads; }
  int useful_threads() const {
    constexpr int64_t kWorthAThread = 1 << 15;  // elements; entering a parallel region costs some microseconds
    return static_cast<int>(std::clamp<int64_t>(p.num_rows * p.V / kWorthAThread, 1, p.threads));
  }
  // Several where there are many: the row after a row, of which the beginning is fetched, should be the same thread's.
  int64_t rows_per_chunk() const {
    const int64_t small = std::min<int64_t>(16, (1 << 15) / p.V),
                  few = std::min<int64_t>(4, p.num_rows / (128 * p.threads));
    return std::max<int64_t>({1, small, few});
  }
};

}  // namespace auxk
