// Fields, loss and gradients of rows. A row's columns are cut into segments, a segment into tiles (plan.h); a block, or
// the blocks of a cluster between them, scan the segments, merge their states and then write the gradient.
//
// Whether a row is ignored is read by everyone who works on it: targets must not change while a kernel runs.
//
// Resident: one warp more, the producer, copies tiles into a ring of slots in shared memory, ahead of the others, across
// the end of the row. A row waits there for its second use, so global memory is read once. Otherwise the columns are
// read again, last tiles first because those are still in L2.
#pragma once

#include "rows.cuh"

namespace auxk {

// A place in the ring: slots are taken in turn, `parity` changes with every round.
struct Place {
  int slot = 0;
  uint32_t parity = 0;

  AUXK_DEVICE void advance(int num_slots) {
    if (++slot == num_slots) slot = 0, parity ^= 1;
  }
};

// A block's shared memory.
struct Shared {
  const Layout& layout;
  char* memory;

  AUXK_DEVICE hw::Barrier* full(int slot) const { return reinterpret_cast<hw::Barrier*>(memory) + slot; }
  AUXK_DEVICE hw::Barrier* empty(int slot) const { return full(layout.num_slots + slot); }
  AUXK_DEVICE hw::Barrier* exchanged(int parity) const { return full(2 * layout.num_slots + parity); }
  template <class S>
  AUXK_DEVICE S* exchange(int parity, int segment) const {
    return reinterpret_cast<S*>(memory + layout.exchange) + parity * kMaxSegments + segment;
  }
  template <class S>
  AUXK_DEVICE S* partial(int segment, int warp) const {
    return reinterpret_cast<S*>(memory + layout.partials) + segment * kMaxSegments + warp;
  }
  AUXK_DEVICE double* sums() const { return reinterpret_cast<double*>(memory + layout.sums); }
  AUXK_DEVICE int* flag() const { return reinterpret_cast<int*>(sums() + kMaxSegments); }
  AUXK_DEVICE char* base_slot(int slot) const { return memory + layout.slots + slot * layout.slot_bytes; }
  AUXK_DEVICE char* aux_slot(int slot) const { return base_slot(slot) + layout.aux_offset; }
};

// Which rows and which of their segments a block works on.
struct Share {
  int64_t first_row, row_step;
  int rank, segments, first_segment;

  AUXK_DEVICE explicit Share(const cuda::Parameters& p)
      : first_row(hw::block() / p.cluster),
        row_step(hw::num_blocks() / p.cluster),
        rank(p.cluster > 1 ? hw::cluster_rank() : 0),
        segments(p.cut.num_segments / p.cluster),
        first_segment(rank * segments) {}
};

// -- the producer -----------------------------------------------------------------------------------------------------

AUXK_DEVICE const char* aligned_down(const char* p) { return p - misalignment(p, 16); }
AUXK_DEVICE const char* aligned_up(const char* p) { return p + ((16 - misalignment(p, 16)) & 15); }

// A lane's column of those at a row's ends, less than 16 bytes at each, which no copy of whole 16 bytes within the row
// brings. Asked for while the row before is copied: a producer that waited for memory would start no copies meanwhile.
template <int kType>
struct RowEnd {
  const char* at = nullptr;  // null: the lane has none
  uint32_t value = 0;

  RowEnd() = default;
  AUXK_DEVICE RowEnd(const RowOf& row, int64_t V, int lane) {
    if (row.first == nullptr) return;
    const int size = bytes_of(type_of<kType>(row.dtype));
    const char *end = row.template at<kType>(V), *from = aligned_up(row.first), *to = aligned_down(end);
    if (to <= from) from = to = end;
    const int before = static_cast<int>(from - row.first) / size;
    const char* p = lane < before ? row.first + lane * size : to + (lane - before) * size;
    if (p >= end) return;
    at = p;
    value = size == 2 ? *reinterpret_cast<const uint16_t*>(p) : *reinterpret_cast<const uint32_t*>(p);
  }
};

// Brings a tile of one source to `slot`, in its place relative to 16 bytes. Whole 16 bytes within the row are copied by
// the machine, which may be a few of the columns beside the tile too; what is left at the row's ends by the lanes.
template <int kType>
struct TileCopy {
  const char *tile, *end;  // of the tile's columns
  const char *from, *to;   // what the machine copies
  char* slot;
  int size;  // of an element

