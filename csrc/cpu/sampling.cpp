// setup.py compiles this file without contraction.
#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <memory>

#include "exact.h"
#include "parallel.h"
#include "sample_threshold.h"
#include "simd/philox.h"
#include "simd/sample_ops.h"

namespace auxk {
namespace {

constexpr int64_t kWorthAThread = 1 << 15;   // columns
constexpr int64_t kPart = 4 * kBlock;        // of a long row, what one thread takes at a time
constexpr int64_t kFew = 2048;               // kept columns whose noise is made one by one
constexpr int64_t kWeighedAtOnce = 512;      // columns
constexpr double kHugeTemperature = 0x1p60;  // differences of floats divided by less are bounded in float

template <class C>
constexpr C kLowest = std::numeric_limits<C>::lowest();

template <class C>
struct Best {
  double v = -std::numeric_limits<double>::infinity();
  int64_t place = -1;
  // noise is at least -3.14, and what is asked for includes the largest s
  float bound() const { return place < 0 ? -3.2f : static_cast<float>(v) - 1e-4f; }
  void offer(double value, int64_t at) {
    if (place < 0 || value > v || (value == v && at < place)) v = value, place = at;
  }
};

// One thread's memory.
template <class C>
struct SampleBuffers {
  std::unique_ptr<C[]> s;  // V
  std::unique_ptr<C[]> scratch;
  std::unique_ptr<int32_t[]> places;  // V
  int64_t num_places = 0;
  std::vector<C> maxima, few;
  std::vector<Weighed<C>> weighed;

  SampleBuffers(int64_t V, int threads)
      : s(new C[static_cast<size_t>(V)]),
        scratch(new C[static_cast<size_t>(threads * 3 * kBlock)]),
        places(new int32_t[static_cast<size_t>(V)]),
        maxima(static_cast<size_t>((V + kBlock - 1) / kBlock * kMaxima)) {}
};

template <class C>
class Sampler {
 public:
  Sampler(const SampleProblem& problem, const SampleFields& out) : p(problem), fields(out), ops(sample_ops<C>()) {}

  void row(int64_t n, SampleBuffers<C>& b, int threads) const {
    const KeepSubnormals keep;
    const double T = p.temperature.of(n), top_p = p.top_p.of(n), min_p = p.min_p.of(n);
    const double plausibility = p.plausibility.of(n);
    const int64_t k = p.top_k.of(n);
    const auto is_fraction = [](double x) { return x >= 0 && x <= 1; };
    const bool in_range = T >= 0 && T <= std::numeric_limits<double>::max() && k >= 0 && is_fraction(top_p) &&
                          is_fraction(min_p) && is_fraction(plausibility);
    if (!in_range) return put_none(n);
    C base_floor = -std::numeric_limits<C>::infinity();
    if (plausibility > 0) base_floor = smallest_within(largest_base(n, b), exact_log_of_probability(plausibility));
    C m;
    if (!load(n, base_floor, b, threads, &m)) return put_none(n);
    if (T == 0) {
      collect(b, m, 1);
      return put(n, b, b.places[0], m, m, T, plausibility > 0);
    }
    const C inverse =
        static_cast<C>(std::clamp<double>(1.0 / T, std::numeric_limits<C>::min(), std::numeric_limits<C>::max()));
    Exponent<C> exponent{m, inverse, kLowest<C>};
    C floor = kLowest<C>;
    if (k > 0 && k < p.V) floor = kth_largest(k, b);
    const C min_p_floor = min_p > 0 ? smallest_within(m, T * exact_log_of_probability(min_p)) : kLowest<C>;
    if (top_p < 1) {
      exponent.floor = p.mass_after_min_p ? std::max(floor, min_p_floor) : floor;
      floor = std::max(floor, mass_floor(b, exponent, top_p));
    }
    floor = std::min(std::max(floor, min_p_floor), m);
    exponent.floor = floor;
    put(n, b, choice(n, b, exponent, T, threads), m, floor, T, plausibility > 0);
  }

