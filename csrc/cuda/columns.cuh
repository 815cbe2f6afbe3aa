// The columns of one row: where they lie, how a lane reads and writes its eight of a tile.
#pragma once

#include "cross_entropy.h"
#include "row_state.cuh"

namespace auxk {

constexpr int kAny = -1;  // a dtype that is known when the kernel runs

// The dtypes of both sources, or kAny for both, and how many neighbouring columns a lane has: 16 bytes of the wider
// source, or 1 where V is no multiple of that. Ragged: pieces of 16-bit numbers although V is no multiple.
template <int kBaseType, int kAuxType, int kColumnsOfPiece, bool kRagged = false>
struct Kind {
  static constexpr int kBase = kBaseType, kAux = kAuxType, kPiece = kColumnsOfPiece;
  static constexpr bool kIsRagged = kRagged;
  // whether a lane that has its first column of a tile has them all
  static constexpr bool kHasWholeLanes = kPiece == kColumns && !kRagged;
};
template <int kPiece, bool kRagged = false>
using BFloat16s = Kind<static_cast<int>(DType::kBFloat16), static_cast<int>(DType::kBFloat16), kPiece, kRagged>;
template <int kPiece, bool kRagged = false>
using Float16s = Kind<static_cast<int>(DType::kFloat16), static_cast<int>(DType::kFloat16), kPiece, kRagged>;
template <int kPiece>
using Float32s = Kind<static_cast<int>(DType::kFloat32), static_cast<int>(DType::kFloat32), kPiece>;
template <int kPiece>
using AnyTypes = Kind<kAny, kAny, kPiece>;

AUXK_DEVICE int bytes_of(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

template <int kType>
AUXK_DEVICE DType type_of(DType dtype) {
  return kType == kAny ? dtype : static_cast<DType>(kType);
}

// Which columns of a tile a lane has: column(0) < column(1) < ..., in pieces of neighbours; first is kNowhere if none.
template <int kPiece>
struct Lane {
  int first, jump;

  AUXK_DEVICE Lane(const Cut& cut, int t) : first(t < cut.lanes ? t * kPiece : kNowhere), jump(kPiece * cut.lanes) {}
  AUXK_DEVICE int column(int i) const { return first + (i / kPiece) * jump + i % kPiece; }
};

// A row of one source, or of its gradient. Tiles begin at multiples of 64 columns, so that all of them, and their copies
// in shared memory, are aligned as the row is.
struct RowOf {
  char* first;  // column 0
  DType dtype;

  template <int kType = kAny>
  AUXK_DEVICE char* at(int64_t column) const {
    return first + column * bytes_of(kType == kAny ? dtype : static_cast<DType>(kType));
  }
};

AUXK_DEVICE int64_t row_start(const Source& source, int64_t n) {
  if (n < source.num_inner) return n * source.stride_inner;
  return (n / source.num_inner) * source.stride_outer + (n % source.num_inner) * source.stride_inner;
}

AUXK_DEVICE RowOf row_of(const Source& source, int64_t n) {
  char* first = const_cast<char*>(static_cast<const char*>(source.values));
  return {first == nullptr ? nullptr : first + row_start(source, n) * bytes_of(source.dtype), source.dtype};
}

AUXK_DEVICE RowOf gradient_row(void* grad, DType dtype, const Source& source, int64_t n) {
  return {grad == nullptr ? nullptr : static_cast<char*>(grad) + n * source.width * bytes_of(dtype), dtype};
}

AUXK_DEVICE uint32_t misalignment(const void* p, uint32_t unit) {
  return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(p)) & (unit - 1);
}

// -- one element ------------------------------------------------------------------------------------------------------

// As it is stored: what is asked for early and used late is not to be waited for by a conversion.
template <class C>
using Raw = std::conditional_t<std::is_same_v<C, double>, uint64_t, uint32_t>;

template <class C, int kType>
AUXK_DEVICE Raw<C> raw_element(const char* p, DType dtype) {
  switch (bytes_of(type_of<kType>(dtype))) {
    case 2:
      return *reinterpret_cast<const uint16_t*>(p);
    case 4:
      return *reinterpret_cast<const uint32_t*>(p);
    default:
      return static_cast<Raw<C>>(*reinterpret_cast<const uint64_t*>(p));
  }
}

template <class C, int kType>
AUXK_DEVICE C value_of(Raw<C> raw, DType dtype) {
  switch (type_of<kType>(dtype)) {
    case DType::kBFloat16:
      return hw::from_bfloat16(static_cast<uint16_t>(raw));
    case DType::kFloat16:
      return hw::from_float16(static_cast<uint16_t>(raw));
    case DType::kFloat32:
      return hw::float_of(static_cast<uint32_t>(raw));
    default:
      return static_cast<C>(hw::double_of(raw));
  }
}

template <class C, int kType>
AUXK_DEVICE C element(const char* p, DType dtype) {
  return value_of<C, kType>(raw_element<C, kType>(p, dtype), dtype);
}

template <class C, int kType>
AUXK_DEVICE void store_element(char* p, DType dtype, C x) {
  switch (type_of<kType>(dtype)) {
    case DType::kBFloat16:
      *reinterpret_cast<uint16_t*>(p) = static_cast<uint16_t>(hw::to_bfloat16(static_cast<float>(x), 0.0f));
      break;
    case DType::kFloat16:
      *reinterpret_cast<uint16_t*>(p) = static_cast<uint16_t>(hw::to_float16(static_cast<float>(x), 0.0f));
      break;
    case DType::kFloat32:
      *reinterpret_cast<float*>(p) = static_cast<float>(x);
      break;
    default:
      *reinterpret_cast<double*>(p) = static_cast<double>(x);
  }
}

// -- pieces -----------------------------------------------------------------------------------------------------------

// How tiles are read: from shared memory, or from global memory with a second read to come or not.
enum Memory { kShared, kGlobalKept, kGlobalLast };

template <int kMemory, class Words>
AUXK_DEVICE Words words_at(const char* p) {
  const Words* q = reinterpret_cast<const Words*>(p);
  return kMemory == kShared ? *q : hw::load(q, kMemory == kGlobalKept);
}

// 16-bit numbers, two in each word
template <int kType, class C, class Words>
AUXK_DEVICE void unpack(const Words& words, DType dtype, C* out) {
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(Words) / 4); ++i) {
    const uint16_t low = static_cast<uint16_t>(words.w[i]), high = static_cast<uint16_t>(words.w[i] >> 16);
    if (type_of<kType>(dtype) == DType::kBFloat16) {
      out[2 * i] = hw::from_bfloat16(low);
      out[2 * i + 1] = hw::from_bfloat16(high);
    } else {
      out[2 * i] = hw::from_float16(low);
      out[2 * i + 1] = hw::from_float16(high);
    }
  }
}

