// What Python passes to the compiled functions of cross-entropy, as auxkernels/native/ makes it.
#pragma once

#include <array>
#include <cstddef>
#include <stdexcept>
#include <string>

#include "cross_entropy.h"

namespace auxk {

inline void* pointer(int64_t address) { return reinterpret_cast<void*>(static_cast<intptr_t>(address)); }

// values, dtype, width, num_inner, stride_outer, stride_inner, scale, scale_stride
using SourceArguments = std::array<int64_t, 8>;
// scale (where no pointer is given), softcap
using SourceNumbers = std::array<double, 2>;

inline Source source_of(const SourceArguments& a, const SourceNumbers& numbers) {
  if (a[1] < 0 || a[1] > 3) throw std::invalid_argument("dtype code must be in [0, 3], got " + std::to_string(a[1]));
  Source source;
  source.values = pointer(a[0]);
  source.dtype = static_cast<DType>(a[1]);
  source.width = a[2];
  source.num_inner = a[3], source.stride_outer = a[4], source.stride_inner = a[5];
  if (source.num_inner < 1)  // rows are numbered by a division by it
    throw std::invalid_argument("num_inner must be at least 1, got " + std::to_string(a[3]));
  source.scale = pointer(a[6]);
  source.scale_stride = a[7];
  source.scale_value = numbers[0];
  source.softcap = numbers[1];
  return source;
}

// num_rows, V, target, target_is_int32, ignore_index, weight, threads (CPU) or stream (CUDA),
// is_double, device (CUDA)
using ProblemArguments = std::array<int64_t, 9>;

inline Problem problem_of(const ProblemArguments& a, const Source& base, const Source& aux) {
  Problem p;
  p.base = base, p.aux = aux;
  p.num_rows = a[0], p.V = a[1];
  p.target = pointer(a[2]);
  p.target_is_int32 = a[3] != 0;
  p.ignore_index = a[4];
  p.weight = pointer(a[5]);
  if (p.num_rows < 0 || p.V < 1 || p.V > base.width || (aux.values != nullptr && p.V > aux.width))
    throw std::invalid_argument("V must be in [1, width of each source], got V=" + std::to_string(p.V));
  return p;
}

// one pointer for each field, then for each gradient: base, aux, base scale, aux scale; dtypes of the first two
using OutputArguments = std::array<int64_t, kNumFields + 6>;

inline Outputs outputs_of(const OutputArguments& a) {
  Outputs out;
  for (int f = 0; f < kNumFields; ++f) out.fields[f] = pointer(a[static_cast<size_t>(f)]);
  out.grad_base = pointer(a[kNumFields]);
  out.grad_aux = pointer(a[kNumFields + 1]);
  out.grad_base_scale = pointer(a[kNumFields + 2]);
  out.grad_aux_scale = pointer(a[kNumFields + 3]);
  out.grad_base_dtype = static_cast<DType>(a[kNumFields + 4]);
  out.grad_aux_dtype = static_cast<DType>(a[kNumFields + 5]);
  return out;
}

// max, log_denom, nll, base_max, base_log_denom
using StateArguments = std::array<int64_t, 5>;
using CoefficientArguments = std::array<int64_t, kNumCoefficients>;

inline BackwardInputs backward_inputs_of(const StateArguments& state, const CoefficientArguments& coefficients) {
  BackwardInputs in;
  in.max = pointer(state[0]), in.log_denom = pointer(state[1]), in.nll = pointer(state[2]);
  in.base_max = pointer(state[3]), in.base_log_denom = pointer(state[4]);
  for (size_t c = 0; c < kNumCoefficients; ++c) in.coefficients[c] = pointer(coefficients[c]);
  return in;
}

}  // namespace auxk
