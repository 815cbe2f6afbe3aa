// Includes AUXK_BODY once for each instruction set, in a namespace of its own with AUXK_NAME and AUXK_VECTOR_BITS: function
// multi-versioning by hand, one body under three targets, and a choice that tests can cap at run time (the compiler's
// target_clones cannot be). Other processors and compilers get the baseline alone, without AUXK_MULTIVERSION.
#if defined(__x86_64__) && defined(__GNUC__)
#define AUXK_MULTIVERSION 1
#endif

namespace auxk {

#if AUXK_MULTIVERSION
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#endif
namespace avx512 {
#define AUXK_NAME "avx512"
#define AUXK_VECTOR_BITS 512  // g++ reads the whole file before a pragma could define __AVX512F__
#include AUXK_BODY
#undef AUXK_VECTOR_BITS
#undef AUXK_NAME
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace avx2 {
#define AUXK_NAME "avx2"
#define AUXK_VECTOR_BITS 256
#include AUXK_BODY
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
#define AUXK_VECTOR_BITS 0  // whatever the compiler takes
#include AUXK_BODY
#undef AUXK_VECTOR_BITS
#undef AUXK_NAME
}  // namespace baseline

}  // namespace auxk