template <class C, int kType, int kPiece, int kMemory>
AUXK_DEVICE void load_piece(const char* p, DType dtype, C* out) {
  const DType type = type_of<kType>(dtype);
  if (type == DType::kFloat32) {
    const hw::Words4 words = words_at<kMemory, hw::Words4>(p);
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = hw::float_of(words.w[i]);
  } else if (type == DType::kFloat64) {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const hw::Words4 words = words_at<kMemory, hw::Words4>(p + 8 * i);
      for (int j = 0; j < 2; ++j)
        out[i + j] = static_cast<C>(hw::double_of(words.w[2 * j] | static_cast<uint64_t>(words.w[2 * j + 1]) << 32));
    }
  } else if (kPiece == 8) {
    unpack<kType>(words_at<kMemory, hw::Words4>(p), dtype, out);
  } else {
    unpack<kType>(words_at<kMemory, hw::Words2>(p), dtype, out);
  }
}

template <class Words, class C>
AUXK_DEVICE void store_half_piece(char* p, bool is_bfloat16, const C* x) {
  Words words;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(Words) / 4); ++i) {
    const float first = static_cast<float>(x[2 * i]), second = static_cast<float>(x[2 * i + 1]);
    words.w[i] = is_bfloat16 ? hw::to_bfloat16(first, second) : hw::to_float16(first, second);
  }
  hw::store(reinterpret_cast<Words*>(p), words);
}

