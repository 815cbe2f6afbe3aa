// The names of csrc/cuda/hardware.cuh for a compiler without CUDA: the kernels run on a CPU, thread by thread, in an
// order drawn from a seed (AUXKERNELS_CUDA_SEED, or auxk::hw::seed), and `launch` returns what they do wrong:
//
//   g++ -std=c++17 -O2 -fno-strict-aliasing -Icsrc -Icsrc/cuda -Itests/kernels/cuda/on_cpu -x c++ some_kernel.cu ...
//
// With -fsanitize=address,undefined plain reads and writes out of bounds are seen, too. Not seen: a missing
// before_copies, a race within what a thread does between two calls of these functions, a loop that never ends.
#pragma once

#include <math.h>  // as nvcc has it: fmax(float, float) and the like outside of std, too

#include <cstdint>
#include <cstring>
#include <map>
#include <utility>

#include "model.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__  // the standard library writes __attribute__((__noinline__)), which must stay an attribute
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

namespace auxk {
namespace hw {

// -- for tests --------------------------------------------------------------------------------------------------------

// of the launches from here on; without it they differ from each other, but not from one process to the next
inline void seed(uint64_t value) { model::machine.seed(value); }

// Once any is registered, load, store and copy_in must stay inside of one.
inline void register_memory(const void* begin, size_t bytes) {
  model::machine.regions.push_back({static_cast<const char*>(begin), bytes});
}
inline void forget_memory() { model::machine.regions.clear(); }

// What the kernels' caller is told of. Callers may keep it: give another device another number.
struct Device {
  int number = 0;
  int multiprocessors = 32;
  int64_t shared_bytes = model::kMaxSharedBytes;
  bool has_clusters = true;
  bool is_capturing = false;  // as a stream does: launches run all the same, but may not be the first to load code
};
inline __attribute__((visibility("hidden"))) Device device;

// how often one thread has followed another, so far
inline uint64_t num_switches() { return model::machine.num_switches; }

// -- who am I ---------------------------------------------------------------------------------------------------------

constexpr int kWarp = 32;
constexpr bool kHasClusters = true;

inline int thread() { return model::machine.current->index; }
inline int block() { return model::machine.current->block->index; }
inline int num_blocks() { return model::machine.how.num_blocks; }
inline int cluster_rank() { return model::machine.current->block->rank; }
inline char* shared_memory() { return model::machine.current->block->shared; }

// -- threads that wait for each other ---------------------------------------------------------------------------------

inline void sync_warp() {
  model::machine.publish_stores();
  model::machine.exchange(0, 0, 0, "sync_warp");
}

inline void sync_block() {
  model::machine.meet(model::machine.current->block->in_sync_block, model::machine.how.threads, "sync_block");
}

inline void sync_group(int num_threads) {
  model::Machine& m = model::machine;
  if (num_threads < 1 || num_threads > m.how.threads || num_threads % kWarp != 0)
    m.fail("sync_group of %d threads, not whole warps of the block", num_threads);
  if (thread() >= num_threads) m.fail("sync_group of the first %d threads", num_threads);
  model::Block& block = *m.current->block;
  if (!block.in_sync_group.empty() && block.group_size != num_threads)
    m.fail("sync_group of %d threads while others wait in one of %d", num_threads, block.group_size);
  block.group_size = num_threads;
  m.meet(block.in_sync_group, num_threads, "sync_group");
}

// of the threads that have not ended, as the machine does it
inline void sync_cluster() {
  model::Cluster& cluster = *model::machine.current->block->cluster;
  model::machine.meet(cluster.in_sync_cluster, cluster.alive, "sync_cluster");
}

template <class T>
T shuffle_xor(T value, int mask) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "as __shfl_xor_sync");
  if (mask < 0 || mask >= kWarp) model::machine.fail("shuffle_xor with mask %d", mask);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = model::machine.exchange(bits, mask, static_cast<int>(sizeof(T)) * kWarp + mask, "shuffle_xor");
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// what the lane before has; the first lane gets its own
inline uint32_t from_lane_before(uint32_t value) {
  return static_cast<uint32_t>(model::machine.exchange(value, model::Machine::kFromBefore, -1, "from_lane_before"));
}

inline uint32_t funnel(uint32_t low, uint32_t high, int bits) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (bits & 31));
}

