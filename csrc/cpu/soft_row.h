// One row of soft_embedding: softmax with noise and mask, selection, gradients.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "parallel.h"
#include "row.h"
#include "simd/block_ops.h"
#include "soft_embedding.h"

namespace auxk {

constexpr int64_t kWorthAThread = 1 << 14;  // elements; a row's softmax costs several times what a copy does

inline int threads_for(int64_t elements, int threads) {
  return static_cast<int>(std::clamp<int64_t>(elements / kWorthAThread, 1, threads));
}

// Long rows are worked on in parts, which threads may share: what a part gives is merged in a fixed order.
constexpr int64_t kPart = 4 * kBlock;

template <class C>
struct Label {
  C value;
  int64_t label;
  bool better_than(const Label& other) const {
    return value > other.value || (value == other.value && label < other.label);
  }
};

template <class C>
struct RowPart {
  C largest = 0;
  int64_t num_nan = 0;
  double denom = 0, times_x = 0, squares = 0;
  Others others;  // where the entropy is wanted
  std::vector<Label<C>> kept;
};

// 1 / T, a finite one where T is too small or too large for it: 0 times infinity would be NaN. NaN for T = 0.
template <class C>
C inverse_of(C T) {
  const C inverse = 1 / T;
  if (T == 0) return std::numeric_limits<C>::quiet_NaN();
  if (inverse > std::numeric_limits<C>::max()) return std::numeric_limits<C>::max();
  return inverse >= 0 && inverse < std::numeric_limits<C>::min() ? std::numeric_limits<C>::min() : inverse;
}

// One thread's rows of K numbers.
template <class C>
struct SoftBuffers {
  std::unique_ptr<C[]> storage;
  C *v, *p, *g;
  std::vector<RowPart<C>> parts;

