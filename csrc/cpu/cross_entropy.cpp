#include "cross_entropy.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <vector>

#include "pages.h"
#include "parallel.h"
#include "row.h"

namespace auxk {

int64_t target_of(const Problem& p, int64_t row) {
  return p.target_is_int32 ? static_cast<const int32_t*>(p.target)[row] : static_cast<const int64_t*>(p.target)[row];
}

int64_t first_bad_target(const Problem& p, int64_t* num_kept) {
  *num_kept = p.num_rows;
  if (p.target == nullptr) return -1;
  int64_t kept = 0;
  for (int64_t n = 0; n < p.num_rows; ++n) {
    const int64_t y = target_of(p, n);
    if (y == p.ignore_index) continue;
    if (static_cast<uint64_t>(y) >= static_cast<uint64_t>(p.V)) return n;
    ++kept;
  }
  *num_kept = kept;
  return -1;
}

namespace {

void bring_gradients_in(const Problem& p, const Outputs& out) {
  bring_pages_in(out.grad_base, p.num_rows * p.base.width * size_of(p.base.dtype), p.threads);
  bring_pages_in(out.grad_aux, p.num_rows * p.aux.width * size_of(p.aux.dtype), p.threads);
}

ScanWants wants_of(const Outputs& out) {
  ScanWants wants;
  for (int f = 0; f < kNumFields; ++f) {
    if (out.fields[f] == nullptr) continue;
    wants.moments |= is_of_moments(static_cast<Field>(f));
    wants.base |= is_of_base(static_cast<Field>(f));
  }
  wants.weighted = out.fields[kWeightedSum] != nullptr;
  wants.rank = out.fields[kTargetRank] != nullptr;
  return wants;
}

template <class C>
std::vector<Buffers<C>> make_buffers(const Problem& p, int threads, bool keeps_row) {
  std::vector<Buffers<C>> buffers;
  for (int t = 0; t < threads; ++t) buffers.emplace_back(p.V, keeps_row);
  return buffers;
}

// Scans row n as a whole, all of it by this thread. See for_each_row.
template <class C, class Ignored, class Finish, class FinishBlock>
void whole_row(const Kernel<C>& kernel, const ScanWants& wants, bool keeps_row, int64_t n, Buffers<C>& b,
               const Ignored& ignored, const Finish& finish, const FinishBlock& finish_block) {
  if (kernel.ignored(n)) return ignored(n);
  const int64_t num_blocks = kernel.num_blocks;
  RowState row = kernel.start(n, wants);
  for (int64_t k = 0; k < num_blocks; ++k)
    b.blocks[k] = kernel.scan_block(n, k, wants, keeps_row ? b.row + k * kBlock : b.s, b.z_b, &row);
  kernel.merge(b.blocks.get(), wants, &row);
  finish(n, row, b.blocks.get(), b);
  for (int64_t k = 0; k < num_blocks; ++k)
    finish_block(n, k, row, b.blocks[k].max, keeps_row ? b.row + k * kBlock : nullptr, b);
}

// Whether the rows are cut over the threads that the problem is worth.
template <class C>
bool cuts_rows(const Kernel<C>& kernel) {
  return kernel.useful_threads() > 1 && kernel.split_rows();
}

// Scans every row and calls finish(n, row state, blocks, buffers) for each that is not ignored, ignored(n) for the
// others. finish_block(n, k, row state, block maximum, exponentials, buffers) comes afterwards for every block of a
// scanned row; the exponentials exp(s - block maximum) only with keeps_row, from the scan or, where rows are split,
// from scanning again.
//
// Rows are independent, so threads take rows. Few long rows (decode) are cut instead, into the blocks that a row is
// scanned in anyway: the same partial sums, merged in the same order, so the same bits.
template <class C, class Ignored, class Finish, class FinishBlock>
void for_each_row(const Kernel<C>& kernel, const ScanWants& wants, bool keeps_row, const Ignored& ignored,
                  const Finish& finish, const FinishBlock& finish_block) {
  const FlushSubnormals
      flush;  // in every part alike, or the bits of a tiny loss would depend on how rows are shared out
  const Problem& p = kernel.p;
  const int threads = kernel.useful_threads();
  const int64_t num_blocks = kernel.num_blocks;
  if (!cuts_rows(kernel)) {
    auto buffers = make_buffers<C>(p, threads, keeps_row);
    parallel_for(p.num_rows, threads, kernel.rows_per_chunk(), [&](int64_t n, int t) {
      whole_row(kernel, wants, keeps_row, n, buffers[static_cast<size_t>(t)], ignored, finish, finish_block);
    });
    return;
  }
  auto buffers = make_buffers<C>(p, threads, false);
  std::vector<BlockState> blocks(static_cast<size_t>(p.num_rows * num_blocks));
  std::vector<RowState> rows;
  for (int64_t n = 0; n < p.num_rows; ++n) rows.push_back(kernel.start(n, wants));
  const auto block_of = [&](int64_t n) { return blocks.data() + n * num_blocks; };
  parallel_for(p.num_rows * num_blocks, threads, 1, [&](int64_t i, int t) {
    const int64_t n = i / num_blocks, k = i % num_blocks;
    Buffers<C>& b = buffers[static_cast<size_t>(t)];
    if (!kernel.ignored(n)) block_of(n)[k] = kernel.scan_block(n, k, wants, b.s, b.z_b, &rows[static_cast<size_t>(n)]);
  });
  for (int64_t n = 0; n < p.num_rows; ++n) {
    RowState& row = rows[static_cast<size_t>(n)];
    if (kernel.ignored(n)) {
      ignored(n);
      continue;
    }
    kernel.merge(block_of(n), wants, &row);
    finish(n, row, block_of(n), buffers[0]);
  }
  parallel_for(p.num_rows * num_blocks, threads, 1, [&](int64_t i, int t) {
    const int64_t n = i / num_blocks, k = i % num_blocks;
    Buffers<C>& b = buffers[static_cast<size_t>(t)];
    if (kernel.ignored(n)) return;
    if (keeps_row) {
      RowState unused;
      kernel.scan_block(n, k, ScanWants{}, b.s, b.z_b, &unused);
    }
    finish_block(n, k, rows[static_cast<size_t>(n)], block_of(n)[k].max, keeps_row ? b.s : nullptr, b);
  });
}

// dscale of each row, its blocks' shares added in their order: by the one thread that has the row, or afterwards.
template <class C>
class ScaleGradients {
 public:
  ScaleGradients(const Kernel<C>& kernel, const Outputs& out)
      : kernel_(kernel), out_(out), places_(kernel.split_rows() ? kernel.num_blocks : 1) {
    if (out.grad_base_scale != nullptr || out.grad_aux_scale != nullptr)
      shares_.resize(static_cast<size_t>(2 * kernel.p.num_rows * places_));
  }
  void add(int64_t n, int64_t k, const ScaleShares& shares) {
    if (shares_.empty()) return;
    double* place = shares_.data() + 2 * (n * places_ + k % places_);
    place[0] += shares.base;
    place[1] += shares.aux;
  }
  void store() const {
    for (int64_t n = 0; n < kernel_.p.num_rows && !shares_.empty(); ++n) {
      if (kernel_.ignored(n)) continue;
      const double* place = shares_.data() + 2 * n * places_;
      double base = 0, aux = 0;
      for (int64_t k = 0; k < places_; ++k) base += place[2 * k], aux += place[2 * k + 1];
      if (out_.grad_base_scale != nullptr) static_cast<C*>(out_.grad_base_scale)[n] = static_cast<C>(base);
      if (out_.grad_aux_scale != nullptr) static_cast<C*>(out_.grad_aux_scale)[n] = static_cast<C>(aux);
    }
  }

