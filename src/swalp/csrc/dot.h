// int32 sums of products of codes, `kLanes` sums at a time of `kTerms` neighbours each: AVX-512 VNNI,
// AVX2, or plain C++ that the compiler makes of what there is. (AMX: amx.h.)
//
// A lane has 4 bytes: four codes, or with AVX2, whose products of bytes saturate, two of 16 bits. One
// operand of bytes is unsigned and has 128 added (`kShifted`); of 16 bits, or with AMX, both are signed.
// Sums are modulo 2**32, so that they are right whenever the true sum fits.
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "scratch.h"

namespace {

#if defined(__AVX2__) && !defined(__AVX512VNNI__)
constexpr int kLanes = 8, kTerms = 2;
constexpr bool kShifted = false;
using Shifted = int16_t;  // a code of the operand that may have 128 added
using Plain = int16_t;    // of the other
#else
constexpr int kLanes = 16, kTerms = 4;
#if defined(__AMX_INT8__)
constexpr bool kShifted = false;
using Shifted = int8_t;
#else
constexpr bool kShifted = true;
using Shifted = uint8_t;
#endif
using Plain = int8_t;
#endif
static_assert(kTerms * sizeof(Plain) == 4 && sizeof(Shifted) == sizeof(Plain), "a lane has 4 bytes");

inline Shifted shifted(int8_t code) { return static_cast<Shifted>(kShifted ? code + 128 : code); }

#if defined(__AVX512VNNI__)
using Sums = __m512i;  // sixteen int32, or sixteen times four bytes

inline Sums zeros() { return _mm512_setzero_si512(); }
inline Sums load(const void* at) { return _mm512_loadu_si512(at); }
inline void store(void* at, Sums x) { _mm512_storeu_si512(at, x); }
// sums + the products of a shifted and a plain operand.
inline Sums dot(Sums sums, Sums u, Sums s) { return _mm512_dpbusd_epi32(sums, u, s); }
inline Sums add(Sums a, Sums b) { return _mm512_add_epi32(a, b); }
inline Sums subtract(Sums a, Sums b) { return _mm512_sub_epi32(a, b); }
inline Sums everywhere(int32_t x) { return _mm512_set1_epi32(x); }
inline Sums times128(Sums x) { return _mm512_slli_epi32(x, 7); }

using Floats = __m512;
inline Floats to_floats(Sums x) { return _mm512_cvtepi32_ps(x); }
inline Floats floats_everywhere(float x) { return _mm512_set1_ps(x); }
inline Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats load_floats(const float* at, int count) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), at);
}
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline void store(float* at, Floats x) { _mm512_storeu_ps(at, x); }
inline void store(float* at, Floats x, int count) {
  _mm512_mask_storeu_ps(at, static_cast<__mmask16>((1u << count) - 1), x);
}

#elif defined(__AVX2__)
using Sums = __m256i;  // eight int32, or eight times two of 16 bits

inline Sums zeros() { return _mm256_setzero_si256(); }
inline Sums load(const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); }
inline void store(void* at, Sums x) { _mm256_storeu_si256(static_cast<__m256i*>(at), x); }
inline Sums dot(Sums sums, Sums a, Sums b) {
  // In the order that GCC 12 gives the intrinsics this takes a third longer on Zen 3.
  Sums products;
  __asm__("vpmaddwd %2, %1, %0" : "=x"(products) : "x"(a), "x"(b));
  __asm__("vpaddd %1, %0, %0" : "+x"(sums) : "x"(products));
  return sums;
}
inline Sums add(Sums a, Sums b) { return _mm256_add_epi32(a, b); }
inline Sums subtract(Sums a, Sums b) { return _mm256_sub_epi32(a, b); }
inline Sums everywhere(int32_t x) { return _mm256_set1_epi32(x); }
inline Sums times128(Sums x) { return _mm256_slli_epi32(x, 7); }

