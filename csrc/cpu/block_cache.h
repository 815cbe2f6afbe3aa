// Memory of large results and buffers: blocks that wait, when their tensor has died, for the next of their size.
//
// Fresh memory comes from the operating system page by page, each filled with zeros, and an allocator that hands large
// blocks back pays for that in every call: as much as the work on them (100 MB, two cores: 35 ms of processor time in
// pages, 40 ms in a loss and its gradient).
#pragma once

#include <cstdint>

namespace auxk {

struct Block {
  void* data = nullptr;
  int64_t capacity = 0;  // bytes
  int64_t since = 0;     // of one that waits: the number of takes before it did
  bool is_lent = false;  // of one that waits: whether the kernel may take its pages
};

// Bytes and numbers of blocks; how many takes have found one that waited, and how many not.
struct BlockCounts {
  int64_t allowed = 0, waiting_bytes = 0, waiting = 0, used_bytes = 0, used = 0, found = 0, mapped = 0;
};

// At least `bytes` whose contents are unknown, aligned to a huge page, their pages brought in by `threads`. No data where
// the cache would not keep such a block, and where there is no memory.
Block take_block(int64_t bytes, int threads);
// By any thread, in a forked child and while the process ends, too.
void return_block(const Block& block);

// How many bytes may wait; those beyond are given back. Negative: an eighth of the machine's memory, as at the start.
void allow_waiting(int64_t bytes);
void give_waiting_back();
BlockCounts block_counts();
// For tests: a block that is taken is filled with bytes of 255, which are NaN in every dtype.
void fill_taken_blocks(bool fills);

}  // namespace auxk
