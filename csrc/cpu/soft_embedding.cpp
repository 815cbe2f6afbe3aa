#include "soft_embedding.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "block_ops.h"
#include "parallel.h"
#include "row_kernel.h"

namespace auxk {
namespace {

constexpr int64_t kWorthAThread = 1 << 14;  // elements; a row's softmax costs several times what a copy does

int threads_for(int64_t elements, int threads) {
  return static_cast<int>(std::clamp<int64_t>(elements / kWorthAThread, 1, threads));
}

// One thread's rows of K numbers.
template <class C>
struct SoftBuffers {
  std::unique_ptr<C[]> storage;
  C *v, *p, *g;

  explicit SoftBuffers(int64_t K) : storage(new C[static_cast<size_t>(3 * (K + 16))]) {
    v = storage.get();
    p = v + K + 16;
    g = p + K + 16;
  }
};

template <class C>
char* row_of(const Matrix& m, int64_t n) {
  return static_cast<char*>(m.values) + n * m.stride * size_of(m.dtype);
}

template <class C>
C number(const void* values, int64_t n) {
  return values == nullptr ? C(0) : static_cast<const C*>(values)[n];
}

template <class C>
void put(void* values, int64_t n, double x) {
  if (values != nullptr) static_cast<C*>(values)[n] = static_cast<C>(x);
}

template <class C>
class SoftKernel {
 public:
  explicit SoftKernel(const SoftProblem& problem) : p(problem), ops(block_ops<C>()) {}

  const SoftProblem& p;
  const BlockOps<C>& ops;

  C temperature(int64_t n) const {
    return p.temperature == nullptr ? static_cast<C>(p.temperature_value)
                                    : static_cast<const C*>(p.temperature)[n * p.temperature_stride];
  }

  // calls task(first, size) for each block of columns
  template <class Task>
  void blocks(const Task& task) const {
    for (int64_t first = 0; first < p.K; first += kBlock) task(first, std::min(kBlock, p.K - first));
  }

  // v = scores + noise, -inf where forbidden; returns the largest
  C load(int64_t n, C* v) const {
    const char* row =
        static_cast<const char*>(p.scores.values) + Kernel<C>::row_start(p.scores, n) * size_of(p.scores.dtype);
    C largest = static_cast<C>(kMinusInf);
    blocks([&](int64_t first, int64_t size) {
      const SourceBlock<C> block{row + first * size_of(p.scores.dtype), p.scores.dtype, C(1), C(0)};
      C m = ops.load(block, size, v + first);
      if (p.gumbel != 0) ops.add_gumbel(v + first, static_cast<C>(p.gumbel), p.seed, p.first_row + n, first, size);
      if (p.mask != nullptr) ops.forbid(v + first, p.mask + n * p.mask_stride + first, size);
      if (p.gumbel != 0 || p.mask != nullptr) m = ops.largest(v + first, size);
      largest = std::max(largest, m);
    });
    return largest;
  }

  bool has_nan(const C* v) const {
    int64_t count = 0;
    blocks([&](int64_t first, int64_t size) { count += ops.count_nan(v + first, size); });
    return count != 0;
  }

  // the first NaN, else the first of the largest
  int64_t argmax(const C* v, C largest, bool poisoned) const {
    if (poisoned)
      for (int64_t i = 0; i < p.K; ++i)
        if (v[i] != v[i]) return i;
    return ops.next_above(v, std::nextafter(largest, static_cast<C>(kMinusInf)), 0, p.K);
  }

  void fill(const Matrix& m, int64_t n, double value, C* scratch) const {
    if (m.values == nullptr) return;
    std::fill(scratch, scratch + std::min(p.K, kBlock), static_cast<C>(value));
    blocks([&](int64_t first, int64_t size) { store(m, n, first, size, scratch, C(1)); });
  }

  // row n of m, from `first` on, = factor * x
  void store(const Matrix& m, int64_t n, int64_t first, int64_t size, const C* x, C factor) const {
    char* place = row_of<C>(m, n) + first * size_of(m.dtype);
    ops.store_scaled(x, factor, C(0), nullptr, size, -1, C(0), m.dtype, place, false);
  }

