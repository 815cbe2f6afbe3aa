// The emulator's own test: correct kernels give the same result under every seed, wrong ones are caught.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "hardware_on_cpu.h"

namespace hw = auxk::hw;

static int failures = 0;
static void check(bool fact, const char* claim) {
  if (fact) return;
  std::printf("FAILED: %s\n", claim);
  ++failures;
}

template <class T>
__device__ __forceinline__ T sum_of_warp(T x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x += hw::shuffle_xor(x, mask);
  return x;
}

// -- a ring of slots, filled by one warp, emptied by the others; sums meet in block 0 of the cluster ------------------

struct Ring {
  const float* in;  // [num_blocks, steps, kSlot]
  double* out;      // [num_clusters]
  int steps, cluster;
  bool waits_for_empty, waits_for_full;
};
constexpr int kSlots = 3, kSlot = 256, kConsumers = 128;
struct alignas(128) RingShared {
  float slots[kSlots][kSlot];
  hw::Barrier full[kSlots], empty[kSlots], sums_are_here;
  double partial[kConsumers / 32];
  uint32_t sums[16][2];
};

template <int kCopies>
__global__ void __launch_bounds__(kConsumers + 32, 1) ring_kernel(const __grid_constant__ Ring p) {
  RingShared& shared = *reinterpret_cast<RingShared*>(hw::shared_memory());
  const int rank = hw::cluster_rank(), warp = hw::thread() / hw::kWarp, lane = hw::thread() % hw::kWarp;
  if (hw::thread() == 0) {
    for (int i = 0; i < kSlots; ++i) {
      hw::init(&shared.full[i], 1);
      hw::init(&shared.empty[i], kConsumers);
    }
    hw::init(&shared.sums_are_here, p.cluster);
    hw::publish_barriers();
  }
  hw::sync_cluster();
  if (warp == kConsumers / 32) {
    const float* in = p.in + static_cast<int64_t>(hw::block()) * p.steps * kSlot;
    for (int i = 0; i < p.steps && lane == 0; ++i) {
      const int slot = i % kSlots;
      if (p.waits_for_empty) hw::wait(&shared.empty[slot], (i / kSlots & 1) ^ 1);
      hw::expect_bytes(&shared.full[slot], sizeof shared.slots[slot]);
      for (int c = 0; c < kCopies; ++c)
        hw::copy_in(&shared.slots[slot][kSlot / kCopies * c], in + i * kSlot + kSlot / kCopies * c,
                    sizeof(float) * kSlot / kCopies, &shared.full[slot]);
      hw::arrive(&shared.full[slot]);
    }
  } else {
    double sum = 0;
    for (int i = 0; i < p.steps; ++i) {
      const int slot = i % kSlots;
      if (p.waits_for_full) hw::wait(&shared.full[slot], i / kSlots & 1);
      for (int j = hw::thread(); j < kSlot; j += kConsumers) sum += shared.slots[slot][j];
      hw::before_copies();
      hw::arrive(&shared.empty[slot]);
    }
    sum = sum_of_warp(sum);
    if (lane == 0) shared.partial[warp] = sum;
    hw::sync_group(kConsumers);
    if (hw::thread() == 0) {
      sum = 0;
      for (double partial : shared.partial) sum += partial;
      const uint64_t bits = hw::bits_of(sum);
      hw::store_at(&shared.sums[rank][0], 0, static_cast<uint32_t>(bits));
      hw::store_at(&shared.sums[rank][1], 0, static_cast<uint32_t>(bits >> 32));
      hw::arrive_at(&shared.sums_are_here, 0);
    }
    if (rank == 0) {
      hw::wait_for_cluster(&shared.sums_are_here, 0);
      if (hw::thread() == 0) {
        sum = 0;
        for (int r = 0; r < p.cluster; ++r)
          sum += hw::double_of(static_cast<uint64_t>(shared.sums[r][1]) << 32 | shared.sums[r][0]);
        p.out[hw::block() / p.cluster] = sum;
      }
    }
  }
  hw::sync_cluster();
}

