// What the kernels of AVX-512 VNNI and of AMX share: packed operands, four neighbours of the
// contraction side by side, and what becomes of sixteen sums.
#pragma once
#include "product.h"
#include "transpose.h"

namespace {

constexpr int64_t kAhead = 32;  // of the contraction: what comes then is on its way to the cache

// `count` <= 64 bytes for each of four neighbours of the contraction from `k` on, or 32 for each of
// eight, of which the second four fill the upper halves.
template <int64_t wide>
void neighbours(const Operand& x, int64_t k, int64_t depth, __mmask64 there, __m512i sign,
                __m512i (&row)[4]) {
  const auto bytes = [&](int64_t i) {
    if (k + i >= depth) return _mm512_setzero_si512();
    return _mm512_xor_si512(_mm512_maskz_loadu_epi8(there, x.data + (k + i) * x.inner), sign);
  };
  for (int64_t i = 0; i < 4; ++i) {
    row[i] = bytes(i);
    if (wide == 32) row[i] = _mm512_inserti64x4(row[i], _mm512_castsi512_si256(bytes(i + 4)), 1);
  }
}

// Bytes [k4][wide][4] of `count` <= wide outer indices, for `depth` of the contraction: four
// neighbours of the contraction side by side. What is missing is 0; `flip` adds 128 to what is there.
template <int64_t wide>
void pack_across(const Operand& x, int64_t depth, int64_t count, bool flip, uint8_t* out) {
  static_assert(wide == 64 || wide == 32, "a register has the bytes of 64 outer indices");
  const __m512i sign = _mm512_set1_epi8(flip ? -128 : 0);
  const __mmask64 there = count == 64 ? ~__mmask64{0} : (__mmask64{1} << count) - 1;
  constexpr int64_t step = 256 / wide;
  for (int64_t k = 0; k < depth; k += step, out += 256) {
    for (int64_t i = 0; i < step; ++i) __builtin_prefetch(x.data + (k + kAhead + i) * x.inner);
    __m512i row[4];
    neighbours<wide>(x, k, depth, there, sign, row);
    const __m512i a = _mm512_unpacklo_epi8(row[0], row[1]), b = _mm512_unpackhi_epi8(row[0], row[1]);
    const __m512i c = _mm512_unpacklo_epi8(row[2], row[3]), d = _mm512_unpackhi_epi8(row[2], row[3]);
    const __m512i q0 = _mm512_unpacklo_epi16(a, c), q1 = _mm512_unpackhi_epi16(a, c);
    const __m512i q2 = _mm512_unpacklo_epi16(b, d), q3 = _mm512_unpackhi_epi16(b, d);
    const __m512i even0 = _mm512_shuffle_i32x4(q0, q1, 0x88), odd0 = _mm512_shuffle_i32x4(q0, q1, 0xdd);
    const __m512i even1 = _mm512_shuffle_i32x4(q2, q3, 0x88), odd1 = _mm512_shuffle_i32x4(q2, q3, 0xdd);
    // even0: lanes 0 and 2 of q0, then of q1; a register of the panel is one lane of q0 .. q3.
    _mm512_storeu_si512(out, _mm512_shuffle_i32x4(even0, even1, 0x88));
    _mm512_storeu_si512(out + 64, _mm512_shuffle_i32x4(odd0, odd1, 0x88));
    _mm512_storeu_si512(out + 128, _mm512_shuffle_i32x4(even0, even1, 0xdd));
    _mm512_storeu_si512(out + 192, _mm512_shuffle_i32x4(odd0, odd1, 0xdd));
  }
}

// The same where the contraction is contiguous in memory.
template <int64_t wide>
void pack_along(const Operand& x, int64_t depth, int64_t count, bool flip, uint8_t* out) {
  const __m512i sign = _mm512_set1_epi8(flip ? -128 : 0);
  for (int64_t group = 0; group < count; group += 16)
    for (int64_t k = 0; k < depth; k += 64) {
      const int64_t left = depth - k;
      const __mmask64 there = left >= 64 ? ~__mmask64{0} : (__mmask64{1} << left) - 1;
      __m512i row[16];
#pragma GCC unroll 16
      for (int64_t i = 0; i < 16; ++i) {
        row[i] = _mm512_setzero_si512();
        if (group + i < count)
          row[i] = _mm512_maskz_mov_epi8(
              there, _mm512_xor_si512(
                         _mm512_maskz_loadu_epi8(there, x.data + (group + i) * x.outer + k), sign));
      }
      transpose(row);
      uint8_t* at = out + k * wide + group * 4;
      if (left >= 64) {
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) _mm512_storeu_si512(at + i * 4 * wide, row[i]);
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i)
          if (4 * i < left) _mm512_storeu_si512(at + i * 4 * wide, row[i]);
      }
    }
}

template <int64_t wide>
void pack(const Operand& x, int64_t depth, int64_t count, bool flip, uint8_t* out) {
  if (x.inner == 1) pack_along<wide>(x, depth, count, flip, out);
  else pack_across<wide>(x, depth, count, flip, out);
}

// What becomes of a tile's sums, asked once for all of them: the numbers of the result, with or without
// a bias and ReLU; or anything else: int32, or a part of the contraction.
enum class Ending { plain, biased, rectified, other };

// Sixteen sums, or those of them that are `there`, on their way to `at`.
template <Ending ending> class Sixteen {
 public:
  explicit Sixteen(const Finish& f)
      : f_(f), scale_(_mm512_set1_ps(f.scale.first)), rest_(_mm512_set1_ps(f.scale.second)) {}

  // `column` of the tile and `element`, counted from its first one.
  SWALP_INLINE void store(__m512i sums, __mmask16 there, int64_t column, int64_t element,
                          int32_t* at) const {
    constexpr bool other = ending == Ending::other;
    if (other && !f_.first) sums = _mm512_add_epi32(sums, _mm512_maskz_loadu_epi32(there, at));
    if (!other || (f_.last && !f_.integers)) {
      __m512 v = _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sums), scale_), rest_);
      if (ending != Ending::plain && (ending == Ending::biased || f_.bias))
        v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(there, f_.bias + column));
      if (ending == Ending::rectified || (other && f_.passed)) {
        const __mmask16 pass = _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NLE_UQ);
        v = _mm512_maskz_mov_ps(pass, v);
        memcpy(f_.passed + element / 8, &pass, 2);
      }
      sums = _mm512_castps_si512(v);
    }
    _mm512_mask_storeu_epi32(at, there, sums);
  }

 private:
  const Finish f_;  // not of the caller: what is stored might be it, for all that the compiler knows
  const __m512 scale_, rest_;
};

// body(sixteen)
template <class Body> SWALP_INLINE inline void ended(const Finish& f, const Body& body) {
  if (!f.first || !f.last || f.integers) return body(Sixteen<Ending::other>(f));
  if (f.passed) return body(Sixteen<Ending::rectified>(f));
  if (f.bias) return body(Sixteen<Ending::biased>(f));
  body(Sixteen<Ending::plain>(f));
}

}  // namespace
