// The smallest number that is kept, found by histograms of ordered keys.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "simd/vector_math.h"

namespace auxk {

// Numbers that compare as floats do, but that -0 is 0.
inline uint32_t key_of(float v) {
  const uint32_t bits = as_bits(v + 0.0f);
  return (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
}
inline uint64_t key_of(double v) {
  uint64_t bits;
  v = v + 0.0;
  std::memcpy(&bits, &v, sizeof bits);
  return (bits >> 63) != 0 ? ~bits : bits | 0x8000000000000000u;
}
inline float value_of(uint32_t key) { return as_float((key >> 31) != 0 ? key & 0x7fffffffu : ~key); }
inline double value_of(uint64_t key) {
  const uint64_t bits = (key >> 63) != 0 ? key & 0x7fffffffffffffffu : ~key;
  double v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

template <class C>
struct Weighed {
  C v;
  int64_t weight;
};

// The smallest v that is kept: the weights of all greater ones and `before` sum to less than the limit. At least the
// largest is kept. Columns come in any order, and are shuffled; there is at least one.
template <class C>
C threshold_of(std::vector<Weighed<C>>& columns, double limit, int64_t before) {
  constexpr size_t kSorted = 256;
  constexpr int kBits = 11;
  const auto begin = columns.begin();
  auto end = columns.end();
  while (end - begin > static_cast<std::ptrdiff_t>(kSorted)) {
    auto low = key_of(begin->v), high = low;
    for (auto one = begin; one != end; ++one)
      low = std::min(low, key_of(one->v)), high = std::max(high, key_of(one->v));
    if (low == high) return begin->v;
    int shift = 0;
    while ((high - low) >> shift >> kBits != 0) ++shift;
    const auto bucket_of = [&](const Weighed<C>& one) { return static_cast<size_t>((high - key_of(one.v)) >> shift); };
    std::vector<int64_t> weights(size_t{1} << kBits, 0);
    for (auto one = begin; one != end; ++one) weights[bucket_of(*one)] += one->weight;
    // where the limit is reached, which is no empty one: the first and the last are not, and no other reaches it
    size_t bucket = 0;
    const size_t last = static_cast<size_t>((high - low) >> shift);
    while (bucket < last && static_cast<double>(before + weights[bucket]) < limit) before += weights[bucket++];
    end = std::partition(begin, end, [&](const Weighed<C>& one) { return bucket_of(one) == bucket; });
  }
  std::sort(begin, end, [](const Weighed<C>& one, const Weighed<C>& other) { return one.v > other.v; });
  C smallest = begin->v;
  for (auto one = begin; one != end && static_cast<double>(before) < limit;) {
    smallest = one->v;
    for (; one != end && one->v == smallest; ++one) before += one->weight;
  }
  return smallest;
}

}  // namespace auxk
