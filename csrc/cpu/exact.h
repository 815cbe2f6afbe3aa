// Logarithms whose bits are the same everywhere: basic operations in a fixed order, as in
// auxkernels/sampling/arithmetic.py. To be compiled without contraction, as setup.py does.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

namespace auxk {

// log(x) of a normal positive number: x = 2**n (1 + f), log(1 + f) = 2 atanh(f / (2 + f))
inline double exact_log(double x) {
  constexpr int64_t kSqrtHalf = 0x3FE6A09E667F3BCD;
  constexpr double kLn2High = 0x1.62e42feep-1, kLn2Low = 1.9082149292705877e-10;
  int64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const int64_t shifted = bits - kSqrtHalf;
  const double n = static_cast<double>(shifted >> 52);
  bits = (shifted & 0x000FFFFFFFFFFFFF) + kSqrtHalf;
  double f;
  std::memcpy(&f, &bits, sizeof f);
  f = f - 1.0;
  double q = f / (f + 2.0);
  const double z = q * q;
  double series = 1.0 / 21;
  for (int i = 9; i > 0; --i) series = series * z + 1.0 / (2 * i + 1);
  q = q + q;
  const double tail = n * kLn2Low + q * (z * series);
  return n * kLn2High + (q + tail);
}

// log(p) of a number in [0, 1]: -inf below the normal ones
inline double exact_log_of_probability(double p) {
  return p < std::numeric_limits<double>::min() ? -std::numeric_limits<double>::infinity() : exact_log(p);
}

// -log(-log(u)) of u = (bits + 0.5) 2**-32
inline double exact_gumbel(uint32_t bits) {
  const double u = (static_cast<double>(bits) + 0.5) * 0x1p-32;
  return -exact_log(-exact_log(u));
}

}  // namespace auxk
