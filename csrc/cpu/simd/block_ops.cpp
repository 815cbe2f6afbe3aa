#include "block_ops.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <type_traits>

#include "philox.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__clang__)
// a loop over std::exp, and a maximum that a NaN may reach, stay scalar in clang, which says so of every instance
#pragma clang diagnostic ignored "-Wpass-failed"
#endif

#define AUXK_BODY "block_ops.inl"
#include "instruction_sets.inl"
#if AUXK_MULTIVERSION
#include "avx512bf16.inl"
#endif

namespace auxk {

namespace {

struct Available {
  const InstructionSet* sets[4];
  int count = 0;

  Available() {
#if AUXK_MULTIVERSION
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (has_avx512 && __builtin_cpu_supports("avx512bf16")) sets[count++] = &avx512bf16::instruction_set;
    if (has_avx512) sets[count++] = &avx512::instruction_set;
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
