// What the kernels ask of the machine beyond C++: threads and clusters, barriers, asynchronous copies, conversions.
// Everything that is PTX is here, and nothing else is, so that a compiler without CUDA can be given the same names
// (tests/kernels/cuda/on_cpu) and the kernels run on a CPU.
#pragma once

#include <climits>
#include <cmath>
#include <cstddef>
#include <cstdint>

#ifndef __CUDACC__
#include "hardware_on_cpu.h"
#else

#include <cuda_runtime.h>

namespace auxk {
namespace hw {

constexpr int kWarp = 32;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
constexpr bool kHasClusters = true;
#else
constexpr bool kHasClusters = false;
#endif

// -- who am I ---------------------------------------------------------------------------------------------------------

__device__ inline int thread() { return static_cast<int>(threadIdx.x); }
__device__ inline int block() { return static_cast<int>(blockIdx.x); }
__device__ inline int num_blocks() { return static_cast<int>(gridDim.x); }

__device__ inline int cluster_rank() {
#if __CUDA_ARCH__ >= 900
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
#else
  return 0;
#endif
}

extern __shared__ __align__(128) char dynamic_shared[];
__device__ inline char* shared_memory() { return dynamic_shared; }
__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// -- threads that wait for each other ---------------------------------------------------------------------------------

__device__ inline void sync_warp() { __syncwarp(); }
__device__ inline void sync_block() { __syncthreads(); }
// the first `num_threads` threads of the block, whole warps
__device__ inline void sync_group(int num_threads) { asm volatile("bar.sync 1, %0;" ::"r"(num_threads) : "memory"); }

// all threads of all blocks of the cluster; what was written to shared memory before, is seen after
__device__ inline void sync_cluster() {
  __syncwarp();  // the instructions want whole warps
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

template <class T>
__device__ inline T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
}

// what the lane before has; the first lane gets its own
__device__ inline uint32_t from_lane_before(uint32_t value) { return __shfl_up_sync(0xFFFFFFFFu, value, 1); }

// 32 bits of 64, from bit `bits` on, less than 32
__device__ inline uint32_t funnel(uint32_t low, uint32_t high, int bits) {
  return __funnelshift_r(low, high, static_cast<uint32_t>(bits));
}

// The largest of a warp's numbers; NaN counts as none. Of signed integers that are ordered as the numbers are it is one
// instruction.
__device__ inline float max_of_warp(float x) {
  const int bits = __float_as_int(x), key = x != x ? INT_MIN : bits ^ ((bits >> 31) & 0x7FFFFFFF);
  const int largest = __reduce_max_sync(0xFFFFFFFFu, key);
  return largest == INT_MIN ? -INFINITY : __int_as_float(largest ^ ((largest >> 31) & 0x7FFFFFFF));
}
__device__ inline double max_of_warp(double x) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x = fmax(x, shuffle_xor(x, mask));
  return x;
}

// the number of a block, or of another unit of which each calls once: whether it is the last of `count`. What the
// others have written before is seen by the last. The counter is 0 before and after.
__device__ inline bool is_last(unsigned* counter, unsigned count) {
  __threadfence();
  const bool last = atomicInc(counter, count - 1) == count - 1;
  __threadfence();
  return last;
}

// -- barriers in shared memory ----------------------------------------------------------------------------------------

// A phase is over when as many threads as `init` said have arrived and as many bytes as were expected have come.
struct Barrier {
  uint64_t state;
};

__device__ inline void init(Barrier* barrier, int arrivals) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
#endif
}

// after the last `init`, by the thread that called it; other threads then need a barrier of the block or cluster
__device__ inline void publish_barriers() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

__device__ inline void arrive(Barrier* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
#endif
}

// at the barrier in the same place of another block of the cluster, or of this one
__device__ inline void arrive_at(Barrier* barrier, int rank) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
#endif
}

__device__ inline void expect_bytes(Barrier* barrier, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
#endif
}

// Until the phase of this parity is over; phases alternate, the first has parity 0. A barrier that has not begun any
// counts as one whose phase of parity 1 is over.
__device__ inline void wait(Barrier* barrier, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#endif
}

// the same where other blocks of the cluster arrive
__device__ inline void wait_for_cluster(Barrier* barrier, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#endif
}

// -- memory -----------------------------------------------------------------------------------------------------------

// Starts a copy into shared memory, counted in bytes by the barrier. Addresses and size are multiples of 16. What is
// read so is read once: the first to leave L2.
__device__ inline void copy_in(void* shared, const void* global, uint32_t bytes, Barrier* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n"
      ".reg .b64 policy;\n"
      "createpolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], policy;\n"
      "}" ::"r"(shared_address(shared)),
      "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
#endif
}

// between this thread's own writes to shared memory and a later copy into the same bytes
__device__ inline void before_copies() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// one word into the same place of another block of the cluster, or of this one
__device__ inline void store_at(uint32_t* shared, int rank, uint32_t value) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "st.shared::cluster.u32 [remote], %2;\n"
      "}" ::"r"(shared_address(shared)),
      "r"(rank), "r"(value)
      : "memory");
#endif
}

struct alignas(16) Words4 {
  uint32_t w[4];
};
struct alignas(8) Words2 {
  uint32_t w[2];
};

// from global memory, past L1: `kept` if it will be read again, else the first to leave L2
__device__ inline Words4 load(const Words4* p, bool kept) {
  const uint4* q = reinterpret_cast<const uint4*>(p);
  const uint4 v = kept ? __ldcg(q) : __ldcs(q);
  return {{v.x, v.y, v.z, v.w}};
}
__device__ inline Words2 load(const Words2* p, bool kept) {
  const uint2* q = reinterpret_cast<const uint2*>(p);
  const uint2 v = kept ? __ldcg(q) : __ldcs(q);
  return {{v.x, v.y}};
}

