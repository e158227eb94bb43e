// Shared exponents: the largest finite magnitude of a block, and what follows from it.
#pragma once
#include "kernels.h"

namespace {

// Magnitudes as unsigned integers that order like the finite float32 numbers, with infinities and NaN
// below all of them: twice the bits (which drops the sign) plus 2**24 (which wraps those around).
constexpr uint32_t kZero = 0x01000000;

Lanes::I order(Lanes::F x) {
  const Lanes::I bits = Lanes::bits(x);
  return Lanes::add(Lanes::add(bits, bits), Lanes::set(static_cast<int32_t>(kZero)));
}

uint32_t largest(const float* x, int64_t n) {
  constexpr int N = Lanes::N;
  Lanes::I most[4] = {Lanes::set(0), Lanes::set(0), Lanes::set(0), Lanes::set(0)};
  int64_t i = 0;
  for (; i + 4 * N <= n; i += 4 * N)
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k)
      most[k] = Lanes::max_unsigned(most[k], order(Lanes::load(x + i + k * N)));
  for (; i + N <= n; i += N) most[0] = Lanes::max_unsigned(most[0], order(Lanes::load(x + i)));
  if (i < n) {
    float rest[N] = {};
    for (int k = 0; i + k < n; ++k) rest[k] = x[i + k];
    most[1] = Lanes::max_unsigned(most[1], order(Lanes::load(rest)));
  }
  const Lanes::I a = Lanes::max_unsigned(most[0], most[1]), b = Lanes::max_unsigned(most[2], most[3]);
  return Lanes::largest_unsigned(Lanes::max_unsigned(a, b));
}

// most[i] = the larger of most[i] and element i.
void largest_each(const float* x, int64_t n, uint32_t* most) {
  int64_t i = 0;
  for (; i + Lanes::N <= n; i += Lanes::N) {
    const Lanes::I m = Lanes::max_unsigned(Lanes::load(most + i), order(Lanes::load(x + i)));
    Lanes::store(reinterpret_cast<float*>(most + i), Lanes::floats(m));
  }
  for (; i < n; ++i) {
    const uint32_t one = largest(x + i, 1);
    if (one > most[i]) most[i] = one;
  }
}

int32_t shared_exponent(const swalp_format& f, uint32_t largest_magnitude) {
  if (largest_magnitude <= kZero) return f.min_exponent;
  const uint32_t bits = (largest_magnitude - kZero) >> 1;
  const int32_t floor_log2 = bits >= 0x00800000 ? static_cast<int32_t>(bits >> 23) - 127
                                                : 31 - __builtin_clz(bits) - 149;
  const int32_t exponent = floor_log2 - f.element_exponent;
  return exponent < f.min_exponent ? f.min_exponent
                                   : exponent > f.max_exponent ? f.max_exponent : exponent;
}

}  // namespace
