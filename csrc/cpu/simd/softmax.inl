// What soft_embedding's rows need. Part of block_ops.inl, compiled once for each instruction set.

// -- one block of a row: noise, selection, gradient -----------------------------------------------

// -log(-log(u)), u strictly inside (0, 1) and exact in float
static AUXK_INLINE float gumbel_of(uint32_t bits) {
  const float u = (static_cast<float>(static_cast<int32_t>(bits >> 9)) + 0.5f) * 0x1p-23f;
  return -log_of(-log_of(u));
}

template <class C>
static void add_gumbel(C* __restrict__ v, C scale, uint64_t seed, int64_t row, int64_t first, int64_t n) {
  constexpr int64_t kAtOnce = 256;
  for (int64_t start = 0; start < n; start += kAtOnce) {
    alignas(64) uint32_t bits[kAtOnce];
    fill_bits<kAtOnce>(seed, static_cast<uint64_t>(row), static_cast<uint32_t>((first + start) / 4), bits);
    if (start + kAtOnce <= n) {
#pragma omp simd
      for (int64_t i = 0; i < kAtOnce; ++i) v[start + i] += scale * static_cast<C>(gumbel_of(bits[i]));
    } else {
#pragma omp simd
      for (int64_t i = 0; i < n - start; ++i) v[start + i] += scale * static_cast<C>(gumbel_of(bits[i]));
    }
  }
}

template <class C>
static void forbid(C* __restrict__ v, const uint8_t* __restrict__ mask, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) v[i] = mask[i] != 0 ? -std::numeric_limits<C>::infinity() : v[i];
}

template <class C>
static C largest(const C* __restrict__ v, int64_t n) {
  C m = -std::numeric_limits<C>::infinity();
#pragma omp simd reduction(max : m)
  for (int64_t i = 0; i < n; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

template <class C>
static int64_t count_nan(const C* __restrict__ v, int64_t n) {
  int32_t count = 0;
#pragma omp simd reduction(+ : count)
  for (int64_t i = 0; i < n; ++i) count += v[i] != v[i] ? 1 : 0;
  return count;
}

template <class C>
static int64_t next_above(const C* __restrict__ v, C bound, int64_t from, int64_t n) {
  return from + first_that(n - from, [&](int64_t i) { return v[from + i] > bound; });
}

template <class C>
static void shift_and_scale(C* __restrict__ v, C m, C factor, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) v[i] = (v[i] - m) * factor;
}

template <class C>
static C dot(const C* __restrict__ a, const C* b, int64_t n) {
  C total = 0;
  for (int64_t start = 0; start < n; start += kStep) {  // few lanes sum few numbers each
    const int64_t end = start + kStep < n ? start + kStep : n;
    alignas(64) C sum[kLanes] = {};
    int64_t i = start;
    for (; i + kLanes <= end; i += kLanes) {
#pragma omp simd
      for (int l = 0; l < kLanes; ++l) sum[l] += a[i + l] == 0 ? 0 : a[i + l] * b[i + l];
    }
    for (int l = 0; i < end; ++i, ++l) sum[l] += a[i] == 0 ? 0 : a[i] * b[i];
    total += sum_of_lanes(sum);
  }
  return total;
}

template <class C>
static void add_where(C* __restrict__ g, const C* p, const C* x, C factor, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) g[i] += p[i] == 0 ? 0 : factor * x[i];
}

template <class C>
static void center(C* __restrict__ g, const C* __restrict__ p, C mean, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) g[i] = p[i] == 0 ? 0 : p[i] * (g[i] - mean);
}

// -- whole rows of nothing but scores -------------------------------------------------------------

template <class T>
static AUXK_INLINE T* row_of(const Matrix& m, int64_t n) {
  return static_cast<T*>(m.values) + n * m.stride;
}

// Row n + 1, which is asked for while row n is worked on; null if a row is too long to stay
static AUXK_INLINE const char* row_after(const Matrix& m, int64_t n, int64_t num_rows, int64_t K) {
  if (m.values == nullptr || n + 1 >= num_rows || K > kBlock) return nullptr;
  return static_cast<const char*>(m.values) + (n + 1) * m.stride * size_of(m.dtype);
}