// one number, from global memory as other blocks have written it
__device__ inline float load_written(const float* p) { return __ldcg(p); }
__device__ inline double load_written(const double* p) { return __ldcg(p); }

// to global memory, past what waits in L2 for a second read
__device__ inline void store(Words4* p, Words4 v) {
  __stcs(reinterpret_cast<uint4*>(p), make_uint4(v.w[0], v.w[1], v.w[2], v.w[3]));
}
__device__ inline void store(Words2* p, Words2 v) { __stcs(reinterpret_cast<uint2*>(p), make_uint2(v.w[0], v.w[1])); }

// -- numbers ----------------------------------------------------------------------------------------------------------

// 2**x to 2 ulp, results below the smallest normal number as 0: one instruction
__device__ inline float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline float from_bfloat16(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }
__device__ inline float from_float16(uint16_t bits) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(bits));
  return y;
}
// two numbers, rounded to nearest even, the first in the lower half
__device__ inline uint32_t to_bfloat16(float first, float second) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(second), "f"(first));
  return y;
}
__device__ inline uint32_t to_float16(float first, float second) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(second), "f"(first));
  return y;
}
__device__ inline uint32_t bits_of(float x) { return __float_as_uint(x); }
__device__ inline float float_of(uint32_t bits) { return __uint_as_float(bits); }
__device__ inline uint64_t bits_of(double x) { return static_cast<uint64_t>(__double_as_longlong(x)); }
__device__ inline double double_of(uint64_t bits) { return __longlong_as_double(static_cast<long long>(bits)); }

// -- from the host ----------------------------------------------------------------------------------------------------

struct Launch {
  int num_blocks, cluster, threads;  // cluster 0: blocks alone, for devices without clusters too
  int64_t shared_bytes;
  void* stream;
};

inline cudaLaunchConfig_t config_of(const Launch& how, cudaLaunchAttribute* attribute) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(how.num_blocks));
  config.blockDim = dim3(static_cast<unsigned>(how.threads));
  config.dynamicSmemBytes = static_cast<size_t>(how.shared_bytes);
  config.stream = static_cast<cudaStream_t>(how.stream);
  *attribute = {};
  attribute->id = cudaLaunchAttributeClusterDimension;
  attribute->val.clusterDim.x = static_cast<unsigned>(how.cluster);
  attribute->val.clusterDim.y = attribute->val.clusterDim.z = 1;
  config.attrs = attribute;
  config.numAttrs = how.cluster > 0 ? 1 : 0;
  return config;
}

inline const char* said(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

// All of these: null, or what the driver said. They speak of the current device.
inline const char* use_device(int device) { return said(cudaSetDevice(device)); }

inline const char* describe_device(int device, int32_t* multiprocessors, int64_t* shared_bytes, bool* has_clusters) {
  int shared = 0, major = 0;
  cudaError_t error = cudaDeviceGetAttribute(multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  *shared_bytes = shared;
  *has_clusters = major >= 9;
  return said(error);
}

// Lets the kernel use `shared_bytes` of shared memory, and says how many blocks the device runs at once of a launch like
// `how`: 0 if none. A call of the driver that another thread's capture must not see, and that waits for the kernel's code.
template <class Parameters>
const char* prepare(void (*kernel)(Parameters), const Launch& how, int64_t shared_bytes, int multiprocessors,
                    int* num_blocks) {
  const auto* function = reinterpret_cast<const void*>(kernel);
  *num_blocks = 0;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaError_t error = cudaThreadExchangeStreamCaptureMode(&mode);
  // the attribute is set and not raised: to the most there is, or a later and smaller launch would take it from this one
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  if (error == cudaSuccess && how.cluster > 8)
    error = cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error == cudaSuccess && how.cluster == 0) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(num_blocks, function, how.threads,
                                                          static_cast<size_t>(how.shared_bytes));
    *num_blocks *= multiprocessors;
  } else if (error == cudaSuccess) {
    cudaLaunchAttribute attribute;
    cudaLaunchConfig_t config = config_of(how, &attribute);
    config.gridDim.x = static_cast<unsigned>(how.cluster);
    error = cudaOccupancyMaxActiveClusters(num_blocks, function, &config);
    *num_blocks *= how.cluster;
    if (error == cudaErrorInvalidClusterSize) {
      cudaGetLastError();
      error = cudaSuccess, *num_blocks = 0;
    }
  }
  cudaThreadExchangeStreamCaptureMode(&mode);
  return said(error);
}

// where the current device has a variable of all blocks
template <class T>
const char* address_of(T& variable, T** address) {
  return said(cudaGetSymbolAddress(reinterpret_cast<void**>(address), variable));
}

// Null, or why the driver cannot run what this compiler makes. Touches no device.
inline const char* driver_problem() {
  int driver = 0, runtime = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || cudaRuntimeGetVersion(&runtime) != cudaSuccess)
    return "the driver's version cannot be read";
  if (driver == 0) return "there is no CUDA driver";
  return driver / 1000 < runtime / 1000 ? "the driver is older than the CUDA version that the module was built with"
                                        : nullptr;
}

// `Parameters` is passed by value.
template <class Parameters>
const char* launch(void (*kernel)(Parameters), const Launch& how, const Parameters& parameters) {
  cudaLaunchAttribute attribute;
  const cudaLaunchConfig_t config = config_of(how, &attribute);
  return said(cudaLaunchKernelEx(&config, kernel, parameters));
}

}  // namespace hw
}  // namespace auxk

#endif