static const char* run_ring(int num_blocks, int cluster, int steps, bool empty, bool full, bool& right) {
  std::vector<float> in(static_cast<size_t>(num_blocks * steps * kSlot) + 4);
  float* begin = in.data();
  while (reinterpret_cast<uintptr_t>(begin) % 16 != 0) ++begin;
  std::vector<double> out(static_cast<size_t>(num_blocks / cluster)), expected(out.size());
  for (int i = 0; i < num_blocks * steps * kSlot; ++i) {
    begin[i] = static_cast<float>(i % 1013);
    expected[static_cast<size_t>(i / (steps * kSlot * cluster))] += begin[i];
  }
  hw::register_memory(begin, sizeof(float) * static_cast<size_t>(num_blocks * steps * kSlot));
  const Ring ring = {begin, out.data(), steps, cluster, empty, full};
  const char* error =
      hw::launch(ring_kernel<4>, {num_blocks, cluster, kConsumers + 32, sizeof(RingShared), nullptr}, ring);
  hw::forget_memory();
  right = out == expected;
  return error;
}

static void test_seeds() {
  bool right = false;
  uint64_t count[3];
  for (int i = 0; i < 3; ++i) {
    hw::seed(i == 2 ? 8 : 7);
    const uint64_t before = hw::num_switches();
    run_ring(16, 4, 5, true, true, right);
    count[i] = hw::num_switches() - before;
  }
  check(count[0] == count[1] && count[0] != count[2], "a seed gives one order, another seed another");
}

static void test_ring() {
  int caught_empty = 0, caught_full = 0;
  for (uint64_t seed = 0; seed < 50; ++seed) {
    hw::seed(seed);
    const int cluster = seed % 3 == 0 ? 1 : seed % 3 == 1 ? 4 : 16;
    bool right = false;
    const char* error = run_ring(32, cluster, 7, true, true, right);
    check(error == nullptr, error);
    check(right, "the ring's sums");
    error = run_ring(4, 2, 7, false, true, right);
    caught_empty += error != nullptr || !right;
    error = run_ring(4, 2, 7, true, false, right);
    caught_full += error != nullptr || !right;
  }
  std::printf("ring and cluster exchange; without the empty barrier caught by %d of 50 seeds, without the full by %d\n",
              caught_empty, caught_full);
  check(caught_empty > 0 && caught_full > 0, "missing barriers are caught");
}

// -- shuffles, is_last, a missing sync_block --------------------------------------------------------------------------

struct Small {
  double* out;
  unsigned* counter;
  int what;
};

__global__ void small_kernel(const __grid_constant__ Small p) {
  const int t = hw::thread(), lane = t % hw::kWarp;
  if (p.what == 0) {
    bool right = true;
    for (int mask = 0; mask < 32; ++mask) {
      const int other = t ^ mask;
      right = right && hw::shuffle_xor(static_cast<float>(t), mask) == static_cast<float>(other);
      right = right && hw::shuffle_xor(t - 1000, mask) == other - 1000;
      right = right && hw::shuffle_xor(t / 3.0, mask) == other / 3.0;
      right = right && hw::shuffle_xor(uint64_t{1} << 60 | static_cast<uint64_t>(t), mask) >> 60 == 1;
    }
    hw::sync_warp();
    p.out[t] = right;
  } else if (p.what == 1) {
    if (t == 0) p.out[hw::block()] = hw::block() + 1;
    hw::sync_block();
    float* last = reinterpret_cast<float*>(hw::shared_memory());
    if (t == 0) *last = hw::is_last(p.counter, static_cast<unsigned>(hw::num_blocks())) ? 1.0f : 0.0f;
    hw::sync_block();
    if (*last == 0.0f) return;
    double sum = 0;
    for (int i = lane; i < hw::num_blocks(); i += hw::kWarp) sum += p.out[i];
    sum = sum_of_warp(sum);
    if (t == 0) p.out[hw::num_blocks()] += sum;
  } else {  // 2: as it should be, 3: without the barrier
    int* words = reinterpret_cast<int*>(hw::shared_memory());
    words[t] = t;
    if (p.what == 2) hw::sync_block();
    p.out[t] = words[(t + 33) % 96];
  }
}

