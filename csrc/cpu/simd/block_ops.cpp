#include "block_ops.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include "philox.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Function multi-versioning by hand: one body under three targets, and a choice that tests can cap at run time (the
// compiler's target_clones cannot be). Other processors and compilers get the baseline alone.
#if defined(__x86_64__) && defined(__GNUC__)
#define AUXK_MULTIVERSION 1
#endif

#if defined(__clang__)
// a loop over std::exp, and a maximum that a NaN may reach, stay scalar in clang, which says so of every instance
#pragma clang diagnostic ignored "-Wpass-failed"
#endif

namespace auxk {

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
#include "block_ops.inl"
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
#include "block_ops.inl"
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
#define AUXK_VECTOR_BITS 128
#include "block_ops.inl"
#undef AUXK_VECTOR_BITS
#undef AUXK_NAME
}  // namespace baseline

namespace {

struct Available {
  const InstructionSet* sets[3];
  int count = 0;

  Available() {
#if AUXK_MULTIVERSION
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      sets[count++] = &avx512::instruction_set;
    if (has_avx2) sets[count++] = &avx2::instruction_set;
#endif
    sets[count++] = &baseline::instruction_set;
  }
};

const Available& available() {
  static const Available a;
  return a;
}

std::atomic<int> chosen{0};

}  // namespace

int num_instruction_sets() { return available().count; }
const InstructionSet& instruction_set(int i) { return *available().sets[i]; }
const InstructionSet& current_instruction_set() { return instruction_set(chosen.load(std::memory_order_relaxed)); }
void use_instruction_set(int i) { chosen.store(i, std::memory_order_relaxed); }

template <>
const BlockOps<float>& block_ops<float>() {
  return current_instruction_set().f32;
}
template <>
const BlockOps<double>& block_ops<double>() {
  return current_instruction_set().f64;
}

}  // namespace auxk