  AUXK_DEVICE TileCopy(const RowOf& row, int64_t V, const Tile& t, char* slot_of_source)
      : tile(row.template at<kType>(t.first)),
        end(row.template at<kType>(t.first + t.num)),
        slot(slot_of_source),
        size(bytes_of(type_of<kType>(row.dtype))) {
    const char *row_from = aligned_up(row.first), *row_to = aligned_down(row.template at<kType>(V));
    from = larger_of(aligned_down(tile), row_from);
    to = smaller_of(aligned_up(end), row_to);
    if (to <= from) from = to = end;
  }
  AUXK_DEVICE uint32_t bytes() const { return static_cast<uint32_t>(to - from); }
  AUXK_DEVICE char* place_of(const char* p) const { return slot + misalignment(tile, 16) + (p - tile); }

  AUXK_DEVICE void start(hw::Barrier* barrier) const {
    if (bytes() > 0) hw::copy_in(place_of(from), from, bytes(), barrier);
  }
  AUXK_DEVICE void write(const RowEnd<kType>& column) const {
    if (from <= tile && to >= end) return;
    if (column.at >= tile && column.at < end) {
      if (size == 2)
        *reinterpret_cast<uint16_t*>(place_of(column.at)) = static_cast<uint16_t>(column.value);
      else
        *reinterpret_cast<uint32_t*>(place_of(column.at)) = column.value;
    }
    hw::before_copies();
  }

 private:
  AUXK_DEVICE static const char* larger_of(const char* a, const char* b) { return a < b ? b : a; }
  AUXK_DEVICE static const char* smaller_of(const char* a, const char* b) { return a < b ? a : b; }
};

// What the producer asks of memory while it copies the row before.
template <class K>
struct RowAhead {
  RowOf base = {}, aux = {};
  RowEnd<K::kBase> base_end;
  RowEnd<K::kAux> aux_end;
  StoredTarget target;

  RowAhead() = default;
  AUXK_DEVICE RowAhead(const Problem& p, int64_t n, int lane)
      : base(row_of(p.base, n)),
        aux(row_of(p.aux, n)),
        base_end(base, p.V, lane),
        aux_end(aux, p.V, lane),
        target(p, n) {}
};

template <class K>
AUXK_DEVICE void produce(const cuda::Parameters& p, const Shared& shared, const Share& share) {
  const int lane = hw::thread() % hw::kWarp;
  const bool has_aux = p.problem.aux.values != nullptr;
  const int64_t num_rows = p.problem.num_rows;
  Place place;
  RowAhead<K> next;
  if (share.first_row < num_rows) next = RowAhead<K>(p.problem, share.first_row, lane);
  for (int64_t n = share.first_row; n < num_rows; n += share.row_step) {
    const RowAhead<K> row = next;
    if (n + share.row_step < num_rows) next = RowAhead<K>(p.problem, n + share.row_step, lane);
    if (target_of(p.problem, row.target).is_ignored) continue;
    for (int segment = 0; segment < share.segments; ++segment) {
      for (int i = 0; i < p.cut.num_tiles; ++i) {
        const Tile tile(p.problem, p.cut, share.first_segment + segment, i);
        if (tile.num < 1) break;
        hw::Barrier* full = shared.full(place.slot);
        const TileCopy<K::kBase> base_copy(row.base, p.problem.V, tile, shared.base_slot(place.slot));
        const TileCopy<K::kAux> aux_copy(has_aux ? row.aux : row.base, p.problem.V, tile, shared.aux_slot(place.slot));
        hw::wait(shared.empty(place.slot), place.parity ^ 1);
        const uint32_t bytes = base_copy.bytes() + (has_aux ? aux_copy.bytes() : 0);
        if (lane == 0 && bytes > 0) {
          hw::expect_bytes(full, bytes);
          base_copy.start(full);
          if (has_aux) aux_copy.start(full);
        }
        base_copy.write(row.base_end);
        if (has_aux) aux_copy.write(row.aux_end);
        hw::sync_warp();
        if (lane == 0) hw::arrive(full);
        place.advance(p.layout.num_slots);
      }
    }
  }
}

// -- those who work on columns ----------------------------------------------------------------------------------------

template <class C, int kMode, class K, bool kResident>
class Worker {
  using S = State<C, kMode>;
  static constexpr int kScanned = kResident ? kShared : kGlobalKept, kLast = kResident ? kShared : kGlobalLast;