  explicit SoftBuffers(int64_t K)
      : storage(new C[static_cast<size_t>(3 * (K + 16))]), parts(static_cast<size_t>((K + kPart - 1) / kPart)) {
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

  // calls task(first, size) for each block of columns from `begin` to `end`
  template <class Task>
  void blocks(int64_t begin, int64_t end, const Task& task) const {
    for (int64_t first = begin; first < end; first += kBlock) task(first, std::min(kBlock, end - first));
  }
  template <class Task>
  void blocks(const Task& task) const {
    blocks(0, p.K, task);
  }
  // calls task(part, begin, end) for each part of the columns
  template <class Task>
  void for_each_part(std::vector<RowPart<C>>& parts, int threads, const Task& task) const {
    parallel_for(static_cast<int64_t>(parts.size()), threads, 1, [&](int64_t i, int) {
      task(parts[static_cast<size_t>(i)], i * kPart, std::min((i + 1) * kPart, p.K));
    });
  }

  // v = scores + noise, -inf where forbidden; returns the largest
  C load(int64_t n, int64_t begin, int64_t end, C* v) const {
    const char* row =
        static_cast<const char*>(p.scores.values) + Kernel<C>::row_start(p.scores, n) * size_of(p.scores.dtype);
    C largest = static_cast<C>(kMinusInf);
    blocks(begin, end, [&](int64_t first, int64_t size) {
      const SourceBlock<C> block{row + first * size_of(p.scores.dtype), p.scores.dtype, C(1), C(0)};
      C m = ops.load(block, size, v + first);
      if (p.gumbel != 0) ops.add_gumbel(v + first, static_cast<C>(p.gumbel), p.seed, p.first_row + n, first, size);
      if (p.mask != nullptr) ops.forbid(v + first, p.mask + n * p.mask_stride + first, size);
      if (p.gumbel != 0 || p.mask != nullptr) m = ops.largest(v + first, size);
      largest = std::max(largest, m);
    });
    return largest;
  }

  // the same with what else a part has to give; (the row's largest, whether it has a NaN)
  template <class Task>
  std::pair<C, bool> load_parts(int64_t n, SoftBuffers<C>& b, int threads, const Task& task) const {
    for_each_part(b.parts, threads, [&](RowPart<C>& part, int64_t begin, int64_t end) {
      part.largest = load(n, begin, end, b.v);
      part.num_nan = 0;
      blocks(begin, end, [&](int64_t first, int64_t size) { part.num_nan += ops.count_nan(b.v + first, size); });
      task(part, begin, end);
    });
    C largest = static_cast<C>(kMinusInf);
    bool poisoned = false;
    for (const RowPart<C>& part : b.parts) {
      largest = std::max(largest, part.largest);
      poisoned = poisoned || part.num_nan != 0;
    }
    return {largest, poisoned};
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
    ops.finish({place, m.dtype, factor, C(0)}, x, size, false, place, false);
  }

  void store_fields(const SoftFields& fields, int64_t n, double max, double log_denom, double entropy, double max_prob,
                    double sum_squares, int64_t argmax) const {
    put<C>(fields.max, n, max);
    put<C>(fields.log_denom, n, log_denom);
    put<C>(fields.entropy, n, entropy);
    put<C>(fields.max_prob, n, max_prob);
    put<C>(fields.sum_squares, n, sum_squares);
    if (fields.argmax != nullptr) fields.argmax[n] = argmax;
  }

  void forward_row(int64_t n, const SoftFields& fields, const Matrix& probabilities, SoftBuffers<C>& b,
                   int threads) const {
    const auto [largest, poisoned] = load_parts(n, b, threads, [](RowPart<C>&, int64_t, int64_t) {});
    const C m = largest, inverse = inverse_of(temperature(n));
    if (m == static_cast<C>(kMinusInf) && !poisoned) {
      store_fields(fields, n, kMinusInf, 0, 0, 0, 0, -1);
      return fill(probabilities, n, 0, b.p);
    }
    const int64_t best = fields.argmax == nullptr ? 0 : argmax(b.v, m, poisoned);
    for_each_part(b.parts, threads, [&](RowPart<C>& part, int64_t begin, int64_t end) {
      part.denom = part.times_x = part.squares = 0;
      part.others = Others();
      blocks(begin, end, [&](int64_t first, int64_t size) { add_sums(fields, m, inverse, b.v + first, size, &part); });
    });
    double denom = 0, times_x = 0, squares = 0;
    Others others;
    for (const RowPart<C>& part : b.parts) {
      denom += part.denom, times_x += part.times_x, squares += part.squares;
      others.sum += part.others.sum, others.num_largest += part.others.num_largest;
    }
    const double log_denom = log_of_denom(denom, fields.entropy == nullptr ? -1 : others.without_largest());
    store_fields(fields, n, poisoned ? static_cast<double>(NAN) : static_cast<double>(m), log_denom,
                 log_denom - times_x / denom, 1 / denom, squares / (denom * denom), best);
    if (probabilities.values == nullptr) return;
    for_each_part(b.parts, threads, [&](RowPart<C>&, int64_t begin, int64_t end) {
      blocks(begin, end, [&](int64_t first, int64_t size) {
        store(probabilities, n, first, size, b.v + first, static_cast<C>(1 / denom));
      });
    });
  }

  // x := exp((x - m) inverse) and the sums that the wanted fields are made of
  void add_sums(const SoftFields& fields, C m, C inverse, C* x, int64_t size, RowPart<C>* part) const {
    const Ahead none;
    ops.shift_and_scale(x, m, inverse, size);
    if (fields.entropy != nullptr) {
      const ScanSums<C> sums = ops.scan_sums(x, nullptr, C(0), C(0), size, true, false, none, none);
      part->denom += static_cast<double>(sums.sum), part->times_x += static_cast<double>(sums.sum_times_s);
      part->others.add(0, 0, 1, static_cast<double>(sums.sum), static_cast<double>(sums.others));
    } else {
      part->denom += static_cast<double>(ops.exp_sum(x, C(0), size, none, none));
    }
    if (fields.sum_squares != nullptr) part->squares += static_cast<double>(ops.dot(x, x, size));
  }

  void backward_row(int64_t n, const SoftFields& fields, const Matrix& grad_probabilities, const SoftUpstream& up,
                    const Matrix& grad_scores, void* grad_temperature, const Matrix& probabilities,
                    SoftBuffers<C>& b) const {
    const C largest = number<C>(fields.max, n), log_denom = number<C>(fields.log_denom, n), T = temperature(n);
    const C inverse = inverse_of(T);
    const bool is_empty = largest == static_cast<C>(kMinusInf);
    if (is_empty || largest != largest) {
      const double value = is_empty ? 0 : static_cast<double>(NAN);
      fill(grad_scores, n, value, b.p);
      fill(probabilities, n, value, b.p);
      return put<C>(grad_temperature, n, value);
    }
    load(n, 0, p.K, b.v);
    const bool keeps_log = grad_temperature != nullptr || up.entropy != nullptr;
    double mean = 0;
    blocks([&](int64_t first, int64_t size) {
      C *x = b.v + first, *p_k = b.p + first, *g = b.g + first;
      ops.shift_and_scale(x, largest, inverse, size);
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
      if (up.max_prob != nullptr && fields.argmax[n] >= first && fields.argmax[n] < first + size)
        b.g[fields.argmax[n]] += number<C>(up.max_prob, n);
      mean += static_cast<double>(ops.dot(p_k, g, size));
    });
    double times_log = 0;
    blocks([&](int64_t first, int64_t size) {
      C *x = b.v + first, *p_k = b.p + first, *g = b.g + first;
      ops.center(g, p_k, static_cast<C>(mean), size);
      if (grad_temperature != nullptr) times_log += static_cast<double>(ops.dot(g, x, size));
      // a NaN is one in every factor, or rounding to 16 bits might lose it
      if (grad_scores.values != nullptr)
        store(grad_scores, n, first, size, g, mean == mean ? inverse : static_cast<C>(NAN));
      if (probabilities.values != nullptr) store(probabilities, n, first, size, p_k, C(1));
    });
    put<C>(grad_temperature, n, -times_log / static_cast<double>(T));
  }

  // -- selection ----------------------------------------------------------------------------------

  // the k best labels of v from `begin` to `end`, best first; -inf is not allowed
  void select(const C* v, int64_t begin, int64_t end, int64_t k, std::vector<Label<C>>* kept) const {
    const auto worst_first = [](const Label<C>& a, const Label<C>& b) { return a.better_than(b); };
    kept->clear();
    C bound = static_cast<C>(kMinusInf);
    for (int64_t i = ops.next_above(v, bound, begin, end); i < end; i = ops.next_above(v, bound, i + 1, end)) {
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

  // the k best of all parts, best first, in the first part
  std::vector<Label<C>>& best_of(std::vector<RowPart<C>>& parts, int64_t k) const {
    std::vector<Label<C>>& kept = parts.front().kept;
    for (size_t i = 1; i < parts.size(); ++i) kept.insert(kept.end(), parts[i].kept.begin(), parts[i].kept.end());
    if (parts.size() > 1) {
      std::sort(kept.begin(), kept.end(), [](const Label<C>& a, const Label<C>& b) { return a.better_than(b); });
      kept.resize(std::min(kept.size(), static_cast<size_t>(k)));
    }
    return kept;
  }

  void select_row(int64_t n, const SoftFields& fields, const Selection& selection, SoftBuffers<C>& b,
                  int threads) const {
    const int64_t k = selection.k;
    const auto [largest, poisoned] = load_parts(n, b, threads, [&](RowPart<C>& part, int64_t begin, int64_t end) {
      part.kept.clear();
      if (threads > 1 && part.num_nan == 0) select(b.v, begin, end, k, &part.kept);
    });
    // one thread looks through the whole row: what is found early saves looking at most of the rest
    if (threads == 1 && !poisoned) select(b.v, 0, p.K, k, &b.parts.front().kept);
    const C inverse = inverse_of(temperature(n));
    int64_t* labels = selection.labels + n * k;
    C* weights = selection.weights == nullptr ? b.p : static_cast<C*>(selection.weights) + n * k;
    std::fill(labels, labels + k, int64_t{-1});
    std::fill(weights, weights + k, C(0));
    if (poisoned) {
      std::fill(labels, labels + k, int64_t{0});
      std::fill(weights, weights + k, static_cast<C>(NAN));
      return store_fields(fields, n, NAN, NAN, NAN, NAN, NAN, argmax(b.v, largest, true));
    }
    const std::vector<Label<C>>& kept = best_of(b.parts, k);
    if (kept.empty()) return store_fields(fields, n, kMinusInf, 0, 0, 0, 0, -1);
    const double others = weigh(kept, largest, inverse, weights), log_denom = std::log1p(others);
    double entropy = log_denom, squares = 0;
    for (size_t j = 0; j < kept.size(); ++j) {
      labels[j] = kept[j].label;
      const double p_j = static_cast<double>(weights[j]);
      if (p_j != 0) entropy -= p_j * static_cast<double>((kept[j].value - largest) * inverse);
      squares += p_j * p_j;
    }
    const double max_prob = 1 / (1 + others);
    store_fields(fields, n, static_cast<double>(largest), log_denom, entropy, max_prob, squares, kept[0].label);
  }

  // weights = softmax of the kept labels; returns the denominator without the 1 of the first, NaN if that is none
  double weigh(const std::vector<Label<C>>& kept, C largest, C inverse, C* weights) const {
    const int64_t size = static_cast<int64_t>(kept.size());
    for (int64_t j = 0; j < size; ++j) weights[j] = std::exp((kept[static_cast<size_t>(j)].value - largest) * inverse);
    double others = static_cast<double>(weights[0]) - 1;
    for (int64_t j = 1; j < size; ++j) others += static_cast<double>(weights[j]);
    for (int64_t j = 0; j < size; ++j) weights[j] = static_cast<C>(static_cast<double>(weights[j]) / (1 + others));
    return others;
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

  void select_backward_row(int64_t n, const SoftFields& fields, const Selection& selection, const C* grad_weights,
                           const SoftUpstream& up, const Matrix& grad_scores, void* grad_temperature, SoftBuffers<C>& b,
                           std::vector<Label<C>>& kept) const {
    const int64_t k = selection.k;
    const int64_t* labels = selection.labels + n * k;
    C* weights = static_cast<C*>(selection.weights) + n * k;
    const C largest = number<C>(fields.max, n), T = temperature(n);
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
    const C inverse = inverse_of(T);
    weigh(kept, largest, inverse, weights);
    double mean = 0, times_log = 0;
    const int64_t size = static_cast<int64_t>(kept.size());
    const C log_denom = number<C>(fields.log_denom, n);
    const auto log_p = [&](int64_t j) { return (kept[static_cast<size_t>(j)].value - largest) * inverse - log_denom; };
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
      if (grad_scores.values != nullptr) store(grad_scores, n, labels[j], 1, &du, inverse);
    }
    put<C>(grad_temperature, n, -times_log / static_cast<double>(T));
  }
};

}  // namespace auxk
