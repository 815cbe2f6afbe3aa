// Loops over a row to sample from, compiled once for each instruction set from one body (sample_ops.inl), all without
// contraction: products are rounded before they are added, so that every set gives the same bits.
#pragma once

#include "block_ops.h"

namespace auxk {

constexpr int kMaxima = 64;           // of a block: the largest of columns that are so many apart
constexpr int64_t kNoiseGroup = 256;  // columns whose noise is looked at together

// a side's sources, in their order
template <class C>
struct Side {
  const SourceBlock<C>* sources = nullptr;
  int count = 0;
};

// what turns s into the exponent of its weight, and which s count
template <class C>
struct Exponent {
  C m, inverse;  // (s - m) inverse
  C floor;       // columns below it count nothing
};

template <class C>
struct SampleOps {
  // s = base + aux, -inf where the base is below `floor`; raises the kMaxima maxima; whether a NaN or +inf is among
  // the sums, also where they become -inf. scratch: 2 n numbers
  bool (*load)(const Side<C>& base, const Side<C>& aux, int64_t n, C floor, C* s, C* scratch, C* maxima);
  // z = base; returns the largest z, NaN passed over
  C (*load_base)(const Side<C>& base, int64_t n, C* z);
  // how many v are at least, and how many greater than the bound
  int64_t (*count_from)(const C* v, C bound, int64_t n);
  int64_t (*count_greater)(const C* v, C bound, int64_t n);
  // appends first + i for each v[i] >= floor to `places`, of which there are `room`; returns how many, more than `room`
  // if they did not fit
  int64_t (*collect)(const C* v, C floor, int64_t n, int64_t first, int32_t* places, int64_t room);
  // weights 2**40 exp((v - m) inverse), and buckets, in the order of falling v; returns the sum
  int64_t (*weigh)(const C* v, const Exponent<C>&, int64_t n, int64_t* weights, int32_t* buckets);
  // sum of exp((v - m) / T) of the columns at or above `floor`, for statistics
  double (*exp_sum)(const C* v, C m, double inverse, C floor, int64_t n);
  // random bits of kNoiseGroup columns, and upper bounds of (v - m) / T + noise; returns the largest. first is a
  // multiple of four
  float (*bound_noise)(const C* v, const Exponent<C>&, uint64_t seed, uint64_t position, int64_t first, int64_t n,
                       uint32_t* bits, float* bounds);
};

constexpr int kBuckets = 2048;  // of weights: 64 for a factor of e, the last with all that is smaller
constexpr int kWeightBits = 40;

// of the instruction set in use
template <class C>
const SampleOps<C>& sample_ops();

}  // namespace auxk
