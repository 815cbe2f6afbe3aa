// How rows are shared out, decided on the host: plain arithmetic, tested without a GPU.
#pragma once

#include <algorithm>
#include <cstdint>

namespace auxk {

constexpr int kMaxThreads = 384;      // that work on columns; with the producer, 128 registers each
constexpr int kGeneralThreads = 224;  // where they need more
constexpr int kThreadsAtOnce = 512;   // of all blocks on a multiprocessor, about: so many have registers
constexpr int kMaxSegments = 16;      // also the largest cluster
constexpr int kMaxSlots = 32;
constexpr int kColumnsOfLane = 8;  // in a tile
constexpr int kColumnsOfWarp = 32 * kColumnsOfLane;
constexpr int64_t kWorthASegment = 6000;

constexpr int kBackwardThreads = 256;
constexpr int kRescaleThreads = 256;
constexpr int kRescaleColumns = kRescaleThreads * kColumnsOfLane;  // of a row, for one block

// How a row's columns are cut. The bits of a result depend on these numbers, so they follow from V and the dtypes alone.
struct Cut {
  int32_t threads;       // each with its own running maximum
  int32_t piece;         // neighbouring columns of a lane
  int32_t is_ragged;     // whether rows are misaligned, and end within a piece
  int32_t num_segments;  // whose states are merged at the row's end: 1, 2, 4, 8 or 16
  int32_t segment;       // columns; the last may have fewer
  int32_t tile;          // columns that the threads work on at once; a segment's last may have fewer
  int32_t num_tiles;     // of a segment
  int32_t lanes;         // threads that have columns of a whole tile
};

// `piece`: columns of 16 bytes. V that are no multiple of it leave most rows misaligned: then neighbouring lanes read
// neighbouring columns one by one or, with `shifts`, pieces all the same, from the 32 bytes around them.
inline Cut cut_of(int64_t V, int piece, int most_threads, bool shifts) {
  constexpr int64_t kLine = 64;  // columns: 128 bytes of 16-bit logits, and tiles that are aligned as their row is
  Cut cut = {};
  cut.threads = std::min(V <= 1024 ? 128 : V <= 8192 ? 256 : kMaxThreads, most_threads);
  cut.is_ragged = V % piece != 0;
  cut.piece = cut.is_ragged && !shifts ? 1 : piece;
  cut.num_segments = 1;
  while (cut.num_segments < kMaxSegments && V >= 2 * cut.num_segments * kWorthASegment) cut.num_segments *= 2;
  const int64_t columns = (V + cut.num_segments - 1) / cut.num_segments;
  cut.segment = static_cast<int32_t>((columns + kLine - 1) / kLine * kLine);
  // Equal tiles, because a slot of the ring holds a whole one. Whole warps of misaligned rows write pieces, the
  // others their columns one by one.
  const int64_t most = int64_t{kColumnsOfLane} * cut.threads, unit = cut.is_ragged ? kColumnsOfWarp : kLine;
  cut.num_tiles = static_cast<int32_t>((cut.segment + most - 1) / most);
  const int64_t even = (cut.segment + cut.num_tiles - 1) / cut.num_tiles;
  cut.tile = static_cast<int32_t>(std::min<int64_t>(cut.segment, (even + unit - 1) / unit * unit));
  cut.lanes = cut.tile / kColumnsOfLane;
  return cut;
}

// What a device offers.
struct DeviceProperties {
  int32_t multiprocessors;
  int64_t shared_bytes;  // of a block, at most
  int32_t max_cluster;   // 0: no clusters
};

// Where things lie in a block's shared memory, in bytes from its start, where the barriers are: full [slots],
// empty [slots], exchange [2].
struct Layout {
  int32_t exchange;  // states of the row's segments, [2][kMaxSegments]
  int32_t partials;  // states of this block's segments by warp, [segments][kMaxSegments]
  int32_t sums;      // a double for each warp, and a flag
  int32_t slots;
  int32_t slot_bytes, aux_offset;  // of a slot, and in it
  int32_t num_slots;
  int64_t bytes;  // of all
};

struct Plan {
  bool is_resident;  // a row stays in shared memory between its two uses; else it is read twice
  int32_t cluster;   // blocks that share a row
  Layout layout;
};

struct PlanInputs {
  Cut cut;
  int64_t num_rows;
  int32_t base_bytes, aux_bytes;  // of a logit; 0: no such source
  int32_t state_bytes;
  bool has_gradient;
  DeviceProperties device;
};

inline int64_t rounded_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

inline Layout layout_of(const PlanInputs& in, int cluster, int num_slots) {
  Layout at = {};
  at.num_slots = num_slots;
  at.exchange = static_cast<int32_t>(rounded_up(int64_t{8} * (2 * num_slots + 2), 16));
  at.partials = static_cast<int32_t>(at.exchange + rounded_up(int64_t{2} * kMaxSegments * in.state_bytes, 16));
  const int64_t segments = in.cut.num_segments / cluster;
  at.sums = static_cast<int32_t>(at.partials + rounded_up(segments * kMaxSegments * in.state_bytes, 16));
  at.slots = static_cast<int32_t>(rounded_up(at.sums + 8 * (kMaxSegments + 2), 128));
  // a tile keeps its place relative to 16 bytes, which copies need: up to 15 bytes before it and after it
  at.aux_offset = static_cast<int32_t>(rounded_up(int64_t{in.cut.tile} * in.base_bytes + 32, 128));
  const int64_t aux = in.aux_bytes == 0 ? 0 : rounded_up(int64_t{in.cut.tile} * in.aux_bytes + 32, 128);
  at.slot_bytes = static_cast<int32_t>(at.aux_offset + aux);
  at.bytes = at.slots + int64_t{num_slots} * at.slot_bytes;
  return at;
}

// A block's share of a multiprocessor's shared memory: blocks of few threads are several to a multiprocessor.
inline int64_t shared_bytes_of(const PlanInputs& in) {
  const int64_t blocks = std::max(kThreadsAtOnce / in.cut.threads, 1);
  return in.device.shared_bytes / blocks / 128 * 128 - (blocks > 1 ? 1024 : 0);  // the system keeps 1 KiB of each block
}

inline int slots_of(const PlanInputs& in, int cluster) {
  const Layout none = layout_of(in, cluster, 0), full = layout_of(in, cluster, kMaxSlots);
  const int64_t overhead = full.slots - none.slots;  // of the barriers
  const int64_t left = shared_bytes_of(in) - none.slots - overhead;
  return static_cast<int>(std::clamp<int64_t>(left / none.slot_bytes, 0, kMaxSlots));
}

// The smallest cluster whose blocks hold their share of a row, with slots to load ahead; a larger one for few rows.
inline Plan plan_of(const PlanInputs& in) {
  constexpr int64_t kAhead = 40 << 10;  // bytes on their way to every multiprocessor hide the memory's latency
  Plan plan = {};
  plan.cluster = 1;
  plan.layout = layout_of(in, 1, 0);
  const int largest = std::min(in.cut.num_segments, in.device.max_cluster);
  for (int cluster = 1; cluster <= largest; cluster *= 2) {
    const int slots = slots_of(in, cluster);
    const int needed = in.has_gradient ? in.cut.num_segments / cluster * in.cut.num_tiles : 1;
    const int64_t ahead = int64_t{slots - needed} * layout_of(in, cluster, 0).slot_bytes;
    if (slots < std::max(needed, 2)) continue;
    const bool is_last_chance = 2 * cluster > largest;
    const bool leaves_half_idle = 2 * cluster * in.num_rows <= in.device.multiprocessors;
    if (is_last_chance || (ahead >= kAhead && !leaves_half_idle)) return {true, cluster, layout_of(in, cluster, slots)};
  }
  return plan;
}

}  // namespace auxk