  void store_rows(const SoftRows& rows, int64_t n, double max, double log_denom, double entropy, double max_prob,
                  double sum_squares, int64_t argmax) const {
    put<C>(rows.max, n, max);
    put<C>(rows.log_denom, n, log_denom);
    put<C>(rows.entropy, n, entropy);
    put<C>(rows.max_prob, n, max_prob);
    put<C>(rows.sum_squares, n, sum_squares);
    if (rows.argmax != nullptr) rows.argmax[n] = argmax;
  }

  void forward_row(int64_t n, const SoftRows& rows, const Matrix& probabilities, SoftBuffers<C>& b) const {
    const C largest = load(n, b.v), inverse = 1 / temperature(n);
    const bool poisoned = has_nan(b.v);
    if (largest == static_cast<C>(kMinusInf) && !poisoned) {
      store_rows(rows, n, kMinusInf, 0, 0, 0, 0, -1);
      return fill(probabilities, n, 0, b.p);
    }
    const int64_t best = rows.argmax == nullptr ? 0 : argmax(b.v, largest, poisoned);
    double denom = 0, times_x = 0, squares = 0;
    const bool moments = rows.entropy != nullptr;
    blocks([&](int64_t first, int64_t size) {
      C* x = b.v + first;
      ops.shift_and_scale(x, largest, inverse, size);
      const Ahead none;
      if (moments) {
        const ScanSums<C> sums = ops.scan_sums(x, nullptr, C(0), C(0), size, true, false, none, none);
        denom += static_cast<double>(sums.sum), times_x += static_cast<double>(sums.sum_times_s);
      } else {
        denom += static_cast<double>(ops.exp_sum(x, C(0), size, none, none));
      }
      if (rows.sum_squares != nullptr) squares += static_cast<double>(ops.dot(x, x, size));
    });
    const double log_denom = std::log(denom);
    store_rows(rows, n, poisoned ? static_cast<double>(NAN) : static_cast<double>(largest), log_denom,
               log_denom - times_x / denom, 1 / denom, squares / (denom * denom), best);
    if (probabilities.values == nullptr) return;
    blocks([&](int64_t first, int64_t size) {
      store(probabilities, n, first, size, b.v + first, static_cast<C>(1 / denom));
    });
  }

  void backward_row(int64_t n, const SoftRows& rows, const Matrix& grad_probabilities, const SoftUpstream& up,
                    const Matrix& grad_scores, void* grad_temperature, const Matrix& probabilities,
                    SoftBuffers<C>& b) const {
    const C largest = number<C>(rows.max, n), log_denom = number<C>(rows.log_denom, n), T = temperature(n);
    const bool is_empty = largest == static_cast<C>(kMinusInf);
    if (is_empty || largest != largest) {
      const double value = is_empty ? 0 : static_cast<double>(NAN);
      fill(grad_scores, n, value, b.p);
      fill(probabilities, n, value, b.p);
      return put<C>(grad_temperature, n, value);
    }
    load(n, b.v);
    const bool keeps_log = grad_temperature != nullptr || up.entropy != nullptr;
    double mean = 0;
    blocks([&](int64_t first, int64_t size) {
      C *x = b.v + first, *p_k = b.p + first, *g = b.g + first;
      ops.shift_and_scale(x, largest, 1 / T, size);
      std::copy(x, x + size, p_k);
      ops.exp_sum(p_k, log_denom, size, Ahead{}, Ahead{});
      if (keeps_log) ops.shift_and_scale(x, log_denom, C(1), size);  // log p
      if (grad_probabilities.values == nullptr) {
        std::fill(g, g + size, C(0));
      } else {
        const Matrix& m = grad_probabilities;
        ops.load({row_of<C>(m, n) + first * size_of(m.dtype), m.dtype, C(1), C(0)}, size, g);
      }
      if (up.usage != nullptr) ops.add_where(g, p_k, static_cast<const C*>(up.usage) + first, C(1), size);
      if (up.sum_squares != nullptr) ops.add_where(g, p_k, p_k, 2 * number<C>(up.sum_squares, n), size);
      if (up.entropy != nullptr) ops.add_where(g, p_k, x, -number<C>(up.entropy, n), size);
      if (up.max_prob != nullptr && rows.argmax[n] >= first && rows.argmax[n] < first + size)
        b.g[rows.argmax[n]] += number<C>(up.max_prob, n);
      mean += static_cast<double>(ops.dot(p_k, g, size));
    });
    double times_log = 0;
    blocks([&](int64_t first, int64_t size) {
      C *x = b.v + first, *p_k = b.p + first, *g = b.g + first;
      ops.center(g, p_k, static_cast<C>(mean), size);
      if (grad_temperature != nullptr) times_log += static_cast<double>(ops.dot(g, x, size));
      // a NaN is one in every factor, or rounding to 16 bits might lose it
      if (grad_scores.values != nullptr)
        store(grad_scores, n, first, size, g, mean == mean ? 1 / T : static_cast<C>(NAN));
      if (probabilities.values != nullptr) store(probabilities, n, first, size, p_k, C(1));
    });
    put<C>(grad_temperature, n, -times_log / static_cast<double>(T));
  }

