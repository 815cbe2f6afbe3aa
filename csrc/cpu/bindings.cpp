// The Python face of the CPU kernels: pointers, sizes, strides in elements, dtype codes. No torch headers.
// auxkernels/cross_entropy/native.py has validated what the pointers mean; what indexes memory (targets) is checked
// here too.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "add.h"
#include "block_bindings.h"
#include "common/arguments.h"
#include "cross_entropy.h"
#include "pages.h"
#include "sampling_bindings.h"
#include "simd/block_ops.h"
#include "soft_bindings.h"

namespace py = pybind11;

namespace auxk {
namespace {

Problem threaded_problem_of(const ProblemArguments& a, const Source& base, const Source& aux) {
  Problem p = problem_of(a, base, aux);
  p.threads = std::max(static_cast<int>(a[ProblemSlot::kThreadsOrStream]), 1);
  return p;
}

// returns how many rows are kept
int64_t check_targets(const Problem& p) {
  int64_t num_kept = 0;
  const int64_t bad = first_bad_target(p, &num_kept);
  if (bad >= 0) throw py::index_error(std::to_string(bad) + " " + std::to_string(target_of(p, bad)));
  return num_kept;
}

void py_scan(const ProblemArguments& args, const SourceArguments& base, const SourceNumbers& base_numbers,
             const SourceArguments& aux, const SourceNumbers& aux_numbers, const OutputArguments& outputs) {
  const Problem p = threaded_problem_of(args, source_of(base, base_numbers), source_of(aux, aux_numbers));
  const Outputs out = outputs_of(outputs);
  py::gil_scoped_release release;
  check_targets(p);
  is_double(args) ? scan<double>(p, out) : scan<float>(p, out);
}

LossRequest loss_request_of(const ProblemArguments& args, const SourceArguments& base,
                            const SourceNumbers& base_numbers, const SourceArguments& aux,
                            const SourceNumbers& aux_numbers, const OutputArguments& outputs, bool has_normalizer,
                            double normalizer, double label_smoothing, double z_loss, bool mean) {
  LossRequest request;
  request.problem = threaded_problem_of(args, source_of(base, base_numbers), source_of(aux, aux_numbers));
  // an empty tensor has no address
  if (request.problem.target == nullptr && request.problem.num_rows > 0)
    throw py::value_error("target must be given for a loss, got none");
  request.out = outputs_of(outputs);
  LossOptions& options = request.options;
  options.label_smoothing = label_smoothing, options.z_loss = z_loss, options.mean = mean;
  options.has_normalizer = has_normalizer, options.normalizer = normalizer;
  return request;
}

void put_loss(const ProblemArguments& args, int64_t address, double value) {
  if (is_double(args))
    *static_cast<double*>(pointer(address)) = value;
  else
    *static_cast<float*>(pointer(address)) = static_cast<float>(value);
}

void py_loss(const ProblemArguments& args, const SourceArguments& base, const SourceNumbers& base_numbers,
             const SourceArguments& aux, const SourceNumbers& aux_numbers, const OutputArguments& outputs,
             int64_t loss_out, bool has_normalizer, double normalizer, double label_smoothing, double z_loss,
             bool mean) {
  LossRequest request = loss_request_of(args, base, base_numbers, aux, aux_numbers, outputs, has_normalizer, normalizer,
                                        label_smoothing, z_loss, mean);
  py::gil_scoped_release release;
  request.num_kept = check_targets(request.problem);
  put_loss(args, loss_out, is_double(args) ? loss<double>(request) : loss<float>(request));
}

// py_loss of contiguous matrices by single numbers alone, which are a third of the time of lists of them: each number of
// a list is a Python object that is asked for. `floats` and `ints` are where the wanted fields go, stacked in the order
// of FIELDS; aux 0: none.
void py_small_loss(int64_t num_rows, int64_t V, int64_t target, bool target_is_int32, int64_t ignore_index,
                   int64_t weight, int threads, int64_t base, int64_t base_dtype, int64_t base_width,
                   int64_t base_scale, bool base_scale_is_per_row, double base_scale_value, double base_softcap,
                   int64_t aux, int64_t aux_dtype, int64_t aux_width, int64_t aux_scale, bool aux_scale_is_per_row,
                   double aux_scale_value, double aux_softcap, int64_t wanted, int64_t floats, int64_t ints,
                   int64_t grad_base, int64_t grad_aux, int64_t loss_out, bool has_normalizer, double normalizer,
                   double label_smoothing, double z_loss, bool mean) {
  ProblemArguments args{};
  args[ProblemSlot::kNumRows] = num_rows, args[ProblemSlot::kVocabSize] = V;
  args[ProblemSlot::kTarget] = target, args[ProblemSlot::kTargetIsInt32] = target_is_int32;
  args[ProblemSlot::kIgnoreIndex] = ignore_index, args[ProblemSlot::kWeight] = weight;
  args[ProblemSlot::kThreadsOrStream] = threads;
  const SourceArguments of_base{base, base_dtype, base_width, std::max(num_rows, int64_t{1}),
                                0,    base_width, base_scale, base_scale_is_per_row};
  const SourceArguments of_aux{aux, aux_dtype, aux_width, std::max(num_rows, int64_t{1}),
                               0,   aux_width, aux_scale, aux_scale_is_per_row};
  OutputArguments outputs{};
  for (size_t field = 0; field < kNumFields; ++field) {
    if ((wanted >> field & 1) == 0) continue;
    int64_t& place = field < static_cast<size_t>(kNumFloatFields) ? floats : ints;
    outputs[field] = place;
    place += num_rows * (field < static_cast<size_t>(kNumFloatFields) ? sizeof(float) : sizeof(int64_t));
  }
  outputs[OutputSlot::kGradBase] = grad_base, outputs[OutputSlot::kGradBaseDType] = base_dtype;
  outputs[OutputSlot::kGradAux] = grad_aux, outputs[OutputSlot::kGradAuxDType] = aux_dtype;
  py_loss(args, of_base, {base_scale_value, base_softcap}, of_aux, {aux_scale_value, aux_softcap}, outputs, loss_out,
          has_normalizer, normalizer, label_smoothing, z_loss, mean);
}

// What py_loss takes, once for each loss; all of the same rows and compute dtype. Targets of all are checked first; the
// error of a bad one says whose it is.
using LossArguments = std::tuple<ProblemArguments, SourceArguments, SourceNumbers, SourceArguments, SourceNumbers,
                                 OutputArguments, int64_t, bool, double, double, double, bool>;

void py_losses(const std::vector<LossArguments>& given) {
  std::vector<LossRequest> requests;
  for (const LossArguments& one : given) {
    requests.push_back(std::apply(
        [](const auto& args, const auto& base, const auto& base_numbers, const auto& aux, const auto& aux_numbers,
           const auto& outputs, int64_t, auto... options) {
          return loss_request_of(args, base, base_numbers, aux, aux_numbers, outputs, options...);
        },
        one));
    if (requests.back().problem.num_rows != requests[0].problem.num_rows ||
        is_double(std::get<0>(one)) != is_double(std::get<0>(given[0])))
      throw std::invalid_argument("losses must have one number of rows and one compute dtype");
  }
  py::gil_scoped_release release;
  for (size_t i = 0; i < requests.size(); ++i) {
    const Problem& p = requests[i].problem;
    const int64_t bad = first_bad_target(p, &requests[i].num_kept);
    if (bad >= 0)
      throw py::index_error(std::to_string(i) + " " + std::to_string(bad) + " " + std::to_string(target_of(p, bad)));
  }
  if (requests.empty()) return;
  const std::vector<double> values =
      is_double(std::get<0>(given[0])) ? losses<double>(requests) : losses<float>(requests);
  for (size_t i = 0; i < values.size(); ++i) put_loss(std::get<0>(given[i]), std::get<6>(given[i]), values[i]);
}

void py_backward(const ProblemArguments& args, const SourceArguments& base, const SourceNumbers& base_numbers,
                 const SourceArguments& aux, const SourceNumbers& aux_numbers, const OutputArguments& outputs,
                 const StateArguments& state, const CoefficientArguments& coefficients) {
  const Problem p = threaded_problem_of(args, source_of(base, base_numbers), source_of(aux, aux_numbers));
  const Outputs out = outputs_of(outputs);
  const BackwardInputs in = backward_inputs_of(state, coefficients);
  py::gil_scoped_release release;
  check_targets(p);
  is_double(args) ? backward<double>(p, in, out) : backward<float>(p, in, out);
}

void py_rescale(int64_t grad, int dtype, int64_t num_rows, int64_t width, int64_t target, bool target_is_int32,
                int64_t ignore_index, double factor, int threads) {
  Problem p;
  p.num_rows = num_rows, p.V = width, p.target = pointer(target), p.target_is_int32 = target_is_int32;
  p.ignore_index = ignore_index, p.threads = threads < 1 ? 1 : threads;
  const DType type = dtype_of(dtype);
  py::gil_scoped_release release;
  type == DType::kFloat64 ? rescale<double>(p, pointer(grad), type, width, factor)
                          : rescale<float>(p, pointer(grad), type, width, factor);
}

struct ElementsSlot {
  enum : size_t { kAddress, kDType, kCount };
};
using ElementsArguments = std::array<int64_t, ElementsSlot::kCount>;

Elements elements_of(const ElementsArguments& a) {
  const int64_t code = a[ElementsSlot::kDType];
  if (code < 0 || code > 2) throw py::value_error("dtype code must be in [0, 2], got " + std::to_string(code));
  return {pointer(a[ElementsSlot::kAddress]), dtype_of(code)};
}

void py_add(const ElementsArguments& out, const ElementsArguments& a, const ElementsArguments& b, int64_t n,
            int threads) {
  const Elements sum = elements_of(out), first = elements_of(a), second = elements_of(b);
  py::gil_scoped_release release;
  add(sum, first, second, n, threads < 1 ? 1 : threads);
}

void py_bring_in(int64_t address, int64_t bytes, int threads) {
  py::gil_scoped_release release;
  bring_pages_in(pointer(address), bytes, threads);
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (int i = 0; i < num_instruction_sets(); ++i) names.emplace_back(instruction_set(i).name);
  return names;
}

void set_instruction_set(const std::string& name) {
  for (int i = 0; i < num_instruction_sets(); ++i)
    if (name == instruction_set(i).name) return use_instruction_set(i);
  throw py::value_error("instruction set must be one that this processor has, got '" + name + "'");
}

}  // namespace
}  // namespace auxk

PYBIND11_MODULE(_cpu, m, py::mod_gil_not_used()) {
  m.doc() = "CPU kernels of auxkernels; called through auxkernels.native.";
  m.def("field_names", &auxk::field_names);
  m.def("coefficient_names", &auxk::coefficient_names);
  m.def("state_names", &auxk::state_names);
  m.def("scan", &auxk::py_scan);
  m.def("loss", &auxk::py_loss);
  m.def("losses", &auxk::py_losses);
  m.def("small_loss", &auxk::py_small_loss);
  m.def("backward", &auxk::py_backward);
  m.def("rescale", &auxk::py_rescale);
  auxk::bind_soft_embedding(m);
  auxk::bind_sampling(m);
  auxk::bind_blocks(m);
  m.def("add", &auxk::py_add);
  m.def("bring_in", &auxk::py_bring_in, "Brings the pages of a large fresh buffer in before it is written.");
  m.def("instruction_sets", &auxk::instruction_sets, "Instruction sets that this processor can run, best first.");
  m.def("instruction_set", [] { return std::string(auxk::current_instruction_set().name); });
  m.def("set_instruction_set", &auxk::set_instruction_set, "Caps the instruction set, for tests.");
}
