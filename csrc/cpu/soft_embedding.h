// Softmax-weighted label embeddings on CPU: the softmax of rows of scores, its gradient, selection of labels, and sums
// of table rows. The mathematics is in auxkernels/soft_embedding/request.py; products with the table are a library's.
#pragma once

#include <cstdint>

#include "cross_entropy.h"
#include "simd/block_ops.h"

namespace auxk {

struct SoftProblem {
  Source scores;  // without scale and softcap
  int64_t num_rows = 0, K = 0;
  int64_t first_row = 0;              // number of the first row, for its noise
  const void* temperature = nullptr;  // compute dtype; null: temperature_value
  double temperature_value = 1;
  int64_t temperature_stride = 0;  // 0: one for all rows, 1: one per row
  double gumbel = 0;               // 0: no noise
  uint64_t seed = 0;
  const uint8_t* mask = nullptr;  // not 0: forbidden; null: none
  int64_t mask_stride = 0;        // 0: one row for all
  int threads = 1;
};

// Each null or one number per row, of the compute dtype. A row without an allowed label has max -inf and zeros.
struct SoftFields {
  void* max = nullptr;        // of scores + noise, before the temperature
  void* log_denom = nullptr;  // log sum exp((v - max) / T)
  void* entropy = nullptr;
  void* max_prob = nullptr;
  void* sum_squares = nullptr;
  int64_t* argmax = nullptr;  // -1 without an allowed label
};

// The k likeliest labels of each row, likeliest first: [num_rows, k]. A row with fewer has labels -1, of weight 0.
struct Selection {
  int64_t k = 0;
  int64_t* labels = nullptr;
  void* weights = nullptr;  // compute dtype; null: not wanted, or all 1
};

// Upstream gradients of the statistics, each null or there.
struct SoftUpstream {
  const void* entropy = nullptr;
  const void* max_prob = nullptr;
  const void* sum_squares = nullptr;
  const void* usage = nullptr;  // K numbers: of the sum of each label's probability over the rows
};

// C is the compute type: float, or double if the scores are float64.

// the statistics, and the probabilities
template <class C>
void soft_rows(const SoftProblem&, const SoftFields&, const Matrix& probabilities);
// the statistics of the softmax over the k likeliest labels
template <class C>
void soft_select(const SoftProblem&, const SoftFields&, const Selection&);
// From max, log_denom and argmax of `fields` and the gradient of the probabilities: gradients of the scores and of the
// temperature (one number per row), and the probabilities again.
template <class C>
void soft_backward(const SoftProblem&, const SoftFields& fields, const Matrix& grad_probabilities, const SoftUpstream&,
                   const Matrix& grad_scores, void* grad_temperature, const Matrix& probabilities);
// The same over selected labels: grad_weights is [num_rows, k] of the compute dtype, the selection's weights are made.
template <class C>
void soft_select_backward(const SoftProblem&, const SoftFields& fields, const Selection&, const void* grad_weights,
                          const SoftUpstream&, const Matrix& grad_scores, void* grad_temperature);

// num_tables tables [num_labels, D] with rows [num_rows, D] for each
struct Tables {
  Matrix tables;  // stride: of a label
  int64_t stride_table = 0;
  int64_t num_tables = 1, num_labels = 0, D = 0;
  int64_t stride_rows_table = 0;  // between the rows of one table and those of the next
};

// rows[l, n] = sum_j weights[n, j] tables[l, labels[n, j]]
template <class C>
void gather_labels(const Tables&, const Selection&, int64_t num_rows, const Matrix& rows, int threads);
// out[n, j] = sum_l <rows[l, n], tables[l, labels[n, j]]>
template <class C>
void gather_products(const Tables&, const Selection&, int64_t num_rows, const Matrix& rows, void* out, int threads);
// tables[l, labels[n, j]] += weights[n, j] rows[l, n], in the order of the rows; tables are of the compute dtype
template <class C>
void scatter_labels(const Tables&, const Selection&, int64_t num_rows, const Matrix& rows, int threads);

}  // namespace auxk
