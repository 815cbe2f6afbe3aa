// What Python passes to the compiled functions of cross-entropy: lists of numbers, whose slots the enums here name.
// auxkernels/cross_entropy/compiled_arguments.py makes them.
#pragma once

#include <array>
#include <cstddef>
#include <stdexcept>
#include <string>
#include <vector>

#include "cross_entropy.h"

namespace auxk {

inline void* pointer(int64_t address) { return reinterpret_cast<void*>(static_cast<intptr_t>(address)); }

inline DType dtype_of(int64_t code) {
  if (code < 0 || code > 3) throw std::invalid_argument("dtype code must be in [0, 3], got " + std::to_string(code));
  return static_cast<DType>(code);
}

struct SourceSlot {
  enum : size_t { kValues, kDType, kWidth, kNumInner, kStrideOuter, kStrideInner, kScale, kScaleStride, kCount };
};
using SourceArguments = std::array<int64_t, SourceSlot::kCount>;
struct SourceNumber {
  enum : size_t { kScale, kSoftcap, kCount };  // scale: where no pointer is given
};
using SourceNumbers = std::array<double, SourceNumber::kCount>;

inline Source source_of(const SourceArguments& a, const SourceNumbers& numbers) {
  using Slot = SourceSlot;
  Source source;
  source.values = pointer(a[Slot::kValues]);
  source.dtype = dtype_of(a[Slot::kDType]);
  source.width = a[Slot::kWidth];
  source.num_inner = a[Slot::kNumInner];
  source.stride_outer = a[Slot::kStrideOuter], source.stride_inner = a[Slot::kStrideInner];
  if (source.values != nullptr && source.num_inner < 1)  // rows are numbered by a division by it
    throw std::invalid_argument("num_inner must be at least 1, got " + std::to_string(source.num_inner));
  source.scale = pointer(a[Slot::kScale]);
  source.scale_stride = a[Slot::kScaleStride];
  source.scale_value = numbers[SourceNumber::kScale];
  source.softcap = numbers[SourceNumber::kSoftcap];
  return source;
}

struct ProblemSlot {
  enum : size_t {
    kNumRows,
    kVocabSize,
    kTarget,
    kTargetIsInt32,
    kIgnoreIndex,
    kWeight,
    kTargetLogit,
    kThreadsOrStream,  // threads on CPU, a stream's handle on CUDA devices
    kIsDouble,
    kDevice,  // CUDA
    kCount
  };
};
using ProblemArguments = std::array<int64_t, ProblemSlot::kCount>;

inline bool is_double(const ProblemArguments& a) { return a[ProblemSlot::kIsDouble] != 0; }

inline Problem problem_of(const ProblemArguments& a, const Source& base, const Source& aux) {
  using Slot = ProblemSlot;
  Problem p;
  p.base = base, p.aux = aux;
  p.num_rows = a[Slot::kNumRows], p.V = a[Slot::kVocabSize];
  p.target = pointer(a[Slot::kTarget]);
  p.target_is_int32 = a[Slot::kTargetIsInt32] != 0;
  p.ignore_index = a[Slot::kIgnoreIndex];
  p.weight = pointer(a[Slot::kWeight]);
  p.target_logit = pointer(a[Slot::kTargetLogit]);
  if (p.num_rows < 0 || p.V < 1 || p.V > base.width || (aux.values != nullptr && p.V > aux.width))
    throw std::invalid_argument("V must be in [1, width of each source], got V=" + std::to_string(p.V));
  return p;
}

// a pointer for each field, then for each gradient, then the dtypes of the first two gradients
struct OutputSlot {
  enum : size_t {
    kGradBase = kNumFields,
    kGradAux,
    kGradBaseScale,
    kGradAuxScale,
    kGradBaseDType,
    kGradAuxDType,
    kCount
  };
};
using OutputArguments = std::array<int64_t, OutputSlot::kCount>;

inline Outputs outputs_of(const OutputArguments& a) {
  using Slot = OutputSlot;
  Outputs out;
  for (size_t field = 0; field < kNumFields; ++field) out.fields[field] = pointer(a[field]);
  out.grad_base = pointer(a[Slot::kGradBase]);
  out.grad_aux = pointer(a[Slot::kGradAux]);
  out.grad_base_scale = pointer(a[Slot::kGradBaseScale]);
  out.grad_aux_scale = pointer(a[Slot::kGradAuxScale]);
  out.grad_base_dtype = dtype_of(a[Slot::kGradBaseDType]);
  out.grad_aux_dtype = dtype_of(a[Slot::kGradAuxDType]);
  return out;
}

// auxkernels.cross_entropy.request.RowState
#define AUXK_STATE(X)    \
  X(Max, max)            \
  X(LogDenom, log_denom) \
  X(Nll, nll)            \
  X(BaseMax, base_max)   \
  X(BaseLogDenom, base_log_denom)
struct StateSlot {
  enum : size_t { AUXK_STATE(AUXK_ENUMERATOR) kCount };
};
using StateArguments = std::array<int64_t, StateSlot::kCount>;
using CoefficientArguments = std::array<int64_t, kNumCoefficients>;

inline BackwardInputs backward_inputs_of(const StateArguments& state, const CoefficientArguments& coefficients) {
  BackwardInputs in;
  in.max = pointer(state[StateSlot::kMax]), in.log_denom = pointer(state[StateSlot::kLogDenom]);
  in.nll = pointer(state[StateSlot::kNll]);
  in.base_max = pointer(state[StateSlot::kBaseMax]), in.base_log_denom = pointer(state[StateSlot::kBaseLogDenom]);
  for (size_t c = 0; c < kNumCoefficients; ++c) in.coefficients[c] = pointer(coefficients[c]);
  return in;
}

// Lists that go by number; Python compares these names with its own.
inline std::vector<std::string> field_names() { return {AUXK_FIELDS(AUXK_STRING)}; }
inline std::vector<std::string> coefficient_names() { return {AUXK_COEFFICIENTS(AUXK_STRING)}; }
inline std::vector<std::string> state_names() { return {AUXK_STATE(AUXK_STRING)}; }

}  // namespace auxk