 private:
  const SampleProblem& p;
  const SampleFields& fields;
  const SampleOps<C>& ops;

  // -- sources ------------------------------------------------------------------------------------

  static SourceBlock<C> block_of(const Source& source, int64_t n, int64_t first) {
    const int64_t start = (n / source.num_inner) * source.stride_outer + (n % source.num_inner) * source.stride_inner;
    const C scale = source.scale == nullptr ? static_cast<C>(source.scale_value)
                                            : static_cast<const C*>(source.scale)[n * source.scale_stride];
    return {static_cast<const char*>(source.values) + (start + first) * size_of(source.dtype), source.dtype, scale,
            static_cast<C>(source.softcap)};
  }

  // calls task(base, aux) with the sides' blocks
  template <class Task>
  void with_sides(int64_t n, int64_t first, const Task& task) const {
    constexpr size_t kFewSources = 8;
    SourceBlock<C> few[kFewSources];
    std::vector<SourceBlock<C>> many;
    SourceBlock<C>* blocks = few;
    const size_t num_base = p.base.size(), num_all = num_base + p.aux.size();
    if (num_all > kFewSources) {
      many.resize(num_all);
      blocks = many.data();
    }
    for (size_t i = 0; i < num_all; ++i) blocks[i] = block_of(i < num_base ? p.base[i] : p.aux[i - num_base], n, first);
    task(Side<C>{blocks, static_cast<int>(num_base)}, Side<C>{blocks + num_base, static_cast<int>(p.aux.size())});
  }

  template <class Task>
  static void blocks(int64_t begin, int64_t end, const Task& task) {
    for (int64_t first = begin; first < end; first += kBlock) task(first, std::min(kBlock, end - first));
  }

  C largest_base(int64_t n, SampleBuffers<C>& b) const {
    C largest = -std::numeric_limits<C>::infinity();
    blocks(0, p.V, [&](int64_t first, int64_t size) {
      with_sides(n, first, [&](const Side<C>& base, const Side<C>&) {
        largest = std::max(largest, ops.load_base(base, size, b.scratch.get()));
      });
    });
    return largest;
  }

  // whether the row is a distribution: s, its maxima and their largest
  bool load(int64_t n, C base_floor, SampleBuffers<C>& b, int threads, C* m) const {
    std::fill(b.maxima.begin(), b.maxima.end(), -std::numeric_limits<C>::infinity());
    const int64_t num_parts = (p.V + kPart - 1) / kPart;
    std::vector<char> bad(static_cast<size_t>(num_parts), 0);
    parallel_for(num_parts, threads, 1, [&](int64_t part, int thread) {
      const KeepSubnormals keep;
      C* scratch = b.scratch.get() + thread * 3 * kBlock;
      blocks(part * kPart, std::min((part + 1) * kPart, p.V), [&](int64_t first, int64_t size) {
        with_sides(n, first, [&](const Side<C>& base, const Side<C>& aux) {
          C* maxima = b.maxima.data() + first / kBlock * kMaxima;
          if (ops.load(base, aux, size, base_floor, b.s.get() + first, scratch, maxima))
            bad[static_cast<size_t>(part)] = 1;
        });
      });
    });
    *m = *std::max_element(b.maxima.begin(), b.maxima.end());
    return std::find(bad.begin(), bad.end(), 1) == bad.end() && *m > -std::numeric_limits<C>::infinity();
  }

  // -- thresholds ---------------------------------------------------------------------------------

  // The smallest t with t - m >= distance in double; found among all numbers by their order, as rounding may make many
  // of them equally far from m.
  static C smallest_within(C m, double distance) {
    using Key = decltype(key_of(m));
    const auto is_within = [&](C t) { return static_cast<double>(t) - static_cast<double>(m) >= distance; };
    if (!(m > -std::numeric_limits<C>::infinity() && m < std::numeric_limits<C>::infinity())) return m;
    if (is_within(kLowest<C>)) return kLowest<C>;
    Key outside = key_of(kLowest<C>), inside = key_of(m);
    while (inside - outside > 1) {
      const Key middle = outside + (inside - outside) / 2;
      (is_within(value_of(middle)) ? inside : outside) = middle;
    }
    return value_of(inside);
  }

