// The Python face of the CUDA kernels: pointers, sizes, strides in elements, dtype codes, a stream. No torch headers.
// auxkernels/cross_entropy/cuda.py has validated what the pointers mean; targets, which index memory, are looked
// at by the kernels.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/arguments.h"
#include "cross_entropy.h"

namespace py = pybind11;

namespace auxk {
namespace cuda {
namespace {

void check(const char* error) {
  // an asynchronous fault of earlier work on the device is reported by whoever comes next
  if (error != nullptr) throw std::runtime_error(std::string("CUDA error, here or of earlier work: ") + error);
}

Stream stream_of(const ProblemArguments& a) {
  return {static_cast<int>(a[ProblemSlot::kDevice]), pointer(a[ProblemSlot::kThreadsOrStream])};
}

Problem checked_problem_of(const ProblemArguments& args, const Source& base, const Source& aux) {
  constexpr int64_t kWidest = int64_t{1} << 30;  // columns are counted in 32 bits
  const int64_t V = args[ProblemSlot::kVocabSize];
  if (V > kWidest) throw std::invalid_argument("vocab_size must be at most 1073741824, got " + std::to_string(V));
  return problem_of(args, base, aux);
}

void py_scan(const ProblemArguments& args, const SourceArguments& base, const SourceNumbers& base_numbers,
             const SourceArguments& aux, const SourceNumbers& aux_numbers, const OutputArguments& outputs) {
  const Problem p = checked_problem_of(args, source_of(base, base_numbers), source_of(aux, aux_numbers));
  const Outputs out = outputs_of(outputs);
  py::gil_scoped_release release;
  check(forward(p, out, LossTerms(), is_double(args), stream_of(args)));
}

struct LossSlot {
  enum : size_t { kRowLoss, kLoss, kCounter, kDivisor, kNormalizer, kCount };  // divisor: of enum Divisor
};
using LossArguments = std::array<int64_t, LossSlot::kCount>;

LossTerms terms_of(const Problem& p, const LossArguments& a, double number, double label_smoothing, double z_loss) {
  if (p.target == nullptr && p.num_rows > 0) throw std::invalid_argument("target must be given for a loss, got none");
  using Slot = LossSlot;
  LossTerms terms;
  terms.row = row_loss_of(label_smoothing, z_loss, p.V);
  terms.row_loss = pointer(a[Slot::kRowLoss]), terms.loss = pointer(a[Slot::kLoss]);
  terms.counter = static_cast<unsigned*>(pointer(a[Slot::kCounter]));
  if (a[Slot::kDivisor] < kByOne || a[Slot::kDivisor] > kByKeptRows)
    throw std::invalid_argument("divisor must be in [0, 3], got " + std::to_string(a[Slot::kDivisor]));
  terms.divisor = static_cast<Divisor>(a[Slot::kDivisor]);
  terms.tensor = static_cast<const double*>(pointer(a[Slot::kNormalizer]));
  terms.number = number;
  return terms;
}

void py_loss(const ProblemArguments& args, const SourceArguments& base, const SourceNumbers& base_numbers,
             const SourceArguments& aux, const SourceNumbers& aux_numbers, const OutputArguments& outputs,
             const LossArguments& loss, double number, double label_smoothing, double z_loss) {
  const Problem p = checked_problem_of(args, source_of(base, base_numbers), source_of(aux, aux_numbers));
  const Outputs out = outputs_of(outputs);
  const LossTerms terms = terms_of(p, loss, number, label_smoothing, z_loss);
  py::gil_scoped_release release;
  check(forward(p, out, terms, is_double(args), stream_of(args)));
}

void py_backward(const ProblemArguments& args, const SourceArguments& base, const SourceNumbers& base_numbers,
                 const SourceArguments& aux, const SourceNumbers& aux_numbers, const OutputArguments& outputs,
                 const StateArguments& state, const CoefficientArguments& coefficients) {
  const Problem p = checked_problem_of(args, source_of(base, base_numbers), source_of(aux, aux_numbers));
  const Outputs out = outputs_of(outputs);
  const BackwardInputs in = backward_inputs_of(state, coefficients);
  py::gil_scoped_release release;
  check(backward(p, out, in, is_double(args), stream_of(args)));
}

// factor: a number on the device
void py_rescale(int64_t grad, int dtype, int64_t num_rows, int64_t width, int64_t target, bool target_is_int32,
                int64_t ignore_index, int64_t factor, int factor_dtype, int64_t stream, int device) {
  RescaleParameters p = {};
  p.problem.num_rows = num_rows, p.problem.V = width, p.problem.target = pointer(target);
  p.problem.target_is_int32 = target_is_int32, p.problem.ignore_index = ignore_index;
  p.grad = pointer(grad), p.dtype = dtype_of(dtype);
  p.factor = pointer(factor), p.factor_dtype = dtype_of(factor_dtype);
  py::gil_scoped_release release;
  check(rescale(p, {device, pointer(stream)}));
}

py::dict dict_of(const Cut& cut, const Plan& plan) {
  py::dict d;
  d["threads"] = cut.threads, d["piece"] = cut.piece, d["is_ragged"] = cut.is_ragged != 0;
  d["num_segments"] = cut.num_segments, d["segment"] = cut.segment;
  d["num_tiles"] = cut.num_tiles, d["tile"] = cut.tile, d["lanes"] = cut.lanes;
  d["is_resident"] = plan.is_resident, d["cluster"] = plan.cluster, d["num_slots"] = plan.layout.num_slots;
  d["slot_bytes"] = plan.layout.slot_bytes, d["shared_bytes"] = plan.layout.bytes;
  return d;
}

// A call without what plans do not look at.
struct Sketch {
  Problem problem;
  Outputs out;
  bool is_double;