  // -- selection ----------------------------------------------------------------------------------

  struct Label {
    C value;
    int64_t label;
    bool better_than(const Label& other) const {
      return value > other.value || (value == other.value && label < other.label);
    }
  };

  // the k best labels of v, best first; -inf is not allowed
  void select(const C* v, int64_t k, std::vector<Label>* kept) const {
    const auto worst_first = [](const Label& a, const Label& b) { return a.better_than(b); };
    kept->clear();
    C bound = static_cast<C>(kMinusInf);
    for (int64_t i = ops.next_above(v, bound, 0, p.K); i < p.K; i = ops.next_above(v, bound, i + 1, p.K)) {
      if (static_cast<int64_t>(kept->size()) == k) {
        std::pop_heap(kept->begin(), kept->end(), worst_first);
        kept->pop_back();
      }
      kept->push_back({v[i], i});
      std::push_heap(kept->begin(), kept->end(), worst_first);
      if (static_cast<int64_t>(kept->size()) == k) bound = kept->front().value;
    }
    std::sort_heap(kept->begin(), kept->end(), worst_first);
  }

  void select_row(int64_t n, const SoftRows& rows, const Selection& selection, SoftBuffers<C>& b,
                  std::vector<Label>& kept) const {
    const int64_t k = selection.k;
    const C largest = load(n, b.v), inverse = 1 / temperature(n);
    int64_t* labels = selection.labels + n * k;
    C* weights = selection.weights == nullptr ? b.p : static_cast<C*>(selection.weights) + n * k;
    std::fill(labels, labels + k, int64_t{-1});
    std::fill(weights, weights + k, C(0));
    if (has_nan(b.v)) {
      std::fill(labels, labels + k, int64_t{0});
      std::fill(weights, weights + k, static_cast<C>(NAN));
      return store_rows(rows, n, NAN, NAN, NAN, NAN, NAN, argmax(b.v, largest, true));
    }
    select(b.v, k, &kept);
    if (kept.empty()) return store_rows(rows, n, kMinusInf, 0, 0, 0, 0, -1);
    const double denom = weigh(kept, largest, inverse, weights);
    double entropy = std::log(denom), squares = 0;
    for (size_t j = 0; j < kept.size(); ++j) {
      labels[j] = kept[j].label;
      const double p_j = static_cast<double>(weights[j]);
      if (p_j != 0) entropy -= p_j * static_cast<double>((kept[j].value - largest) * inverse);
      squares += p_j * p_j;
    }
    store_rows(rows, n, static_cast<double>(largest), std::log(denom), entropy, 1 / denom, squares, kept[0].label);
  }

  // weights = softmax of the kept labels; returns the denominator
  double weigh(const std::vector<Label>& kept, C largest, C inverse, C* weights) const {
    const int64_t size = static_cast<int64_t>(kept.size());
    double denom = 0;
    for (int64_t j = 0; j < size; ++j) weights[j] = std::exp((kept[static_cast<size_t>(j)].value - largest) * inverse);
    for (int64_t j = 0; j < size; ++j) denom += static_cast<double>(weights[j]);
    for (int64_t j = 0; j < size; ++j) weights[j] = static_cast<C>(static_cast<double>(weights[j]) / denom);
    return denom;
  }

  // score + noise of one label
  C value_at(int64_t n, int64_t label) const {
    const int64_t size = size_of(p.scores.dtype), first = label / 4 * 4;
    const char* row = static_cast<const char*>(p.scores.values) + Kernel<C>::row_start(p.scores, n) * size;
    C v[4] = {0, 0, 0, 0};
    ops.load({row + label * size, p.scores.dtype, C(1), C(0)}, 1, v + label - first);
    if (p.gumbel != 0) ops.add_gumbel(v, static_cast<C>(p.gumbel), p.seed, p.first_row + n, first, 4);
    return v[label - first];
  }