  // The first places of s at or above the floor, as many as there is room for; whether that is all.
  bool collect(SampleBuffers<C>& b, C floor, int64_t room) const {
    int64_t count = 0;
    for (int64_t first = 0; first < p.V && count <= room; first += kBlock) {
      const int64_t size = std::min(kBlock, p.V - first);
      count += ops.collect(b.s.get() + first, floor, size, first, b.places.get() + count, room - count);
    }
    b.num_places = std::min(count, room);
    return count <= room;
  }

  // The k-th largest s, or the smallest allowed one. Of maxima of disjoint sets of columns the k-th largest is a lower
  // bound, and what is above it few.
  C kth_largest(int64_t k, SampleBuffers<C>& b) const {
    const size_t rank = static_cast<size_t>(k - 1);
    if (2 * k <= static_cast<int64_t>(b.maxima.size())) {
      b.few = b.maxima;
      for (size_t fold = b.few.size() / 2; fold >= 8 * rank + 16; fold = b.few.size() / 2) {
        for (size_t i = 0; i < fold; ++i) b.few[i] = std::max(b.few[i], b.few[i + fold]);
        if (b.few.size() % 2 != 0) b.few[fold++] = b.few.back();
        b.few.resize(fold);
      }
      std::nth_element(b.few.begin(), b.few.begin() + k - 1, b.few.end(), std::greater<C>());
      const C bound = b.few[rank];
      if (bound > -std::numeric_limits<C>::infinity() && collect(b, bound, p.V)) {
        gather(b);
        std::nth_element(b.few.begin(), b.few.begin() + k - 1, b.few.end(), std::greater<C>());
        return b.few[rank];
      }
    }
    b.weighed.clear();
    for (int64_t i = 0; i < p.V; ++i)
      if (b.s[i] >= kLowest<C>) b.weighed.push_back({b.s[i], 1});
    return threshold_of(b.weighed, static_cast<double>(k), 0);
  }

  // few = s at the places
  void gather(SampleBuffers<C>& b) const {
    b.few.resize(static_cast<size_t>(b.num_places));
    for (size_t i = 0; i < b.few.size(); ++i) b.few[i] = b.s[b.places[i]];
  }

  // The smallest s of top-p, by the weights of what is above exponent.floor.
  C mass_floor(SampleBuffers<C>& b, const Exponent<C>& exponent, double top_p) const {
    const C* v = b.s.get();
    int64_t n = p.V;
    if (exponent.floor > kLowest<C>) {
      collect(b, exponent.floor, p.V);
      gather(b);
      v = b.few.data(), n = static_cast<int64_t>(b.few.size());
    }
    int64_t weights[kWeighedAtOnce];
    int32_t buckets[kWeighedAtOnce];
    const auto weighed_parts = [&](const C* values, int64_t count, const auto& task) {
      for (int64_t first = 0; first < count; first += kWeighedAtOnce) {
        const int64_t size = std::min(kWeighedAtOnce, count - first);
        task(ops.weigh(values + first, exponent, size, weights, buckets), values + first, size);
      }
    };
    std::vector<int64_t> masses(kBuckets, 0);
    int64_t total = 0;
    weighed_parts(v, n, [&](int64_t sum, const C*, int64_t size) {
      total += sum;
      for (int64_t i = 0; i < size; ++i) masses[static_cast<size_t>(buckets[i])] += weights[i];
    });
    const double limit = top_p * static_cast<double>(total);
    int32_t bucket = 0;
    int64_t before = 0;
    while (bucket < kBuckets - 1 && static_cast<double>(before + masses[static_cast<size_t>(bucket)]) < limit)
      before += masses[static_cast<size_t>(bucket++)];
    // the bucket's columns: what is not above it is a little below, whatever was rounded
    if (v == b.s.get() && bucket < kBuckets - 1) {
      const double distance = (static_cast<double>(bucket) + 1.1) / 64 / static_cast<double>(exponent.inverse);
      const C low = static_cast<C>(static_cast<double>(exponent.m) - distance * (1 + 1e-5));
      if (collect(b, std::max(low, kLowest<C>), p.V / 4)) {
        gather(b);
        v = b.few.data(), n = static_cast<int64_t>(b.few.size());
      }
    }
    b.weighed.clear();
    weighed_parts(v, n, [&](int64_t, const C* values, int64_t size) {
      for (int64_t i = 0; i < size; ++i)
        if (buckets[i] == bucket && values[i] >= exponent.floor) b.weighed.push_back({values[i], weights[i]});
    });
    return b.weighed.empty() ? kLowest<C> : threshold_of(b.weighed, limit, before);
  }

