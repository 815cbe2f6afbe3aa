// Included by sample_ops.cpp once for each instruction set; see block_ops.inl.

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
static constexpr C kInfinity = std::numeric_limits<C>::infinity();

// -- loads ----------------------------------------------------------------------------------------

template <class C, class T, bool kCapped, bool kAdd>
static void put_source(const SourceBlock<C>& source, int64_t n, C* __restrict__ z) {
  const T* __restrict__ values = static_cast<const T*>(source.values);
  const C scale = source.scale, cap = source.softcap;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    C v = static_cast<C>(widen(values[i]));
    if (kCapped) v = cap * tanh_of(v / cap);
    z[i] = kAdd ? z[i] + scale * v : scale * v;
  }
}

// z = the side's sum
template <class C>
static void load_side(const Side<C>& side, int64_t n, C* z) {
  for (int i = 0; i < side.count; ++i) {
    const SourceBlock<C>& source = side.sources[i];
    const bool capped = source.softcap != 0;
    AUXK_DISPATCH(source.dtype, T, {
      if (i == 0)
        capped ? put_source<C, T, true, false>(source, n, z) : put_source<C, T, false, false>(source, n, z);
      else
        capped ? put_source<C, T, true, true>(source, n, z) : put_source<C, T, false, true>(source, n, z);
    })
  }
}

// calls put(i) for all columns, s := it, and raises the maxima; whether one is NaN or +inf
template <class C, class Put>
static AUXK_INLINE bool fill_block(int64_t n, C* __restrict__ s, C* __restrict__ maxima, const Put& put) {
  int32_t bad = 0;
  int64_t start = 0;
  for (; start + kMaxima <= n; start += kMaxima) {
#pragma omp simd reduction(| : bad)
    for (int64_t j = 0; j < kMaxima; ++j) {
      const C v = put(start + j);
      s[start + j] = v;
      bad |= v < kInfinity<C> ? 0 : 1;
      maxima[j] = v > maxima[j] ? v : maxima[j];
    }
  }
  for (int64_t j = 0; start + j < n; ++j) {
    const C v = put(start + j);
    s[start + j] = v;
    bad |= v < kInfinity<C> ? 0 : 1;
    maxima[j] = v > maxima[j] ? v : maxima[j];
  }
  return bad != 0;
}

template <class C, class T>
static bool load_pair(const SourceBlock<C>& base, const SourceBlock<C>& aux, int64_t n, C* s, C* maxima) {
  const T* __restrict__ b = static_cast<const T*>(base.values);
  const T* __restrict__ a = static_cast<const T*>(aux.values);
  const C b_scale = base.scale, a_scale = aux.scale;
  return fill_block(n, s, maxima, [&](int64_t i) __attribute__((always_inline)) {
    return b_scale * static_cast<C>(widen(b[i])) + a_scale * static_cast<C>(widen(a[i]));
  });
}

template <class C>
static bool load(const Side<C>& base, const Side<C>& aux, int64_t n, C floor, C* s, C* scratch, C* maxima) {
  if (base.count == 1 && aux.count == 1 && floor == -kInfinity<C>) {
    const SourceBlock<C>&one = base.sources[0], &other = aux.sources[0];
    if (one.dtype == other.dtype && one.softcap == 0 && other.softcap == 0) {
      AUXK_DISPATCH(one.dtype, T, { return load_pair<C, T>(one, other, n, s, maxima); })
    }
  }
  C *z = scratch, *a = scratch + n;
  load_side(base, n, z);
  if (aux.count != 0) load_side(aux, n, a);
  if (floor == -kInfinity<C>) {
    if (aux.count == 0) return fill_block(n, s, maxima, [&](int64_t i) __attribute__((always_inline)) { return z[i]; });
    return fill_block(n, s, maxima, [&](int64_t i) __attribute__((always_inline)) { return z[i] + a[i]; });
  }
  int32_t bad = 0;
#pragma omp simd reduction(| : bad)
  for (int64_t i = 0; i < n; ++i) {
    const C v = aux.count == 0 ? z[i] : z[i] + a[i];
    bad |= v < kInfinity<C> ? 0 : 1;
    z[i] = z[i] >= floor ? v : -kInfinity<C>;
  }
  const bool found = fill_block(n, s, maxima, [&](int64_t i) __attribute__((always_inline)) { return z[i]; });
  return found || bad != 0;
}

template <class C>
static C load_base(const Side<C>& base, int64_t n, C* z) {
  load_side(base, n, z);
  C largest = -kInfinity<C>;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < n; ++i) largest = z[i] > largest ? z[i] : largest;
  return largest;
}

// -- counts and places ----------------------------------------------------------------------------