 public:
  AUXK_DEVICE Worker(const cuda::Parameters& p, const Shared& shared, const Share& share)
      : p(p), shared(shared), share(share) {}

  AUXK_DEVICE void run() {
    const Outputs& out = p.out;
    has_gradient = out.grad_base != nullptr || out.grad_aux != nullptr || out.grad_base_scale != nullptr ||
                   out.grad_aux_scale != nullptr;
    const bool divides = has_gradient && p.terms.row_loss != nullptr;
    const double divisor = divides ? divisor_of<C>(p.problem, p.terms, shared.sums(), p.cut) : 1;
    int64_t n = share.first_row;
    // a row's target is asked for while the row before it is worked on
    StoredTarget next;
    if (n < p.problem.num_rows) next = StoredTarget(p.problem, n);
    for (; n < p.problem.num_rows; n += share.row_step) {
      const RowTarget target = target_of(p.problem, next);
      if (n + share.row_step < p.problem.num_rows) next = StoredTarget(p.problem, n + share.row_step);
      if (target.is_ignored)
        ignore(n);
      else
        work_on(n, target, static_cast<C>(divisor));
    }
    if (p.terms.row_loss != nullptr) reduce(divides, divisor);
  }

 private:
  const cuda::Parameters& p;
  const Shared& shared;
  const Share& share;
  Place place;
  uint32_t num_worked = 0;
  bool has_gradient = false;

  AUXK_DEVICE bool has_cluster() const { return kResident && p.cluster > 1; }
  AUXK_DEVICE bool has_aux() const { return p.problem.aux.values != nullptr; }
  AUXK_DEVICE bool is_ranked() const { return kMode != kPlain && p.out.fields[kTargetRank] != nullptr; }
  AUXK_DEVICE int warp() const { return hw::thread() / hw::kWarp; }
  AUXK_DEVICE int lane_of_warp() const { return hw::thread() % hw::kWarp; }
  AUXK_DEVICE bool is_first() const { return share.rank == 0 && hw::thread() == 0; }

  // A tile's last warps often have no columns of it. Warps take turns there: a multiprocessor's four schedulers have
  // every fourth warp each, and of eleven at work one would always have fewer.
  AUXK_DEVICE Lane<K::kPiece> lane_of(int segment, int tile) const {
    const int t = hw::thread() + (segment + tile) % 4 * hw::kWarp;
    return Lane<K::kPiece>(p.cut, t < p.cut.threads ? t : t - p.cut.threads);
  }

  // a row's sources, and its target's logits: asked for early, needed late
  struct Row {
    int64_t n;
    SourceRows sources;
    Transform<C> base_transform, aux_transform;
    Target<C> target;
    Raw<C> raw_base = 0, raw_aux = 0;
  };

  AUXK_DEVICE void finish_target(Row* row) const {
    if (!row->target.exists()) return;
    const C base = value_of<C, K::kBase>(row->raw_base, row->sources.base.dtype);
    C aux = has_aux() ? value_of<C, K::kAux>(row->raw_aux, row->sources.aux.dtype) : C(0);
    row->target.z = base;
    if constexpr (kMode == kGeneral) {
      C capped, slope;
      row->target.z = row->base_transform(base, &capped, &slope);
      aux = has_aux() ? row->aux_transform(aux, &capped, &slope) : C(0);
    }
    row->target.s = row->target.z + aux;
  }