static void test_small() {
  unsigned counter = 0;
  int caught = 0;
  for (uint64_t seed = 0; seed < 50; ++seed) {
    hw::seed(seed);
    std::vector<double> out(101);
    check(hw::launch(small_kernel, {1, 0, 96, 0, nullptr}, Small{out.data(), &counter, 0}) == nullptr, "shuffles");
    for (size_t t = 0; t < 96; ++t) check(out[t] == 1, "shuffled values");
    std::fill(out.begin(), out.end(), 0.0);
    for (int launch = 1; launch <= 2; ++launch) {
      check(hw::launch(small_kernel, {100, 0, 64, 4, nullptr}, Small{out.data(), &counter, 1}) == nullptr, "is_last");
      check(counter == 0 && out[100] == launch * 5050, "one block is last, and sees what all have written");
    }
    bool right[2] = {true, true};
    for (int wrong = 0; wrong < 2; ++wrong) {
      check(hw::launch(small_kernel, {1, 1, 96, 96 * 4, nullptr}, Small{out.data(), &counter, 2 + wrong}) == nullptr,
            "");
      for (size_t t = 0; t < 96; ++t) right[wrong] = right[wrong] && out[t] == static_cast<double>((t + 33) % 96);
    }
    check(right[0], "sync_block");
    caught += !right[1];
  }
  std::printf("shuffles, is_last, sync_block; without it caught by %d of 50 seeds\n", caught);
  check(caught > 0, "a missing sync_block is caught");
}

// -- what must not be done --------------------------------------------------------------------------------------------

struct Wrong {
  int what;
  char* memory;
};
struct alignas(16) WrongShared {
  char data[256];
  hw::Barrier barrier, other;
};

__global__ void wrong_kernel(const __grid_constant__ Wrong p) {
  WrongShared& shared = *reinterpret_cast<WrongShared*>(hw::shared_memory());
  hw::Barrier* barrier = &shared.barrier;
  const int t = hw::thread(), rank = hw::cluster_rank();
  if (t == 0 && p.what != 0) {
    hw::init(barrier, 1);
    hw::publish_barriers();
  }
  hw::sync_cluster();
  const bool first = t == 0 && rank == 0;
  if (first) hw::expect_bytes(barrier, 64);
  switch (p.what) {
    case 0:
      break;
    case 1:
      hw::wait(barrier, 0);
      break;
    case 2:
      hw::arrive(barrier), hw::arrive(barrier);
      break;
    case 3:
      hw::expect_bytes(barrier, 1 << 20);
      break;
    case 4:
      first ? hw::copy_in(shared.data, p.memory, 80, barrier) : void();
      break;
    case 5:
      first ? hw::copy_in(shared.data, p.memory + 8, 16, barrier) : void();
      break;
    case 6:
      first ? hw::copy_in(shared.data + 4, p.memory, 16, barrier) : void();
      break;
    case 7:
      first ? hw::copy_in(shared.data, p.memory, 24, barrier) : void();
      break;
    case 8:
      first ? hw::copy_in(shared.data, p.memory, 0, barrier) : void();
      break;
    case 9:
      first ? hw::copy_in(shared.data + 272, p.memory, 16, barrier) : void();
      break;
    case 10:
      first ? hw::copy_in(shared.data - 16, p.memory, 16, barrier) : void();
      break;
    case 11:
      first ? hw::copy_in(shared.data, p.memory + 128, 16, barrier) : void();
      break;
    case 12:
      if (first) hw::copy_in(shared.data, p.memory, 32, barrier), hw::copy_in(shared.data + 16, p.memory, 32, barrier);
      hw::sync_cluster();
      hw::sync_cluster();
      break;
    case 13:
      hw::store_at(reinterpret_cast<uint32_t*>(shared.data), 2, 0);
      break;
    case 14:
      hw::arrive_at(barrier, -1);
      break;
    case 15:
      hw::store_at(reinterpret_cast<uint32_t*>(p.memory), 1, 0);
      break;
    case 16:
      t < 32 ? hw::sync_group(32) : hw::sync_group(64);
      hw::sync_group(64);
      break;
    case 17:
      hw::sync_group(48);
      break;
    case 18:
      t == 5 ? void() : void(hw::shuffle_xor(1.0f, 1));
      break;
    case 19:
      t == 5 ? hw::sync_warp() : void(hw::shuffle_xor(1.0f, 1));
      break;
    case 20:
      hw::load(reinterpret_cast<hw::Words4*>(p.memory + 8), false);
      break;
    case 21:
      hw::store(reinterpret_cast<hw::Words2*>(p.memory + 4), hw::Words2{});
      break;
    case 22:
      hw::load(reinterpret_cast<hw::Words2*>(p.memory + 128), true);
      break;
    case 23:
      first ? hw::copy_in(shared.data, p.memory, 64, barrier) : void();
      break;
    case 24:
      first ? hw::store_at(reinterpret_cast<uint32_t*>(shared.data), 1, 7) : void();
      break;
    case 25:
      if (first) {
        hw::copy_in(shared.data, p.memory, 64, barrier);
        shared.data[3] = 1;
        hw::arrive(barrier);
        hw::wait(barrier, 0);
      }
      break;
    case 26:
      std::memset(barrier, 0, 8), hw::sync_block(), hw::wait(barrier, 0);
      break;
    case 27:
      t == 0 ? hw::init(&shared.other, 2) : hw::arrive(&shared.other);
      hw::sync_block();
      break;
    case 28:
      hw::init(barrier, 1);
      break;
    case 29:
      t > 7 ? hw::sync_block() : void();
      break;
    case 30:
      t == 0 ? void(p.memory[0] = 1) : hw::sync_cluster();
      return;  // not wrong
    case 31:
      first ? hw::arrive_at(barrier, 1) : void();
      break;
    case 32:
      hw::shared_memory()[sizeof(WrongShared)] = 0;
      break;
  }
}

