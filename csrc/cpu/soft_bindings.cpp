// The Python face of soft_embedding.h; see bindings.cpp. auxkernels/soft_embedding/native.py has validated what the
// pointers mean; labels that index tables are checked in C++ too.
#include "soft_bindings.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <string>

#include "small_lookup.h"
#include "soft_embedding.h"

namespace py = pybind11;

namespace auxk {
namespace {

void* pointer(int64_t address) { return reinterpret_cast<void*>(static_cast<intptr_t>(address)); }

DType dtype_of(int64_t code) {
  if (code < 0 || code > 3) throw py::value_error("dtype code must be in [0, 3], got " + std::to_string(code));
  return static_cast<DType>(code);
}

// address, dtype, row stride
using MatrixArguments = std::array<int64_t, 3>;

Matrix matrix_of(const MatrixArguments& a) { return {pointer(a[0]), dtype_of(a[1]), a[2]}; }

// scores, dtype, num_inner, stride_outer, stride_inner, num_rows, K, first_row, temperature, temperature stride, seed,
// mask, mask stride, threads, is_double
using ProblemArguments = std::array<int64_t, 15>;
// temperature (where no pointer is given), gumbel
using ProblemNumbers = std::array<double, 2>;

SoftProblem problem_of(const ProblemArguments& a, const ProblemNumbers& numbers) {
  SoftProblem p;
  p.scores.values = pointer(a[0]);
  p.scores.dtype = dtype_of(a[1]);
  p.scores.num_inner = a[2], p.scores.stride_outer = a[3], p.scores.stride_inner = a[4];
  p.num_rows = a[5], p.K = a[6], p.first_row = a[7];
  p.scores.width = p.K;
  p.temperature = pointer(a[8]), p.temperature_stride = a[9], p.temperature_value = numbers[0];
  p.gumbel = numbers[1], p.seed = static_cast<uint64_t>(a[10]);
  p.mask = static_cast<const uint8_t*>(pointer(a[11])), p.mask_stride = a[12];
  p.threads = static_cast<int>(a[13] < 1 ? 1 : a[13]);
  if (p.num_rows < 0 || p.K < 1 || p.scores.num_inner < 1)
    throw py::value_error("there must be at least one label, got K=" + std::to_string(p.K));
  return p;
}

// max, log_denom, entropy, max_prob, sum_squares, argmax
using RowsArguments = std::array<int64_t, 6>;

SoftRows rows_of(const RowsArguments& a) {
  return {pointer(a[0]), pointer(a[1]), pointer(a[2]),
          pointer(a[3]), pointer(a[4]), static_cast<int64_t*>(pointer(a[5]))};
}

// entropy, max_prob, sum_squares, usage
using UpstreamArguments = std::array<int64_t, 4>;

SoftUpstream upstream_of(const UpstreamArguments& a) {
  return {pointer(a[0]), pointer(a[1]), pointer(a[2]), pointer(a[3])};
}

// k, labels, weights
using SelectionArguments = std::array<int64_t, 3>;

Selection selection_of(const SelectionArguments& a) {
  if (a[0] < 1) throw py::value_error("k must be at least 1, got " + std::to_string(a[0]));
  return {a[0], static_cast<int64_t*>(pointer(a[1])), pointer(a[2])};
}

// tables, dtype, label stride, table stride, num_tables, num_labels, D, stride of the rows from table to table
using TablesArguments = std::array<int64_t, 8>;

Tables tables_of(const TablesArguments& a) {
  if (*std::min_element(a.begin() + 4, a.begin() + 7) < 0)
    throw py::value_error("sizes of tables must not be negative");
  return {{pointer(a[0]), dtype_of(a[1]), a[2]}, a[3], a[4], a[5], a[6], a[7]};
}

bool is_double(const ProblemArguments& a) { return a[14] != 0; }

void py_rows(const ProblemArguments& args, const ProblemNumbers& numbers, const RowsArguments& rows_args,
             const MatrixArguments& probabilities_args) {
  const SoftProblem p = problem_of(args, numbers);
  const SoftRows rows = rows_of(rows_args);
  const Matrix probabilities = matrix_of(probabilities_args);
  py::gil_scoped_release release;
  is_double(args) ? soft_rows<double>(p, rows, probabilities) : soft_rows<float>(p, rows, probabilities);
}

void py_select(const ProblemArguments& args, const ProblemNumbers& numbers, const RowsArguments& rows_args,
               const SelectionArguments& selection_args) {
  const SoftProblem p = problem_of(args, numbers);
  const SoftRows rows = rows_of(rows_args);
  const Selection selection = selection_of(selection_args);
  if (selection.k > p.K) throw py::value_error("k must be at most K, got " + std::to_string(selection.k));
  py::gil_scoped_release release;
  is_double(args) ? soft_select<double>(p, rows, selection) : soft_select<float>(p, rows, selection);
}

void py_backward(const ProblemArguments& args, const ProblemNumbers& numbers, const RowsArguments& rows_args,
                 const MatrixArguments& grad_probabilities_args, const UpstreamArguments& upstream_args,
                 const MatrixArguments& grad_scores_args, int64_t grad_temperature,
                 const MatrixArguments& probabilities_args) {
  const SoftProblem p = problem_of(args, numbers);
  const SoftRows rows = rows_of(rows_args);
  const Matrix grad_probabilities = matrix_of(grad_probabilities_args), grad_scores = matrix_of(grad_scores_args);
  const Matrix probabilities = matrix_of(probabilities_args);
  const SoftUpstream upstream = upstream_of(upstream_args);
  py::gil_scoped_release release;
  const auto run = is_double(args) ? soft_backward<double> : soft_backward<float>;
  run(p, rows, grad_probabilities, upstream, grad_scores, pointer(grad_temperature), probabilities);
}

void py_select_backward(const ProblemArguments& args, const ProblemNumbers& numbers, const RowsArguments& rows_args,
                        const SelectionArguments& selection_args, int64_t grad_weights,
                        const UpstreamArguments& upstream_args, const MatrixArguments& grad_scores_args,
                        int64_t grad_temperature) {
  const SoftProblem p = problem_of(args, numbers);
  const SoftRows rows = rows_of(rows_args);
  const Selection selection = selection_of(selection_args);
  const SoftUpstream upstream = upstream_of(upstream_args);
  const Matrix grad_scores = matrix_of(grad_scores_args);
  for (int64_t i = 0; i < p.num_rows * selection.k; ++i)
    if (selection.labels[i] >= p.K) throw py::value_error("a selected label must be below K");
  py::gil_scoped_release release;
  const auto run = is_double(args) ? soft_select_backward<double> : soft_select_backward<float>;
  run(p, rows, selection, pointer(grad_weights), upstream, grad_scores, pointer(grad_temperature));
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

// scores, table, N, K, D, temperature, threads, then max and log_denom (N numbers each, one after the other; 0: not
// wanted)
SmallLookup small_of(int64_t scores, int64_t table, int64_t N, int64_t K, int64_t D, double temperature, int threads,
                     int64_t state) {
  if (N < 0 || K < 1 || D < 1) throw py::value_error("there must be a label and a column, got K=" + std::to_string(K));
  SmallLookup p;
  p.scores = static_cast<const float*>(pointer(scores)), p.table = static_cast<const float*>(pointer(table));
  p.N = N, p.K = K, p.D = D, p.factor = 1 / static_cast<float>(temperature), p.threads = std::max(threads, 1);
  p.max = static_cast<float*>(pointer(state)), p.log_denom = state == 0 ? nullptr : p.max + N;
  return p;
}

void py_small(int64_t scores, int64_t table, int64_t N, int64_t K, int64_t D, double temperature, int threads,
              int64_t state, int64_t mixture) {
  const SmallLookup p = small_of(scores, table, N, K, D, temperature, threads, state);
  py::gil_scoped_release release;
  small_lookup(p, static_cast<float*>(pointer(mixture)));
}

void py_small_backward(int64_t scores, int64_t table, int64_t N, int64_t K, int64_t D, double temperature, int threads,
                       int64_t state, int64_t grad, int64_t grad_scores, int64_t grad_table) {
  const SmallLookup p = small_of(scores, table, N, K, D, temperature, threads, state);
  py::gil_scoped_release release;
  small_lookup_backward(p, static_cast<const float*>(pointer(grad)), static_cast<float*>(pointer(grad_scores)),
                        static_cast<float*>(pointer(grad_table)));
}

}  // namespace

void bind_soft_embedding(py::module_& m) {
  m.def("soft_rows", &py_rows);
  m.def("soft_select", &py_select);
  m.def("soft_backward", &py_backward);
  m.def("soft_select_backward", &py_select_backward);
  m.def("gather_labels", &py_gather);
  m.def("gather_products", &py_products);
  m.def("scatter_labels", &py_scatter);
  m.def("small_lookup", &py_small);
  m.def("small_lookup_backward", &py_small_backward);
}

}  // namespace auxk
