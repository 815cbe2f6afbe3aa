// The block loops that operators share, then those of each, and the table of all. Included by block_ops.cpp once for each
// instruction set, inside a namespace of that name and under that target; no include guard on purpose.

// -- lanes ----------------------------------------------------------------------------------------

// Loops over columns go in steps of kStep, between which a little of what comes next is fetched. Sums and maxima of a
// step stay in as many lanes as a vector has, and steps are added lane by lane: to reduce a vector to one number takes as
// long as several vectors' work.
constexpr int64_t kStep = 256;
constexpr int kLanes = 16;

template <class C>
static AUXK_INLINE void add_lanes(const C* __restrict__ from, C* __restrict__ to) {
#pragma omp simd
  for (int l = 0; l < kLanes; ++l) to[l] += from[l];
}

template <class C>
static AUXK_INLINE C sum_of_lanes(const C* __restrict__ v) {
  alignas(64) C lanes[kLanes / 2];
#pragma omp simd
  for (int l = 0; l < 8; ++l) lanes[l] = v[l] + v[l + 8];
#pragma omp simd
  for (int l = 0; l < 4; ++l) lanes[l] += lanes[l + 4];
  return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
}

// The columns of a row's end, which -inf fills up to all lanes
template <class C>
struct Rest {
  alignas(64) C lanes[kLanes];
  const int64_t size;

  AUXK_INLINE Rest(const C* v, int64_t n) : size(n) {
    for (int l = 0; l < kLanes; ++l) lanes[l] = l < n ? v[l] : -std::numeric_limits<C>::infinity();
  }
  AUXK_INLINE void store(C* v) const {
    for (int64_t l = 0; l < size; ++l) v[l] = lanes[l];
  }
};

// Calls run(lanes of v, the same columns of another array) for columns [begin, end); the lanes of v may be written.
template <class C, class Run>
static AUXK_INLINE void in_lanes(C* v, const C* beside, int64_t begin, int64_t end, const Run& run) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) run(v + i, beside + i);
  if (i == end) return;
  Rest<C> rest(v + i, end - i);
  const Rest<C> rest_beside(beside + i, end - i);
  run(rest.lanes, rest_beside.lanes);
  rest.store(v + i);
}

// The first i of n for which is_it(i), or n: a vector or more at a time, then one by one
template <class Is>
static AUXK_INLINE int64_t first_that(int64_t n, const Is& is_it) {
  constexpr int64_t kAtOnce = 64;
  int64_t i = 0;
  for (; i + kAtOnce <= n; i += kAtOnce) {
    int32_t found = 0;
#pragma omp simd reduction(| : found)
    for (int64_t j = 0; j < kAtOnce; ++j) found |= is_it(i + j) ? 1 : 0;
    if (found != 0) break;
  }
  while (i < n && !is_it(i)) ++i;
  return i;
}

// Calls run(begin, end) for each step of n columns. What lies ahead is fetched between the steps: a few lines at a time, or
// the processor drops the requests.
template <int64_t kSize, class Run>
static AUXK_INLINE void in_steps(int64_t n, const Ahead& first, const Ahead& second, const Run& run) {
  const int64_t steps = (n + kSize - 1) / kSize;
  const auto share = [&](const Ahead& ahead) { return ahead.bytes == 0 ? 0 : (ahead.bytes + steps - 1) / steps; };
  const int64_t first_share = share(first), second_share = share(second);
  const auto fetch = [](const Ahead& ahead, int64_t begin, int64_t bytes) {
    const int64_t end = std::min(ahead.bytes, begin + bytes);
    for (int64_t b = begin; b < end; b += 64) __builtin_prefetch(ahead.first + b, 0, 2);
  };
  for (int64_t step = 0; step < steps; ++step) {
    fetch(first, step * first_share, first_share);
    fetch(second, step * second_share, second_share);
    run(step * kSize, std::min(n, (step + 1) * kSize));
  }
}

// -- loads ----------------------------------------------------------------------------------------

template <class C, bool kCapped>
static AUXK_INLINE C transformed(C value, C scale, C softcap, C inverse_cap) {
  return kCapped ? scale * (softcap * tanh_of(value * inverse_cap)) : scale * value;
}

