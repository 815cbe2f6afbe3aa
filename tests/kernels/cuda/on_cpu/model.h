// A model of the machine: blocks of warps of threads, in clusters, with shared memory, barriers, and copies and remote
// stores on their way. A thread runs until it has to wait; who is next, and when what is on its way comes, is drawn
// from a seed, so that a result which hangs on the order changes with the seed. A misuse ends the launch.
#pragma once

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "fibers.h"

namespace auxk::hw {

struct Barrier {
  uint64_t state;
};

struct Launch {
  int num_blocks, cluster, threads;
  int64_t shared_bytes;
  void* stream;
};

namespace model {

constexpr int kLanes = 32;
constexpr int kMaxThreads = 1024, kMaxCluster = 16, kMaxLiveBlocks = 16;
constexpr int64_t kMaxSharedBytes = 227 * 1024, kMaxCount = (1 << 20) - 1;
constexpr int kPoison = 0xFF;  // a NaN in every format
constexpr int kGuard = 0xA5;
constexpr uint64_t kBarrierMark = 0xBA221E5B0A7ull << 20;

struct Block;
struct Cluster;
struct Thread;
struct Warp;

// A barrier's own bytes only hold a mark and a number, by which its being overwritten is seen.
struct Phase {
  int64_t place;  // of the barrier, in bytes of shared memory
  int64_t arrivals, missing_arrivals;
  int64_t missing_bytes = 0, bytes_on_the_way = 0;
  uint32_t parity = 0;
  const Thread* not_published_by;
  std::vector<Thread*> waiting;
};

struct Copy {
  Block* block;
  char* to;
  const void* from;
  uint32_t bytes;
  Phase* phase;
};

struct Store {
  Block* block;
  char* to;
  uint32_t value;
};

struct Thread {
  Context context;
  Block* block;
  Warp* warp;
  int index;
  const char* waits_in;    // null: it runs or could
  const Phase* waits_for;  // in a wait()
  std::vector<Store> stores;
};

struct Warp {
  Thread* lanes;
  uint32_t runnable = 0;  // a bit for each lane
  int ready_place = -1;
  unsigned priority = 0;
  // of the shuffle that goes on; the results are read before any lane can end the next
  int met = 0, kind = 0;
  uint64_t value[kLanes], result[kLanes];
};

struct Block {
  int index, rank;
  Cluster* cluster;
  char *memory, *shared;  // with the guards, and without
  int alive;
  std::deque<Phase> phases;
  int group_size;  // of those that wait there
  std::vector<Thread*> in_sync_block, in_sync_group;
};

struct Cluster {
  Block* blocks;
  int size, alive;
  std::vector<Thread*> in_sync_cluster;
};

class Machine {
 public:
  Thread* current = nullptr;
  Launch how = {};
  uint64_t num_switches = 0;
  std::vector<std::pair<const char*, size_t>> regions;  // of global memory; none: all

  // -- the threads ----------------------------------------------------------------------------------------------------

  const char* run(const Launch& launch, const std::function<void()>& kernel);

  void seed(uint64_t value) {
    random_ = value * 0x9E3779B97F4A7C15ull + 0xD1B54A32D192ED03ull;
    seeded_ = true;
  }

  // a place where others may go first, even all that can
  void pause() {
    if (!chance(preemption_)) return;
    held_.push_back(current);
    suspend(nullptr);
  }

  // Until `count` threads have called.
  void meet(std::vector<Thread*>& waiting, int count, const char* where) {
    publish_stores();
    if (static_cast<int>(waiting.size()) + 1 == count) {
      wake_all(waiting);
      pause();
    } else {
      waiting.push_back(current);
      suspend(where);
    }
  }