using Floats = __m256;
inline Floats to_floats(Sums x) { return _mm256_cvtepi32_ps(x); }
inline Floats floats_everywhere(float x) { return _mm256_set1_ps(x); }
inline Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats load_floats(const float* at, int count) {
  float some[kLanes] = {};
  memcpy(some, at, static_cast<size_t>(count) * 4);
  return _mm256_loadu_ps(some);
}
inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline void store(float* at, Floats x) { _mm256_storeu_ps(at, x); }
inline void store(float* at, Floats x, int count) {
  float some[kLanes];
  _mm256_storeu_ps(some, x);
  memcpy(at, some, static_cast<size_t>(count) * 4);
}

#else
struct Sums {
  int32_t lane[kLanes];
};

inline Sums zeros() { return {}; }
inline Sums load(const void* at) {
  Sums x;
  memcpy(&x, at, sizeof x);
  return x;
}
inline void store(void* at, const Sums& x) { memcpy(at, &x, sizeof x); }
inline Sums dot(Sums sums, const Sums& u, const Sums& s) {
  uint8_t a[4 * kLanes];
  int8_t b[4 * kLanes];
  memcpy(a, &u, sizeof a);
  memcpy(b, &s, sizeof b);
  for (int i = 0; i < kLanes; ++i)
    for (int k = 0; k < 4; ++k)
      sums.lane[i] = static_cast<int32_t>(static_cast<uint32_t>(sums.lane[i]) +
                                          static_cast<uint32_t>(a[4 * i + k] * b[4 * i + k]));
  return sums;
}
template <class Of> inline Sums lanes(Of of) {
  Sums x;
  for (int i = 0; i < kLanes; ++i) x.lane[i] = static_cast<int32_t>(of(i));
  return x;
}
inline uint32_t bits(int32_t x) { return static_cast<uint32_t>(x); }
inline Sums add(const Sums& a, const Sums& b) {
  return lanes([&](int i) { return bits(a.lane[i]) + bits(b.lane[i]); });
}
inline Sums subtract(const Sums& a, const Sums& b) {
  return lanes([&](int i) { return bits(a.lane[i]) - bits(b.lane[i]); });
}
inline Sums everywhere(int32_t x) {
  return lanes([&](int) { return x; });
}
inline Sums times128(const Sums& x) {
  return lanes([&](int i) { return bits(x.lane[i]) << 7; });
}

struct Floats {
  float lane[kLanes];
};
inline Floats to_floats(const Sums& x) {
  Floats y;
  for (int i = 0; i < kLanes; ++i) y.lane[i] = static_cast<float>(x.lane[i]);
  return y;
}
inline Floats floats_everywhere(float x) {
  Floats y;
  for (float& lane : y.lane) lane = x;
  return y;
}
inline Floats multiply(Floats a, const Floats& b) {
  for (int i = 0; i < kLanes; ++i) a.lane[i] *= b.lane[i];
  return a;
}
inline Floats load_floats(const float* at, int count) {
  Floats x = {};
  for (int i = 0; i < count; ++i) x.lane[i] = at[i];
  return x;
}
inline Floats add(Floats a, const Floats& b) {
  for (int i = 0; i < kLanes; ++i) a.lane[i] += b.lane[i];
  return a;
}
inline void store(float* at, const Floats& x) { memcpy(at, &x, sizeof x); }
inline void store(float* at, const Floats& x, int count) {
  for (int i = 0; i < count; ++i) at[i] = x.lane[i];
}
#endif

inline Sums lane_everywhere(const void* at) {
  int32_t lane;
  memcpy(&lane, at, 4);
  return everywhere(lane);
}

// Sums times a power of two.
struct Scale {
  Floats first, second;
  explicit Scale(const Factors& f)
      : first(floats_everywhere(f.first)), second(floats_everywhere(f.second)) {}
  Floats operator()(const Sums& x) const { return multiply(multiply(to_floats(x), first), second); }
};

}  // namespace
