// The Python face of soft_embedding.h; see bindings.cpp. auxkernels/soft_embedding/native.py has validated what the
// pointers mean; labels that index tables are checked in C++ too.
#include "soft_bindings.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <string>
#include <vector>

#include "common/arguments.h"
#include "common/names.h"
#include "small_lookup.h"
#include "soft_embedding.h"

namespace py = pybind11;

namespace auxk {
namespace {

struct MatrixSlot {
  enum : size_t { kValues, kDType, kRowStride, kCount };
};
using MatrixArguments = std::array<int64_t, MatrixSlot::kCount>;

Matrix matrix_of(const MatrixArguments& a) {
  return {pointer(a[MatrixSlot::kValues]), dtype_of(a[MatrixSlot::kDType]), a[MatrixSlot::kRowStride]};
}

struct SoftProblemSlot {
  enum : size_t {
    kScores,
    kDType,
    kNumInner,
    kStrideOuter,
    kStrideInner,
    kNumRows,
    kNumLabels,
    kFirstRow,
    kTemperature,
    kTemperatureStride,
    kSeed,
    kMask,
    kMaskStride,
    kThreads,
    kIsDouble,
    kCount
  };
};
using SoftProblemArguments = std::array<int64_t, SoftProblemSlot::kCount>;
struct SoftProblemNumber {
  enum : size_t { kTemperature, kGumbel, kCount };  // temperature: where no pointer is given
};
using SoftProblemNumbers = std::array<double, SoftProblemNumber::kCount>;

bool is_double(const SoftProblemArguments& a) { return a[SoftProblemSlot::kIsDouble] != 0; }

SoftProblem problem_of(const SoftProblemArguments& a, const SoftProblemNumbers& numbers) {
  using Slot = SoftProblemSlot;
  SoftProblem p;
  p.scores.values = pointer(a[Slot::kScores]);
  p.scores.dtype = dtype_of(a[Slot::kDType]);
  p.scores.num_inner = a[Slot::kNumInner];
  p.scores.stride_outer = a[Slot::kStrideOuter], p.scores.stride_inner = a[Slot::kStrideInner];
  p.num_rows = a[Slot::kNumRows], p.K = a[Slot::kNumLabels], p.first_row = a[Slot::kFirstRow];
  p.scores.width = p.K;
  p.temperature = pointer(a[Slot::kTemperature]), p.temperature_stride = a[Slot::kTemperatureStride];
  p.temperature_value = numbers[SoftProblemNumber::kTemperature];
  p.gumbel = numbers[SoftProblemNumber::kGumbel], p.seed = static_cast<uint64_t>(a[Slot::kSeed]);
  p.mask = static_cast<const uint8_t*>(pointer(a[Slot::kMask])), p.mask_stride = a[Slot::kMaskStride];
  p.threads = std::max(static_cast<int>(a[Slot::kThreads]), 1);
  if (p.num_rows < 0 || p.K < 1 || p.scores.num_inner < 1)
    throw py::value_error("there must be at least one label, got K=" + std::to_string(p.K));
  return p;
}

// auxkernels.soft_embedding.request.ROW_FIELDS
#define AUXK_SOFT_FIELDS(X)  \
  X(Max, max)                \
  X(LogDenom, log_denom)     \
  X(Entropy, entropy)        \
  X(MaxProb, max_prob)       \
  X(SumSquares, sum_squares) \
  X(Argmax, argmax)
struct SoftFieldSlot {
  enum : size_t { AUXK_SOFT_FIELDS(AUXK_ENUMERATOR) kCount };
};
using SoftFieldArguments = std::array<int64_t, SoftFieldSlot::kCount>;

SoftFields fields_of(const SoftFieldArguments& a) {
  using Slot = SoftFieldSlot;
  SoftFields fields;
  fields.max = pointer(a[Slot::kMax]), fields.log_denom = pointer(a[Slot::kLogDenom]);
  fields.entropy = pointer(a[Slot::kEntropy]), fields.max_prob = pointer(a[Slot::kMaxProb]);
  fields.sum_squares = pointer(a[Slot::kSumSquares]);
  fields.argmax = static_cast<int64_t*>(pointer(a[Slot::kArgmax]));
  return fields;
}

// auxkernels.soft_embedding.request.Upstream
#define AUXK_SOFT_UPSTREAM(X) X(Entropy, entropy) X(MaxProb, max_prob) X(SumSquares, sum_squares) X(Usage, usage)
struct SoftUpstreamSlot {
  enum : size_t { AUXK_SOFT_UPSTREAM(AUXK_ENUMERATOR) kCount };
};
using SoftUpstreamArguments = std::array<int64_t, SoftUpstreamSlot::kCount>;

SoftUpstream upstream_of(const SoftUpstreamArguments& a) {
  using Slot = SoftUpstreamSlot;
  SoftUpstream upstream;
  upstream.entropy = pointer(a[Slot::kEntropy]), upstream.max_prob = pointer(a[Slot::kMaxProb]);
  upstream.sum_squares = pointer(a[Slot::kSumSquares]), upstream.usage = pointer(a[Slot::kUsage]);
  return upstream;
}

struct SelectionSlot {
  enum : size_t { kNumSelected, kLabels, kWeights, kCount };
};
using SelectionArguments = std::array<int64_t, SelectionSlot::kCount>;

Selection selection_of(const SelectionArguments& a) {
  using Slot = SelectionSlot;
  const int64_t k = a[Slot::kNumSelected];
  if (k < 1) throw py::value_error("k must be at least 1, got " + std::to_string(k));
  return {k, static_cast<int64_t*>(pointer(a[Slot::kLabels])), pointer(a[Slot::kWeights])};
}

struct TablesSlot {
  enum : size_t {
    kTables,
    kDType,
    kStrideLabel,
    kStrideTable,
    kNumTables,
    kNumLabels,
    kWidth,
    kStrideRowsTable,
    kCount
  };
};
using TablesArguments = std::array<int64_t, TablesSlot::kCount>;

Tables tables_of(const TablesArguments& a) {
  using Slot = TablesSlot;
  Tables t;
  t.tables = {pointer(a[Slot::kTables]), dtype_of(a[Slot::kDType]), a[Slot::kStrideLabel]};
  t.stride_table = a[Slot::kStrideTable], t.stride_rows_table = a[Slot::kStrideRowsTable];
  t.num_tables = a[Slot::kNumTables], t.num_labels = a[Slot::kNumLabels], t.D = a[Slot::kWidth];
  if (std::min({t.num_tables, t.num_labels, t.D}) < 0) throw py::value_error("sizes of tables must not be negative");
  return t;
}

void py_rows(const SoftProblemArguments& args, const SoftProblemNumbers& numbers, const SoftFieldArguments& fields_args,
             const MatrixArguments& probabilities_args) {
  const SoftProblem p = problem_of(args, numbers);
  const SoftFields fields = fields_of(fields_args);
  const Matrix probabilities = matrix_of(probabilities_args);
  py::gil_scoped_release release;
  is_double(args) ? soft_rows<double>(p, fields, probabilities) : soft_rows<float>(p, fields, probabilities);
}

void py_select(const SoftProblemArguments& args, const SoftProblemNumbers& numbers,
               const SoftFieldArguments& fields_args, const SelectionArguments& selection_args) {
  const SoftProblem p = problem_of(args, numbers);
  const SoftFields fields = fields_of(fields_args);
  const Selection selection = selection_of(selection_args);
  if (selection.k > p.K) throw py::value_error("k must be at most K, got " + std::to_string(selection.k));
  py::gil_scoped_release release;
  is_double(args) ? soft_select<double>(p, fields, selection) : soft_select<float>(p, fields, selection);
}

void py_backward(const SoftProblemArguments& args, const SoftProblemNumbers& numbers,
                 const SoftFieldArguments& fields_args, const MatrixArguments& grad_probabilities_args,
                 const SoftUpstreamArguments& upstream_args, const MatrixArguments& grad_scores_args,
                 int64_t grad_temperature, const MatrixArguments& probabilities_args) {
  const SoftProblem p = problem_of(args, numbers);
  const SoftFields fields = fields_of(fields_args);
  const Matrix grad_probabilities = matrix_of(grad_probabilities_args), grad_scores = matrix_of(grad_scores_args);
  const Matrix probabilities = matrix_of(probabilities_args);
  const SoftUpstream upstream = upstream_of(upstream_args);
  py::gil_scoped_release release;
  const auto run = is_double(args) ? soft_backward<double> : soft_backward<float>;
  run(p, fields, grad_probabilities, upstream, grad_scores, pointer(grad_temperature), probabilities);
}

void py_select_backward(const SoftProblemArguments& args, const SoftProblemNumbers& numbers,
                        const SoftFieldArguments& fields_args, const SelectionArguments& selection_args,
                        int64_t grad_weights, const SoftUpstreamArguments& upstream_args,
                        const MatrixArguments& grad_scores_args, int64_t grad_temperature) {
  const SoftProblem p = problem_of(args, numbers);
  const SoftFields fields = fields_of(fields_args);
  const Selection selection = selection_of(selection_args);
  const SoftUpstream upstream = upstream_of(upstream_args);
  const Matrix grad_scores = matrix_of(grad_scores_args);
  for (int64_t i = 0; i < p.num_rows * selection.k; ++i)
    if (selection.labels[i] >= p.K) throw py::value_error("a selected label must be below K");
  py::gil_scoped_release release;
  const auto run = is_double(args) ? soft_select_backward<double> : soft_select_backward<float>;
  run(p, fields, selection, pointer(grad_weights), upstream, grad_scores, pointer(grad_temperature));
}

void py_gather(const TablesArguments& tables_args, const SelectionArguments& selection_args, int64_t num_rows,
               const MatrixArguments& rows_args, int threads, bool in_double) {
  const Tables tables = tables_of(tables_args);
  const Selection selection = selection_of(selection_args);
  const Matrix rows = matrix_of(rows_args);
  py::gil_scoped_release release;
  (in_double ? gather_labels<double> : gather_labels<float>)(tables, selection, num_rows, rows, std::max(threads, 1));
}

void py_products(const TablesArguments& tables_args, const SelectionArguments& selection_args, int64_t num_rows,
                 const MatrixArguments& rows_args, int64_t out, int threads, bool in_double) {
  const Tables tables = tables_of(tables_args);
  const Selection selection = selection_of(selection_args);
  const Matrix rows = matrix_of(rows_args);
  py::gil_scoped_release release;
  const auto run = in_double ? gather_products<double> : gather_products<float>;
  run(tables, selection, num_rows, rows, pointer(out), std::max(threads, 1));
}

void py_scatter(const TablesArguments& tables_args, const SelectionArguments& selection_args, int64_t num_rows,
                const MatrixArguments& rows_args, int threads, bool in_double) {
  const Tables tables = tables_of(tables_args);
  const Selection selection = selection_of(selection_args);
  const Matrix rows = matrix_of(rows_args);
  py::gil_scoped_release release;
  (in_double ? scatter_labels<double> : scatter_labels<float>)(tables, selection, num_rows, rows, std::max(threads, 1));
}

// contiguous scores and their dtype, N rows from row `start` on, K, temperature, threads, and the addresses of all rows'
// max and log_denom (0: not wanted): most of what a problem can have these have not
struct PlainRows {
  SoftProblem problem;
  SoftFields fields;
};
PlainRows plain_of(int64_t scores, int64_t dtype, int64_t N, int64_t K, int64_t start, double temperature, int threads,
                   int64_t max, int64_t log_denom) {
  if (N < 0 || K < 1) throw py::value_error("there must be at least one label, got K=" + std::to_string(K));
  if (dtype > 2) throw py::value_error("plain rows have no float64");
  PlainRows rows;
  SoftProblem& p = rows.problem;
  p.scores.dtype = dtype_of(dtype);
  p.scores.values = pointer(scores + start * K * size_of(p.scores.dtype));
  p.scores.num_inner = std::max<int64_t>(N, 1), p.scores.stride_outer = 0;
  p.scores.stride_inner = p.scores.width = p.K = K;
  p.num_rows = N, p.first_row = start, p.temperature_value = temperature, p.threads = std::max(threads, 1);
  if (max != 0) {
    rows.fields.max = static_cast<float*>(pointer(max)) + start;
    rows.fields.log_denom = static_cast<float*>(pointer(log_denom)) + start;
  }
  return rows;
}

void py_plain(int64_t scores, int64_t dtype, int64_t N, int64_t K, int64_t start, double temperature, int threads,
              int64_t max, int64_t log_denom, int64_t probabilities, int64_t probabilities_dtype,
              int64_t probabilities_stride) {
  const PlainRows rows = plain_of(scores, dtype, N, K, start, temperature, threads, max, log_denom);
  const Matrix out = matrix_of({probabilities, probabilities_dtype, probabilities_stride});
  py::gil_scoped_release release;
  soft_rows<float>(rows.problem, rows.fields, out);
}

// grad_probabilities of these rows and grad_scores of all, with their dtypes; the rows of each are contiguous
void py_plain_backward(int64_t scores, int64_t dtype, int64_t N, int64_t K, int64_t start, double temperature,
                       int threads, int64_t max, int64_t log_denom, int64_t grad_probabilities, int64_t grad_dtype,
                       int64_t grad_scores, int64_t probabilities, int64_t probabilities_dtype) {
  const PlainRows rows = plain_of(scores, dtype, N, K, start, temperature, threads, max, log_denom);
  const Matrix grad = matrix_of({grad_probabilities, grad_dtype, K});
  const int64_t offset = grad_scores == 0 ? 0 : start * K * size_of(rows.problem.scores.dtype);
  const Matrix of_scores = matrix_of({grad_scores + offset, dtype, K});
  const Matrix out = matrix_of({probabilities, probabilities_dtype, K});
  py::gil_scoped_release release;
  soft_backward<float>(rows.problem, rows.fields, grad, SoftUpstream{}, of_scores, nullptr, out);
}

// scores, table, their dtypes, N, K, D, temperature, threads, then max and log_denom (N numbers each, one after the
// other; 0: not wanted)
SmallLookup small_of(int64_t scores, int64_t table, int64_t scores_dtype, int64_t table_dtype, int64_t N, int64_t K,
                     int64_t D, double temperature, int threads, int64_t state) {
  if (N < 0 || K < 1 || D < 1) throw py::value_error("there must be a label and a column, got K=" + std::to_string(K));
  if (std::max(scores_dtype, table_dtype) > 2) throw py::value_error("small lookups have no float64");
  SmallLookup p;
  p.scores = pointer(scores), p.table = pointer(table);
  p.scores_dtype = dtype_of(scores_dtype), p.table_dtype = dtype_of(table_dtype);
  p.N = N, p.K = K, p.D = D, p.factor = 1 / static_cast<float>(temperature), p.threads = std::max(threads, 1);
  p.max = static_cast<float*>(pointer(state)), p.log_denom = state == 0 ? nullptr : p.max + N;
  return p;
}

void py_small(int64_t scores, int64_t table, int64_t scores_dtype, int64_t table_dtype, int64_t N, int64_t K, int64_t D,
              double temperature, int threads, int64_t state, int64_t mixture) {
  const SmallLookup p = small_of(scores, table, scores_dtype, table_dtype, N, K, D, temperature, threads, state);
  py::gil_scoped_release release;
  small_lookup(p, pointer(mixture));
}

void py_small_backward(int64_t scores, int64_t table, int64_t scores_dtype, int64_t table_dtype, int64_t N, int64_t K,
                       int64_t D, double temperature, int threads, int64_t grad, int64_t grad_scores,
                       int64_t grad_table) {
  const SmallLookup p = small_of(scores, table, scores_dtype, table_dtype, N, K, D, temperature, threads, 0);
  py::gil_scoped_release release;
  small_lookup_backward(p, pointer(grad), pointer(grad_scores), pointer(grad_table));
}

}  // namespace

void bind_soft_embedding(py::module_& m) {
  // lists that go by number; Python compares these names with its own
  m.def("soft_field_names", [] { return std::vector<std::string>{AUXK_SOFT_FIELDS(AUXK_STRING)}; });
  m.def("soft_upstream_names", [] { return std::vector<std::string>{AUXK_SOFT_UPSTREAM(AUXK_STRING)}; });
  m.def("soft_rows", &py_rows);
  m.def("soft_select", &py_select);
  m.def("soft_backward", &py_backward);
  m.def("soft_select_backward", &py_select_backward);
  m.def("gather_labels", &py_gather);
  m.def("gather_products", &py_products);
  m.def("scatter_labels", &py_scatter);
  m.def("plain_softmax", &py_plain);
  m.def("plain_softmax_backward", &py_plain_backward);
  m.def("small_lookup", &py_small);
  m.def("small_lookup_backward", &py_small_backward);
}

}  // namespace auxk