 private:
  const Kernel<C>& kernel_;
  const Outputs& out_;
  const int64_t places_;
  std::vector<double> shares_;
};

}  // namespace

template <class C>
void scan(const Problem& p, const Outputs& out) {
  const Kernel<C> kernel(p);
  const ScanWants wants = wants_of(out);
  for_each_row(
      kernel, wants, false, [&](int64_t n) { kernel.store_ignored_fields(n, out); },
      [&](int64_t n, const RowState& row, const BlockState* blocks, Buffers<C>& b) {
        kernel.store_fields(n, out, kernel.numbers_of(row, wants), row, blocks, b);
      },
      [](int64_t, int64_t, const RowState&, double, const C*, Buffers<C>&) {});
}

namespace {

// A loss and its gradients: what is known before the rows, what is done with each, what is left at the end. The request
// must outlive it.
template <class C>
class LossRows {
 public:
  explicit LossRows(const LossRequest& request)
      : kernel(request.problem),
        p_(request.problem),
        out_(request.out),
        terms_(row_loss_of(request.options.label_smoothing, request.options.z_loss, p_.V)),
        is_smoothed_(request.options.label_smoothing > 0),
        wants_(wants_of(out_)),
        row_loss_(static_cast<size_t>(p_.num_rows), 0.0),
        dscale_(kernel, out_) {
    const LossOptions& options = request.options;
    for (int64_t k = 0; k < kernel.num_blocks && is_smoothed_; ++k) total_weight_ += kernel.sum_of_weights(k);
    divisor_ = options.has_normalizer ? options.normalizer : static_cast<double>(request.num_kept);
    if (!options.has_normalizer && p_.weight != nullptr) {
      divisor_ = 0;
      for (int64_t n = 0; n < p_.num_rows; ++n)
        if (!kernel.ignored(n)) divisor_ += weight_at(kernel.target(n));
    }
    if (!options.mean) divisor_ = 1;
    wants_.weighted |= is_smoothed_;
    const bool wants_dscale = out_.grad_base_scale != nullptr || out_.grad_aux_scale != nullptr;
    wants_grad_ = out_.grad_base != nullptr || out_.grad_aux != nullptr || wants_dscale;
    scaled_ = !wants_dscale && (out_.grad_base == nullptr || p_.base.softcap == 0) &&
              (out_.grad_aux == nullptr || p_.aux.softcap == 0);
    bring_gradients_in(p_, out_);
  }
  LossRows(const LossRows&) = delete;  // its kernel and dscale refer to it