  void select_backward_row(int64_t n, const SoftRows& rows, const Selection& selection, const C* grad_weights,
                           const SoftUpstream& up, const Matrix& grad_scores, void* grad_temperature, SoftBuffers<C>& b,
                           std::vector<Label>& kept) const {
    const int64_t k = selection.k;
    const int64_t* labels = selection.labels + n * k;
    C* weights = static_cast<C*>(selection.weights) + n * k;
    const C largest = number<C>(rows.max, n), T = temperature(n);
    if (largest != largest) {
      std::fill(weights, weights + k, static_cast<C>(NAN));
      fill(grad_scores, n, NAN, b.p);
      return put<C>(grad_temperature, n, NAN);
    }
    kept.clear();
    for (int64_t j = 0; j < k && labels[j] >= 0; ++j) kept.push_back({value_at(n, labels[j]), labels[j]});
    std::fill(weights, weights + k, C(0));
    fill(grad_scores, n, 0, b.p);  // only now: it may be the scores' own memory
    if (kept.empty()) return put<C>(grad_temperature, n, 0);
    weigh(kept, largest, 1 / T, weights);
    double mean = 0, times_log = 0;
    const int64_t size = static_cast<int64_t>(kept.size());
    const C log_denom = number<C>(rows.log_denom, n);
    const auto log_p = [&](int64_t j) { return (kept[static_cast<size_t>(j)].value - largest) / T - log_denom; };
    for (int64_t j = 0; j < size; ++j) {
      b.g[j] = grad_weights == nullptr ? C(0) : grad_weights[n * k + j];
      b.g[j] += number<C>(up.usage, labels[j]) + 2 * number<C>(up.sum_squares, n) * weights[j];
      if (up.entropy != nullptr && weights[j] != 0) b.g[j] -= number<C>(up.entropy, n) * log_p(j);
      if (j == 0) b.g[j] += number<C>(up.max_prob, n);
      if (weights[j] != 0) mean += static_cast<double>(weights[j] * b.g[j]);
    }
    for (int64_t j = 0; j < size; ++j) {
      const C du = weights[j] == 0 ? C(0) : weights[j] * (b.g[j] - static_cast<C>(mean));
      if (du != 0) times_log += static_cast<double>(du * log_p(j));
      if (grad_scores.values != nullptr) store(grad_scores, n, labels[j], 1, &du, 1 / T);
    }
    put<C>(grad_temperature, n, -times_log / static_cast<double>(T));
  }
};

template <class C, class Task>
void for_each_soft_row(const SoftProblem& p, const Task& task) {
  const int threads = threads_for(p.num_rows * p.K, p.threads);
  std::vector<SoftBuffers<C>> buffers;
  for (int t = 0; t < threads; ++t) buffers.emplace_back(p.K);
  const int64_t rows_at_once = std::max<int64_t>(1, std::min<int64_t>(16, kWorthAThread / p.K));
  parallel_for(p.num_rows, threads, rows_at_once, [&](int64_t n, int t) { task(n, buffers[static_cast<size_t>(t)]); });
}

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
    rows.factor = 1 / static_cast<C>(p.temperature_value);
  } else {
    const C* temperature = static_cast<const C*>(p.temperature);
    factors.reserve(static_cast<size_t>(p.num_rows));
    for (int64_t n = 0; n < p.num_rows; ++n) factors.push_back(1 / temperature[n * p.temperature_stride]);
    rows.factors = factors.data();
  }
  const int threads = threads_for(p.num_rows * p.K, p.threads);
  const int64_t at_once = std::max(kWorthAThread / p.K, int64_t{1});
  const int64_t room = 2 * (p.K + 16);
  const std::unique_ptr<C[]> scratch(new C[static_cast<size_t>(threads * room)]);
  parallel_for((p.num_rows + at_once - 1) / at_once, threads, 0, [&](int64_t i, int thread) {
    run(rows, i * at_once, std::min((i + 1) * at_once, p.num_rows), scratch.get() + thread * room);
  });
}

}  // namespace