  // instead of a mask: lane i gets what lane i - 1 has
  static constexpr int kFromBefore = -1;
  // `kind` tells one use by a warp from another
  uint64_t exchange(uint64_t value, int mask, int kind, const char* where) {
    Warp& warp = *current->warp;
    const int lane = current->index % kLanes;
    if (warp.met > 0 && warp.kind != kind) fail("%s while other lanes of the warp wait in a different one", where);
    warp.kind = kind;
    warp.value[lane] = value;
    if (++warp.met < kLanes) {
      suspend(where);
    } else {
      warp.met = 0;
      for (int i = 0; i < kLanes; ++i) warp.result[i] = warp.value[mask == kFromBefore ? i - (i > 0) : i ^ mask];
      wake(warp, ~(1u << lane));
    }
    return warp.result[lane];
  }

  // -- barriers -------------------------------------------------------------------------------------------------------

  void init(Barrier* barrier, int arrivals) {
    Block& block = *current->block;
    const int64_t place = place_in(block, barrier, sizeof(Barrier), "init");
    if (place % 8 != 0) fail("init of a barrier at byte %ld, not a multiple of 8", long(place));
    if (arrivals < 1 || arrivals > kMaxCount) fail("init of a barrier for %d arrivals", arrivals);
    for (const Phase& other : block.phases)
      if (other.place == place) fail("init of the barrier at byte %ld a second time", long(place));
    barrier->state = kBarrierMark | block.phases.size();
    block.phases.push_back(Phase{place, arrivals, arrivals, 0, 0, 0, current, {}});
  }

  void publish_barriers() {
    for (Phase& phase : current->block->phases)
      if (phase.not_published_by == current) phase.not_published_by = nullptr;
  }

  void arrive(Barrier* barrier, int rank, const char* where) {
    publish_stores();
    Phase& phase = phase_of(barrier, other_block(rank, where), where);
    if (phase.missing_arrivals == 0)
      fail("%s: more than %ld arrivals at the barrier at byte %ld", where, long(phase.arrivals), long(phase.place));
    --phase.missing_arrivals;
    end_if_over(phase);
    pause();
  }

  void expect(Barrier* barrier, uint32_t bytes) {
    Phase& phase = phase_of(barrier, *current->block, "expect_bytes");
    phase.missing_bytes += bytes;
    if (phase.missing_bytes > kMaxCount) fail("expect_bytes: %ld in one phase", long(phase.missing_bytes));
  }

  void wait(Barrier* barrier, uint32_t parity, const char* where) {
    Phase& phase = phase_of(barrier, *current->block, where);
    if (parity > 1) fail("%s for parity %u", where, parity);
    pause();
    // looked at again on waking: by then the next phase, too, may be over, and the thread has missed its own
    while (phase.parity == parity) {
      phase.waiting.push_back(current);
      current->waits_for = &phase;
      suspend(where);
    }
  }

  // -- memory ---------------------------------------------------------------------------------------------------------

  void copy_in(void* shared, const void* global, uint32_t bytes, Barrier* barrier) {
    Block& block = *current->block;
    const int64_t place = place_in(block, shared, bytes, "copy_in");
    if (bytes == 0) fail("copy_in of 0 bytes");
    if (place % 16 != 0 || bytes % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0)
      fail("copy_in of %u bytes from %p to byte %ld, not all multiples of 16", bytes, global, long(place));
    check_global(global, bytes, 16, "copy_in");
    Phase& phase = phase_of(barrier, block, "copy_in");
    if (phase.not_published_by != nullptr) fail("copy_in with a barrier before publish_barriers");
    phase.bytes_on_the_way += bytes;
    if (phase.bytes_on_the_way > phase.missing_bytes)
      fail("copy_in: %ld bytes on the way to the barrier at byte %ld, which expects %ld", long(phase.bytes_on_the_way),
           long(phase.place), long(phase.missing_bytes));
    char* const to = static_cast<char*>(shared);
    for (const Copy& other : copies_)
      if (to < other.to + other.bytes && other.to < to + bytes)
        fail("copy_in to byte %ld while another copy to there is on its way", long(place));
    std::memset(to, kPoison, bytes);
    copies_.push_back({&block, to, global, bytes, &phase});
    pause();
  }

