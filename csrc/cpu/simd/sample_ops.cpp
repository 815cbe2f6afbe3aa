// setup.py compiles this file without contraction.
#include "sample_ops.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "philox.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__clang__)
#pragma clang diagnostic ignored "-Wpass-failed"  // as in block_ops.cpp
#endif

namespace auxk {

namespace {

struct SampleTable {
  const char* name;
  SampleOps<float> f32;
  SampleOps<double> f64;
};

}  // namespace

}  // namespace auxk

#define AUXK_BODY "sample_ops.inl"
#include "instruction_sets.inl"

namespace auxk {

namespace {

const SampleTable& current_table() {
  const char* name = current_instruction_set().name;
#if AUXK_MULTIVERSION
  if (std::strncmp(name, "avx512", 6) == 0) return avx512::sample_table;
  if (std::strcmp(name, "avx2") == 0) return avx2::sample_table;
#endif
  (void)name;
  return baseline::sample_table;
}

}  // namespace

template <>
const SampleOps<float>& sample_ops<float>() {
  return current_table().f32;
}
template <>
const SampleOps<double>& sample_ops<double>() {
  return current_table().f64;
}

}  // namespace auxk