  AUXK_DEVICE Row row_at(int64_t n, const RowTarget& at) const {
    Row row;
    row.n = n;
    row.sources = source_rows<K>(p.problem, n);
    const RowOf &base_row = row.sources.base, &aux_row = row.sources.aux;
    if constexpr (kMode == kGeneral) {
      row.base_transform = transform_of<C>(p.problem.base, n);
      if (has_aux()) row.aux_transform = transform_of<C>(p.problem.aux, n);
    }
    if (at.y >= 0) {
      row.target.column = at.y;
      row.raw_base = raw_element<C, K::kBase>(base_row.template at<K::kBase>(at.y), base_row.dtype);
      if (has_aux()) row.raw_aux = raw_element<C, K::kAux>(aux_row.template at<K::kAux>(at.y), aux_row.dtype);
      if constexpr (kMode == kGeneral) row.target.weight = weight_of<C>(p.problem, at.y);
    }
    return row;
  }

  // the sources' values of this lane's columns
  template <int kMemory>
  AUXK_DEVICE void load(const Row& row, const Tile& tile, const Lane<K::kPiece>& lane, int slot, C (&base)[kColumns],
                        C (&aux)[kColumns]) const {
    const SourceRows& rows = row.sources;
    const char* base_tile = rows.base.template at<K::kBase>(tile.first);
    const char* aux_tile = rows.has_aux ? rows.aux.template at<K::kAux>(tile.first) : nullptr;
    if (kResident) {
      base_tile = shared.base_slot(slot) + misalignment(rows.base.first, 16);
      aux_tile = shared.aux_slot(slot) + misalignment(rows.aux.first, 16);
    }
    load_sources<C, K, kMemory>(base_tile, aux_tile, rows, static_cast<int>(p.problem.V), lane, tile.num, base, aux);
  }