  void store_at(uint32_t* shared, int rank, uint32_t value) {
    Block& mine = *current->block;
    const int64_t place = place_in(mine, shared, sizeof value, "store_at");
    if (place % 4 != 0) fail("store_at byte %ld of shared memory", long(place));
    Block& block = other_block(rank, "store_at");
    char* const to = block.shared + place;
    auto& stores = current->stores;
    for (size_t i = 0; i < stores.size(); ++i)  // one thread's stores to one word stay in order
      if (stores[i].to == to) stores.erase(stores.begin() + static_cast<long>(i--));
    if (&block == &mine) {  // the thread itself may read it at once
      std::memcpy(to, &value, sizeof value);
    } else {
      if (stores.empty()) storing_.push_back(current);
      stores.push_back({&block, to, value});
    }
    pause();
  }

  // what this thread has stored in other blocks is there
  void publish_stores() {
    while (!current->stores.empty()) finish_store(current, current->stores.size() - 1);
  }

  void check_global(const void* p, size_t bytes, size_t alignment, const char* where) {
    if (reinterpret_cast<uintptr_t>(p) % alignment != 0) fail("%s at %p, not a multiple of %zu", where, p, alignment);
    if (regions.empty()) return;
    const char* const begin = static_cast<const char*>(p);
    for (const auto& region : regions)
      if (begin >= region.first && begin + bytes <= region.first + region.second) return;
    fail("%s of %zu bytes at %p, in no registered memory", where, bytes, p);
  }

  // Ends the launch with this message.
  [[noreturn, gnu::format(printf, 2, 3)]] void stop(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(error_, sizeof error_, format, arguments);
    va_end(arguments);
    switch_stacks(current->context, caller_, true);
    std::abort();
  }
  template <class... Values>
  [[noreturn]] void fail(const char* format, Values... values) {
    char text[512];
    std::snprintf(text, sizeof text, format, values...);
    stop("block %d, thread %d: %s", current->block->index, current->index, text);
  }

 private:
  // -- chance ---------------------------------------------------------------------------------------------------------

  uint32_t below(uint32_t n) {  // splitmix64
    uint64_t x = random_ += 0x9E3779B97F4A7C15ull;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return static_cast<uint32_t>(((x >> 32) * n) >> 32);
  }
  bool chance(uint32_t of_256) { return of_256 != 0 && below(256) < of_256; }

  // Bugs differ in what brings them out: much switching, little, copies that come at once or only when all wait, a
  // warp that falls far behind. So each set of blocks has its own manners.
  void draw_manners() {
    static constexpr uint32_t kPreemption[] = {0, 8, 64}, kDelivery[] = {1, 16, 128}, kLeaving[] = {4, 32, 128};
    preemption_ = kPreemption[below(3)];
    delivery_ = kDelivery[below(3)];
    leaving_ = kLeaving[below(3)];
    candidates_ = below(2) ? 1 : 4;
  }

  // -- who runs -------------------------------------------------------------------------------------------------------

  void wake(Warp& warp, uint32_t lanes) {
    warp.runnable |= lanes;
    if (warp.ready_place >= 0) return;
    warp.ready_place = static_cast<int>(ready_.size());
    ready_.push_back(&warp);
  }
  void wake(Thread* thread) { wake(*thread->warp, 1u << (thread->index % kLanes)); }
  void wake_all(std::vector<Thread*>& threads) {
    for (Thread* thread : threads) wake(thread);
    threads.clear();
  }

  Warp* choose_warp() {
    Warp* best = ready_[below(static_cast<uint32_t>(ready_.size()))];
    for (int i = 1; i < candidates_; ++i) {
      Warp* other = ready_[below(static_cast<uint32_t>(ready_.size()))];
      if (other->priority > best->priority) best = other;
    }
    if (chance(4)) best->priority = below(1u << 30);
    return best;
  }

