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

Stream stream_of(const ProblemArguments& a) { return {static_cast<int>(a[8]), pointer(a[6])}; }

Problem checked_problem_of(const ProblemArguments& args, const SourceArguments& base, const SourceNumbers& base_numbers,
                           const SourceArguments& aux, const SourceNumbers& aux_numbers) {
  constexpr int64_t kWidest = int64_t{1} << 30;  // columns are counted in 32 bits
  if (args[1] > kWidest)
    throw std::invalid_argument("vocab_size must be at most 1073741824, got " + std::to_string(args[1]));
  return problem_of(args, source_of(base, base_numbers), source_of(aux, aux_numbers));
}

void py_scan(const ProblemArguments& args, const SourceArguments& base, const SourceNumbers& base_numbers,
             const SourceArguments& aux, const SourceNumbers& aux_numbers, const OutputArguments& outputs) {
  const Problem p = checked_problem_of(args, base, base_numbers, aux, aux_numbers);
  const Outputs out = outputs_of(outputs);
  py::gil_scoped_release release;
  check(forward(p, out, LossTerms(), args[7] != 0, stream_of(args)));
}

// row_loss, loss, ticket, divisor (of enum Divisor), normalizer
using LossArguments = std::array<int64_t, 5>;

LossTerms terms_of(const Problem& p, const LossArguments& a, double number, double label_smoothing, double z_loss) {
  if (p.target == nullptr && p.num_rows > 0) throw std::invalid_argument("target must be given for a loss, got none");
  LossTerms terms;
  if (label_smoothing != 0) {
    terms.kept = 1 - label_smoothing;
    terms.share = label_smoothing / static_cast<double>(p.V);
  }
  terms.z_loss = z_loss;
  terms.row_loss = pointer(a[0]), terms.loss = pointer(a[1]), terms.ticket = static_cast<unsigned*>(pointer(a[2]));
  if (a[3] < kByOne || a[3] > kByKeptRows)
    throw std::invalid_argument("divisor must be in [0, 3], got " + std::to_string(a[3]));
  terms.divisor = static_cast<Divisor>(a[3]);
  terms.tensor = static_cast<const double*>(pointer(a[4]));
  terms.number = number;
  return terms;
}

void py_loss(const ProblemArguments& args, const SourceArguments& base, const SourceNumbers& base_numbers,
             const SourceArguments& aux, const SourceNumbers& aux_numbers, const OutputArguments& outputs,
             const LossArguments& loss, double number, double label_smoothing, double z_loss) {
  const Problem p = checked_problem_of(args, base, base_numbers, aux, aux_numbers);
  const Outputs out = outputs_of(outputs);
  const LossTerms terms = terms_of(p, loss, number, label_smoothing, z_loss);
  py::gil_scoped_release release;
  check(forward(p, out, terms, args[7] != 0, stream_of(args)));
}

void py_backward(const ProblemArguments& args, const SourceArguments& base, const SourceNumbers& base_numbers,
                 const SourceArguments& aux, const SourceNumbers& aux_numbers, const OutputArguments& outputs,
                 const StateArguments& state, const CoefficientArguments& coefficients) {
  const Problem p = checked_problem_of(args, base, base_numbers, aux, aux_numbers);
  const Outputs out = outputs_of(outputs);
  const BackwardInputs in = backward_inputs_of(state, coefficients);
  py::gil_scoped_release release;
  check(backward(p, out, in, args[7] != 0, stream_of(args)));
}

// factor: a number on the device
void py_rescale(int64_t grad, int dtype, int64_t num_rows, int64_t width, int64_t target, bool target_is_int32,
                int64_t ignore_index, int64_t factor, int factor_dtype, int64_t stream, int device) {
  RescaleParameters p = {};
  p.problem.num_rows = num_rows, p.problem.V = width, p.problem.target = pointer(target);
  p.problem.target_is_int32 = target_is_int32, p.problem.ignore_index = ignore_index;
  p.grad = pointer(grad), p.dtype = static_cast<DType>(dtype);
  p.factor = pointer(factor), p.factor_dtype = static_cast<DType>(factor_dtype);
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
    const int64_t at = reinterpret_cast<intptr_t>(somewhere);
    const SourceArguments base = {at, base_dtype, V, 1, 0, V, 0, 0};
    const SourceArguments aux = {aux_dtype < 0 ? 0 : at, aux_dtype < 0 ? 0 : aux_dtype, V, 1, 0, V, 0, 0};
    problem = checked_problem_of({num_rows, V, 0, 0, -100, 0, 0, 0, 0}, base, {1, 0}, aux, {1, 0});
    out.grad_base = has_gradient ? somewhere : nullptr;
    out.grad_base_dtype = problem.base.dtype;
    out.fields[kEntropy] = has_statistics ? somewhere : nullptr;
    is_double = problem.base.dtype == DType::kFloat64 || problem.aux.dtype == DType::kFloat64;
  }
};

// The launch of a call on a device of that room, for tests and for those who tune.
py::dict py_plan(int64_t num_rows, int64_t V, int base_dtype, int aux_dtype, bool has_gradient, bool has_statistics,
                 int multiprocessors, int64_t shared_bytes, bool has_clusters) {
  const Sketch call(num_rows, V, base_dtype, aux_dtype, has_gradient, has_statistics);
  const Room room = {multiprocessors, shared_bytes, has_clusters ? kMaxSegments : 0};
  const Planned planned = plan_of_call(call.problem, call.out, LossTerms(), call.is_double, room);
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
  m.def("scan", &auxk::cuda::py_scan);
  m.def("loss", &auxk::cuda::py_loss);
  m.def("backward", &auxk::cuda::py_backward);
  m.def("rescale", &auxk::cuda::py_rescale);
  m.def("plan", &auxk::cuda::py_plan, py::arg("num_rows"), py::arg("V"), py::arg("base_dtype"), py::arg("aux_dtype"),
        py::arg("has_gradient"), py::arg("has_statistics"), py::arg("multiprocessors"), py::arg("shared_bytes"),
        py::arg("has_clusters"));
  m.def("plan_on", &auxk::cuda::py_plan_on);
}