  // -- choice -------------------------------------------------------------------------------------

  double value_at(const C* s, int64_t place, C m, double T, uint32_t bits) const {
    return (static_cast<double>(s[place]) - static_cast<double>(m)) / T + exact_gumbel(bits);
  }

  int64_t choice(int64_t n, SampleBuffers<C>& b, const Exponent<C>& exponent, double T, int threads) const {
    const uint64_t seed = static_cast<uint64_t>(p.seed.of(n));
    const uint64_t position = static_cast<uint64_t>(p.has_position ? p.position.of(n) : p.first_row + n);
    const C* s = b.s.get();
    if (exponent.floor > kLowest<C> && collect(b, exponent.floor, kFew)) {
      Best<C> best;
      for (int64_t i = 0; i < b.num_places; ++i) {
        const int32_t place = b.places[i];
        uint32_t lanes[4];
        philox(static_cast<uint32_t>(place / 4), position, seed, lanes);
        best.offer(value_at(s, place, exponent.m, T, lanes[place % 4]), place);
      }
      return best.place;
    }
    const int64_t num_parts = threads > 1 ? (p.V + kPart - 1) / kPart : 1, part_size = threads > 1 ? kPart : p.V;
    std::vector<Best<C>> found(static_cast<size_t>(num_parts));
    parallel_for(num_parts, threads, 1, [&](int64_t part, int) {
      const KeepSubnormals keep;
      const int64_t end = std::min((part + 1) * part_size, p.V);
      for (int64_t first = part * part_size; first < end; first += kNoiseGroup)
        offer_group(s, exponent, T, seed, position, first, std::min(kNoiseGroup, end - first),
                    &found[static_cast<size_t>(part)]);
    });
    Best<C> best;
    for (const Best<C>& one : found)
      if (one.place >= 0) best.offer(one.v, one.place);
    return best.place;
  }

  // Few columns can be the best by an upper bound of their noise; of these it is computed.
  void offer_group(const C* s, const Exponent<C>& exponent, double T, uint64_t seed, uint64_t position, int64_t first,
                   int64_t n, Best<C>* best) const {
    uint32_t bits[kNoiseGroup];
    float bounds[kNoiseGroup];
    const float largest = ops.bound_noise(s + first, exponent, seed, position, first, n, bits, bounds);
    const bool is_bound = T < kHugeTemperature;
    if (is_bound && largest < best->bound()) return;
    const auto offer = [&](int64_t i) { best->offer(value_at(s, first + i, exponent.m, T, bits[i]), first + i); };
    if (is_bound)
      for (int64_t i = 0; i < n; ++i)
        if (bounds[i] == largest) {
          offer(i);
          break;
        }
    for (int64_t i = 0; i < n; ++i)
      if (is_bound ? bounds[i] >= best->bound() : s[first + i] >= exponent.floor) offer(i);
  }

  // -- answers ------------------------------------------------------------------------------------

  static void put_number(void* values, int64_t n, double x) {
    if (values != nullptr) static_cast<C*>(values)[n] = static_cast<C>(x);
  }

  void put_none(int64_t n) const {
    const double nan = std::numeric_limits<double>::quiet_NaN();
    fields.token[n] = -1;
    put_number(fields.log_prob, n, nan);
    put_number(fields.kept_log_prob, n, nan);
    if (fields.num_kept != nullptr) fields.num_kept[n] = 0;
    if (fields.base_rank != nullptr) fields.base_rank[n] = -1;
  }

