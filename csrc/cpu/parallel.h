// Threads over independent tasks. OpenMP where the compiler has it; otherwise, in a forked child, or for one thread, a
// plain loop.
#pragma once

#include <cstdint>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace auxk {

#if defined(__unix__) || defined(__APPLE__)
inline const pid_t loader_pid = getpid();
#endif

inline bool in_forked_child() {
#if defined(__unix__) || defined(__APPLE__)
  // the OpenMP runtime's threads do not survive a fork, and entering it in a child hangs. whether the parent (or
  // another library in it) had entered it is not ours to know: any process other than the one that loaded this module
  // counts.
  return getpid() != loader_pid;
#else
  return false;
#endif
}

// While it lives, the control word of SSE has some bits in this thread and not others; the thread's own comes back.
template <unsigned kSet, unsigned kCleared>
class FloatMode {
 public:
#if defined(__SSE__)
  FloatMode() : before_(__builtin_ia32_stmxcsr()) { __builtin_ia32_ldmxcsr((before_ | kSet) & ~kCleared); }
  ~FloatMode() { __builtin_ia32_ldmxcsr(before_); }

 private:
  const unsigned before_;
#else
  FloatMode() {}
#endif
  FloatMode(const FloatMode&) = delete;
};
// Results below the normal numbers are 0. A peaked softmax is full of them, and each costs a hundred cycles (a whole row
// was 1.6 times slower).
using FlushSubnormals = FloatMode<0x8000u, 0>;
// Numbers below the normal ones count, whatever the thread was set to: a sum of such logits is compared like any other.
using KeepSubnormals = FloatMode<0, 0x8040u>;

// Calls task(i, thread) for i in [0, n), thread in [0, threads), in chunks handed out as threads become free; with chunk
// 0 in one even share for each thread, as libraries share out the rows of a product, which then lie in its own cache.
template <class Task>
void parallel_for(int64_t n, int threads, int64_t chunk, const Task& task) {
#if defined(_OPENMP)
  if (threads > 1 && n > 1 && !in_forked_child()) {
#pragma omp parallel num_threads(threads)
    {
      const FlushSubnormals flush;
      const int thread = omp_get_thread_num();
      if (chunk == 0) {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n; ++i) task(i, thread);
      } else {
#pragma omp for schedule(dynamic, chunk)
        for (int64_t i = 0; i < n; ++i) task(i, thread);
      }
    }
    return;
  }
#endif
  (void)threads;
  (void)chunk;
  const FlushSubnormals flush;
  for (int64_t i = 0; i < n; ++i) task(i, 0);
}

}  // namespace auxk