static AUXK_INLINE void prefetch_range(const char* place, size_t first, size_t last) {
  for (size_t b = first; b < last; b += 64) __builtin_prefetch(place + b, 0, 2);
}

template <class C, class T>
static C largest_of(const T* __restrict__ x, int64_t n) {
  constexpr int kAtOnce = 64;  // one vector's comparisons would wait for each other
  C m = -std::numeric_limits<C>::infinity(), lanes[kAtOnce];
  for (int j = 0; j < kAtOnce; ++j) lanes[j] = m;
  int64_t i = 0;
  for (; i + kAtOnce <= n; i += kAtOnce) {
#pragma omp simd
    for (int j = 0; j < kAtOnce; ++j) {
      const C v = static_cast<C>(widen(x[i + j]));
      lanes[j] = v > lanes[j] ? v : lanes[j];
    }
  }
#pragma omp simd reduction(max : m)
  for (int j = 0; j < kAtOnce; ++j) m = lanes[j] > m ? lanes[j] : m;
  for (; i < n; ++i) {
    const C v = static_cast<C>(widen(x[i]));
    m = v > m ? v : m;
  }
  return m;
}

// the sum of a short row
template <int W, class C>
static AUXK_INLINE C sum_in_pairs(const C* __restrict__ v) {
  alignas(64) C lanes[kLanes];
#pragma omp simd
  for (int i = 0; i < kLanes; ++i) lanes[i] = v[i];
  for (int start = kLanes; start < W; start += kLanes) add_lanes(v + start, lanes);
  return sum_of_lanes(lanes);
}

// The lanes of e = exp((x - m) factor - log_denom), and of what they add to the sum
template <class C, class T, class G, bool kDot>
static AUXK_INLINE void exp_row_lanes(const T* __restrict__ x, C m, C factor, C log_denom, const G* __restrict__ g,
                                      C* __restrict__ e, C* __restrict__ sum) {
#pragma omp simd
  for (int l = 0; l < kLanes; ++l) {
    const C p = exp_of((static_cast<C>(widen(x[l])) - m) * factor - log_denom);
    e[l] = p;
    sum[l] += kDot ? (p == 0 ? 0 : p * static_cast<C>(widen(g[l]))) : p;
  }
}

// e = exp((x - m) factor - log_denom); returns the sum of e, or with kDot that of e g, where e = 0 counts nothing
template <class C, class T, class G, bool kDot>
static double exp_row(const T* __restrict__ x, C m, C factor, C log_denom, const G* __restrict__ g, int64_t n,
                      C* __restrict__ e, const char* next_x, const char* next_g) {
  double total = 0;
  for (int64_t start = 0; start < n; start += kStep) {
    const int64_t end = start + kStep < n ? start + kStep : n;
    if (next_x != nullptr) prefetch_range(next_x, start * sizeof(T), end * sizeof(T));
    if (next_g != nullptr) prefetch_range(next_g, start * sizeof(G), end * sizeof(G));
    alignas(64) C sum[kLanes] = {};
    int64_t i = start;
    for (; i + kLanes <= end; i += kLanes)
      exp_row_lanes<C, T, G, kDot>(x + i, m, factor, log_denom, kDot ? g + i : nullptr, e + i, sum);
    if (i < end) {
      alignas(64) C rest_x[kLanes], rest_g[kLanes], rest_e[kLanes];
      for (int64_t l = 0; l < kLanes; ++l) {
        rest_x[l] = i + l < end ? static_cast<C>(widen(x[i + l])) : -std::numeric_limits<C>::infinity();
        if (kDot) rest_g[l] = i + l < end ? static_cast<C>(widen(g[i + l])) : 0;
      }
      exp_row_lanes<C, C, C, kDot>(rest_x, m, factor, log_denom, rest_g, rest_e, sum);
      for (int64_t l = 0; i + l < end; ++l) e[i + l] = rest_e[l];
    }
    total += static_cast<double>(sum_of_lanes(sum));
  }
  return total;
}

// row n of m = factor e
template <class C>
static AUXK_INLINE void store_row(const C* __restrict__ e, C factor, const Matrix& m, int64_t n, int64_t K) {
  AUXK_DISPATCH(m.dtype, T, { scale_into(e, factor, C(0), static_cast<const C*>(nullptr), K, row_of<T>(m, n)); })
}