  void put(int64_t n, SampleBuffers<C>& b, int64_t place, C m, C floor, double T, bool is_masked) const {
    fields.token[n] = place;
    if (fields.log_prob == nullptr) return;
    const double divisor = T == 0 ? 1 : T;
    const double inverse = std::min(1 / divisor, std::numeric_limits<double>::max());
    const double chosen = static_cast<double>(b.s[place]);
    const auto log_prob = [&](C largest, double sum) {
      return (chosen - static_cast<double>(largest)) / divisor - std::log(sum);
    };
    C largest = m;
    double all = 0, kept = 0;
    int64_t num_kept = 0;
    blocks(0, p.V, [&](int64_t first, int64_t size) {
      const C* s = b.s.get() + first;
      kept += ops.exp_sum(s, m, inverse, floor, size);
      num_kept += ops.count_from(s, floor, size);
      if (!is_masked) all += ops.exp_sum(s, m, inverse, kLowest<C>, size);
    });
    if (is_masked) {  // s has lost what the base does not find plausible
      C maxima[kMaxima];
      std::fill(maxima, maxima + kMaxima, -std::numeric_limits<C>::infinity());
      const auto load_again = [&](const auto& task) {
        blocks(0, p.V, [&](int64_t first, int64_t size) {
          C *scratch = b.scratch.get(), *s = scratch + 2 * kBlock;
          with_sides(n, first, [&](const Side<C>& base, const Side<C>& aux) {
            ops.load(base, aux, size, -std::numeric_limits<C>::infinity(), s, scratch, maxima);
          });
          task(s, size);
        });
      };
      load_again([](const C*, int64_t) {});
      largest = *std::max_element(maxima, maxima + kMaxima);
      load_again([&](const C* s, int64_t size) { all += ops.exp_sum(s, largest, inverse, kLowest<C>, size); });
    }
    put_number(fields.log_prob, n, log_prob(largest, all));
    put_number(fields.kept_log_prob, n, T == 0 ? 0 : log_prob(m, kept));
    fields.num_kept[n] = T == 0 ? 1 : num_kept;
    fields.base_rank[n] = base_rank(n, b, place);
  }

  int64_t base_rank(int64_t n, SampleBuffers<C>& b, int64_t place) const {
    C* z = b.scratch.get();
    C chosen;
    with_sides(n, place, [&](const Side<C>& base, const Side<C>&) { ops.load_base(base, 1, &chosen); });
    int64_t rank = 0;
    blocks(0, p.V, [&](int64_t first, int64_t size) {
      with_sides(n, first, [&](const Side<C>& base, const Side<C>&) { ops.load_base(base, size, z); });
      rank += ops.count_greater(z, chosen, size);
    });
    return rank;
  }
};

}  // namespace

template <class C>
void sample(const SampleProblem& p, const SampleFields& fields) {
  const Sampler<C> sampler(p, fields);
  const int threads = static_cast<int>(std::clamp<int64_t>(p.num_rows * p.V / kWorthAThread, 1, p.threads));
  if (p.num_rows < threads) {
    SampleBuffers<C> buffers(p.V, threads);
    for (int64_t n = 0; n < p.num_rows; ++n) sampler.row(n, buffers, threads);
    return;
  }
  std::vector<std::unique_ptr<SampleBuffers<C>>> buffers(static_cast<size_t>(threads));
  const int64_t rows_at_once = std::clamp<int64_t>(kWorthAThread / p.V, 1, 16);
  parallel_for(p.num_rows, threads, rows_at_once, [&](int64_t n, int thread) {
    auto& own = buffers[static_cast<size_t>(thread)];
    if (!own) own = std::make_unique<SampleBuffers<C>>(p.V, 1);
    sampler.row(n, *own, 1);
  });
}

template void sample<float>(const SampleProblem&, const SampleFields&);
template void sample<double>(const SampleProblem&, const SampleFields&);

}  // namespace auxk