  bool keeps_row() const { return wants_grad_ && scaled_; }

  // one row, by the thread whose buffers these are
  void whole_row(int64_t n, Buffers<C>& b) {
    with_steps([&](const auto&... steps) { auxk::whole_row(kernel, wants_, keeps_row(), n, b, steps...); });
  }
  void all_rows() {
    with_steps([&](const auto&... steps) { for_each_row(kernel, wants_, keeps_row(), steps...); });
  }

  // of all rows, after them
  double value() const {
    dscale_.store();
    double total = 0;
    for (double of_row : row_loss_) total += of_row;
    return total / divisor_;
  }

  const Kernel<C> kernel;

 private:
  // another thread may write the targets while they are read: what was checked is checked again where it is an index
  double weight_at(int64_t v) const {
    if (static_cast<uint64_t>(v) >= static_cast<uint64_t>(p_.V)) return std::numeric_limits<double>::quiet_NaN();
    return p_.weight == nullptr ? 1.0 : static_cast<double>(static_cast<const C*>(p_.weight)[v]);
  }

  typename Kernel<C>::Gradient gradient_of(int64_t n, const RowState& row) const {
    typename Kernel<C>::Gradient g;
    const double lse = row.max + row.log_denom();
    const double G = terms_.G(weight_at(kernel.target(n)), divisor_);
    if (is_smoothed_ || terms_.z_loss > 0)
      g.A = (terms_.A_of_smoothing(total_weight_) + terms_.A_of_z_loss(lse)) / divisor_;
    g.row.p_factor = static_cast<C>(g.A + G);
    g.row.S = static_cast<C>(terms_.S(divisor_));
    g.row.max = static_cast<C>(row.max);
    g.row.log_denom = static_cast<C>(row.log_denom());
    g.target_term = -G * (row.rest / row.denom);
    return g;
  }

  // calls run(ignored, finish, finish_block), as for_each_row takes them
  template <class Run>
  void with_steps(const Run& run) {
    run(
        [&](int64_t n) {
          kernel.store_ignored_fields(n, out_);
          kernel.zero_row(out_, n);
        },
        [&](int64_t n, const RowState& row, const BlockState* blocks, Buffers<C>& b) {
          const RowNumbers<double> numbers = kernel.numbers_of(row, wants_);
          const double of_target = terms_.kept * weight_at(kernel.target(n)) * numbers.nll;
          row_loss_[static_cast<size_t>(n)] = terms_.value(of_target, total_weight_, numbers);
          kernel.store_fields(n, out_, numbers, row, blocks, b);
        },
        [&](int64_t n, int64_t k, const RowState& row, double block_max, const C* e, Buffers<C>& b) {
          if (!wants_grad_) return;
          if (scaled_)
            kernel.scaled_block(n, k, gradient_of(n, row), row, block_max, e, out_);
          else
            dscale_.add(n, k, kernel.backward_block(n, k, gradient_of(n, row), out_, b));
        });
  }