template <class C>
static int64_t count_from(const C* __restrict__ v, C bound, int64_t n) {
  int32_t count = 0;
#pragma omp simd reduction(+ : count)
  for (int64_t i = 0; i < n; ++i) count += v[i] >= bound ? 1 : 0;
  return count;
}

template <class C>
static int64_t count_greater(const C* __restrict__ v, C bound, int64_t n) {
  int32_t count = 0;
#pragma omp simd reduction(+ : count)
  for (int64_t i = 0; i < n; ++i) count += v[i] > bound ? 1 : 0;
  return count;
}

template <class C>
static int64_t collect(const C* __restrict__ v, C floor, int64_t n, int64_t first, int32_t* places, int64_t room) {
  constexpr int64_t kAtOnce = 64;
  int64_t count = 0;
  for (int64_t start = 0; start < n; start += kAtOnce) {
    const int64_t size = n - start < kAtOnce ? n - start : kAtOnce;
    int32_t found = 0;
#pragma omp simd reduction(| : found)
    for (int64_t j = 0; j < size; ++j) found |= v[start + j] >= floor ? 1 : 0;
    if (found == 0) continue;
    for (int64_t j = 0; j < size; ++j) {
      if (!(v[start + j] >= floor)) continue;
      if (count < room) places[count] = static_cast<int32_t>(first + start + j);
      ++count;
    }
    if (count > room) return count;
  }
  return count;
}

// -- weights --------------------------------------------------------------------------------------

template <class C>
static int64_t weigh(const C* __restrict__ v, const Exponent<C>& of, int64_t n, int64_t* __restrict__ weights,
                     int32_t* __restrict__ buckets) {
  const C m = of.m, inverse = of.inverse, floor = of.floor;
  int64_t total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) {
    const float x = static_cast<float>((v[i] - m) * inverse);
    const float e = v[i] >= floor ? exp_of(x) * 0x1p40f : 0.0f;
    const int64_t w = static_cast<int64_t>(e);
    const float scaled = x * -64.0f;
    buckets[i] = static_cast<int32_t>(scaled < kBuckets - 1.0f ? scaled : kBuckets - 1.0f);
    weights[i] = w;
    total += w;
  }
  return total;
}

template <class C>
static double exp_sum(const C* __restrict__ v, C m, double inverse, C floor, int64_t n) {
  const double largest = static_cast<double>(m);
  double total = 0;
  for (int64_t start = 0; start < n; start += 256) {  // few lanes sum few numbers each
    const int64_t end = start + 256 < n ? start + 256 : n;
    C sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = start; i < end; ++i) {  // in double, which holds every difference and every quotient that counts
      const double x = (static_cast<double>(v[i]) - largest) * inverse;
      sum += v[i] >= floor ? exp_of(static_cast<C>(x > -1000 ? x : -1000)) : 0;
    }
    total += static_cast<double>(sum);
  }
  return total;
}

// -- noise ----------------------------------------------------------------------------------------

#include "noise.inl"

// With w = 1 - u the noise -log(-log(1 - w)) is at most -log(w), and log2(w) at least what the bits of w as a float are,
// read as a fixed-point number. The roundings here are less than 2e-5.
template <class C>
static float bound_noise(const C* __restrict__ v, const Exponent<C>& of, uint64_t seed, uint64_t position,
                         int64_t first, int64_t n, uint32_t* __restrict__ bits, float* __restrict__ bounds) {
  constexpr float kLn2 = 0.69314718056f;
  constexpr float kSlack = 1e-4f;
  const C m = of.m, inverse = of.inverse, floor = of.floor;
  fill_bits<kNoiseGroup>(seed, position, static_cast<uint32_t>(first / 4), bits);
  float largest = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < n; ++i) {
    const float w = static_cast<float>(static_cast<int32_t>(~bits[i] >> 1));  // times 2**-31
    const float log_w = static_cast<float>(static_cast<int32_t>(as_bits(w)));
    const float noise = (kLn2 * (127 + 31) + kSlack) - log_w * (kLn2 * 0x1p-23f);
    const float x = static_cast<float>((v[i] - m) * inverse);
    const float bound = v[i] >= floor ? x + noise : -std::numeric_limits<float>::infinity();
    bounds[i] = bound;
    largest = bound > largest ? bound : largest;
  }
  return largest;
}

template <class C>
static constexpr SampleOps<C> table() {
  SampleOps<C> ops = {};
  ops.load = &load<C>;
  ops.load_base = &load_base<C>;
  ops.count_from = &count_from<C>;
  ops.count_greater = &count_greater<C>;
  ops.collect = &collect<C>;
  ops.weigh = &weigh<C>;
  ops.exp_sum = &exp_sum<C>;
  ops.bound_noise = &bound_noise<C>;
  return ops;
}

static const SampleTable sample_table = {AUXK_NAME, table<float>(), table<double>()};

#undef AUXK_DISPATCH
