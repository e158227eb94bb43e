// One lane in plain C++: any architecture, and what the vector builds are compared with.
#pragma once
#include <stdint.h>
#include <string.h>

namespace {

struct Lanes {
  static constexpr int N = 1;         // elements of a vector
  static constexpr int counters = 1;  // Philox counters of a vector
  static constexpr bool xors_three = false;  // by one instruction
  static constexpr bool fours = false;  // there is `round_up`, for four vectors at a time
  static constexpr float exact_limit = 128;  // see ceil_minus_half

  using F = float;
  using I = int32_t;
  using M = bool;
  using W = uint64_t;  // one 32-bit word of a Philox state in each 64-bit lane; its upper half is free

  static F load(const float* p) { return *p; }
  static I load(const int32_t* p) { return *p; }
  static I load(const int8_t* p) { return *p; }
  static I load(const int16_t* p) { return *p; }
  static I load(const uint16_t* p) { return *p; }
  static I load(const uint32_t* p) { return static_cast<I>(*p); }
  static void store(float* p, F v) { *p = v; }
  static void stream(float* p, F v) { *p = v; }  // past the caches; p on a boundary of a vector
  static void fence() {}                           // after which other threads see what was streamed
  static void store(int32_t* p, I v) { *p = v; }
  static void store(int8_t* p, I v) { *p = static_cast<int8_t>(v); }
  // Four vectors of numbers that fit.
  static void store(int8_t* p, I a, I b, I c, I d) {
    store(p, a), store(p + N, b), store(p + 2 * N, c), store(p + 3 * N, d);
  }
  static void store(int16_t* p, I v) { *p = static_cast<int16_t>(v); }
  static F set(float v) { return v; }
  static I set(int32_t v) { return v; }
  static M all(bool v) { return v; }

  static F mul(F a, F b) { return a * b; }
  static F add(F a, F b) { return a + b; }
  static F div(F a, F b) { return a / b; }
  static F sqrt(F v) { return __builtin_sqrtf(v); }
  static F fma(F a, F b, F c) { return __builtin_fmaf(a, b, c); }  // a * b + c, rounded once
  static F sub(F a, F b) { return a - b; }
  static F min(F a, F b) { return a < b ? a : b; }  // b if either is NaN
  static F max(F a, F b) { return a > b ? a : b; }
  static I bits(F v) {
    I i;
    memcpy(&i, &v, 4);
    return i;
  }
  static F floats(I v) {
    F f;
    memcpy(&f, &v, 4);
    return f;
  }
  static F abs(F v) { return floats(bits(v) & 0x7fffffff); }
  // The smaller of |a| and |b|, for b >= 0 and neither of them NaN.
  static F smaller_magnitude(F a, F b) { return min(abs(a), b); }
  static F convert(I v) { return static_cast<float>(v); }
  static I truncate(F v) { return static_cast<I>(v); }
  static I nearest(F v) { return static_cast<I>(__builtin_lrintf(v)); }  // in the default mode
  // ceil(a * c - 1/2) for a * c in [0, exact_limit * 2**16], c a power of two. Up to that limit
  // a * c - 1/2 is exact in float32 unless it lies in (-1/2, 0), where -1/2 gives 0, too.
  static I ceil_minus_half(F a, F c) {
    const F y = a * c - 0.5f;
    const I whole = static_cast<I>(y);
    return whole + (static_cast<float>(whole) < y);
  }
  // ceil(a * c - 1/2) + 2**16 - 1 for a * c in [0, 2**23]; vectors that have `fours` also have `floor_above`,
  // floor(a * c) + 2**16 - 1.
  static I ceil_above(F a, F c) { return add(ceil_minus_half(a, c), 0xffff); }

  static I add(I a, I b) { return static_cast<I>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b)); }
  static I sub(I a, I b) { return static_cast<I>(static_cast<uint32_t>(a) - static_cast<uint32_t>(b)); }
  static I and_(I a, I b) { return a & b; }
  static I or_(I a, I b) { return a | b; }
  static I max(I a, I b) { return a > b ? a : b; }
  static I min(I a, I b) { return a < b ? a : b; }
  static I max_unsigned(I a, I b) { return static_cast<uint32_t>(a) > static_cast<uint32_t>(b) ? a : b; }
  template <int n> static I left(I v) { return static_cast<I>(static_cast<uint32_t>(v) << n); }
  template <int n> static I right(I v) { return v >> n; }
  template <int n> static I right_unsigned(I v) { return static_cast<I>(static_cast<uint32_t>(v) >> n); }
  static I left_by(I v, int n) { return static_cast<I>(static_cast<uint32_t>(v) << n); }
  static I right_unsigned_by(I v, int n) { return static_cast<I>(static_cast<uint32_t>(v) >> n); }
  static uint32_t largest_unsigned(I v) { return static_cast<uint32_t>(v); }

  static M less(F a, F b) { return a < b; }
  static M equal(F a, F b) { return a == b; }
  static M is_nan(F v) { return v != v; }
  static M less(I a, I b) { return a < b; }
  static M equal(I a, I b) { return a == b; }
  static M sign(F v) { return bits(v) < 0; }
  static M both(M a, M b) { return a && b; }
  static M either(M a, M b) { return a || b; }
  static M without(M a, M b) { return a && !b; }
  // Whether the lower 16 bits of a lane are all ones; the upper 16 never are.
  static bool any_low_ones(I v) { return (v & 0xffff) == 0xffff; }
  static bool any(M m) { return m; }
  static I select(M m, I a, I b) { return b ^ ((a ^ b) & -static_cast<I>(m)); }
  static F select(M m, F a, F b) { return floats(select(m, bits(a), bits(b))); }
  static I increment(M m, I v) { return v + m; }
  // v, or -v if x has a minus sign; v is 0 where x is +0.
  static I with_sign(F x, I v) {  // signs mispredict
    const I negative = -static_cast<I>(sign(x));
    return (v ^ negative) - negative;
  }
  // v * gap >= 0 with the sign of x, and 0 without.
  static F product_with_sign(F x, I v, F gap) { return mul(convert(with_sign(x, v)), gap); }
  static F keep_nan(F x, F v) { return x != x ? x + x : v; }  // x + x makes the NaN a quiet one

  static W wide(uint64_t v) { return v; }
  static W wide_counters(uint64_t first) { return first; }  // in the order that store_pairs undoes
  static W wide_add(W a, W b) { return a + b; }
  static W wide_mul(W a, W b) { return (a & 0xffffffff) * (b & 0xffffffff); }
  static W wide_high(W v) { return v >> 32; }
  static W wide_xor(W a, W b) { return a ^ b; }
  static W wide_xor(W a, W b, W c) { return a ^ b ^ c; }
  // Two words of Philox's last round from a product of its: the upper word of that, ^ other ^ key; the lower.
  static W pair(W product, W other, W key) {
    return static_cast<uint32_t>(wide_high(product) ^ other ^ key) | product << 32;
  }
  // The words 0 and 1 of each block, and 2 and 3.
  static void store_pairs(uint32_t* p, W a, W b) {
    p[0] = static_cast<uint32_t>(a);
    p[1] = static_cast<uint32_t>(a >> 32);
    p[2] = static_cast<uint32_t>(b);
    p[3] = static_cast<uint32_t>(b >> 32);
  }
};

}  // namespace