// z[i] = value(i); returns the largest z, NaN passed over
template <class C, class Value>
static AUXK_INLINE C load_values(int64_t n, const Ahead& first, const Ahead& second, C* z, const Value& value) {
  C largest = -std::numeric_limits<C>::infinity();
  constexpr int64_t kLong = 4 * kStep;  // the loop is short, and ends with a maximum of all lanes
  in_steps<kLong>(n, first, second, [&](int64_t begin, int64_t end) {
#pragma omp simd reduction(max : largest)
    for (int64_t i = begin; i < end; ++i) {
      const C v = value(i);
      z[i] = v;
      largest = v > largest ? v : largest;
    }
  });
  return largest;
}

template <class C, class T, bool kCapped>
static C load_as(const SourceBlock<C>& source, int64_t n, C* __restrict__ z) {
  const T* __restrict__ values = static_cast<const T*>(source.values);
  const C scale = source.scale, cap = source.softcap, inverse_cap = kCapped ? 1 / cap : 0;
  return load_values(n, source.ahead, Ahead{}, z, [&](int64_t i) {
    return transformed<C, kCapped>(static_cast<C>(widen(values[i])), scale, cap, inverse_cap);
  });
}

template <class C, class T, bool kCapped>
static C load_add_as(const SourceBlock<C>& source, int64_t n, const C* z, C* s) {
  const T* __restrict__ values = static_cast<const T*>(source.values);
  const C scale = source.scale, cap = source.softcap, inverse_cap = kCapped ? 1 / cap : 0;
  return load_values(n, source.ahead, Ahead{}, s, [&](int64_t i) {
    return z[i] + transformed<C, kCapped>(static_cast<C>(widen(values[i])), scale, cap, inverse_cap);
  });
}

template <class C, class T>
static C load_sum_as(const SourceBlock<C>& base, const SourceBlock<C>& aux, int64_t n, C* __restrict__ s) {
  const T* __restrict__ b = static_cast<const T*>(base.values), * __restrict__ a = static_cast<const T*>(aux.values);
  return load_values(n, base.ahead, aux.ahead, s,
                     [&](int64_t i) { return static_cast<C>(widen(b[i])) + static_cast<C>(widen(a[i])); });
}

#define AUXK_DISPATCH(dtype, T, ...) \
  switch (dtype) {                   \
    case DType::kFloat32: {          \
      using T = float;               \
      __VA_ARGS__;                   \
    } break;                         \
    case DType::kBFloat16: {         \
      using T = bfloat16;            \
      __VA_ARGS__;                   \
    } break;                         \
    case DType::kFloat16: {          \
      using T = float16;             \
      __VA_ARGS__;                   \
    } break;                         \
    case DType::kFloat64: {          \
      using T = double;              \
      __VA_ARGS__;                   \
    } break;                         \
  }

template <class C>
static C load(const SourceBlock<C>& source, int64_t n, C* z) {
  AUXK_DISPATCH(source.dtype, T, {
    return source.softcap != 0 ? load_as<C, T, true>(source, n, z) : load_as<C, T, false>(source, n, z);
  })
  return 0;
}

template <class C>
static C load_add(const SourceBlock<C>& source, int64_t n, const C* z, C* s) {
  AUXK_DISPATCH(source.dtype, T, {
    return source.softcap != 0 ? load_add_as<C, T, true>(source, n, z, s) : load_add_as<C, T, false>(source, n, z, s);
  })
  return 0;
}

// One pass for the common case. The others take two, so that a product is rounded before the sum however the compiler
// fuses: a maximum is looked for again by its bits.
template <class C>
static C load_sum(const SourceBlock<C>& base, const SourceBlock<C>& aux, int64_t n, C* s) {
  const bool plain = base.scale == 1 && aux.scale == 1 && base.softcap == 0 && aux.softcap == 0;
  if (plain && base.dtype == aux.dtype) {
    AUXK_DISPATCH(base.dtype, T, { return load_sum_as<C, T>(base, aux, n, s); })
  }
  load(base, n, s);
  return load_add(aux, n, s, s);
}

// -- exponentials ---------------------------------------------------------------------------------

// the reference point of a block: a block of -inf alone has none, and -inf - -inf would be NaN
template <class C>
static AUXK_INLINE C finite_or_zero(C m) {
  return m == -std::numeric_limits<C>::infinity() ? 0 : m;
}

