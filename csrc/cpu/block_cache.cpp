#include "block_cache.h"

#include <algorithm>
#include <cstring>
#include <fstream>
#include <mutex>
#include <string>
#include <vector>

#include "pages.h"

#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define AUXK_ASAN 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__) && !defined(AUXK_ASAN)
#define AUXK_ASAN 1
#endif
#if defined(AUXK_ASAN)
#include <sanitizer/asan_interface.h>
#endif

namespace auxk {
namespace {

#if defined(AUXK_ASAN)
constexpr int64_t kRedZone = 64;
void poison(void* begin, int64_t bytes) { ASAN_POISON_MEMORY_REGION(begin, static_cast<size_t>(bytes)); }
void unpoison(void* begin, int64_t bytes) { ASAN_UNPOISON_MEMORY_REGION(begin, static_cast<size_t>(bytes)); }
#else
constexpr int64_t kRedZone = 0;
void poison(void*, int64_t) {}
void unpoison(void*, int64_t) {}
#endif

#if defined(__linux__)

constexpr int64_t kHugePage = 2 << 20;
// The largest need of a benchmark's call is 491 MiB (both heads' gradients at 2048 x 50257): an eighth of 4 GiB.
constexpr int64_t kShareOfMemory = 8;
// a block serves what leaves no more than this part of it unused, so that lengths may vary a little
constexpr int64_t kUnusedPart = 8;
// a block that so many takes have passed by is given back: what one evaluation of another shape has needed
constexpr int64_t kMostPassedBy = 512;
// While a block waits, the kernel may take its pages when it is short of them, instead of swapping or ending a process.
// With huge pages that costs 0.1 ms for 200 MB. Small ones cost more than the work on them when they are written again
// (27 ms, of 18), and are lent when so many takes have passed them by.
constexpr int64_t kPassedByUntilLent = 32;

int64_t rounded_up(int64_t bytes, int64_t unit) { return (bytes + unit - 1) / unit * unit; }

int64_t page_size() { return std::max<int64_t>(sysconf(_SC_PAGESIZE), 1); }

int64_t default_allowance() { return std::max<int64_t>(sysconf(_SC_PHYS_PAGES), 0) * page_size() / kShareOfMemory; }

bool has_huge_pages() {
  std::ifstream file("/sys/kernel/mm/transparent_hugepage/enabled");
  std::string setting;
  std::getline(file, setting);
  return !setting.empty() && setting.find("[never]") == std::string::npos;
}

void lend(Block* block) {
  madvise(block->data, static_cast<size_t>(block->capacity), MADV_FREE);
  block->is_lent = true;
}

Block map_block(int64_t bytes) {
  const int64_t capacity = rounded_up(bytes + kRedZone, page_size()), reserved = capacity + kHugePage;
  void* begin =
      mmap(nullptr, static_cast<size_t>(reserved), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (begin == MAP_FAILED) return {};
  char* const data =
      reinterpret_cast<char*>(rounded_up(static_cast<int64_t>(reinterpret_cast<intptr_t>(begin)), kHugePage));
  const int64_t before = data - static_cast<char*>(begin), after = reserved - before - capacity;
  if (before > 0) munmap(begin, static_cast<size_t>(before));
  if (after > 0) munmap(data + capacity, static_cast<size_t>(after));
  madvise(data, static_cast<size_t>(capacity), MADV_HUGEPAGE);
  return {data, capacity, 0, false};
}

void unmap_block(const Block& block) {
  unpoison(block.data, block.capacity);
  munmap(block.data, static_cast<size_t>(block.capacity));
}

// Blocks that are not the cache's any more; given back at the end of a scope, when its lock is.
struct Dropped {
  ~Dropped() { std::for_each(blocks.begin(), blocks.end(), unmap_block); }
  std::vector<Block> blocks;
};

class BlockCache {
 public:
  // never destroyed: tensors may outlive what ends a process
  static BlockCache& instance() {
    static BlockCache* const cache = new BlockCache;
    return *cache;
  }

  Block take(int64_t bytes, int threads) {
    Block block;
    bool fills;
    {
      Dropped dropped;
      const std::lock_guard<std::mutex> lock(mutex_);
      if (bytes <= 0 || bytes > counts_.allowed) return {};
      ++num_takes_, fills = fills_;
      const auto best = find(bytes);
      if (best != waiting_.end()) {
        block = *best;
        waiting_.erase(best);
        counts_.waiting_bytes -= block.capacity, --counts_.waiting;
        ++counts_.found, count_used(block, 1);
      }
      while (!waiting_.empty() && num_takes_ - waiting_.front().since > kMostPassedBy) drop_oldest(&dropped);
      for (Block& old : waiting_)
        if (!old.is_lent && num_takes_ - old.since > kPassedByUntilLent) lend(&old);
    }
    if (block.data == nullptr) {
      block = map_block(bytes);
      if (block.data == nullptr) {
        give_waiting_back();
        block = map_block(bytes);
      }
      if (block.data == nullptr) return {};
      const std::lock_guard<std::mutex> lock(mutex_);
      ++counts_.mapped, count_used(block, 1);
    }
    unpoison(block.data, bytes);
    poison(static_cast<char*>(block.data) + bytes, block.capacity - bytes);
    bring_pages_in(block.data, bytes, threads);
    if (fills) std::memset(block.data, 255, static_cast<size_t>(bytes));
    return block;
  }

  void take_back(Block block) {
    block.is_lent = false;
    if (lends_at_once_) lend(&block);
    poison(block.data, block.capacity);
    Dropped dropped;
    const std::lock_guard<std::mutex> lock(mutex_);
    count_used(block, -1);
    block.since = num_takes_;
    waiting_.push_back(block);
    counts_.waiting_bytes += block.capacity, ++counts_.waiting;
    drop_beyond(counts_.allowed, &dropped);
  }

  void allow(int64_t bytes) {
    Dropped dropped;
    const std::lock_guard<std::mutex> lock(mutex_);
    counts_.allowed = bytes < 0 ? default_allowance() : bytes;
    drop_beyond(counts_.allowed, &dropped);
  }

  void give_waiting_back() {
    Dropped dropped;
    const std::lock_guard<std::mutex> lock(mutex_);
    drop_beyond(0, &dropped);
  }

  BlockCounts counts() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return counts_;
  }

  void fill_taken(bool fills) {
    const std::lock_guard<std::mutex> lock(mutex_);
    fills_ = fills;
  }

 private:
  BlockCache() {
    counts_.allowed = default_allowance();
    pthread_atfork([] { instance().before_fork(); }, [] { instance().after_fork_in_parent(); },
                   [] { instance().after_fork_in_child(); });
  }

  // What waits has no part in a fork: the parent would copy each page that it writes to, for contents nobody reads.
  void before_fork() {
    mutex_.lock();
    for (const Block& block : waiting_) madvise(block.data, static_cast<size_t>(block.capacity), MADV_DONTFORK);
  }

  void after_fork_in_parent() {
    for (const Block& block : waiting_) madvise(block.data, static_cast<size_t>(block.capacity), MADV_DOFORK);
    mutex_.unlock();
  }

  void after_fork_in_child() {
    for (const Block& block : waiting_) unpoison(block.data, block.capacity);  // others' addresses from now on
    waiting_.clear();
    counts_.waiting_bytes = counts_.waiting = 0;
    mutex_.unlock();
  }

  // The smallest that is large enough, of those the one that has waited least: its lines may still be in a cache.
  std::vector<Block>::iterator find(int64_t bytes) {
    const int64_t needed = bytes + kRedZone;
    auto best = waiting_.end();
    for (auto block = waiting_.begin(); block != waiting_.end(); ++block)
      if (block->capacity >= needed &&
          block->capacity - needed <= std::max(block->capacity / kUnusedPart, page_size()) &&
          (best == waiting_.end() || block->capacity <= best->capacity))
        best = block;
    return best;
  }

  void drop_oldest(Dropped* dropped) {
    dropped->blocks.push_back(waiting_.front());
    counts_.waiting_bytes -= waiting_.front().capacity, --counts_.waiting;
    waiting_.erase(waiting_.begin());
  }

  void drop_beyond(int64_t bytes, Dropped* dropped) {
    while (counts_.waiting_bytes > bytes) drop_oldest(dropped);
  }

  void count_used(const Block& block, int sign) { counts_.used_bytes += sign * block.capacity, counts_.used += sign; }

  const bool lends_at_once_ = has_huge_pages();
  std::mutex mutex_;
  std::vector<Block> waiting_;  // the oldest first
  BlockCounts counts_;
  int64_t num_takes_ = 0;
  bool fills_ = false;
};

#endif

}  // namespace

#if defined(__linux__)

Block take_block(int64_t bytes, int threads) { return BlockCache::instance().take(bytes, threads); }
void return_block(const Block& block) { BlockCache::instance().take_back(block); }
void allow_waiting(int64_t bytes) { BlockCache::instance().allow(bytes); }
void give_waiting_back() { BlockCache::instance().give_waiting_back(); }
BlockCounts block_counts() { return BlockCache::instance().counts(); }
void fill_taken_blocks(bool fills) { BlockCache::instance().fill_taken(fills); }

#else  // where it has not been measured, memory stays the allocator's

Block take_block(int64_t, int) { return {}; }
void return_block(const Block&) {}
void allow_waiting(int64_t) {}
void give_waiting_back() {}
BlockCounts block_counts() { return {}; }
void fill_taken_blocks(bool) {}

#endif

}  // namespace auxk