template <class C, int kType, int kPiece>
AUXK_DEVICE void store_piece(char* p, DType dtype, const C* x) {
  const DType type = type_of<kType>(dtype);
  if (type == DType::kFloat32) {
    hw::Words4 words;
#pragma unroll
    for (int i = 0; i < 4; ++i) words.w[i] = hw::bits_of(static_cast<float>(x[i]));
    hw::store(reinterpret_cast<hw::Words4*>(p), words);
  } else if (type == DType::kFloat64) {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      hw::Words4 words;
      for (int j = 0; j < 2; ++j) {
        const uint64_t bits = hw::bits_of(static_cast<double>(x[i + j]));
        words.w[2 * j] = static_cast<uint32_t>(bits), words.w[2 * j + 1] = static_cast<uint32_t>(bits >> 32);
      }
      hw::store(reinterpret_cast<hw::Words4*>(p + 8 * i), words);
    }
  } else if (kPiece == 8) {
    store_half_piece<hw::Words4>(p, type == DType::kBFloat16, x);
  } else {
    store_half_piece<hw::Words2>(p, type == DType::kBFloat16, x);
  }
}

// -- a lane's columns of a tile ---------------------------------------------------------------------------------------

// A tile's columns in the row: [first, first + num), num < 1 where the row is over.
struct Tile {
  int first, num;

  AUXK_DEVICE Tile(const Problem& p, const Cut& cut, int segment, int tile)
      : first(segment * cut.segment + tile * cut.tile) {
    const int V = static_cast<int>(p.V), end = (segment + 1) * cut.segment, stop = first + cut.tile;
    num = (end < V ? (stop < end ? stop : end) : (stop < V ? stop : V)) - first;
  }
};

// whether a row's pieces can be read at once: 16 bytes, or 8 of a narrow source beside a wide one
template <int kType, int kPiece>
AUXK_DEVICE bool has_pieces(const RowOf& row) {
  return kPiece > 1 && misalignment(row.first, bytes_of(type_of<kType>(row.dtype)) * kPiece >= 16 ? 16 : 8) == 0;
}