// The lanes of s := exp(s - m), added to sum
template <class C>
static AUXK_INLINE void exp_lanes(C* __restrict__ s, C m, C* __restrict__ sum) {
#pragma omp simd
  for (int l = 0; l < kLanes; ++l) {
    const C e = exp_of(s[l] - m);
    s[l] = e;
    sum[l] += e;
  }
}

template <class C>
static C exp_sum(C* __restrict__ s, C m, int64_t n, const Ahead& first, const Ahead& second) {
  m = finite_or_zero(m);
  alignas(64) C total[kLanes] = {};
  in_steps<kStep>(n, first, second, [&](int64_t begin, int64_t end) {
    alignas(64) C sum[kLanes] = {};
    in_lanes(s, s, begin, end, [&](C* v, const C*) { exp_lanes(v, m, sum); });
    add_lanes(sum, total);
  });
  return sum_of_lanes(total);
}

// -- stores ---------------------------------------------------------------------------------------

constexpr int64_t kLine = 64;  // bytes

// A gradient is written once and read much later: past the caches it costs one transfer instead of two (no line is read
// before it is overwritten). Whole lines only, `out` at the start of one; ragged ends go the ordinary way.
static AUXK_INLINE void stream_line(char* out, const char* from) {
#if !defined(__SSE2__)
  std::memcpy(out, from, kLine);
#elif AUXK_VECTOR_BITS == 512
  _mm512_stream_si512(reinterpret_cast<__m512i*>(out), _mm512_loadu_si512(from));
#elif AUXK_VECTOR_BITS == 256
  for (int64_t j = 0; j < kLine; j += 32)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(out + j),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + j)));
#else
  for (int64_t j = 0; j < kLine; j += 16)
    _mm_stream_si128(reinterpret_cast<__m128i*>(out + j), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + j)));
#endif
}

// how many of n elements lie before the first whole line; `out` lies at a multiple of an element's size
template <class T>
static AUXK_INLINE int64_t before_line(const T* out, int64_t n) {
  return std::min(n, static_cast<int64_t>(-reinterpret_cast<uintptr_t>(out) & (kLine - 1)) / int64_t{sizeof(T)});
}

template <class T>
static void copy_past_cache(T* out, const T* from, int64_t n) {
  int64_t i = before_line(out, n);
  std::memcpy(out, from, static_cast<size_t>(i) * sizeof(T));
  for (; i + kLine / int64_t{sizeof(T)} <= n; i += kLine / int64_t{sizeof(T)})
    stream_line(reinterpret_cast<char*>(out + i), reinterpret_cast<const char*>(from + i));
  std::memcpy(out + i, from + i, static_cast<size_t>(n - i) * sizeof(T));
}

template <class C, class T>
static AUXK_INLINE void narrow_number(C x, T& out) {
  narrow(x, out);
}
static AUXK_INLINE void narrow_number(float x, bfloat16& out) {
  out.bits = static_cast<uint16_t>(rounded_to_bfloat16(x) >> 16);
}

template <class C, class T>
static void scale_into(const C* __restrict__ e, C factor, C S, const C* __restrict__ w, int64_t n,
                       T* __restrict__ out) {
  if (S == 0 && factor == factor) {  // a NaN among the e would have made the factor NaN
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) narrow_number(e[i] * factor, out[i]);
  } else if (w == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) narrow(e[i] * factor + S, out[i]);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) narrow(e[i] * factor + S * w[i], out[i]);
  }
}

// The same past the caches. Without weights and a conversion, lines go there from registers.
template <class C, class T>
static void scale_past_cache(const C* e, C factor, C S, const C* w, int64_t n, T* out) {
  if constexpr (std::is_same<C, T>::value) {
    if (w == nullptr) {
      constexpr int64_t kAtOnce = kLine / int64_t{sizeof(T)};
      const C added = S == 0 ? C(-0.0) : S;  // x + 0 would lose the sign of -0
      int64_t i = before_line(out, n);
      scale_into(e, factor, S, w, i, out);
      for (; i + kAtOnce <= n; i += kAtOnce) {
        alignas(64) T line[kAtOnce];
#pragma omp simd
        for (int64_t j = 0; j < kAtOnce; ++j) line[j] = e[i + j] * factor + added;
        stream_line(reinterpret_cast<char*>(out + i), reinterpret_cast<const char*>(line));
      }
      return scale_into(e + i, factor, S, w, n - i, out + i);
    }
  }
  alignas(64) T staged[kBlock];
  scale_into(e, factor, S, w, n, staged);
  copy_past_cache(out, staged, n);
}