// row n of m = factor p (g - mean), 0 where p is; it may be g
template <class C, class G, class T>
static void store_centered_as(const C* __restrict__ p, const G* g, C mean, C factor, int64_t K, T* out) {
#pragma omp simd
  for (int64_t i = 0; i < K; ++i) narrow(p[i] == 0 ? 0 : p[i] * (static_cast<C>(widen(g[i])) - mean) * factor, out[i]);
}
template <class C, class G>
static AUXK_INLINE void store_centered(const C* p, const G* g, C mean, C factor, const Matrix& m, int64_t n,
                                       int64_t K) {
  AUXK_DISPATCH(m.dtype, T, { store_centered_as(p, g, mean, factor, K, row_of<T>(m, n)); })
}

// the same, and a row of p
template <class C, class G, class T>
static void store_centered_and_p_as(const C* __restrict__ p, const G* g, C mean, C factor, int64_t K, T* out,
                                    T* __restrict__ out_p) {
#pragma omp simd
  for (int64_t i = 0; i < K; ++i) {
    narrow(p[i] == 0 ? 0 : p[i] * (static_cast<C>(widen(g[i])) - mean) * factor, out[i]);
    narrow(p[i], out_p[i]);
  }
}

template <class C>
static void fill_row(const Matrix& m, int64_t n, C value, int64_t K) {
  if (m.values == nullptr) return;
  AUXK_DISPATCH(m.dtype, T, {
    T filling;
    narrow(value, filling);
    std::fill(row_of<T>(m, n), row_of<T>(m, n) + K, filling);
  })
}

template <class C>
static AUXK_INLINE bool is_own(const Matrix& m) {
  return m.values != nullptr && m.dtype == (sizeof(C) == 8 ? DType::kFloat64 : DType::kFloat32);
}

// d := log(d), for denominators of at least 1; one after the other they would be a quarter of the time of short rows
static void logarithms(float* d, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) d[i] = d[i] == d[i] ? log_of(d[i]) : d[i];
}
static void logarithms(double* d, int64_t n) {
  for (int64_t i = 0; i < n; ++i) d[i] = std::log(d[i]);
}

// -- rows of a few vectors, whose whole work is in loops of a constant length ----------------------

constexpr int64_t kShort = 64;

// v = the row, padded to W
template <int W, class T>
static AUXK_INLINE void load_short_as(const T* __restrict__ x, int64_t K, float padding, float* __restrict__ v) {
  if (K == W) {
#pragma omp simd
    for (int i = 0; i < W; ++i) v[i] = static_cast<float>(widen(x[i]));
  } else {
    for (int64_t i = 0; i < K; ++i) v[i] = static_cast<float>(widen(x[i]));
    for (int64_t i = K; i < W; ++i) v[i] = padding;
  }
}
template <int W>
static AUXK_INLINE void load_short(const Matrix& m, int64_t n, int64_t K, float padding, float* v) {
  AUXK_DISPATCH(m.dtype, T, { load_short_as<W>(row_of<T>(m, n), K, padding, v); })
}

// the row = factor v
template <int W, class T>
static AUXK_INLINE void store_short_as(const float* __restrict__ v, float factor, int64_t K, T* __restrict__ out) {
  if (K == W) {
#pragma omp simd
    for (int i = 0; i < W; ++i) narrow(v[i] * factor, out[i]);
  } else {
    for (int64_t i = 0; i < K; ++i) narrow(v[i] * factor, out[i]);
  }
}
template <int W>
static AUXK_INLINE void store_short(const float* v, float factor, int64_t K, const Matrix& m, int64_t n) {
  AUXK_DISPATCH(m.dtype, T, { store_short_as<W>(v, factor, K, row_of<T>(m, n)); })
}