  AUXK_DEVICE void scan(const Row& row, const Tile& tile, const Lane<K::kPiece>& lane, const C (&base)[kColumns],
                        const C (&aux)[kColumns], S* state) const {
    Columns<C> x;
    x.counted = 0, x.target = row.target.s;
    const int y = row.target.column - tile.first;
    const bool is_weighted = kMode == kGeneral && (p.out.fields[kWeightedSum] != nullptr || p.terms.row.share != 0);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      x.z[i] = base[i], x.s[i] = base[i] + aux[i];
      if constexpr (kMode == kGeneral) {
        C capped, slope;
        x.z[i] = row.base_transform(base[i], &capped, &slope);
        x.s[i] = x.z[i] + (has_aux() ? row.aux_transform(aux[i], &capped, &slope) : C(0));
      }
      x.w[i] = is_weighted && lane.column(i) < tile.num ? weight_of<C>(p.problem, tile.first + lane.column(i)) : C(0);
    }
    if (static_cast<uint32_t>(y) < static_cast<uint32_t>(tile.num)) {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) drop_unless(lane.column(i) != y, &x, i);
    }
    if (!K::kHasWholeLanes && lane.column(kColumns - 1) >= tile.num) {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) drop_unless(lane.column(i) < tile.num, &x, i);
    }
    if constexpr (kMode == kGeneral) {
#pragma unroll
      for (int i = 0; i < kColumns; ++i)
        x.counted |= static_cast<uint32_t>(lane.column(i) < tile.num && lane.column(i) != y) << i;
    }
    absorb(*state, x, is_weighted, [&](int i) { return tile.first + lane.column(i); });
  }

  AUXK_DEVICE static void drop_unless(bool stays, Columns<C>* x, int i) {
    x->s[i] = stays ? x->s[i] : -Limit<C>::kInf;
    x->z[i] = stays ? x->z[i] : -Limit<C>::kInf;
  }

  AUXK_DEVICE void release(int slot) const {
    hw::sync_warp();
    if (lane_of_warp() == 0) hw::arrive(shared.empty(slot));
  }

  AUXK_DEVICE void scan_segments(const Row& row) {
    for (int segment = 0; segment < share.segments; ++segment) {
      S state;
      for (int i = 0; i < p.cut.num_tiles; ++i) {
        const Tile tile(p.problem, p.cut, share.first_segment + segment, i);
        if (tile.num < 1) break;
        const Lane<K::kPiece> lane = lane_of(share.first_segment + segment, i);
        if (kResident) hw::wait(shared.full(place.slot), place.parity);
        if (lane.first < tile.num) {
          C base[kColumns], aux[kColumns];
          load<kScanned>(row, tile, lane, place.slot, base, aux);
          scan(row, tile, lane, base, aux, &state);
        }
        if (kResident) {
          if (!has_gradient) release(place.slot);
          place.advance(p.layout.num_slots);
        }
      }
      state = merged(state, hw::kWarp);
      if (lane_of_warp() == 0) *shared.template partial<S>(segment, warp()) = state;
    }
  }

  // The row's state, without its target: segments' states of all blocks, given to all. Every thread gets it.
  AUXK_DEVICE S merge_segments() {
    const int num_warps = p.cut.threads / hw::kWarp, parity = static_cast<int>(num_worked & 1);
    hw::sync_group(p.cut.threads);
    for (int segment = warp(); segment < share.segments; segment += num_warps) {
      S state;
      if (lane_of_warp() < num_warps) state = *shared.template partial<S>(segment, lane_of_warp());
      state = merged(state, kMaxSegments);
      S* place_of_segment = shared.template exchange<S>(parity, share.first_segment + segment);
      if (has_cluster()) {
        // double-buffered: who is two rows ahead has heard from every block that it is done with the row between
        if (lane_of_warp() < p.cluster) {
          give(state, place_of_segment, lane_of_warp());
          hw::arrive_at(shared.exchanged(parity), lane_of_warp());
        }
      } else if (lane_of_warp() == 0) {
        *place_of_segment = state;
      }
    }
    if (has_cluster())
      hw::wait_for_cluster(shared.exchanged(parity), num_worked >> 1 & 1);
    else
      hw::sync_group(p.cut.threads);
    ++num_worked;
    const int segment = lane_of_warp() % kMaxSegments;
    S state;
    if (segment < p.cut.num_segments) state = *shared.template exchange<S>(parity, segment);
    return merged(state, kMaxSegments);
  }

  AUXK_DEVICE static void give(const S& state, S* place_of_segment, int rank) {
    uint32_t words[sizeof(S) / 4];
    memcpy(words, &state, sizeof(S));
    auto* to = reinterpret_cast<uint32_t*>(place_of_segment);
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(S) / 4); ++i) hw::store_at(to + i, rank, words[i]);
  }

  AUXK_DEVICE void work_on(int64_t n, const RowTarget& at, C divisor) {
    Row row = row_at(n, at);
    const Place first = place;
    // For a rank the target's logits are waited for, by all but the producer. With float64 always: registers that hold
    // what is stored, and what is made of it, would spill.
    const bool is_early = std::is_same_v<C, double> || is_ranked();
    if (is_early) finish_target(&row);
    scan_segments(row);
    S whole = merge_segments();
    if (!is_early) finish_target(&row);
    C rest = 0, base_rest = 0;
    const C weight = kMode == kGeneral && p.terms.row_loss != nullptr && at.y >= 0 ? row.target.weight : C(1);
    if constexpr (kMode == kPlain)
      join(whole, row.target, &rest);
    else
      join(whole, row.target, &rest, &base_rest);
    if (has_gradient) write_gradients(row, at.is_poisoned, whole, rest, weight, divisor, first);
    if (is_first()) store_row(row, at.is_poisoned, whole, rest, base_rest, weight);
  }

  // -- what a row leaves ----------------------------------------------------------------------------------------------

  AUXK_DEVICE void put(Field field, int64_t n, C value) const {
    if (p.out.fields[field] != nullptr) static_cast<C*>(p.out.fields[field])[n] = value;
  }
  AUXK_DEVICE void put_column(Field field, int64_t n, int column) const {
    if (p.out.fields[field] != nullptr) static_cast<int64_t*>(p.out.fields[field])[n] = column == kNowhere ? 0 : column;
  }

  // a target that names no class has no rank, nor has a row without a distribution
  AUXK_DEVICE void put_rank(const Row& row, const S& whole) const {
    const bool has_rank = row.target.exists() && whole.denom == whole.denom;
    if (is_ranked()) static_cast<int64_t*>(p.out.fields[kTargetRank])[row.n] = has_rank ? whole.num_above : -1;
  }

  AUXK_DEVICE RowLoss<C> row_loss() const {
    const RowLoss<double>& row = p.terms.row;
    return {static_cast<C>(row.kept), static_cast<C>(row.share), static_cast<C>(row.z_loss)};
  }

  // by one thread: the fields, and the row's loss. A target that names no class makes all but the argmaxes NaN.
  AUXK_DEVICE void store_row(const Row& row, bool is_poisoned, const S& whole, C rest, C base_rest, C weight) const {
    const C bad = is_poisoned ? Limit<C>::kNaN : C(0);
    const int64_t n = row.n;
    const auto put_number = [&](Field field, C value) { put(field, n, value + bad); };
    RowNumbers<C> numbers;
    numbers.max = whole.max, numbers.log_denom = log(whole.denom);
    if (row.target.exists()) numbers.nll = nll_of_logit(row.target.s, whole.max, rest, whole.denom);
    numbers.put_plain(put_number);
    C loss = weight * numbers.nll;
    if constexpr (kMode != kPlain) {
      numbers.mean_sum = whole.mean_sum / whole.denom, numbers.mean_base = whole.mean_base / whole.denom;
      numbers.base_max = whole.base_max, numbers.base_log_denom = log(whole.base_denom);
      if (row.target.exists())
        numbers.base_nll = nll_of_logit(row.target.z, whole.base_max, base_rest, whole.base_denom);
      numbers.weighted_sum = whole.weighted_sum;
      numbers.put_statistics(put_number);
      put_column(kArgmax, n, whole.argmax.column);
      put_column(kBaseArgmax, n, whole.base_argmax.column);
      put_rank(row, whole);
      if constexpr (kMode == kGeneral) {
        const RowLoss<C> terms = row_loss();
        loss = terms.value(terms.kept * loss, whole.weight, numbers);
      }
    }
    if (p.terms.row_loss != nullptr) static_cast<C*>(p.terms.row_loss)[n] = loss + bad;
  }

  AUXK_DEVICE RowGradient<C> gradient_of(const S& whole, C rest, C weight, C divisor) const {
    RowGradient<C> k;
    k.max = whole.max;
    k.p_factor = C(1) / whole.denom;
    k.G = weight / divisor;
    k.residual = rest / whole.denom;
    if constexpr (kMode == kGeneral) {
      const RowLoss<C> terms = row_loss();
      k.G = terms.G(weight, divisor);
      if (terms.share != 0) {
        k.A = terms.A_of_smoothing(whole.weight) / divisor;
        k.S = terms.S(divisor);
      }
      if (terms.z_loss != 0) k.A += terms.A_of_z_loss(whole.max + log(whole.denom)) / divisor;
    }
    return k;
  }

  AUXK_DEVICE void write_gradients(const Row& row, bool is_poisoned, const S& whole, C rest, C weight, C divisor,
                                   Place at) {
    RowGradient<C> k = gradient_of(whole, rest, weight, divisor);
    if (is_poisoned) k.A = Limit<C>::kNaN;
    const GradientRows grads = gradient_rows<K>(p.problem, p.out, row.n);
    ScaleSums<C> scale_sums;
    for (int s = 0; s < share.segments; ++s) {
      const int segment = share.first_segment + (kResident ? s : share.segments - 1 - s);
      for (int t = 0; t < p.cut.num_tiles; ++t) {
        const int i = kResident ? t : p.cut.num_tiles - 1 - t;
        const Tile tile(p.problem, p.cut, segment, i);
        if (tile.num < 1) continue;
        const Lane<K::kPiece> lane = lane_of(segment, i);
        C base[kColumns], aux[kColumns];
        const bool has_columns = lane.first < tile.num;
        if (has_columns) load<kLast>(row, tile, lane, at.slot, base, aux);
        if (kResident) {
          release(at.slot);
          at.advance(p.layout.num_slots);
        }
        const int y = row.target.column - tile.first;
        if (has_columns)
          write_gradient<C, kMode, K>(p.problem, lane, tile, y, k, row.base_transform, row.aux_transform, grads, base,
                                      aux, &scale_sums);
      }
    }
    if (kMode == kGeneral && !kResident) store_scale_gradients(row.n, scale_sums);
    // columns from V on belong to nobody
    if (share.rank == p.cluster - 1) {
      fill_zero(grads.base, p.problem.V, p.problem.base.width, hw::thread(), p.cut.threads);
      fill_zero(grads.aux, p.problem.V, p.problem.aux.width, hw::thread(), p.cut.threads);
    }
  }

  AUXK_DEVICE void store_scale_gradients(int64_t n, const ScaleSums<C>& sums) const {
    for (int i = 0; i < 2; ++i) {
      void* grad = i == 0 ? p.out.grad_base_scale : p.out.grad_aux_scale;
      if (grad == nullptr) continue;
      const double sum = sum_of_group(static_cast<double>(i == 0 ? sums.base : sums.aux), shared.sums(), p.cut);
      if (hw::thread() == 0) static_cast<C*>(grad)[n] = static_cast<C>(sum);
    }
  }

  AUXK_DEVICE void ignore(int64_t n) const {
    const int t = share.rank * p.cut.threads + hw::thread(), count = p.cluster * p.cut.threads;
    const GradientRows grads = gradient_rows<K>(p.problem, p.out, n);
    fill_zero(grads.base, 0, p.problem.base.width, t, count);
    fill_zero(grads.aux, 0, p.problem.aux.width, t, count);
    if (!is_first()) return;
    for (int field = 0; field < kNumFloatFields; ++field) put(static_cast<Field>(field), n, C(0));
    put_column(kArgmax, n, -1);
    put_column(kBaseArgmax, n, -1);
    put_column(kTargetRank, n, -1);
    for (void* grad : {p.out.grad_base_scale, p.out.grad_aux_scale})
      if (grad != nullptr) static_cast<C*>(grad)[n] = C(0);
    if (p.terms.row_loss != nullptr) static_cast<C*>(p.terms.row_loss)[n] = C(0);
  }

  // The loss, by the first block of the cluster that is done last: a sum in float64, in an order that depends on the
  // number of rows and threads alone.
  AUXK_DEVICE void reduce(bool has_divisor, double divisor) const {
    if (share.rank != 0) return;
    const unsigned num_clusters = static_cast<unsigned>(share.row_step);
    if (hw::thread() == 0) *shared.flag() = num_clusters == 1 || hw::is_last(p.terms.counter, num_clusters);
    hw::sync_group(p.cut.threads);
    if (*shared.flag() == 0) return;
    const C* losses = static_cast<const C*>(p.terms.row_loss);
    const double sum = sum_over_rows(p.problem.num_rows, shared.sums(), p.cut,
                                     [&](int64_t n) { return static_cast<double>(hw::load_written(losses + n)); });
    if (!has_divisor) divisor = divisor_of<C>(p.problem, p.terms, shared.sums(), p.cut);
    if (hw::thread() == 0) *static_cast<C*>(p.terms.loss) = static_cast<C>(sum / divisor);
  }
};