  // Null when all have ended.
  Thread* next() {
    for (;;) {
      if (copies_.size() + storing_.size() + held_.size() > 0 && (ready_.empty() || chance(delivery_))) {
        deliver_one();
        continue;
      }
      if (alive_ == 0) return nullptr;
      if (ready_.empty()) report_deadlock();
      // the lanes of a warp mostly run one after the other, for the sake of the cache
      Warp* warp = current == nullptr ? nullptr : current->warp;
      if (warp == nullptr || warp->runnable == 0 || chance(leaving_)) warp = choose_warp();
      const uint32_t turn = below(kLanes);
      const uint32_t turned = warp->runnable >> turn | warp->runnable << ((kLanes - turn) % kLanes);
      const uint32_t lane = (static_cast<uint32_t>(__builtin_ctz(turned)) + turn) % kLanes;
      warp->runnable &= ~(1u << lane);
      if (warp->runnable == 0) {
        ready_[static_cast<size_t>(warp->ready_place)] = ready_.back();
        ready_.back()->ready_place = warp->ready_place;
        ready_.pop_back();
        warp->ready_place = -1;
      }
      return &warp->lanes[lane];
    }
  }

  void suspend(const char* where) {
    Thread* const self = current;
    self->waits_in = where;
    Thread* const other = next();
    if (other != self) {
      current = other;
      ++num_switches;
      switch_stacks(self->context, other->context, false);
    }
    self->waits_in = nullptr;
    self->waits_for = nullptr;
  }

  static void enter();
  [[noreturn]] void leave();
  void end_block(Block& block);
  [[noreturn]] void report_deadlock();
  bool set_up(const std::vector<int>& clusters);

  // -- what waits -----------------------------------------------------------------------------------------------------

  int64_t place_in(const Block& block, const void* p, int64_t bytes, const char* where) {
    const int64_t place =
        static_cast<int64_t>(reinterpret_cast<intptr_t>(p) - reinterpret_cast<intptr_t>(block.shared));
    if (place < 0 || place + bytes > how.shared_bytes)
      fail("%s: %ld bytes at byte %ld, outside of shared memory", where, long(bytes), long(place));
    return place;
  }

  Block& other_block(int rank, const char* where) {
    Cluster& cluster = *current->block->cluster;
    if (rank < 0 || rank >= cluster.size) fail("%s rank %d in a cluster of %d", where, rank, cluster.size);
    Block& block = cluster.blocks[rank];
    if (block.alive == 0) fail("%s block %d, which has ended", where, block.index);
    return block;
  }

  // of the barrier in this place of shared memory, but in `block`
  Phase& phase_of(const Barrier* barrier, Block& block, const char* where) {
    const int64_t place = place_in(*current->block, barrier, sizeof(Barrier), where);
    uint64_t state;
    std::memcpy(&state, block.shared + place, sizeof state);
    state ^= kBarrierMark;
    if (state >= block.phases.size() || block.phases[state].place != place)
      fail("%s: at byte %ld no barrier was initialized, or it was overwritten", where, long(place));
    Phase& phase = block.phases[state];
    if (phase.not_published_by != nullptr && phase.not_published_by != current)
      fail("%s: the barrier at byte %ld is used by another thread before publish_barriers", where, long(place));
    return phase;
  }

  void end_if_over(Phase& phase) {
    if (phase.missing_arrivals != 0 || phase.missing_bytes != 0) return;
    phase.missing_arrivals = phase.arrivals;
    phase.parity ^= 1;
    wake_all(phase.waiting);
  }

  void deliver_one() {
    size_t chosen = below(static_cast<uint32_t>(copies_.size() + storing_.size() + held_.size()));
    if (chosen < copies_.size()) return finish_copy(taken_from(copies_, chosen));
    chosen -= copies_.size();
    if (chosen >= storing_.size()) return wake(taken_from(held_, chosen - storing_.size()));
    Thread* const thread = storing_[chosen];
    finish_store(thread, below(static_cast<uint32_t>(thread->stores.size())));
  }