template <int W>
static void softmax_short_as(const SoftmaxRows<float>& rows, int64_t first, int64_t last) {
  const int K = static_cast<int>(rows.K);
  for (int64_t n = first; n < last; ++n) {
    alignas(64) float v[W];
    load_short<W>(rows.scores, n, K, -std::numeric_limits<float>::infinity(), v);
    float largest = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : largest)
    for (int i = 0; i < W; ++i) largest = v[i] > largest ? v[i] : largest;
    const float m = finite_or_zero(largest), factor = rows.factors == nullptr ? rows.factor : rows.factors[n];
#pragma omp simd
    for (int i = 0; i < W; ++i) {
      const float e = exp_of((v[i] - m) * factor);
      v[i] = i < K ? e : 0;
    }
    const float denom = sum_in_pairs<W>(v);
    const bool is_empty = denom == 0;  // and otherwise as in softmax_rows_as
    if (rows.max != nullptr) rows.max[n] = denom == denom ? largest : std::numeric_limits<float>::quiet_NaN();
    if (rows.log_denom != nullptr) rows.log_denom[n] = is_empty ? 1.0f : denom;
    if (rows.probabilities.values != nullptr) store_short<W>(v, is_empty ? 0.0f : 1 / denom, K, rows.probabilities, n);
  }
  if (rows.log_denom != nullptr) logarithms(rows.log_denom + first, last - first);
}

template <int W>
static void softmax_short_backward_as(const SoftmaxRows<float>& rows, int64_t first, int64_t last) {
  const int K = static_cast<int>(rows.K);
  const Matrix& out = rows.probabilities;
  for (int64_t n = first; n < last; ++n) {
    const float largest = rows.max[n], log_denom = rows.log_denom[n];
    const bool is_empty = largest == -std::numeric_limits<float>::infinity();
    if (is_empty || largest != largest) {
      const float value = is_empty ? 0.0f : std::numeric_limits<float>::quiet_NaN();
      fill_row(out, n, value, K);
      fill_row(rows.grad_scores, n, value, K);
      continue;
    }
    alignas(64) float p[W], g[W];
    load_short<W>(rows.scores, n, K, 0.0f, p);
    load_short<W>(rows.grad_probabilities, n, K, 0.0f, g);
    const float factor = rows.factors == nullptr ? rows.factor : rows.factors[n];
    alignas(64) float products[W];
#pragma omp simd
    for (int i = 0; i < W; ++i) {
      const float e = exp_of((p[i] - largest) * factor - log_denom);
      p[i] = i < K ? e : 0;
      products[i] = p[i] == 0 ? 0 : p[i] * g[i];
    }
    const float mean = sum_in_pairs<W>(products);
    // as in softmax_rows_backward_as
    const float slope = mean == mean ? factor : std::numeric_limits<float>::quiet_NaN();
#pragma omp simd
    for (int i = 0; i < W; ++i) g[i] = p[i] == 0 ? 0 : p[i] * (g[i] - mean) * slope;
    store_short<W>(g, 1.0f, K, rows.grad_scores, n);
    if (out.values != nullptr) store_short<W>(p, 1.0f, K, out, n);
  }
}

// Whether the rows are such: they are done then. In float64 there is no form of them.
static bool are_short(const SoftmaxRows<float>& rows, int64_t first, int64_t last, bool is_backward) {
  if (rows.K > kShort || (is_backward && rows.grad_scores.values == nullptr)) return false;
  const auto run = [&](auto forward, auto backward) { (is_backward ? backward : forward)(rows, first, last); };
  switch ((rows.K + 15) / 16) {
    case 1:
      run(softmax_short_as<16>, softmax_short_backward_as<16>);
      return true;
    case 2:
      run(softmax_short_as<32>, softmax_short_backward_as<32>);
      return true;
    case 3:
      run(softmax_short_as<48>, softmax_short_backward_as<48>);
      return true;
    default:
      run(softmax_short_as<64>, softmax_short_backward_as<64>);
      return true;
  }
}
static bool are_short(const SoftmaxRows<double>&, int64_t, int64_t, bool) { return false; }