static void test_wrong() {
  static const char* const kSaid[] = {"no barrier was initialized",
                                      "deadlock",
                                      "more than 1 arrivals",
                                      "expect_bytes",
                                      "on the way to the barrier",
                                      "not all multiples of 16",
                                      "not all multiples of 16",
                                      "not all multiples of 16",
                                      "copy_in of 0 bytes",
                                      "outside of shared memory",
                                      "outside of shared memory",
                                      "no registered memory",
                                      "another copy",
                                      "rank 2 in a cluster",
                                      "rank -1 in a cluster",
                                      "outside of shared memory",
                                      "sync_group",
                                      "not whole warps",
                                      "shuffle_xor",
                                      "in a different one",
                                      "not a multiple of 16",
                                      "not a multiple of 8",
                                      "no registered memory",
                                      "ended while a copy",
                                      "ended",
                                      "was written while a copy",
                                      "overwritten",
                                      "barrier",
                                      "a second time",
                                      "sync_block",
                                      nullptr,
                                      "ended",
                                      "wrote outside"};
  alignas(16) static char memory[144];
  hw::register_memory(memory, 128);
  int count = 0;
  for (const char* said : kSaid) {
    const int what = count++;
#ifdef AUXK_ADDRESS_SANITIZER
    if (what == 32) continue;  // which ends the program instead
#endif
    int caught = 0, missed = 0;
    for (uint64_t seed = 0; seed < 50; ++seed) {
      hw::seed(seed);
      const char* error = hw::launch(wrong_kernel, {2, 2, 64, sizeof(WrongShared), nullptr}, Wrong{what, memory});
      const bool as_expected = said == nullptr ? error == nullptr : error != nullptr && std::strstr(error, said);
      caught += as_expected;
      missed += !as_expected;
      if (!as_expected && !(said != nullptr && error == nullptr)) {
        std::printf("FAILED: misuse %d said %s\n", what, error == nullptr ? "nothing" : error);
        ++failures;
      }
      if (seed == 0) std::printf("  %2d: %s\n", what, error == nullptr ? "-" : error);
    }
    if (caught == 0) std::printf("FAILED: misuse %d is never seen\n", what), ++failures;
    if (missed > 0) std::printf("      seen by %d of 50 seeds\n", caught);
  }
  hw::forget_memory();
  const hw::Launch refused[] = {{2, 2, 48, 0, nullptr}, {2, 2, 1056, 0, nullptr},    {34, 17, 32, 0, nullptr},
                                {3, 2, 32, 0, nullptr}, {1, 1, 32, 232449, nullptr}, {0, 1, 32, 0, nullptr}};
  for (const hw::Launch& how : refused)
    check(hw::launch(wrong_kernel, how, Wrong{30, memory}) != nullptr, "a launch that must be refused");
  hw::device.has_clusters = false;
  check(hw::launch(wrong_kernel, {2, 2, 64, sizeof(WrongShared), nullptr}, Wrong{30, memory}) != nullptr,
        "clusters on a device without");
  hw::device = {};
  std::printf("%d misuses, 7 refused launches\n", count - 1);
}