// `tile` is its column 0 of `num`, of which the lane has at least its first; columns beyond give 0.
template <class C, int kType, int kPiece, int kMemory>
AUXK_DEVICE void load_columns(const char* tile, DType dtype, bool is_wide, const Lane<kPiece>& lane, int num, C* out) {
  const int size = bytes_of(type_of<kType>(dtype));
  if (kPiece > 1 && is_wide) {
#pragma unroll
    for (int i = 0; i < kColumns; i += kPiece) {
      if (i == 0 || lane.column(i) < num) {
        load_piece<C, kType, kPiece, kMemory>(tile + lane.column(i) * size, dtype, out + i);
      } else {
#pragma unroll
        for (int j = i; j < i + kPiece; ++j) out[j] = 0;
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < kColumns; ++i)
      out[i] = lane.column(i) < num ? element<C, kType>(tile + lane.column(i) * size, dtype) : C(0);
  }
}

template <class C, int kType, int kPiece>
AUXK_DEVICE void store_columns(char* tile, DType dtype, bool is_wide, const Lane<kPiece>& lane, int num, const C* x) {
  const int size = bytes_of(type_of<kType>(dtype));
  if (kPiece > 1 && is_wide) {
#pragma unroll
    for (int i = 0; i < kColumns; i += kPiece) {
      if (i == 0 || lane.column(i) < num) store_piece<C, kType, kPiece>(tile + lane.column(i) * size, dtype, x + i);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      if (lane.column(i) < num) store_element<C, kType>(tile + lane.column(i) * size, dtype, x[i]);
    }
  }
}

// A row of both sources.
struct SourceRows {
  RowOf base, aux;
  bool has_aux, is_wide;  // is_wide: both have pieces
};

template <class K>
AUXK_DEVICE SourceRows source_rows(const Problem& p, int64_t n) {
  const RowOf base = row_of(p.base, n), aux = row_of(p.aux, n);
  const bool has_aux = p.aux.values != nullptr;
  return {base, aux, has_aux,
          has_pieces<K::kBase, K::kPiece>(base) && (!has_aux || has_pieces<K::kAux, K::kPiece>(aux))};
}

// -- pieces of misaligned rows ----------------------------------------------------------------------------------------

template <int kFirst>
AUXK_DEVICE hw::Words4 words_from(const uint32_t (&w)[8], int bits) {
  hw::Words4 out;
#pragma unroll
  for (int i = 0; i < 4; ++i) out.w[i] = hw::funnel(w[kFirst + i], w[kFirst + i + 1], bits);
  return out;
}

// 16 of 32 bytes, from byte `shift` on; an even number, less than 16, the same for all lanes
AUXK_DEVICE hw::Words4 shifted(const hw::Words4& a, const hw::Words4& b, uint32_t shift) {
  const uint32_t w[8] = {a.w[0], a.w[1], a.w[2], a.w[3], b.w[0], b.w[1], b.w[2], b.w[3]};
  const int bits = static_cast<int>(shift % 4) * 8;
  switch (shift / 4) {
    case 0:
      return words_from<0>(w, bits);
    case 1:
      return words_from<1>(w, bits);
    case 2:
      return words_from<2>(w, bits);
    default:
      return words_from<3>(w, bits);
  }
}

// A lane's piece of 16-bit numbers at `p`, which lies in the row's bytes [first, end). Read from the aligned 32 bytes
// around it; from global memory only where the row has them.
template <class C, int kType, int kMemory>
AUXK_DEVICE void load_ragged(const char* p, uint32_t shift, const char* first, const char* end, int num, C* out) {
  const char* aligned = p - shift;
  if (kMemory == kShared || (aligned >= first && aligned + 32 <= end)) {
    const hw::Words4 a = words_at<kMemory, hw::Words4>(aligned), b = words_at<kMemory, hw::Words4>(aligned + 16);
    unpack<kType>(shifted(a, b, shift), static_cast<DType>(kType), out);
  } else {
#pragma unroll
    for (int i = 0; i < kColumns; ++i)
      out[i] = i < num ? element<C, kType>(p + 2 * i, static_cast<DType>(kType)) : C(0);
  }
}

// The lanes' pieces of 16-bit numbers at neighbouring places `p`: 16 aligned bytes are the end of one lane's piece and
// the beginning of the next one's. By whole warps of whole pieces; the two lanes at the ends write the rest alone.
template <class C, int kType>
AUXK_DEVICE void store_ragged(char* p, uint32_t shift, const C* x) {
  constexpr bool kIsBFloat16 = kType == static_cast<int>(DType::kBFloat16);
  hw::Words4 own, before;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    own.w[i] = kIsBFloat16 ? hw::to_bfloat16(static_cast<float>(x[2 * i]), static_cast<float>(x[2 * i + 1]))
                           : hw::to_float16(static_cast<float>(x[2 * i]), static_cast<float>(x[2 * i + 1]));
    before.w[i] = shift == 0 ? 0 : hw::from_lane_before(own.w[i]);
  }
  const int lane = hw::thread() % hw::kWarp;
  if (shift == 0) {
    hw::store(reinterpret_cast<hw::Words4*>(p), own);
  } else {
    const hw::Words4 block = shifted(before, own, 16 - shift);
    if (lane > 0) hw::store(reinterpret_cast<hw::Words4*>(p - shift), block);
    if (lane == 0 || lane == hw::kWarp - 1) {
      const int in_first = static_cast<int>(16 - shift) / 2;  // columns before the next 16 bytes begin
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        if ((lane == 0) == (i < in_first))
          reinterpret_cast<uint16_t*>(p)[i] = static_cast<uint16_t>(own.w[i / 2] >> (i % 2 * 16));
      }
    }
  }
}