// -- the kernels ------------------------------------------------------------------------------------------------------

template <int kMode>
constexpr int kThreads = kMode == kGeneral ? kGeneralThreads : kMaxThreads;

template <class C, int kMode, class K>
__global__ void __launch_bounds__(kThreads<kMode> + hw::kWarp, 1)
    cross_entropy_resident_kernel(const __grid_constant__ cuda::Parameters p) {
  if (!hw::kHasClusters) return;
  const Shared shared = {p.layout, hw::shared_memory()};
  const Share share(p);
  const int lane = hw::thread();
  if (lane < hw::kWarp) {
    for (int slot = lane; slot < p.layout.num_slots; slot += hw::kWarp) {
      hw::init(shared.full(slot), 1);
      hw::init(shared.empty(slot), p.cut.threads / hw::kWarp);
    }
    if (lane < 2) hw::init(shared.exchanged(lane), p.cut.num_segments);
    hw::publish_barriers();
  }
  hw::sync_cluster();
  if (hw::thread() < p.cut.threads)
    Worker<C, kMode, K, true>(p, shared, share).run();
  else
    produce<K>(p, shared, share);
  hw::sync_cluster();  // a block's shared memory stays until no other writes to it
}

template <class C, int kMode, class K>
__global__ void __launch_bounds__(kThreads<kMode>, 1)
    cross_entropy_reread_kernel(const __grid_constant__ cuda::Parameters p) {
  const Shared shared = {p.layout, hw::shared_memory()};
  const Share share(p);
  Worker<C, kMode, K, false>(p, shared, share).run();
}

}  // namespace auxk
