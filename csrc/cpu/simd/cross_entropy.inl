// What cross-entropy's rows need. Part of block_ops.inl, compiled once for each instruction set.

// -- scan -----------------------------------------------------------------------------------------

// The lanes of s := exp(s - m) and of what they add to the sums
template <class C, bool kMoments>
static AUXK_INLINE void scan_lanes(C* __restrict__ s, C m, C* __restrict__ sum, C* __restrict__ times_s) {
#pragma omp simd
  for (int l = 0; l < kLanes; ++l) {
    const C x = s[l] - m;
    const C e = exp_of(x);
    s[l] = e;
    sum[l] += e;
    if (kMoments) times_s[l] += e > 0 ? e * x : 0;  // 0 * (-inf) = 0
  }
}

// The same of z_b := exp(z_b - m_b), after those
template <class C, bool kMoments>
static AUXK_INLINE void scan_base_lanes(const C* __restrict__ e, C* __restrict__ z_b, C m_b, C* __restrict__ base_sum,
                                        C* __restrict__ times_base) {
#pragma omp simd
  for (int l = 0; l < kLanes; ++l) {
    const C x_b = z_b[l] - m_b;
    const C e_b = exp_of(x_b);
    z_b[l] = e_b;
    base_sum[l] += e_b;
    if (kMoments) times_base[l] += e[l] > 0 ? e[l] * x_b : 0;
  }
}

// See ScanSums::others.
template <class C>
static C others_in(const C* __restrict__ e, C sum, int64_t n) {
  if (!(sum < 2)) return sum - 1;
  C others = 0;
#pragma omp simd reduction(+ : others)
  for (int64_t i = 0; i < n; ++i) others += e[i] == 1 ? 0 : e[i];
  return others;
}

template <class C, bool kMoments, bool kBase>
static ScanSums<C> scan_sums_as(C* __restrict__ s, C* __restrict__ z_b, C m, C m_b, int64_t n, const Ahead& first,
                                const Ahead& second) {
  alignas(64) C sum[kLanes] = {}, times_s[kLanes] = {}, times_base[kLanes] = {}, base_sum[kLanes] = {};
  in_steps<kStep>(n, first, second, [&](int64_t begin, int64_t end) {
    // two loops, as one would have more waiting for the exponentials than a processor looks ahead
    alignas(64) C step_sum[kLanes] = {}, step_times[kLanes] = {};
    in_lanes(s, s, begin, end, [&](C* v, const C*) { scan_lanes<C, kMoments>(v, m, step_sum, step_times); });
    add_lanes(step_sum, sum);
    if (kMoments) add_lanes(step_times, times_s);
    if (!kBase) return;
    alignas(64) C step_base_sum[kLanes] = {}, step_times_base[kLanes] = {};
    in_lanes(z_b, s, begin, end,
             [&](C* v, const C* e) { scan_base_lanes<C, kMoments>(e, v, m_b, step_base_sum, step_times_base); });
    add_lanes(step_base_sum, base_sum);
    if (kMoments) add_lanes(step_times_base, times_base);
  });
  ScanSums<C> sums;
  sums.sum = sum_of_lanes(sum), sums.base_sum = sum_of_lanes(base_sum);
  sums.sum_times_s = sum_of_lanes(times_s), sums.sum_times_base = sum_of_lanes(times_base);
  if (kMoments) sums.others = others_in(s, sums.sum, n);
  if (kMoments && kBase) sums.base_others = others_in(z_b, sums.base_sum, n);
  return sums;
}

template <class C>
static ScanSums<C> scan_sums(C* s, C* z_b, C m, C m_b, int64_t n, bool moments, bool base, const Ahead& first,
                             const Ahead& second) {
  m = finite_or_zero(m);
  m_b = finite_or_zero(m_b);
  const auto run = moments ? (base ? scan_sums_as<C, true, true> : scan_sums_as<C, true, false>)
                           : (base ? scan_sums_as<C, false, true> : scan_sums_as<C, false, false>);
  return run(s, z_b, m, m_b, n, first, second);
}

template <class C>
static int64_t count_above(const C* __restrict__ s, C bound, int64_t n) {
  int32_t count = 0;
#pragma omp simd reduction(+ : count)
  for (int64_t i = 0; i < n; ++i) count += s[i] > bound ? 1 : 0;
  return count;
}

template <class C>
static int64_t first_equal(const C* s, C value, int64_t n) {
  return first_that(n, [&](int64_t i) { return s[i] == value; });
}
template <class C>
static int64_t first_nan(const C* s, int64_t n) {
  return first_that(n, [&](int64_t i) { return s[i] != s[i]; });
}

template <class C>
static C weighted_sum(const C* __restrict__ s, const C* __restrict__ w, C m, int64_t n) {
  m = finite_or_zero(m);
  C total = 0;
  if (w == nullptr) {
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < n; ++i) total += s[i] - m;
  } else {
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < n; ++i) total += w[i] * (s[i] - m);
  }
  return total;
}

// -- backward -------------------------------------------------------------------------------------

template <class C>
static void add_weights(C S, const C* __restrict__ w, int64_t n, C* __restrict__ d) {
  if (w == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) d[i] += S;
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) d[i] += S * w[i];
  }
}

template <class C, bool kMoments, bool kBase>
static void backward_as(const C* __restrict__ s, const C* __restrict__ z_b, const C* __restrict__ w,
                        const RowCoefficients<C>& row, int64_t n, C* __restrict__ ds, C* __restrict__ ds_b) {
  const C m = row.max, log_d = row.log_denom, m_b = row.base_max, log_d_b = row.base_log_denom;
  const C p_factor = row.p_factor, C_ = row.C_, D = row.D, Q = row.Q, Q_b = row.Q_b, S = row.S;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const C x = s[i] - m;
    const C p = exp_of(x - log_d);
    C g = p * p_factor;
    if (kMoments) {
      const C x_b = z_b[i] - m_b;
      g = p == 0 ? 0 : p * (p_factor + C_ * x + D * x_b);
    }
    C q = 0;
    if (kBase) q = exp_of(z_b[i] - m_b - log_d_b);
    g += Q * q;
    ds[i] = g;
    if (kMoments || kBase) ds_b[i] = g + D * p + Q_b * q;
  }
  if (S == 0) return;
  add_weights(S, w, n, ds);
  if (kMoments || kBase) add_weights(S, w, n, ds_b);
}

template <class C>
static void backward(const C* s, const C* z_b, const C* w, const RowCoefficients<C>& row, int64_t n, C* ds, C* ds_b) {
  const bool moments = row.C_ != 0 || row.D != 0, base = row.Q != 0 || row.Q_b != 0;
  if (moments && base) return backward_as<C, true, true>(s, z_b, w, row, n, ds, ds_b);
  if (moments) return backward_as<C, true, false>(s, z_b, w, row, n, ds, ds_b);
  if (base) return backward_as<C, false, true>(s, z_b, w, row, n, ds, ds_b);
  backward_as<C, false, false>(s, z_b, w, row, n, ds, ds_b);
  std::memcpy(ds_b, ds, static_cast<size_t>(n) * sizeof(C));
}
