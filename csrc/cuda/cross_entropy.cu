// From a call to a kernel and its launch.
#include "cross_entropy.h"

#include <map>
#include <mutex>
#include <tuple>

#include "kernels.h"
#include "row_state.cuh"

namespace auxk {
namespace cuda {
namespace {

bool is_transformed(const Source& source) {
  return source.values != nullptr && (source.scale != nullptr || source.scale_value != 1 || source.softcap != 0);
}

Types types_of(const Problem& p, const Outputs& out, bool is_double) {
  if (is_double) return kWithDoubles;
  if (p.aux.values != nullptr && p.aux.dtype != p.base.dtype) return kAnyTypes;
  if (out.grad_base != nullptr && out.grad_base_dtype != p.base.dtype) return kAnyTypes;
  if (out.grad_aux != nullptr && out.grad_aux_dtype != p.aux.dtype) return kAnyTypes;
  return p.base.dtype == DType::kBFloat16 ? kBFloat16s : p.base.dtype == DType::kFloat16 ? kFloat16s : kFloat32s;
}

bool sums_row(const Outputs& out) { return out.grad_base_scale != nullptr || out.grad_aux_scale != nullptr; }

Mode mode_of(const Problem& p, const Outputs& out, const LossTerms& terms, Types types) {
  const bool is_weighted = p.weight != nullptr || terms.row.share != 0 || terms.row.z_loss != 0 || terms.row.kept != 1;
  if (types == kAnyTypes || types == kWithDoubles || is_transformed(p.base) || is_transformed(p.aux) || is_weighted ||
      sums_row(out) || out.fields[kWeightedSum] != nullptr)
    return kGeneral;
  for (int field = 0; field < kNumFields; ++field) {
    if (!is_plain(static_cast<Field>(field)) && out.fields[field] != nullptr) return kStatistics;
  }
  return kPlain;
}

bool is_narrow(Mode mode, Types types) { return mode != kGeneral && (types == kBFloat16s || types == kFloat16s); }

int state_bytes_of(Mode mode, Types types) {
  if (types == kWithDoubles) return sizeof(FullState<double>);
  return mode == kPlain ? sizeof(PlainState<float>) : sizeof(FullState<float>);
}

// What is asked of the driver once for each kernel, device and way to launch it, before the launch: a first launch loads
// the kernel's code, which a capture need not allow.
template <class Kernel>
const char* blocks_at_once(Kernel kernel, const hw::Launch& how, int device, const DeviceProperties& properties,
                           int* found) {
  using Key = std::tuple<Kernel, int, int, int, int64_t>;
  static std::mutex mutex;
  static std::map<Key, int> known;
  const std::lock_guard<std::mutex> guard(mutex);
  const Key key = {kernel, device, how.cluster, how.threads, how.shared_bytes};
  const auto it = known.find(key);
  if (it != known.end()) {
    *found = it->second;
    return nullptr;
  }
  const char* error = hw::prepare(kernel, how, properties.shared_bytes, properties.multiprocessors, found);
  if (error == nullptr) known[key] = *found;
  return error;
}

// Kernels of one stream follow each other, so they can share a counter.
constexpr size_t kNumCounters = 4096;
__device__ unsigned counters[kNumCounters];

const char* counter_of(const Stream& stream, unsigned** counter) {
  static std::mutex mutex;
  static std::map<std::tuple<int, void*>, unsigned*> known;
  static std::map<int, size_t> used;
  const std::lock_guard<std::mutex> guard(mutex);
  unsigned*& found = known[{stream.device, stream.handle}];
  if (found == nullptr) {
    size_t& number = used[stream.device];
    if (number == kNumCounters) return "more streams than there are counters";
    unsigned (*first)[kNumCounters] = nullptr;
    if (const char* error = hw::address_of(counters, &first)) return error;
    found = *first + number++;
  }
  *counter = found;
  return nullptr;
}

struct Choice {
  Mode mode;
  Types types;
  PlanInputs inputs;
};

Choice choose(const Problem& p, const Outputs& out, const LossTerms& terms, bool is_double,
              const DeviceProperties& properties) {
  Choice choice = {};
  choice.types = types_of(p, out, is_double);
  choice.mode = mode_of(p, out, terms, choice.types);
  PlanInputs& in = choice.inputs;
  const bool narrow = is_narrow(choice.mode, choice.types);
  in.cut = cut_of(p.V, narrow ? 8 : 4, choice.mode == kGeneral ? kGeneralThreads : kMaxThreads, narrow);
  in.num_rows = p.num_rows;
  in.base_bytes = static_cast<int32_t>(size_of(p.base.dtype));
  in.aux_bytes = p.aux.values == nullptr ? 0 : static_cast<int32_t>(size_of(p.aux.dtype));
  in.state_bytes = state_bytes_of(choice.mode, choice.types);
  in.has_gradient = out.grad_base != nullptr || out.grad_aux != nullptr;
  in.device = properties;
  // a scale's gradient is a sum over the row, which one block then has for itself
  if (choice.types == kWithDoubles || sums_row(out)) in.device.max_cluster = 0;
  return choice;
}

const char* properties_of(int device, DeviceProperties* properties) {
  static std::mutex mutex;
  static std::map<int, DeviceProperties> known;
  const std::lock_guard<std::mutex> guard(mutex);
  const auto it = known.find(device);
  if (it != known.end()) {
    *properties = it->second;
    return nullptr;
  }
  bool has_clusters = false;
  const char* error =
      hw::describe_device(device, &properties->multiprocessors, &properties->shared_bytes, &has_clusters);
  properties->max_cluster = has_clusters ? kMaxSegments : 0;
  if (error == nullptr) known[device] = *properties;
  return error;
}

// A plan whose blocks run on the device, and what launches it.
struct Settled {
  Planned planned;
  ForwardKernel kernel;
  hw::Launch how;
  int at_once;  // blocks
};

const char* settle(const Problem& p, const Outputs& out, const LossTerms& terms, bool is_double, const Stream& stream,
                   Settled* settled) {
  DeviceProperties properties = {};
  if (const char* error = hw::use_device(stream.device)) return error;
  if (const char* error = properties_of(stream.device, &properties)) return error;
  Choice choice = choose(p, out, terms, is_double, properties);
  const Cut& cut = choice.inputs.cut;
  auto& [planned, kernel, how, at_once] = *settled;
  planned = {cut, plan_of(choice.inputs)};
  Plan& plan = planned.plan;
  while (plan.is_resident) {
    kernel = resident_kernel(choice.mode, choice.types, cut);
    how = {0, plan.cluster, cut.threads + hw::kWarp, plan.layout.bytes, stream.handle};
    if (const char* error = blocks_at_once(kernel, how, stream.device, properties, &at_once)) return error;
    if (at_once > 0) return nullptr;
    choice.inputs.device.max_cluster = plan.cluster / 2;  // none of this size here
    plan = plan_of(choice.inputs);
  }
  kernel = reread_kernel(choice.mode, choice.types, cut);
  how = {0, 0, cut.threads, plan.layout.bytes, stream.handle};
  if (const char* error = blocks_at_once(kernel, how, stream.device, properties, &at_once)) return error;
  return at_once == 0 ? "a block of this kernel does not fit on the device" : nullptr;
}

// Starts a kernel whose blocks take many units each in turn: starting a block costs more than a unit of which nothing is
// wanted.
template <class Kernel, class Parameters>
const char* launch_over(int64_t units, Kernel kernel, hw::Launch how, const Stream& stream,
                        const Parameters& parameters) {
  constexpr int64_t kBlocksOfMultiprocessor = 8;
  DeviceProperties properties = {};
  int at_once = 0;
  if (const char* error = hw::use_device(stream.device)) return error;
  if (const char* error = properties_of(stream.device, &properties)) return error;
  if (const char* error = blocks_at_once(kernel, how, stream.device, properties, &at_once)) return error;
  how.num_blocks = static_cast<int>(std::min(units, kBlocksOfMultiprocessor * properties.multiprocessors));
  return hw::launch(kernel, how, parameters);
}

}  // namespace

Planned plan_of_call(const Problem& p, const Outputs& out, const LossTerms& terms, bool is_double,
                     const DeviceProperties& properties) {
  const PlanInputs inputs = choose(p, out, terms, is_double, properties).inputs;
  return {inputs.cut, plan_of(inputs)};
}

const char* plan_on_device(const Problem& p, const Outputs& out, const LossTerms& terms, bool is_double, int device,
                           Planned* planned, int* blocks_at_once) {
  Settled settled = {};
  const char* error = settle(p, out, terms, is_double, {device, nullptr}, &settled);
  *planned = settled.planned, *blocks_at_once = settled.at_once;
  return error;
}

const char* driver_problem() { return hw::driver_problem(); }

const char* forward(const Problem& p, const Outputs& out, const LossTerms& terms, bool is_double,
                    const Stream& stream) {
  Settled settled = {};
  if (const char* error = settle(p, out, terms, is_double, stream, &settled)) return error;
  const auto& [cut, plan] = settled.planned;
  if (p.num_rows == 0 && terms.row_loss == nullptr) return nullptr;
  // as many blocks as run at once, each with many rows; one cluster at least, because it writes the loss
  const int64_t clusters = std::max<int64_t>(1, std::min<int64_t>(p.num_rows, settled.at_once / plan.cluster));
  settled.how.num_blocks = static_cast<int>(clusters * plan.cluster);
  Parameters parameters = {};
  parameters.problem = p, parameters.out = out, parameters.terms = terms;
  parameters.cut = cut, parameters.layout = plan.layout, parameters.cluster = plan.cluster;
  if (terms.row_loss != nullptr && terms.counter == nullptr)
    if (const char* error = counter_of(stream, &parameters.terms.counter)) return error;
  return hw::launch(settled.kernel, settled.how, parameters);
}

const char* backward(const Problem& p, const Outputs& out, const BackwardInputs& in, bool is_double,
                     const Stream& stream) {
  const bool wants_any = out.grad_base != nullptr || out.grad_aux != nullptr || sums_row(out);
  if (p.num_rows == 0 || !wants_any) return nullptr;
  const Types types = types_of(p, out, is_double);
  bool has_plain_form = types != kAnyTypes && types != kWithDoubles && !is_transformed(p.base) &&
                        !is_transformed(p.aux) && !sums_row(out);
  for (int c = 0; c < kNumCoefficients; ++c) has_plain_form &= c == kA || c == kG || in.coefficients[c] == nullptr;
  const Mode mode = has_plain_form ? kPlain : kGeneral;
  BackwardParameters parameters = {};
  parameters.problem = p, parameters.out = out, parameters.in = in;
  parameters.cut = cut_of(p.V, is_narrow(mode, types) ? 8 : 4, kBackwardThreads, false);
  const int64_t units = p.num_rows * (sums_row(out) ? 1 : parameters.cut.num_segments);
  const hw::Launch how = {0, 0, parameters.cut.threads, 8 * kBackwardThreads / hw::kWarp, stream.handle};
  return launch_over(units, backward_kernel(mode, types, parameters.cut.piece), how, stream, parameters);
}

const char* rescale(const RescaleParameters& p, const Stream& stream) {
  const int64_t units = p.problem.num_rows * ((p.problem.V + kRescaleColumns - 1) / kRescaleColumns);
  if (units == 0) return nullptr;
  const hw::Launch how = {0, 0, kRescaleThreads, 0, stream.handle};
  const bool is_double = p.dtype == DType::kFloat64 || p.factor_dtype == DType::kFloat64;
  return launch_over(units, rescale_kernel(is_double, p.problem.V % 4 == 0 ? 4 : 1), how, stream, p);
}

}  // namespace cuda
}  // namespace auxk