template <class C, class T>
static void softmax_rows_as(const SoftmaxRows<C>& rows, int64_t first, int64_t last, C* scratch) {
  const int64_t K = rows.K;
  const Matrix& out = rows.probabilities;
  for (int64_t n = first; n < last; ++n) {
    const T* x = row_of<T>(rows.scores, n);
    C* e = is_own<C>(out) ? row_of<C>(out, n) : scratch;
    const C largest = largest_of<C>(x, K), factor = rows.factors == nullptr ? rows.factor : rows.factors[n];
    const C* none = nullptr;
    const char* next = row_after(rows.scores, n, rows.num_rows, K);
    const double denom = exp_row<C, T, C, false>(x, finite_or_zero(largest), factor, C(0), none, K, e, next, nullptr);
    // the largest gives 1, so that only a row of -inf sums to 0; a NaN among the scores, or +inf, is one in the sum
    const bool is_empty = denom == 0;
    if (rows.max != nullptr) rows.max[n] = denom == denom ? largest : std::numeric_limits<C>::quiet_NaN();
    if (rows.log_denom != nullptr) rows.log_denom[n] = is_empty ? C(1) : static_cast<C>(denom);
    const C scale = is_empty ? C(0) : static_cast<C>(1 / denom);
    if (is_own<C>(out)) {
      multiply_as(e, scale, K);
    } else if (out.values != nullptr) {
      store_row(e, scale, out, n, K);
    }
  }
  if (rows.log_denom != nullptr) logarithms(rows.log_denom + first, last - first);
}

template <class C>
static void softmax_rows(const SoftmaxRows<C>& rows, int64_t first, int64_t last, C* scratch) {
  if (are_short(rows, first, last, false)) return;
  AUXK_DISPATCH(rows.scores.dtype, T, { softmax_rows_as<C, T>(rows, first, last, scratch); })
}

// Row n, from its scores x and the gradient g of its probabilities; p: where these go, or room for them. In double, results
// and g of other dtypes take passes of their own: every combination without them is more code.
template <class C, class T, class G>
static AUXK_INLINE void softmax_row_backward(const SoftmaxRows<C>& rows, int64_t n, const T* x, const G* g, C* p) {
  const int64_t K = rows.K;
  const Matrix &out = rows.probabilities, &grad = rows.grad_scores;
  const C factor = rows.factors == nullptr ? rows.factor : rows.factors[n];
  const char* next = row_after(rows.scores, n, rows.num_rows, K);
  const char* next_g = row_after(rows.grad_probabilities, n, rows.num_rows, K);
  const double mean = exp_row<C, T, G, true>(x, rows.max[n], factor, rows.log_denom[n], g, K, p, next, next_g);
  // a NaN is one in every number, or rounding to 16 bits might lose it
  const C slope = mean == mean ? factor : std::numeric_limits<C>::quiet_NaN();
  const bool stores_p = out.values != nullptr && !is_own<C>(out);
  if constexpr (sizeof(C) == 4) {
    if (stores_p && out.dtype == grad.dtype) {
      AUXK_DISPATCH(out.dtype, O, {
        store_centered_and_p_as(p, g, static_cast<C>(mean), slope, K, row_of<O>(grad, n), row_of<O>(out, n));
      })
      return;
    }
  }
  store_centered(p, g, static_cast<C>(mean), slope, grad, n, K);
  if (stores_p) store_row(p, C(1), out, n, K);
}

template <class C, class T>
static void softmax_rows_backward_as(const SoftmaxRows<C>& rows, int64_t first, int64_t last, C* scratch) {
  const int64_t K = rows.K;
  const Matrix &out = rows.probabilities, &grad = rows.grad_probabilities;
  for (int64_t n = first; n < last; ++n) {
    const C largest = rows.max[n], log_denom = rows.log_denom[n];
    const bool is_empty = largest == -std::numeric_limits<C>::infinity();
    if (is_empty || largest != largest) {
      const C value = is_empty ? C(0) : std::numeric_limits<C>::quiet_NaN();
      fill_row(out, n, value, K);
      fill_row(rows.grad_scores, n, value, K);
      continue;
    }
    const T* x = row_of<T>(rows.scores, n);
    C* p = is_own<C>(out) ? row_of<C>(out, n) : scratch;
    if (rows.grad_scores.values == nullptr) {
      const C factor = rows.factors == nullptr ? rows.factor : rows.factors[n];
      const char* next = row_after(rows.scores, n, rows.num_rows, K);
      exp_row<C, T, C, false>(x, largest, factor, log_denom, nullptr, K, p, next, nullptr);
      if (out.values != nullptr && !is_own<C>(out)) store_row(p, C(1), out, n, K);
      continue;
    }
    if constexpr (sizeof(C) == 4 && sizeof(T) == 2) {
      if (grad.dtype == rows.scores.dtype) {
        softmax_row_backward(rows, n, x, row_of<T>(grad, n), p);
        continue;
      }
    }
    const C* g = scratch + K;
    if (is_own<C>(grad)) {
      g = row_of<C>(grad, n);
    } else {
      const char* place = static_cast<const char*>(grad.values) + n * grad.stride * size_of(grad.dtype);
      load<C>({place, grad.dtype, C(1), C(0)}, K, scratch + K);
    }
    softmax_row_backward(rows, n, x, g, p);
  }
}

