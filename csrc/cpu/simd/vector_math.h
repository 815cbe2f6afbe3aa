// Scalar building blocks of the block loops. Everything here is branch-free and inlined, so that a loop over it
// vectorises for whatever instruction set the caller is compiled for.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "common/dtype.h"

#define AUXK_INLINE inline __attribute__((always_inline))

namespace auxk {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

AUXK_INLINE float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

AUXK_INLINE uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

AUXK_INLINE float widen(float x) { return x; }
AUXK_INLINE double widen(double x) { return x; }
AUXK_INLINE float widen(bfloat16 x) { return as_float(static_cast<uint32_t>(x.bits) << 16); }

AUXK_INLINE float widen(float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t rest = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  // moving the exponent by a multiplication makes subnormals come out right; Inf and NaN need their exponent set
  const uint32_t finite = as_bits(as_float(rest) * 0x1p112f);
  const uint32_t magnitude = (x.bits & 0x7c00u) == 0x7c00u ? rest | 0x7f800000u : finite;
  return as_float(sign | magnitude);
}

AUXK_INLINE void narrow(float x, float& out) { out = x; }
AUXK_INLINE void narrow(double x, float& out) { out = static_cast<float>(x); }
AUXK_INLINE void narrow(double x, double& out) { out = x; }
AUXK_INLINE void narrow(float x, double& out) { out = x; }

// to nearest, ties to even, in the upper half; not for NaN, whose payload may carry into the sign
AUXK_INLINE uint32_t rounded_to_bfloat16(float x) {
  const uint32_t bits = as_bits(x);
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}
AUXK_INLINE void narrow(float x, bfloat16& out) {
  out.bits = static_cast<uint16_t>(x == x ? rounded_to_bfloat16(x) >> 16 : 0x7fc0u);
}
AUXK_INLINE void narrow(double x, bfloat16& out) { narrow(static_cast<float>(x), out); }

AUXK_INLINE void narrow(float x, float16& out) {
  const uint32_t bits = as_bits(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // adding 1/2 shifts a subnormal result into the low mantissa bits, rounded by the addition itself
  const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f);
  uint32_t half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // 65520 and above round to Inf
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  out.bits = static_cast<uint16_t>(sign | half);
}
AUXK_INLINE void narrow(double x, float16& out) { narrow(static_cast<float>(x), out); }

// exp(x) for x <= 88, within 1 ulp and |x| / 2 ulp of 2^-24; below the normal numbers the result is exactly 0; NaN
// stays NaN. 2^n * (1 + r + r^2 q(r)), q fitted to minimise the relative error on |r| <= ln(2)/2 (3e-9).
AUXK_INLINE float exp_of(float x) {
  // 1.5 * 2^23 + 127: adding it leaves round(value) in the low mantissa bits, biased as an exponent is
  constexpr float kRound = 12583039.0f;
  x = x < -88.0f ? -88.0f : x;  // 2^n is then 0, and so is exp(-inf)
  const float shifted = x * 1.44269504089f + kRound;
  const float n = shifted - kRound;
  const float r = x - n * 0.69314718056f;
  float q = 1.381446674e-3f;
  q = q * r + 8.368780429e-3f;
  q = q * r + 4.166839422e-2f;
  q = q * r + 1.666652011e-1f;
  q = q * r + 4.999999341e-1f;
  q = q * r + 1.0f;
  q = q * r + 1.0f;
  return q * as_float(as_bits(shifted) << 23);  // a product: a NaN must come out as one
}
AUXK_INLINE double exp_of(double x) { return std::exp(x); }

// log(x) for normal x > 0, within 1 ulp; relative to log(x) also near 1. x = 2^n (1 + f), sqrt(1/2) <= 1 + f < sqrt(2).
AUXK_INLINE float log_of(float x) {
  constexpr uint32_t kSqrtHalf = 0x3f3504f3u;
  const uint32_t shifted = as_bits(x) - kSqrtHalf;
  const float n = static_cast<float>(static_cast<int32_t>(shifted) >> 23);
  const float f = as_float((shifted & 0x007fffffu) + kSqrtHalf) - 1.0f;
  const float z = f * f;
  float q = 7.0376836292e-2f;
  q = q * f - 1.1514610310e-1f;
  q = q * f + 1.1676998740e-1f;
  q = q * f - 1.2420140846e-1f;
  q = q * f + 1.4249322787e-1f;
  q = q * f - 1.6668057665e-1f;
  q = q * f + 2.0000714765e-1f;
  q = q * f - 2.4999993993e-1f;
  q = q * f + 3.3333331174e-1f;
  float tail = q * f * z;
  tail = tail + n * -2.12194440e-4f;
  tail = tail - 0.5f * z;
  return (f + tail) + n * 0.693359375f;
}

// tanh within 2 ulp: an odd polynomial near 0, where 1 - 2 / (exp(2x) + 1) would cancel.
AUXK_INLINE float tanh_of(float x) {
  const float magnitude = std::fabs(x);
  const float z = x * x;
  float q = 2.142961627e-3f;
  q = q * z - 8.177398004e-3f;
  q = q * z + 2.170070313e-2f;
  q = q * z - 5.394676305e-2f;
  q = q * z + 1.333320601e-1f;
  q = q * z - 3.333333080e-1f;
  const float small = q * z * x + x;
  const float capped = magnitude > 20.0f ? 20.0f : magnitude;  // NaN passes
  const float large = std::copysign(1.0f - 2.0f / (exp_of(2.0f * capped) + 1.0f), x);
  return magnitude < 0.625f ? small : large;
}
AUXK_INLINE double tanh_of(double x) { return std::tanh(x); }

}  // namespace auxk