  template <class T>
  static T taken_from(std::vector<T>& values, size_t i) {
    const T value = values[i];
    values[i] = values.back();
    values.pop_back();
    return value;
  }

  void finish_copy(const Copy& copy) {
    for (uint32_t i = 0; i < copy.bytes; ++i)
      if (copy.to[i] != static_cast<char>(kPoison))
        stop("block %d: byte %ld was written while a copy to there was on its way", copy.block->index,
             long(copy.to + i - copy.block->shared));
    std::memcpy(copy.to, copy.from, copy.bytes);
    copy.phase->missing_bytes -= copy.bytes;
    copy.phase->bytes_on_the_way -= copy.bytes;
    end_if_over(*copy.phase);
  }

  void finish_store(Thread* thread, size_t which) {
    const Store store = taken_from(thread->stores, which);
    std::memcpy(store.to, &store.value, sizeof store.value);
    if (thread->stores.empty()) storing_.erase(std::find(storing_.begin(), storing_.end(), thread));
  }

  std::mutex one_launch_;
  Context caller_;
  const std::function<void()>* kernel_ = nullptr;
  char error_[1024] = "";
  bool seeded_ = false;
  uint64_t random_ = 0;
  uint32_t preemption_ = 0, delivery_ = 0, leaving_ = 0;
  int candidates_ = 1;

  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<Block> blocks_;
  std::vector<Cluster> clusters_;
  std::vector<Warp*> ready_;
  int alive_ = 0;
  std::vector<Copy> copies_;
  std::vector<Thread*> storing_;  // have stores on their way
  std::vector<Thread*> held_;     // in pause()
};

// hidden: libraries that are loaded into one process keep their own
inline __attribute__((visibility("hidden"))) Machine machine;

// -- a launch -----------------------------------------------------------------------------------------------------------

inline const char* Machine::run(const Launch& launch, const std::function<void()>& kernel) {
  const std::lock_guard<std::mutex> lock(one_launch_);
  if (!seeded_) {
    const char* given = std::getenv("AUXKERNELS_CUDA_SEED");
    seed(given == nullptr ? 0 : std::strtoull(given, nullptr, 10));
  }
  how = launch;
  how.cluster = launch.cluster > 0 ? launch.cluster : 1;
  kernel_ = &kernel;
  error_[0] = 0;
  std::vector<int> order(static_cast<size_t>(how.num_blocks / how.cluster));
  for (size_t i = 0; i < order.size(); ++i) {  // a random permutation
    order[i] = static_cast<int>(i);
    std::swap(order[i], order[below(static_cast<uint32_t>(i + 1))]);
  }
  while (!order.empty() && error_[0] == 0) {
    draw_manners();
    const size_t live = std::min(order.size(), size_t{1} + below(static_cast<uint32_t>(kMaxLiveBlocks / how.cluster)));
    const std::vector<int> clusters(order.end() - static_cast<long>(live), order.end());
    order.resize(order.size() - live);
    if (set_up(clusters)) {
      current = next();
      switch_stacks(caller_, current->context, false);
    } else {
      std::snprintf(error_, sizeof error_, "launch: no memory for the emulation");
    }
    for (Block& block : blocks_) std::free(block.memory);
    current = nullptr;
  }
  return error_[0] == 0 ? nullptr : error_;
}

inline bool Machine::set_up(const std::vector<int>& clusters) {
  const size_t size = static_cast<size_t>(how.cluster), threads = static_cast<size_t>(how.threads);
  const size_t num_blocks = clusters.size() * size, num_threads = num_blocks * threads;
  copies_.clear();
  storing_.clear();
  held_.clear();
  ready_.clear();
  clusters_.assign(clusters.size(), Cluster{});
  blocks_.assign(num_blocks, Block{});
  warps_.assign(num_threads / kLanes, Warp{});
  if (threads_.size() < num_threads) threads_.resize(num_threads);
  for (size_t b = 0; b < num_blocks; ++b) {
    Block& block = blocks_[b];
    block.rank = static_cast<int>(b % size);
    block.cluster = &clusters_[b / size];
    if (block.rank == 0) *block.cluster = {&block, how.cluster, how.cluster * how.threads, {}};
    block.index = clusters[b / size] * how.cluster + block.rank;
    block.alive = how.threads;
    const size_t bytes = static_cast<size_t>(how.shared_bytes), guard = static_cast<size_t>(kGuardBytes);
    void* memory = nullptr;
    if (posix_memalign(&memory, 128, std::max<size_t>(bytes + 2 * guard, 1)) != 0) return false;
    block.memory = static_cast<char*>(memory);
    block.shared = block.memory + guard;
    std::memset(block.memory, kGuard, bytes + 2 * guard);
    std::memset(block.shared, kPoison, bytes);
  }
  for (size_t t = 0; t < num_threads; ++t) {
    Thread& thread = threads_[t];
    const int index = static_cast<int>(t % threads);
    thread = {thread.context, &blocks_[t / threads], &warps_[t / kLanes], index, nullptr, nullptr, {}};
    if (thread.context.stack == nullptr && !give_stack(thread.context)) return false;
    prepare(thread.context, enter);
    if (t % kLanes != 0) continue;
    thread.warp->lanes = &thread;
    thread.warp->priority = below(1u << 30);
    wake(*thread.warp, 0xFFFFFFFFu);
  }
  alive_ = static_cast<int>(num_threads);
  return true;
}

inline void Machine::enter() {
  have_switched(nullptr);
  (*machine.kernel_)();
  machine.leave();
}

inline void Machine::leave() {
  Thread* const self = current;
  Cluster& cluster = *self->block->cluster;
  --alive_;
  --cluster.alive;
  if (--self->block->alive == 0) end_block(*self->block);
  if (!cluster.in_sync_cluster.empty() && static_cast<int>(cluster.in_sync_cluster.size()) == cluster.alive)
    wake_all(cluster.in_sync_cluster);
  self->waits_in = "ended";
  Thread* const other = next();
  if (other != nullptr) current = other;
  switch_stacks(self->context, other == nullptr ? caller_ : other->context, true);
  std::abort();
}

inline void Machine::end_block(Block& block) {
  for (const Copy& copy : copies_)
    if (copy.block == &block)
      stop("block %d ended while a copy to its byte %ld was on its way", block.index, long(copy.to - block.shared));
  for (const Thread* thread : storing_)
    for (const Store& store : thread->stores)
      if (store.block == &block)
        stop("block %d ended while a store_at to its byte %ld was on its way", block.index,
             long(store.to - block.shared));
  for (int64_t i = 0; i < kGuardBytes; ++i)
    if (block.shared[-1 - i] != static_cast<char>(kGuard) ||
        block.shared[how.shared_bytes + i] != static_cast<char>(kGuard))
      stop("block %d wrote outside of its shared memory", block.index);
}

inline void Machine::report_deadlock() {
  std::map<std::string, int> counts;
  for (size_t t = 0; t < warps_.size() * kLanes; ++t) {
    const Thread& thread = threads_[t];
    std::string where = thread.waits_in;
    if (const Phase* phase = thread.waits_for) {
      char text[160];
      std::snprintf(text, sizeof text, " (block %d, barrier at byte %ld, parity %u, misses %ld arrivals and %ld bytes)",
                    thread.block->index, long(phase->place), phase->parity, long(phase->missing_arrivals),
                    long(phase->missing_bytes));
      where += text;
    }
    ++counts[where];
  }
  char text[900];
  int length = std::snprintf(text, sizeof text, "deadlock, threads:");
  for (const auto& count : counts)
    if (length < 700) length += std::snprintf(text + length, 200, " %d %s;", count.second, count.first.c_str());
  counts.clear();  // nothing is destroyed after stop
  stop("%s", text);
}

}  // namespace model
}  // namespace auxk::hw
