// Fresh memory, brought in before it is written.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "parallel.h"

namespace auxk {

// Brings the pages of a large fresh buffer in, huge ones, by all threads. Left to page faults they would cost more than
// the work on them (100 MB: 35 ms small, 20 ms huge, where a store past the caches also waits for the write-back of the
// line just zeroed; 7 ms this way. A GEMM that writes to fresh pages takes three times its time).
inline void bring_pages_in(void* begin, int64_t bytes, int threads) {
#if defined(__linux__)
  constexpr int64_t kLarge = 4 << 20, kHugePage = 2 << 20, kPage = 4096;
  constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE, Linux 5.14; older kernels refuse it and nothing is lost
  if (begin == nullptr || bytes < kLarge) return;
  const uintptr_t address = reinterpret_cast<uintptr_t>(begin);
  const uintptr_t first = (address + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (address + static_cast<uintptr_t>(bytes)) / kHugePage * kHugePage;
  if (first >= last) return;
  unsigned char resident = 1;
  if (mincore(reinterpret_cast<void*>(first), kPage, &resident) != 0 || (resident & 1) != 0) return;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  parallel_for(static_cast<int64_t>((last - first) / kHugePage), threads, 1, [&](int64_t i, int) {
    madvise(reinterpret_cast<void*>(first + static_cast<uintptr_t>(i * kHugePage)), kHugePage, kPopulateWrite);
  });
#else
  (void)begin;
  (void)bytes;
  (void)threads;
#endif
}

}  // namespace auxk