// the largest of a warp's numbers; NaN counts as none
template <class T>
T max_of_warp(T x) {
  if (x != x) x = -static_cast<T>(HUGE_VAL);
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const T other = shuffle_xor(x, mask);
    x = other > x ? other : x;
  }
  return x;
}

inline bool is_last(unsigned* counter, unsigned count) {
  model::machine.publish_stores();
  model::machine.pause();
  const unsigned before = *counter;
  if (before >= count) model::machine.fail("is_last of %u with counter %u", count, before);
  *counter = before == count - 1 ? 0 : before + 1;
  model::machine.pause();
  return before == count - 1;
}

// -- barriers in shared memory ----------------------------------------------------------------------------------------

inline void init(Barrier* barrier, int arrivals) { model::machine.init(barrier, arrivals); }
inline void publish_barriers() { model::machine.publish_barriers(); }
inline void arrive(Barrier* barrier) { model::machine.arrive(barrier, cluster_rank(), "arrive"); }
inline void arrive_at(Barrier* barrier, int rank) { model::machine.arrive(barrier, rank, "arrive_at"); }
inline void expect_bytes(Barrier* barrier, uint32_t bytes) { model::machine.expect(barrier, bytes); }
inline void wait(Barrier* barrier, uint32_t parity) { model::machine.wait(barrier, parity, "wait"); }
inline void wait_for_cluster(Barrier* barrier, uint32_t parity) {
  model::machine.wait(barrier, parity, "wait_for_cluster");
}

// -- memory -----------------------------------------------------------------------------------------------------------

inline void copy_in(void* shared, const void* global, uint32_t bytes, Barrier* barrier) {
  model::machine.copy_in(shared, global, bytes, barrier);
}
inline void before_copies() {}
inline void store_at(uint32_t* shared, int rank, uint32_t value) { model::machine.store_at(shared, rank, value); }

struct alignas(16) Words4 {
  uint32_t w[4];
};
struct alignas(8) Words2 {
  uint32_t w[2];
};

template <class Words>
Words load(const Words* p, bool /*kept*/) {
  model::machine.check_global(p, sizeof(Words), sizeof(Words), "load");
  Words v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class Words>
void store(Words* p, Words v) {
  model::machine.check_global(p, sizeof(Words), sizeof(Words), "store");
  std::memcpy(p, &v, sizeof v);
}

// -- numbers ----------------------------------------------------------------------------------------------------------

template <class To, class From>
To same_bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "");
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
inline uint32_t bits_of(float x) { return same_bits<uint32_t>(x); }
inline float float_of(uint32_t bits) { return same_bits<float>(bits); }
inline uint64_t bits_of(double x) { return same_bits<uint64_t>(x); }
inline double double_of(uint64_t bits) { return same_bits<double>(bits); }

inline float exp2_approximate(float x) {
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0.0f : y;
}

inline float from_bfloat16(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }

inline float from_float16(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  if (exponent == 31 && mantissa != 0) return float_of(0x7FFFFFFFu);
  const float y = exponent == 31  ? INFINITY
                  : exponent == 0 ? static_cast<float>(mantissa) * 0x1p-24f
                                  : ldexpf(static_cast<float>(1024 + mantissa), exponent - 25);
  return bits >> 15 ? -y : y;
}

