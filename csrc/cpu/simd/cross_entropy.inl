// What cross-entropy's rows need. Part of block_ops.inl, compiled once for each instruction set.

// -- scan -----------------------------------------------------------------------------------------

template <class C, bool kMoments, bool kBase>
static ScanSums<C> scan_sums_as(C* __restrict__ s, const C* __restrict__ z_b, C m, C m_b, int64_t n, const Ahead& first,
                                const Ahead& second) {
  ScanSums<C> total;
  const int64_t steps = (n + kStep - 1) / kStep;
  for (int64_t step = 0; step < steps; ++step) {
    prefetch(first, step, steps);
    prefetch(second, step, steps);
    const int64_t end = (step + 1) * kStep < n ? (step + 1) * kStep : n;
    C sum = 0, times_s = 0, times_base = 0, base_sum = 0, others = 0, base_others = 0;
#pragma omp simd reduction(+ : sum, times_s, times_base, base_sum, others, base_others)
    for (int64_t i = step * kStep; i < end; ++i) {
      const C x = s[i] - m;
      const C e = exp_of(x);
      s[i] = e;
      sum += e;
      if (kMoments) {
        times_s += e > 0 ? e * x : 0;  // 0 * (-inf) = 0
        others += x == 0 ? 0 : e;
      }
      if (kBase) {
        const C x_b = z_b[i] - m_b;
        const C e_b = exp_of(x_b);
        base_sum += e_b;
        if (kMoments) {
          times_base += e > 0 ? e * x_b : 0;
          base_others += x_b == 0 ? 0 : e_b;
        }
      }
    }
    total.sum += sum;
    total.others += others;
    total.base_others += base_others;
    total.sum_times_s += times_s;
    total.sum_times_base += times_base;
    total.base_sum += base_sum;
  }
  return total;
}

template <class C>
static ScanSums<C> scan_sums(C* s, const C* z_b, C m, C m_b, int64_t n, bool moments, bool base, const Ahead& first,
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
