#include "soft_embedding.h"

#include "soft_row.h"

namespace auxk {
namespace {

// task(n, buffers, threads) for each row: threads share the rows or, where these are few and long, the parts of each
template <class C, class Task>
void for_each_soft_row(const SoftProblem& p, const Task& task) {
  const int threads = threads_for(p.num_rows * p.K, p.threads);
  if (p.num_rows < threads && p.K > kPart) {
    SoftBuffers<C> buffers(p.K);
    for (int64_t n = 0; n < p.num_rows; ++n) task(n, buffers, threads);
    return;
  }
  std::vector<SoftBuffers<C>> buffers;
  for (int t = 0; t < threads; ++t) buffers.emplace_back(p.K);
  const int64_t rows_at_once = std::max<int64_t>(1, std::min<int64_t>(16, kWorthAThread / p.K));
  parallel_for(p.num_rows, threads, rows_at_once,
               [&](int64_t n, int t) { task(n, buffers[static_cast<size_t>(t)], 1); });
}

constexpr int64_t kFewRows = 8;

bool has_scores_only(const SoftProblem& p) {
  return p.gumbel == 0 && p.mask == nullptr && p.scores.num_inner >= p.num_rows;
}

// run(rows, first, last, scratch) for all rows of a softmax without noise and mask
template <class C, class Run>
void for_plain_rows(const SoftProblem& p, SoftmaxRows<C> rows, const Run& run) {
  if (p.num_rows == 0) return;
  rows.scores = {const_cast<void*>(p.scores.values), p.scores.dtype, p.scores.stride_inner};
  rows.num_rows = p.num_rows, rows.K = p.K;
  std::vector<C> factors;
  if (p.temperature == nullptr) {
    rows.factor = inverse_of(static_cast<C>(p.temperature_value));
  } else {
    const C* temperature = static_cast<const C*>(p.temperature);
    factors.reserve(static_cast<size_t>(p.num_rows));
    for (int64_t n = 0; n < p.num_rows; ++n) factors.push_back(inverse_of(temperature[n * p.temperature_stride]));
    rows.factors = factors.data();
  }
  const int threads = threads_for(p.num_rows * p.K, p.threads);
  const int64_t at_once = std::max(kWorthAThread / p.K, int64_t{1});
  const int64_t scratch_size = 2 * (p.K + 16);
  const std::unique_ptr<C[]> scratch(new C[static_cast<size_t>(threads * scratch_size)]);
  parallel_for((p.num_rows + at_once - 1) / at_once, threads, 0, [&](int64_t i, int thread) {
    run(rows, i * at_once, std::min((i + 1) * at_once, p.num_rows), scratch.get() + thread * scratch_size);
  });
}

}  // namespace

template <class C>
void soft_rows(const SoftProblem& p, const SoftFields& fields, const Matrix& probabilities) {
  const bool has_statistics = fields.entropy != nullptr || fields.max_prob != nullptr || fields.sum_squares != nullptr;
  const bool can_be_split = p.num_rows < kFewRows && p.K > kPart;  // not by `threads`: bits shall not depend on it
  if (has_scores_only(p) && !has_statistics && fields.argmax == nullptr && !can_be_split) {
    SoftmaxRows<C> plain;
    plain.max = static_cast<C*>(fields.max), plain.log_denom = static_cast<C*>(fields.log_denom);
    plain.probabilities = probabilities;
    return for_plain_rows(p, plain, block_ops<C>().softmax_rows);
  }
  const SoftKernel<C> kernel(p);
  for_each_soft_row<C>(
      p, [&](int64_t n, SoftBuffers<C>& b, int threads) { kernel.forward_row(n, fields, probabilities, b, threads); });
}

template <class C>
void soft_select(const SoftProblem& p, const SoftFields& fields, const Selection& selection) {
  const SoftKernel<C> kernel(p);
  for_each_soft_row<C>(
      p, [&](int64_t n, SoftBuffers<C>& b, int threads) { kernel.select_row(n, fields, selection, b, threads); });
}

template <class C>
void soft_backward(const SoftProblem& p, const SoftFields& fields, const Matrix& grad_probabilities,
                   const SoftUpstream& up, const Matrix& grad_scores, void* grad_temperature,
                   const Matrix& probabilities) {
  const bool has_upstream = up.entropy != nullptr || up.max_prob != nullptr || up.sum_squares != nullptr ||
                            up.usage != nullptr || grad_temperature != nullptr;
  const bool wants_gradient = grad_scores.values != nullptr;
  if (has_scores_only(p) && !has_upstream && wants_gradient == (grad_probabilities.values != nullptr)) {
    SoftmaxRows<C> plain;
    plain.max = static_cast<C*>(fields.max), plain.log_denom = static_cast<C*>(fields.log_denom);
    plain.grad_probabilities = grad_probabilities, plain.grad_scores = grad_scores;
    plain.probabilities = probabilities;
    return for_plain_rows(p, plain, block_ops<C>().softmax_rows_backward);
  }
  const SoftKernel<C> kernel(p);
  for_each_soft_row<C>(p, [&](int64_t n, SoftBuffers<C>& b, int) {
    kernel.backward_row(n, fields, grad_probabilities, up, grad_scores, grad_temperature, probabilities, b);
  });
}

template <class C>
void soft_select_backward(const SoftProblem& p, const SoftFields& fields, const Selection& selection,
                          const void* grad_weights, const SoftUpstream& up, const Matrix& grad_scores,
                          void* grad_temperature) {
  const SoftKernel<C> kernel(p);
  for_each_soft_row<C>(p, [&](int64_t n, SoftBuffers<C>& b, int) {
    std::vector<Label<C>> kept;
    kernel.select_backward_row(n, fields, selection, static_cast<const C*>(grad_weights), up, grad_scores,
                               grad_temperature, b, kept);
  });
}

#define AUXK_INSTANTIATE(C)                                                                                   \
  template void soft_rows<C>(const SoftProblem&, const SoftFields&, const Matrix&);                           \
  template void soft_select<C>(const SoftProblem&, const SoftFields&, const Selection&);                      \
  template void soft_backward<C>(const SoftProblem&, const SoftFields&, const Matrix&, const SoftUpstream&,   \
                                 const Matrix&, void*, const Matrix&);                                        \
  template void soft_select_backward<C>(const SoftProblem&, const SoftFields&, const Selection&, const void*, \
                                        const SoftUpstream&, const Matrix&, void*);
AUXK_INSTANTIATE(float)
AUXK_INSTANTIATE(double)

}  // namespace auxk
