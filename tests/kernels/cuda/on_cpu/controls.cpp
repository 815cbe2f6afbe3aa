// What hardware_on_cpu.h has for tests, for Python: linked into the emulated module, called through ctypes.
#include "hardware_on_cpu.h"

#define AUXK_CONTROL extern "C" __attribute__((visibility("default")))

AUXK_CONTROL void auxk_seed(uint64_t value) { auxk::hw::seed(value); }

AUXK_CONTROL void auxk_register_memory(const void* begin, uint64_t bytes) { auxk::hw::register_memory(begin, bytes); }
AUXK_CONTROL void auxk_forget_memory() { auxk::hw::forget_memory(); }

AUXK_CONTROL void auxk_use_device(int number, int multiprocessors, int64_t shared_bytes, int has_clusters) {
  auxk::hw::device = {number, multiprocessors, shared_bytes, has_clusters != 0};
}
AUXK_CONTROL void auxk_capture(int is_capturing) { auxk::hw::device.is_capturing = is_capturing != 0; }

// num_blocks, blocks of a cluster (1: also without clusters), threads, bytes of shared memory
AUXK_CONTROL void auxk_last_launch(int64_t* launch) {
  const auxk::hw::Launch& how = auxk::hw::model::machine.how;
  launch[0] = how.num_blocks, launch[1] = how.cluster, launch[2] = how.threads, launch[3] = how.shared_bytes;
}