template <class C>
static void store_scaled(const C* e, C factor, C S, const C* w, int64_t n, int64_t y, C y_value, DType dtype, void* out,
                         bool stream) {
  AUXK_DISPATCH(dtype, T, {
    T* place = static_cast<T*>(out);
    stream ? scale_past_cache(e, factor, S, w, n, place) : scale_into(e, factor, S, w, n, place);
    if (y >= 0 && y < n) narrow(y_value, place[y]);
  })
}

// -- gradients ------------------------------------------------------------------------------------

template <class C, class T, bool kCapped>
static C finish_as(const SourceBlock<C>& source, const C* __restrict__ ds, int64_t n, bool wants_dscale, T* out,
                   bool stream) {
  const T* __restrict__ values = static_cast<const T*>(source.values);
  const C scale = source.scale, cap = source.softcap, inverse_cap = kCapped ? 1 / cap : 0;
  C dscale = 0;
  if (wants_dscale) {
#pragma omp simd reduction(+ : dscale)
    for (int64_t i = 0; i < n; ++i) {
      const C v = transformed<C, kCapped>(static_cast<C>(widen(values[i])), 1, cap, inverse_cap);
      dscale += ds[i] == 0 ? 0 : ds[i] * v;  // 0 * (-inf) = 0
    }
  }
  if (out == nullptr) return dscale;
  alignas(64) T staged[kBlock];
  T* __restrict__ place = stream ? staged : out;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    C slope = scale;
    if (kCapped) {
      const C t = tanh_of(static_cast<C>(widen(values[i])) * inverse_cap);
      slope = scale * (1 - t * t);
    }
    narrow(slope * ds[i], place[i]);
  }
  if (stream) copy_past_cache(out, staged, n);
  return dscale;
}

template <class C>
static C finish(const SourceBlock<C>& source, const C* ds, int64_t n, bool wants_dscale, void* out, bool stream) {
  AUXK_DISPATCH(source.dtype, T, {
    T* place = static_cast<T*>(out);
    return source.softcap != 0 ? finish_as<C, T, true>(source, ds, n, wants_dscale, place, stream)
                               : finish_as<C, T, false>(source, ds, n, wants_dscale, place, stream);
  })
  return 0;
}

template <class C, class T>
static void multiply_as(T* values, C factor, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) narrow(static_cast<C>(widen(values[i])) * factor, values[i]);
}

template <class C>
static void multiply(void* values, DType dtype, C factor, int64_t n) {
  AUXK_DISPATCH(dtype, T, { multiply_as(static_cast<T*>(values), factor, n); })
}

#include "cross_entropy.inl"
#include "noise.inl"
#include "softmax.inl"

template <class C>
static constexpr BlockOps<C> table() {
  BlockOps<C> ops = {};
  ops.load = &load<C>;
  ops.load_add = &load_add<C>;
  ops.load_sum = &load_sum<C>;
  ops.exp_sum = &exp_sum<C>;
  ops.scan_sums = &scan_sums<C>;
  ops.count_above = &count_above<C>;
  ops.first_equal = &first_equal<C>;
  ops.first_nan = &first_nan<C>;
  ops.weighted_sum = &weighted_sum<C>;
  ops.store_scaled = &store_scaled<C>;
  ops.backward = &backward<C>;
  ops.finish = &finish<C>;
  ops.multiply = &multiply<C>;
  ops.add_gumbel = &add_gumbel<C>;
  ops.forbid = &forbid<C>;
  ops.largest = &largest<C>;
  ops.count_nan = &count_nan<C>;
  ops.next_above = &next_above<C>;
  ops.shift_and_scale = &shift_and_scale<C>;
  ops.dot = &dot<C>;
  ops.add_where = &add_where<C>;
  ops.center = &center<C>;
  ops.softmax_rows = &softmax_rows<C>;
  ops.softmax_rows_backward = &softmax_rows_backward<C>;
  ops.center_rows = &center_rows<C>;
  ops.multiply_small = &multiply_small<C>;
  ops.transpose = &transpose<C>;
  return ops;
}

static const InstructionSet instruction_set = {AUXK_NAME, table<float>(), table<double>()};

#undef AUXK_DISPATCH