// -- numbers ----------------------------------------------------------------------------------------------------------

// the nearest of the format's numbers by looking at all near it, ties to the even one
static uint32_t nearest(double x, int exponent_bits, int mantissa_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const uint32_t infinity = ((1u << exponent_bits) - 1) << mantissa_bits;
  const auto value = [&](uint32_t bits) {
    const int exponent = static_cast<int>(bits >> mantissa_bits);
    const int mantissa = static_cast<int>(bits & ((1u << mantissa_bits) - 1)) + (exponent ? 1 << mantissa_bits : 0);
    return std::ldexp(static_cast<double>(mantissa), (exponent ? exponent : 1) - bias - mantissa_bits);
  };
  uint32_t below = 0, above = infinity;  // the value of "infinity" is the number that would follow
  const double magnitude = std::fabs(x);
  if (magnitude >= value(infinity)) below = infinity;
  while (above - below > 1 && below < infinity) {
    const uint32_t middle = (below + above) / 2;
    (value(middle) <= magnitude ? below : above) = middle;
  }
  if (below < infinity) {
    const double down = magnitude - value(below), up = value(below + 1) - magnitude;
    if (up < down || (up == down && below % 2 == 1)) ++below;
  }
  return below | (std::signbit(x) ? 1u << (exponent_bits + mantissa_bits) : 0);
}

static void test_numbers() {
  uint64_t random = 1;
  for (int i = 0; i < 400000; ++i) {
    random = random * 6364136223846793005ull + 1442695040888963407ull;
    uint32_t bits = static_cast<uint32_t>(random >> 32);
    if (i % 4 == 0) bits &= 0xFFFFF000u;                                        // ties
    if (i % 2 == 0) bits = (bits & 0x8FFFFFFFu) | (i % 8 < 4 ? 3u : 4u) << 28;  // the range of float16
    const float x = hw::float_of(bits);
    if (x != x) continue;
    check((hw::to_float16(x, 0.0f) & 0xFFFF) == nearest(x, 5, 10), "to_float16");
    check(hw::to_bfloat16(0.0f, x) >> 16 == nearest(x, 8, 7), "to_bfloat16");
  }
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const float half = hw::from_float16(static_cast<uint16_t>(bits)),
                brain = hw::from_bfloat16(static_cast<uint16_t>(bits));
    check(half != half ? (bits & 0x7FFF) > 0x7C00 : (hw::to_float16(half, half) == bits * 0x10001u), "from_float16");
    check(brain != brain ? (bits & 0x7FFF) > 0x7F80 : (hw::to_bfloat16(brain, brain) == bits * 0x10001u),
          "from_bfloat16");
  }
  check(hw::to_float16(NAN, -NAN) == 0x7FFF7FFF && hw::to_bfloat16(-NAN, NAN) == 0x7FFF7FFF, "NaN");
  check(hw::exp2_approximate(-126.5f) == 0 && hw::exp2_approximate(-INFINITY) == 0 && hw::exp2_approximate(3) == 8 &&
            hw::exp2_approximate(-126) == 0x1p-126f && hw::exp2_approximate(129) == INFINITY &&
            std::isnan(hw::exp2_approximate(NAN)),
        "exp2_approximate");
  std::printf("conversions, exp2\n");
}

int main() {
  test_seeds();
  test_ring();
  test_small();
  test_wrong();
  test_numbers();
  hw::seed(1);
  bool right = false;
  const uint64_t before = hw::num_switches();
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < 10; ++i) run_ring(160, 16, 64, true, true, right);
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
  std::printf("%.2f million switches per second\n",
              static_cast<double>(hw::num_switches() - before) / took.count() / 1e6);
  std::printf(failures == 0 ? "all as it should be\n" : "%d FAILURES\n", failures);
  return failures == 0 ? 0 : 1;
}
