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

uint32_t order_of(const float* x) {
  uint32_t bits;
  __builtin_memcpy(&bits, x, 4);
  return 2 * bits + kZero;
}

// Twice the bits: these order like the numbers, infinities and NaN above all others.
Lanes::I twice_bits(Lanes::F x) { return Lanes::add(Lanes::bits(x), Lanes::bits(x)); }

constexpr uint32_t kStrange = 0xff000000;  // twice the bits of the first that is not finite

template <class Order>
inline __attribute__((always_inline)) uint32_t largest_by(const Order& order, const float* x, int64_t n) {
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

// The largest finite magnitude, and whether there is no other.
struct Largest {
  uint32_t magnitude = 0;
  bool finite = true;

  void join(const Largest& other) {
    if (other.magnitude > magnitude) magnitude = other.magnitude;
    finite &= other.finite;
  }
};

// The same, found by several threads, or by one, which need not wait for its own writes.
class Raised {
 public:
  void own() { several_ = false; }
  void raise(const Largest& mine) {
    if (!several_) {
      if (mine.magnitude > magnitude_) magnitude_ = mine.magnitude;
      finite_ &= mine.finite;
      return;
    }
    uint32_t seen = __atomic_load_n(&magnitude_, __ATOMIC_RELAXED);
    while (mine.magnitude > seen &&
           !__atomic_compare_exchange_n(&magnitude_, &seen, mine.magnitude, true, __ATOMIC_RELAXED,
                                        __ATOMIC_RELAXED)) {
    }
    if (!mine.finite) __atomic_store_n(&finite_, false, __ATOMIC_RELAXED);
  }
  Largest value() const { return {magnitude_, finite_}; }

 private:
  uint32_t magnitude_ = 0;
  bool finite_ = true, several_ = true;
};

inline __attribute__((always_inline)) Largest largest_here(const float* x, int64_t n) {
  const uint32_t most = largest_by(twice_bits, x, n);
  if (most < kStrange) return {most + kZero, true};
  return {largest_by(order, x, n), false};
}

Largest largest(const float* x, int64_t n) { return largest_here(x, n); }

// most[i] = the larger of most[i] and element i.
void largest_each(const float* x, int64_t n, uint32_t* most) {
  int64_t i = 0;
  for (; i + Lanes::N <= n; i += Lanes::N) {
    const Lanes::I m = Lanes::max_unsigned(Lanes::load(most + i), order(Lanes::load(x + i)));
    Lanes::store(reinterpret_cast<float*>(most + i), Lanes::floats(m));
  }
  for (; i < n; ++i) {
    const uint32_t one = order_of(x + i);
    if (one > most[i]) most[i] = one;
  }
}

// The largest `order` of elements too few for vectors.
uint32_t largest_of_few(const float* x, int64_t n) {
  uint32_t most = 0;
  for (int64_t i = 0; i < n; ++i) most = order_of(x + i) > most ? order_of(x + i) : most;
  return most;
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

// What a block's elements share. `bounded`: all are finite, and in gaps none is above the power of two
// that the lowest integer of a format in two's complement reaches.
struct Scale {
  int32_t exponent;
  bool bounded;
};

// Of a block with that exponent, its own or a larger one.
Scale scale_at(const swalp_format& f, const Largest& most, int32_t exponent) {
  const int32_t reach = f.element_exponent + 1 - f.gap_offset;
  const bool reached = reach >= 0 && reach < 31 && -f.min_integer >= (1 << reach) - 1;
  return {exponent, f.blocked && most.finite && exponent < f.max_exponent && reached};
}

Scale scale_of(const swalp_format& f, const Largest& most) {
  return scale_at(f, most, shared_exponent(f, most.magnitude));
}

}  // namespace