template <class C>
void soft_rows(const SoftProblem& p, const SoftRows& rows, const Matrix& probabilities) {
  const bool has_statistics = rows.entropy != nullptr || rows.max_prob != nullptr || rows.sum_squares != nullptr;
  if (has_scores_only(p) && !has_statistics && rows.argmax == nullptr) {
    SoftmaxRows<C> plain;
    plain.max = static_cast<C*>(rows.max), plain.log_denom = static_cast<C*>(rows.log_denom);
    plain.probabilities = probabilities;
    return for_plain_rows(p, plain, block_ops<C>().softmax_rows);
  }
  const SoftKernel<C> kernel(p);
  for_each_soft_row<C>(p, [&](int64_t n, SoftBuffers<C>& b) { kernel.forward_row(n, rows, probabilities, b); });
}

template <class C>
void soft_select(const SoftProblem& p, const SoftRows& rows, const Selection& selection) {
  const SoftKernel<C> kernel(p);
  for_each_soft_row<C>(p, [&](int64_t n, SoftBuffers<C>& b) {
    std::vector<typename SoftKernel<C>::Label> kept;
    kernel.select_row(n, rows, selection, b, kept);
  });
}

template <class C>
void soft_backward(const SoftProblem& p, const SoftRows& rows, const Matrix& grad_probabilities, const SoftUpstream& up,
                   const Matrix& grad_scores, void* grad_temperature, const Matrix& probabilities) {
  const bool has_upstream = up.entropy != nullptr || up.max_prob != nullptr || up.sum_squares != nullptr ||
                            up.usage != nullptr || grad_temperature != nullptr;
  const bool wants_gradient = grad_scores.values != nullptr;
  if (has_scores_only(p) && !has_upstream && wants_gradient == (grad_probabilities.values != nullptr)) {
    SoftmaxRows<C> plain;
    plain.max = static_cast<C*>(rows.max), plain.log_denom = static_cast<C*>(rows.log_denom);
    plain.grad_probabilities = grad_probabilities, plain.grad_scores = grad_scores;
    plain.probabilities = probabilities;
    return for_plain_rows(p, plain, block_ops<C>().softmax_rows_backward);
  }
  const SoftKernel<C> kernel(p);
  for_each_soft_row<C>(p, [&](int64_t n, SoftBuffers<C>& b) {
    kernel.backward_row(n, rows, grad_probabilities, up, grad_scores, grad_temperature, probabilities, b);
  });
}

template <class C>
void soft_select_backward(const SoftProblem& p, const SoftRows& rows, const Selection& selection,
                          const void* grad_weights, const SoftUpstream& up, const Matrix& grad_scores,
                          void* grad_temperature) {
  const SoftKernel<C> kernel(p);
  for_each_soft_row<C>(p, [&](int64_t n, SoftBuffers<C>& b) {
    std::vector<typename SoftKernel<C>::Label> kept;
    kernel.select_backward_row(n, rows, selection, static_cast<const C*>(grad_weights), up, grad_scores,
                               grad_temperature, b, kept);
  });
}

// -- rows of tables -------------------------------------------------------------------------------

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
      void* place = const_cast<void*>(row_block<C>(t, rows, table, n, first, C(1)).values);
      ops.store_scaled(sum, C(1), C(0), nullptr, size, -1, C(0), rows.dtype, place, stream);
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

#define AUXK_INSTANTIATE(C)                                                                                 \
  template void soft_rows<C>(const SoftProblem&, const SoftRows&, const Matrix&);                           \
  template void soft_select<C>(const SoftProblem&, const SoftRows&, const Selection&);                      \
  template void soft_backward<C>(const SoftProblem&, const SoftRows&, const Matrix&, const SoftUpstream&,   \
                                 const Matrix&, void*, const Matrix&);                                      \
  template void soft_select_backward<C>(const SoftProblem&, const SoftRows&, const Selection&, const void*, \
                                        const SoftUpstream&, const Matrix&, void*);                         \
  template void gather_labels<C>(const Tables&, const Selection&, int64_t, const Matrix&, int);             \
  template void gather_products<C>(const Tables&, const Selection&, int64_t, const Matrix&, void*, int);    \
  template void scatter_labels<C>(const Tables&, const Selection&, int64_t, const Matrix&, int);
AUXK_INSTANTIATE(float)
AUXK_INSTANTIATE(double)

}  // namespace auxk
