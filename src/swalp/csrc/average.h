// Taking an iterate into an average, in place: one pass over memory, element by element.
//
// Each equals its definition in src/swalp/averaging/definition.py bit for bit.
#pragma once
#include "kernels.h"

namespace {

constexpr int64_t kTaken = 2048;  // elements widened at a time: they stay in L1

// What becomes of n values x of the iterate that belong to the average's elements from `at` on.
struct Compensated {
  using Value = float;
  float* average;
  float* residual;
  float weight;
  void operator()(int64_t at, const float* __restrict x, int64_t n) const {
    float* __restrict kept = average + at;
    float* __restrict lost = residual + at;
    for (int64_t i = 0; i < n; ++i) {
      const float increment = (x[i] - kept[i] - lost[i]) * weight + lost[i];
      const float total = kept[i] + increment;
      lost[i] = increment - (total - kept[i]);
      kept[i] = total;
    }
  }
};

template <class Real> struct Moving {
  using Value = float;
  Real* average;
  Real weight;
  void operator()(int64_t at, const float* __restrict x, int64_t n) const {
    Real* __restrict kept = average + at;
    for (int64_t i = 0; i < n; ++i)
      kept[i] = kept[i] + (static_cast<Real>(x[i]) - kept[i]) * weight;
  }
};

// Integers themselves, summed.
template <class Code> struct Sum {
  using Value = Code;
  int64_t* sum;
  void operator()(int64_t at, const Code* __restrict x, int64_t n) const {
    int64_t* __restrict kept = sum + at;
    for (int64_t i = 0; i < n; ++i) kept[i] += x[i];
  }
};

// Values of another type, made float32 a little at a time.
template <class Taker, class Widen>
void take_widened(const Taker& take, int64_t at, int64_t n, const Widen& widen) {
  alignas(64) float values[kTaken];
  for (int64_t done = 0; done < n; done += kTaken) {
    const int64_t count = n - done < kTaken ? n - done : kTaken;
    widen(done, count, values);
    take(at + done, values, count);
  }
}

inline void widen_bfloat16(const uint16_t* __restrict from, int64_t n, float* __restrict to) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
    __builtin_memcpy(to + i, &bits, 4);
  }
}

}  // namespace