  const Problem& p_;
  const Outputs& out_;
  const RowLoss<double> terms_;
  const bool is_smoothed_;
  ScanWants wants_;
  bool wants_grad_ = false, scaled_ = false;
  double total_weight_ = 0, divisor_ = 1;
  std::vector<double> row_loss_;
  ScaleGradients<C> dscale_;
};

}  // namespace

template <class C>
double loss(const LossRequest& request) {
  LossRows<C> rows(request);
  rows.all_rows();
  return rows.value();
}

// Row by row, for each request in turn, so that all but the first find the base's row in the cache.
template <class C>
std::vector<double> losses(const std::vector<LossRequest>& requests) {
  std::vector<double> values;
  std::vector<std::unique_ptr<LossRows<C>>> all;
  bool keeps_row = false, cuts = false;
  int threads = 1;
  const LossRequest* widest = nullptr;
  for (const LossRequest& request : requests) {
    const Kernel<C> kernel(request.problem);
    cuts |= cuts_rows(kernel);
    threads = std::max(threads, kernel.useful_threads());
    if (widest == nullptr || request.problem.V > widest->problem.V) widest = &request;
  }
  if (cuts || widest == nullptr) {
    for (const LossRequest& request : requests) values.push_back(loss<C>(request));
    return values;
  }
  for (const LossRequest& request : requests) {
    all.push_back(std::make_unique<LossRows<C>>(request));
    keeps_row |= all.back()->keeps_row();
  }
  auto buffers = make_buffers<C>(widest->problem, threads, keeps_row);
  parallel_for(widest->problem.num_rows, threads, all.front()->kernel.rows_per_chunk(), [&](int64_t n, int t) {
    for (auto& rows : all) rows->whole_row(n, buffers[static_cast<size_t>(t)]);
  });
  for (const auto& rows : all) values.push_back(rows->value());
  return values;
}

template <class C>
void backward(const Problem& p, const BackwardInputs& in, const Outputs& out) {
  const Kernel<C> kernel(p);
  bring_gradients_in(p, out);
  ScaleGradients<C> dscale(kernel, out);
  const auto at = [](const void* values, int64_t n) {
    return values == nullptr ? 0.0 : static_cast<double>(static_cast<const C*>(values)[n]);
  };
  const auto gradient_of = [&](int64_t n) {
    typename Kernel<C>::Gradient g;
    const auto coefficient = [&](Coefficient c) { return at(in.coefficients[c], n); };
    const double G = coefficient(kG);
    g.A = coefficient(kA);
    g.row.p_factor = static_cast<C>(g.A + G);
    g.row.C_ = static_cast<C>(coefficient(kC));
    g.row.D = static_cast<C>(coefficient(kD));
    g.row.Q = static_cast<C>(coefficient(kQ));
    g.row.S = static_cast<C>(coefficient(kS));
    g.row.Q_b = static_cast<C>(coefficient(kQ_b));
    g.row.max = static_cast<C>(at(in.max, n));
    g.row.log_denom = static_cast<C>(at(in.log_denom, n));
    g.row.base_max = static_cast<C>(at(in.base_max, n));
    g.row.base_log_denom = static_cast<C>(at(in.base_log_denom, n));
    if (G != 0) g.target_term = G * std::expm1(-at(in.nll, n));
    g.base_target_term = coefficient(kB_b);
    return g;
  };
  const int threads = kernel.useful_threads();
  auto buffers = make_buffers<C>(p, threads, false);
  const int64_t chunk = kernel.split_rows() ? 1 : kernel.num_blocks * kernel.rows_per_chunk();
  parallel_for(p.num_rows * kernel.num_blocks, threads, chunk, [&](int64_t i, int t) {
    const int64_t n = i / kernel.num_blocks, k = i % kernel.num_blocks;
    if (!kernel.ignored(n))
      dscale.add(n, k, kernel.backward_block(n, k, gradient_of(n), out, buffers[static_cast<size_t>(t)]));
    else if (k == 0)
      kernel.zero_row(out, n);
  });
  dscale.store();
}

template <class C>
void rescale(const Problem& p, void* grad, DType dtype, int64_t width, double factor) {
  // a head of width 0 (an adapter of rank 0) has a gradient without elements
  if (factor == 1 || p.num_rows < 1 || width < 1) return;
  const Kernel<C> kernel(p);
  const int64_t row_bytes = width * size_of(dtype);
  parallel_for(p.num_rows, kernel.useful_threads(), kernel.rows_per_chunk(), [&](int64_t n, int) {
    if (!kernel.ignored(n))
      kernel.ops.multiply(static_cast<char*>(grad) + n * row_bytes, dtype, static_cast<C>(factor), width);
  });
}

#define AUXK_INSTANTIATE(C)                                                         \
  template void scan<C>(const Problem&, const Outputs&);                            \
  template double loss<C>(const LossRequest&);                                      \
  template std::vector<double> losses<C>(const std::vector<LossRequest>&);          \
  template void backward<C>(const Problem&, const BackwardInputs&, const Outputs&); \
  template void rescale<C>(const Problem&, void*, DType, int64_t, double);
AUXK_INSTANTIATE(float)
AUXK_INSTANTIATE(double)

}  // namespace auxk