inline uint32_t to_bfloat16(float x) {
  const uint32_t bits = bits_of(x);
  if (x != x) return 0x7FFFu;
  return (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
}

inline uint32_t to_float16(float x) {
  const uint32_t sign = bits_of(x) >> 16 & 0x8000u;
  const float magnitude = fabsf(x);
  if (x != x) return 0x7FFFu;
  if (magnitude >= 65520.0f) return sign | 0x7C00u;
  // in units of the last place: nearbyint rounds as asked, and a carry moves on to the next exponent by itself
  const int exponent = magnitude < 0x1p-14f ? -14 : ilogbf(magnitude);
  const uint32_t units = static_cast<uint32_t>(nearbyintf(ldexpf(magnitude, 10 - exponent)));
  return sign | (static_cast<uint32_t>(exponent + 14) * 1024u + units);
}

inline uint32_t to_bfloat16(float first, float second) { return to_bfloat16(second) << 16 | to_bfloat16(first); }
inline uint32_t to_float16(float first, float second) { return to_float16(second) << 16 | to_float16(first); }

inline float load_written(const float* p) { return *p; }
inline double load_written(const double* p) { return *p; }

// -- from the host ----------------------------------------------------------------------------------------------------

inline const char* use_device(int number) {
  return number == device.number ? nullptr : "use_device: not the number of the device there is";
}

inline const char* describe_device(int number, int32_t* multiprocessors, int64_t* shared_bytes, bool* has_clusters) {
  if (number != device.number) return "describe_device: not the current device";
  *multiprocessors = device.multiprocessors;
  *shared_bytes = device.shared_bytes;
  *has_clusters = device.has_clusters;
  return nullptr;
}

// What is known of a kernel on this device: what the last `prepare` asked for, not the most that any did.
struct Known {
  int64_t shared_limit = 48 << 10;
  bool is_loaded = false;
};
inline Known& known_of(const void* kernel) {
  static std::map<std::pair<int, const void*>, Known> known;
  return known[std::make_pair(device.number, kernel)];
}

// One block on each multiprocessor.
template <class Parameters>
const char* prepare(void (*kernel)(Parameters), const Launch& how, int64_t shared_bytes, int multiprocessors,
                    int* num_blocks) {
  *num_blocks = 0;
  if (how.shared_bytes > shared_bytes || shared_bytes > device.shared_bytes)
    return "prepare: more shared memory than the device has";
  known_of(reinterpret_cast<const void*>(kernel)) = {shared_bytes, true};
  if (how.cluster == 0) *num_blocks = multiprocessors;
  if (how.cluster > 0 && device.has_clusters) *num_blocks = multiprocessors / how.cluster * how.cluster;
  return nullptr;
}

template <class T>
const char* address_of(T& variable, T** address) {
  *address = &variable;
  return nullptr;
}

inline const char* driver_problem() { return nullptr; }

// Null, or what went wrong, until the next launch.
template <class Parameters>
const char* launch(void (*kernel)(Parameters), const Launch& how, const Parameters& parameters) {
  if (how.cluster > 0 && !device.has_clusters) return "launch: clusters, on a device without";
  const int cluster = how.cluster > 0 ? how.cluster : 1;
  if (how.threads < 1 || how.threads > model::kMaxThreads || how.threads % kWarp != 0)
    return "launch: the number of threads is not a multiple of 32 up to 1024";
  if (cluster > model::kMaxCluster || how.num_blocks < 1 || how.num_blocks % cluster != 0)
    return "launch: clusters of more than 16 blocks, or a number of blocks that is not a multiple of theirs";
  if (how.shared_bytes < 0 || how.shared_bytes > device.shared_bytes)
    return "launch: more shared memory than the device has";
  Known& known = known_of(reinterpret_cast<const void*>(kernel));
  if (how.shared_bytes > known.shared_limit) return "launch: more shared memory than the kernel was prepared for";
  if (device.is_capturing && !known.is_loaded) return "launch: a capture would load the kernel's code";
  known.is_loaded = true;
  return model::machine.run(how, [&] { kernel(parameters); });
}

}  // namespace hw
}  // namespace auxk