template <class C, class K, int kMemory>
AUXK_DEVICE void load_sources(const char* base_tile, const char* aux_tile, const SourceRows& rows, int V,
                              const Lane<K::kPiece>& lane, int num, C (&base)[kColumns], C (&aux)[kColumns]) {
  if constexpr (K::kIsRagged) {
    const auto load = [&](const char* tile, const RowOf& row, C* out) {
      load_ragged<C, K::kBase, kMemory>(tile + 2 * lane.first, misalignment(row.first, 16), row.first,
                                        row.first + 2 * int64_t{V}, num - lane.first, out);
    };
    load(base_tile, rows.base, base);
    if (rows.has_aux) load(aux_tile, rows.aux, aux);
  } else {
    const auto load = [&](bool is_wide) {
      load_columns<C, K::kBase, K::kPiece, kMemory>(base_tile, rows.base.dtype, is_wide, lane, num, base);
      if (rows.has_aux) load_columns<C, K::kAux, K::kPiece, kMemory>(aux_tile, rows.aux.dtype, is_wide, lane, num, aux);
    };
    // one branch for both sources: wide in the common case
    if (K::kPiece > 1 && rows.is_wide)
      load(true);
    else
      load(false);
  }
  if (!rows.has_aux) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) aux[i] = 0;
  }
}

// A lane's columns of a tile of a gradient's row.
template <class C, class K, int kType>
AUXK_DEVICE void store_gradient(const RowOf& row, const Tile& tile, bool is_wide, const Lane<K::kPiece>& lane,
                                const C* x) {
  char* first = row.template at<kType>(tile.first);
  if constexpr (K::kIsRagged) {
    const bool is_whole_warp = (lane.first | (kColumnsOfWarp - 1)) < tile.num;
    if (is_whole_warp)
      store_ragged<C, kType>(first + 2 * lane.first, misalignment(row.first, 16), x);
    else
      store_columns<C, kType, K::kPiece>(first, row.dtype, false, lane, tile.num, x);
  } else {
    store_columns<C, kType, K::kPiece>(first, row.dtype, is_wide, lane, tile.num, x);
  }
}

// Zeros in [start, stop) of a row of 16-bit or wider numbers, by `count` threads of which this is number `t`.
AUXK_DEVICE void fill_zero(const RowOf& row, int64_t start, int64_t stop, int t, int count) {
  if (row.first == nullptr) return;
  char *first = row.at(start), *last = row.at(stop);
  char* body = first + ((16 - misalignment(first, 16)) & 15);
  if (body > last) body = last;
  char* tail = last - misalignment(last, 16);
  if (tail < body) tail = body;
  const hw::Words4 zeros = {{0, 0, 0, 0}};
  for (char* p = first + 2 * t; p < body; p += 2 * count) *reinterpret_cast<uint16_t*>(p) = 0;
  for (char* p = body + 16 * int64_t{t}; p < tail; p += 16 * int64_t{count}) {
    hw::store(reinterpret_cast<hw::Words4*>(p), zeros);
  }
  for (char* p = tail + 2 * t; p < last; p += 2 * count) *reinterpret_cast<uint16_t*>(p) = 0;
}

// -- from what is stored to logits ------------------------------------------------------------------------------------

// scale * softcap(.) of one source in one row
template <class C>
struct Transform {
  C scale = 1, cap = 0;  // 0: none

  // the logit; `capped` receives softcap(value), `slope` its derivative
  AUXK_DEVICE C operator()(C value, C* capped, C* slope) const {
    *slope = C(1);
    *capped = cap == C(0) ? value : soft_cap(value, cap, slope);
    return *capped * scale;
  }
};

template <class C>
AUXK_DEVICE Transform<C> transform_of(const Source& source, int64_t n) {
  Transform<C> transform;
  transform.scale = source.scale == nullptr ? static_cast<C>(source.scale_value)
                                            : static_cast<const C*>(source.scale)[n * source.scale_stride];
  transform.cap = static_cast<C>(source.softcap);
  return transform;
}

}  // namespace auxk
