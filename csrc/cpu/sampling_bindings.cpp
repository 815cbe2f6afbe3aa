// The Python face of sampling.h; see bindings.cpp. auxkernels/sampling/native.py has validated what the pointers mean.
#include "sampling_bindings.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <string>
#include <vector>

#include "common/arguments.h"
#include "common/names.h"
#include "sampling.h"

namespace py = pybind11;

namespace auxk {
namespace {

struct SampleSlot {
  enum : size_t {
    kNumRows,
    kVocabSize,
    kNumBase,
    kFirstRow,
    kHasPosition,
    kMassAfterMinP,
    kThreads,
    kIsDouble,
    kCount
  };
};
using SampleArguments = std::array<int64_t, SampleSlot::kCount>;

// auxkernels.sampling.request.Parameters: the address of each, 0 for a number, and its stride
#define AUXK_SAMPLE_PARAMETERS(X) \
  X(Temperature, temperature)     \
  X(TopK, top_k)                  \
  X(TopP, top_p)                  \
  X(MinP, min_p)                  \
  X(Plausibility, plausibility)   \
  X(Seed, seed)                   \
  X(Position, position)
struct SampleParameter {
  enum : size_t { AUXK_SAMPLE_PARAMETERS(AUXK_ENUMERATOR) kCount };
};
using Addresses = std::array<std::array<int64_t, 2>, SampleParameter::kCount>;
using Fractions = std::array<double, SampleParameter::kCount>;  // the numbers among them, those that are no integers
using Integers = std::array<int64_t, SampleParameter::kCount>;  // and those that are

// auxkernels.sampling.request.FIELDS
#define AUXK_SAMPLE_FIELDS(X)   \
  X(Token, token)               \
  X(LogProb, log_prob)          \
  X(KeptLogProb, kept_log_prob) \
  X(NumKept, num_kept)          \
  X(BaseRank, base_rank)
struct SampleField {
  enum : size_t { AUXK_SAMPLE_FIELDS(AUXK_ENUMERATOR) kCount };
};
using FieldAddresses = std::array<int64_t, SampleField::kCount>;

void py_sample(const SampleArguments& args, const std::vector<SourceArguments>& sources,
               const std::vector<SourceNumbers>& numbers, const Addresses& addresses, const Fractions& fractions,
               const Integers& integers, const FieldAddresses& field_addresses) {
  using Slot = SampleSlot;
  using Parameter = SampleParameter;
  SampleProblem p;
  p.num_rows = args[Slot::kNumRows], p.V = args[Slot::kVocabSize], p.first_row = args[Slot::kFirstRow];
  p.has_position = args[Slot::kHasPosition] != 0, p.mass_after_min_p = args[Slot::kMassAfterMinP] != 0;
  p.threads = std::max(static_cast<int>(args[Slot::kThreads]), 1);
  const int64_t num_base = args[Slot::kNumBase];
  if (sources.size() != numbers.size() || num_base < 1 || num_base > static_cast<int64_t>(sources.size()))
    throw py::value_error("num_base must be in [1, number of sources], got " + std::to_string(num_base));
  for (size_t i = 0; i < sources.size(); ++i) {
    const Source source = source_of(sources[i], numbers[i]);
    if (p.num_rows < 0 || p.V < 1 || p.V > source.width || source.num_inner < 1)
      throw py::value_error("V must be in [1, width of each source], got V=" + std::to_string(p.V));
    (static_cast<int64_t>(i) < num_base ? p.base : p.aux).push_back(source);
  }
  if (p.V > int64_t{1} << 23) throw py::value_error("V must be at most 2**23, got V=" + std::to_string(p.V));
  const auto fraction = [&](size_t i) {
    return RowParameter<double>{static_cast<const double*>(pointer(addresses[i][0])), fractions[i], addresses[i][1]};
  };
  const auto integer = [&](size_t i) {
    return RowParameter<int64_t>{static_cast<const int64_t*>(pointer(addresses[i][0])), integers[i], addresses[i][1]};
  };
  p.temperature = fraction(Parameter::kTemperature), p.top_p = fraction(Parameter::kTopP);
  p.min_p = fraction(Parameter::kMinP), p.plausibility = fraction(Parameter::kPlausibility);
  p.top_k = integer(Parameter::kTopK), p.seed = integer(Parameter::kSeed), p.position = integer(Parameter::kPosition);
  SampleFields fields;
  fields.token = static_cast<int64_t*>(pointer(field_addresses[SampleField::kToken]));
  fields.log_prob = pointer(field_addresses[SampleField::kLogProb]);
  fields.kept_log_prob = pointer(field_addresses[SampleField::kKeptLogProb]);
  fields.num_kept = static_cast<int64_t*>(pointer(field_addresses[SampleField::kNumKept]));
  fields.base_rank = static_cast<int64_t*>(pointer(field_addresses[SampleField::kBaseRank]));
  if (p.num_rows == 0) return;
  py::gil_scoped_release release;
  args[Slot::kIsDouble] != 0 ? sample<double>(p, fields) : sample<float>(p, fields);
}

}  // namespace

void bind_sampling(py::module_& m) {
  // lists that go by number; Python compares these names with its own
  m.def("sample_parameter_names", [] { return std::vector<std::string>{AUXK_SAMPLE_PARAMETERS(AUXK_STRING)}; });
  m.def("sample_field_names", [] { return std::vector<std::string>{AUXK_SAMPLE_FIELDS(AUXK_STRING)}; });
  m.def("sample", &py_sample);
}

}  // namespace auxk