  Sketch(int64_t num_rows, int64_t V, int base_dtype, int aux_dtype, bool has_gradient, bool has_statistics) {
    static char somewhere[1];
    Source base, aux;
    base.values = somewhere, base.dtype = dtype_of(base_dtype), base.width = V;
    if (aux_dtype >= 0) aux.values = somewhere, aux.dtype = dtype_of(aux_dtype), aux.width = V;
    ProblemArguments arguments = {};
    arguments[ProblemSlot::kNumRows] = num_rows, arguments[ProblemSlot::kVocabSize] = V;
    problem = checked_problem_of(arguments, base, aux);
    out.grad_base = has_gradient ? somewhere : nullptr;
    out.grad_base_dtype = problem.base.dtype;
    out.fields[kEntropy] = has_statistics ? somewhere : nullptr;
    is_double = problem.base.dtype == DType::kFloat64 || problem.aux.dtype == DType::kFloat64;
  }
};

// The launch of a call on such a device, for tests and for those who tune.
py::dict py_plan(int64_t num_rows, int64_t V, int base_dtype, int aux_dtype, bool has_gradient, bool has_statistics,
                 int multiprocessors, int64_t shared_bytes, bool has_clusters) {
  const Sketch call(num_rows, V, base_dtype, aux_dtype, has_gradient, has_statistics);
  const DeviceProperties device = {multiprocessors, shared_bytes, has_clusters ? kMaxSegments : 0};
  const Planned planned = plan_of_call(call.problem, call.out, LossTerms(), call.is_double, device);
  return dict_of(planned.cut, planned.plan);
}

// the same on a device that is there, of which the driver is asked how many clusters it runs at once
py::dict py_plan_on(int device, int64_t num_rows, int64_t V, int base_dtype, int aux_dtype, bool has_gradient,
                    bool has_statistics) {
  const Sketch call(num_rows, V, base_dtype, aux_dtype, has_gradient, has_statistics);
  Planned planned = {};
  int blocks_at_once = 0;
  check(plan_on_device(call.problem, call.out, LossTerms(), call.is_double, device, &planned, &blocks_at_once));
  py::dict d = dict_of(planned.cut, planned.plan);
  d["clusters_at_once"] = blocks_at_once / planned.plan.cluster;
  return d;
}

}  // namespace
}  // namespace cuda
}  // namespace auxk

PYBIND11_MODULE(_cuda, m, py::mod_gil_not_used()) {
  m.doc() = "CUDA kernels of auxkernels; called through auxkernels.native.";
  m.def("driver_problem", [] {
    const char* problem = auxk::cuda::driver_problem();
    return problem == nullptr ? py::object(py::none()) : py::object(py::str(problem));
  });
  m.def("field_names", &auxk::field_names);
  m.def("coefficient_names", &auxk::coefficient_names);
  m.def("state_names", &auxk::state_names);
  m.def("scan", &auxk::cuda::py_scan);
  m.def("loss", &auxk::cuda::py_loss);
  m.def("backward", &auxk::cuda::py_backward);
  m.def("rescale", &auxk::cuda::py_rescale);
  m.def("plan", &auxk::cuda::py_plan, py::arg("num_rows"), py::arg("V"), py::arg("base_dtype"), py::arg("aux_dtype"),
        py::arg("has_gradient"), py::arg("has_statistics"), py::arg("multiprocessors"), py::arg("shared_bytes"),
        py::arg("has_clusters"));
  m.def("plan_on", &auxk::cuda::py_plan_on);
}