template <class C>
static void softmax_rows_backward(const SoftmaxRows<C>& rows, int64_t first, int64_t last, C* scratch) {
  if (are_short(rows, first, last, true)) return;
  AUXK_DISPATCH(rows.scores.dtype, T, { softmax_rows_backward_as<C, T>(rows, first, last, scratch); })
}

// factor p (g - <p, g>) of rows that lie `stride` apart, to contiguous ones
template <class C>
static void center_rows(const C* p, const C* g, int64_t stride, C factor, int64_t num_rows, int64_t K, DType dtype,
                        void* out) {
  const Matrix matrix{out, dtype, K};
  for (int64_t n = 0; n < num_rows; ++n, p += stride, g += stride) {
    C mean = 0;
    if (K > kStep) {
      mean = dot(p, g, K);
    } else {
#pragma omp simd reduction(+ : mean)
      for (int64_t i = 0; i < K; ++i) mean += p[i] == 0 ? 0 : p[i] * g[i];
    }
    // a NaN is one in every number, or rounding to 16 bits might lose it
    const C slope = mean == mean ? factor : std::numeric_limits<C>::quiet_NaN();
    store_centered(p, g, mean, slope, matrix, n, K);
  }
}

// -- small products -------------------------------------------------------------------------------

// A tile of sums that stays in registers, wide ones first: of AVX-512 sixteen of 32 registers, of AVX2 twelve of 16, and
// eight of SSE's 16. Fewer would wait for each other's additions.
constexpr int kTileRows = AUXK_VECTOR_BITS == 512 ? 8 : AUXK_VECTOR_BITS == 256 ? 6 : 4;
constexpr int kTileColumns = AUXK_VECTOR_BITS == 512 ? 32 : AUXK_VECTOR_BITS == 256 ? 16 : 8;

// Where operands of R rows begin; a's strides. `ahead`: how far in front rows of b are fetched, which lie too far apart
// for the processor to do it
template <class C>
struct TileOperands {
  const C* a;
  int64_t a_row, a_column;
  const C* b;
  int64_t b_stride, inner, ahead;
};

// out [R, W] (+)= a [R, inner] @ b [inner, W], of which the first num_columns are stored
template <class C, int R, int W>
static AUXK_INLINE void multiply_tile(const TileOperands<C>& p, C* out, int64_t out_stride, int64_t num_columns,
                                      bool accumulate) {
  C sum[R][W] = {};
  for (int64_t k = 0; k < p.inner; ++k) {
    const C* row = p.b + k * p.b_stride;
    for (int j = 0; j < W; j += 64 / static_cast<int>(sizeof(C))) __builtin_prefetch(row + p.ahead + j, 0, 3);
    for (int r = 0; r < R; ++r) {
      const C factor = p.a[r * p.a_row + k * p.a_column];
#pragma omp simd
      for (int j = 0; j < W; ++j) sum[r][j] += factor * row[j];
    }
  }
  for (int r = 0; r < R; ++r) {
    C* place = out + r * out_stride;
    if (num_columns < W) {
      for (int64_t j = 0; j < num_columns; ++j) place[j] = accumulate ? place[j] + sum[r][j] : sum[r][j];
    } else if (accumulate) {
#pragma omp simd
      for (int j = 0; j < W; ++j) place[j] += sum[r][j];
    } else {
#pragma omp simd
      for (int j = 0; j < W; ++j) place[j] = sum[r][j];
    }
  }
}

