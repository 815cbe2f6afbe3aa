// setup.py compiles this file without contraction.
#include "sample_ops.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "philox.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__x86_64__) && defined(__GNUC__)
#define AUXK_MULTIVERSION 1
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

#if AUXK_MULTIVERSION
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#endif
namespace avx512 {
#define AUXK_NAME "avx512"
#define AUXK_VECTOR_BITS 512  // g++ reads the whole file before a pragma could define __AVX512F__
#include "sample_ops.inl"
#undef AUXK_VECTOR_BITS
#undef AUXK_NAME
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
namespace avx2 {
#define AUXK_NAME "avx2"
#define AUXK_VECTOR_BITS 256
#include "sample_ops.inl"
#undef AUXK_VECTOR_BITS
#undef AUXK_NAME
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

namespace baseline {
#define AUXK_NAME "baseline"
#define AUXK_VECTOR_BITS 0
#include "sample_ops.inl"
#undef AUXK_VECTOR_BITS
#undef AUXK_NAME
}  // namespace baseline

namespace {

const SampleTable& current_table() {
  const char* name = current_instruction_set().name;
#if AUXK_MULTIVERSION
  if (std::strcmp(name, "avx512") == 0) return avx512::sample_table;
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