// all columns of R rows; `last`: the last columns of b, too few for a tile, with zeros beside them
template <class C, int R>
static void multiply_rows(TileOperands<C> p, const C* last, C* out, int64_t out_stride, int64_t num_columns,
                          bool accumulate) {
  constexpr int kHalf = kTileColumns / 2;
  alignas(64) C packed[kStep * R];
  if (p.a_column != 1 && num_columns >= 4 * kTileColumns) {  // read often enough to be made contiguous once
    for (int64_t k = 0; k < p.inner; ++k)
      for (int r = 0; r < R; ++r) packed[k * R + r] = p.a[r * p.a_row + k * p.a_column];
    p.a = packed, p.a_row = 1, p.a_column = R;
  }
  int64_t j = 0;
  for (; j + kTileColumns <= num_columns; j += kTileColumns, p.b += kTileColumns)
    multiply_tile<C, R, kTileColumns>(p, out + j, out_stride, kTileColumns, accumulate);
  if (j + kHalf <= num_columns) {
    multiply_tile<C, R, kHalf>(p, out + j, out_stride, kHalf, accumulate);
    j += kHalf;
  }
  if (j == num_columns) return;
  p.b = last, p.b_stride = kHalf, p.ahead = 0;
  multiply_tile<C, R, kHalf>(p, out + j, out_stride, num_columns - j, accumulate);
}

// No sum in the registers is of more than kStep products.
template <class C>
static void multiply_small(const SmallProduct<C>& p) {
  constexpr int kHalf = kTileColumns / 2;
  const int64_t num_last = p.num_columns % kHalf, ahead = p.a_column == 1 && p.inner > 128 ? 16 * p.b_stride : 0;
  alignas(64) C last[kStep * kHalf];
  for (int64_t start = 0; start < p.inner; start += kStep) {
    const int64_t inner = p.inner - start < kStep ? p.inner - start : kStep;
    const C *a = p.a + start * p.a_column, *b = p.b + start * p.b_stride;
    for (int64_t k = 0; k < (num_last == 0 ? 0 : inner); ++k)
      for (int64_t j = 0; j < kHalf; ++j)
        last[k * kHalf + j] = j < num_last ? b[k * p.b_stride + p.num_columns - num_last + j] : C(0);
    const auto run = [&](auto rows, int64_t n) {
      const TileOperands<C> operands = {a + n * p.a_row, p.a_row, p.a_column, b, p.b_stride, inner, ahead};
      multiply_rows<C, decltype(rows)::value>(operands, last, p.out + n * p.out_stride, p.out_stride, p.num_columns,
                                              p.accumulate || start > 0);
    };
    int64_t n = 0;
    for (; n + kTileRows <= p.num_rows; n += kTileRows) run(std::integral_constant<int, kTileRows>{}, n);
    for (; n + 2 <= p.num_rows; n += 2) run(std::integral_constant<int, 2>{}, n);
    if (n < p.num_rows) run(std::integral_constant<int, 1>{}, n);
  }
}

// Row by row, 2 m := m of the first half and 2 m + 1 := m of the second: four times this transposes 16 rows of 16
template <class C>
static AUXK_INLINE void shuffle(const C* __restrict__ from, C* __restrict__ to) {
#pragma omp simd
  for (int m = 0; m < 128; ++m) {
    to[2 * m] = from[m];
    to[2 * m + 1] = from[128 + m];
  }
}

template <class C>
static void transpose(const C* __restrict__ from, int64_t from_stride, int64_t num_rows, int64_t num_columns,
                      C* __restrict__ out, int64_t out_stride) {
  const int64_t whole_rows = num_rows / 16 * 16, whole_columns = num_columns / 16 * 16;
  for (int64_t n = 0; n < whole_rows; n += 16) {
    for (int64_t j = 0; j < whole_columns; j += 16) {
      alignas(64) C a[256], b[256];
      for (int i = 0; i < 16; ++i) std::memcpy(a + 16 * i, from + (n + i) * from_stride + j, 16 * sizeof(C));
      shuffle(a, b), shuffle(b, a), shuffle(a, b), shuffle(b, a);
      for (int i = 0; i < 16; ++i) std::memcpy(out + (j + i) * out_stride + n, a + 16 * i, 16 * sizeof(C));
    }
  }
  for (int64_t j = 0; j < num_columns; ++j)
    for (int64_t n = j < whole_columns ? whole_rows : 0; n < num_rows; ++n)
      out[j * out_stride + n] = from[n * from_stride + j];
}
