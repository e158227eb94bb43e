// Sixteen lanes of AVX-512 (F, BW, DQ, VL). `lanes_scalar.h` says what each function means.
#pragma once
#include <immintrin.h>
#include <stdint.h>

namespace {

struct Lanes {
  static constexpr int N = 16;
  static constexpr int counters = 8;
  static constexpr bool xors_three = true;
  static constexpr bool fours = true;  // there is `round_up`
  // Rounding toward +infinity makes ceil_minus_half exact as long as its result fits an int32.
  static constexpr float exact_limit = 16384;
  static constexpr int up = _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC;

  using F = __m512;
  using I = __m512i;
  using M = __mmask16;
  using W = __m512i;

  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static I load(const int32_t* p) { return _mm512_loadu_si512(p); }
  static I load(const int8_t* p) {
    return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static I load(const int16_t* p) {
    return _mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static I load(const uint16_t* p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static I load(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static void stream(float* p, F v) { _mm512_stream_ps(p, v); }
  static void fence() { _mm_sfence(); }
  static void store(int32_t* p, I v) { _mm512_storeu_si512(p, v); }
  static void store(int8_t* p, I v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v));
  }
  static void store(int8_t* p, I a, I b, I c, I d) {
    store(p, a), store(p + N, b), store(p + 2 * N, c), store(p + 3 * N, d);
  }
  static void store(int16_t* p, I v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(v));
  }
  static F set(float v) { return _mm512_set1_ps(v); }
  static I set(int32_t v) { return _mm512_set1_epi32(v); }
  static M all(bool v) { return static_cast<M>(v ? 0xffff : 0); }

  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F sqrt(F v) { return _mm512_sqrt_ps(v); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static I bits(F v) { return _mm512_castps_si512(v); }
  static F floats(I v) { return _mm512_castsi512_ps(v); }
  static F abs(F v) { return floats(_mm512_and_si512(bits(v), set(0x7fffffff))); }
  static F smaller_magnitude(F a, F b) { return _mm512_range_ps(a, b, 0b1010); }
  static F convert(I v) { return _mm512_cvtepi32_ps(v); }
  static I truncate(F v) { return _mm512_cvttps_epi32(v); }
  static I nearest(F v) { return _mm512_cvtps_epi32(v); }
  // y = a * c - 1/2 rounded up to a float32 is >= y and <= ceil(y): an integer is a float32 below 2**24,
  // and above it a * c is an integer already, from which 1/2 does not reach down to the next float32.
  static I ceil_minus_half(F a, F c) {
    return _mm512_cvt_roundps_epi32(_mm512_fmsub_round_ps(a, c, set(0.5f), up), up);
  }
  // The same: the sum is below 2**24, so that what is rounded to a float32 stays on its side of an integer.
  static I ceil_above(F a, F c) {
    return _mm512_cvt_roundps_epi32(_mm512_fmadd_round_ps(a, c, set(0x1p16f - 1.5f), up), up);
  }
  static I floor_above(F a, F c) {
    constexpr int down = _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC;
    return _mm512_cvttps_epi32(_mm512_fmadd_round_ps(a, c, set(0x1p16f - 1), down));
  }

  static I add(I a, I b) { return _mm512_add_epi32(a, b); }
  static I sub(I a, I b) { return _mm512_sub_epi32(a, b); }
  static I and_(I a, I b) { return _mm512_and_si512(a, b); }
  static I or_(I a, I b) { return _mm512_or_si512(a, b); }
  static I max(I a, I b) { return _mm512_max_epi32(a, b); }
  static I min(I a, I b) { return _mm512_min_epi32(a, b); }
  static I max_unsigned(I a, I b) { return _mm512_max_epu32(a, b); }
  template <int n> static I left(I v) { return _mm512_slli_epi32(v, n); }
  template <int n> static I right(I v) { return _mm512_srai_epi32(v, n); }
  template <int n> static I right_unsigned(I v) { return _mm512_srli_epi32(v, n); }
  static I left_by(I v, int n) { return _mm512_sll_epi32(v, _mm_cvtsi32_si128(n)); }
  static I right_unsigned_by(I v, int n) { return _mm512_srl_epi32(v, _mm_cvtsi32_si128(n)); }
  static uint32_t largest_unsigned(I v) { return _mm512_reduce_max_epu32(v); }

  static M less(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
  static M equal(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
  static M is_nan(F v) { return _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q); }
  static M less(I a, I b) { return _mm512_cmplt_epi32_mask(a, b); }
  static M equal(I a, I b) { return _mm512_cmpeq_epi32_mask(a, b); }
  static M sign(F v) { return _mm512_movepi32_mask(bits(v)); }
  static M both(M a, M b) { return static_cast<M>(a & b); }
  static M either(M a, M b) { return static_cast<M>(a | b); }
  static M without(M a, M b) { return static_cast<M>(a & ~b); }
  static bool any_low_ones(I v) { return _mm512_cmpeq_epi16_mask(v, set(-1)) != 0; }
  static bool any(M m) { return m != 0; }
  static I select(M m, I a, I b) { return _mm512_mask_mov_epi32(b, m, a); }
  static F select(M m, F a, F b) { return _mm512_mask_mov_ps(b, m, a); }
  static I increment(M m, I v) { return _mm512_mask_sub_epi32(v, m, v, set(-1)); }
  static I with_sign(F x, I v) {
    return _mm512_mask_sub_epi32(v, sign(x), _mm512_setzero_si512(), v);
  }
  // Codes of a byte for 4 * N numbers x, of which k has `ceil_above` or `floor_above`: rounded up where the rest
  // is more than the 16 random bits, at most `most` above 0. False, and nothing written, if `unequal` is asked
  // for and rest and bits are equal somewhere.
  static bool round_up(const float* x, const I* k, const uint16_t* bits, bool unequal, int32_t most, int8_t* out) {
    alignas(64) static constexpr int32_t order[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
    I sum[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sum[i] = sub(k[i], load(bits + i * N));
    if (unequal) {  // where a sum ends in ones
      const I largest = _mm512_max_epu16(_mm512_max_epu16(sum[0], sum[1]), _mm512_max_epu16(sum[2], sum[3]));
      if (__builtin_expect(any_low_ones(largest), false)) return false;
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sum[i] = right<16>(sum[i]);
    // What packs works on each 128 bits: `order` brings four numbers of each vector back to their places.
    const I size = _mm512_packus_epi16(_mm512_packus_epi32(sum[0], sum[1]), _mm512_packus_epi32(sum[2], sum[3]));
    const auto raw = [x](int i) { return _mm512_loadu_si512(x + i * N); };
    const __mmask64 minus = _mm512_movepi8_mask(
        _mm512_packs_epi16(_mm512_packs_epi32(raw(0), raw(1)), _mm512_packs_epi32(raw(2), raw(3))));
    const I code = _mm512_mask_sub_epi8(_mm512_min_epu8(size, _mm512_set1_epi8(static_cast<char>(most))), minus,
                                        _mm512_setzero_si512(), size);
    _mm512_storeu_si512(out, _mm512_permutexvar_epi32(_mm512_load_si512(order), code));
    return true;
  }
  static F product_with_sign(F x, I v, F gap) {  // -0 + 0 is 0
    const I bits_of_gap = _mm512_ternarylogic_epi32(bits(gap), bits(x), set(INT32_MIN), 0x78);
    return fma(convert(v), floats(bits_of_gap), set(0.0f));
  }
  static F keep_nan(F x, F v) { return _mm512_mask_add_ps(v, is_nan(x), x, x); }

  static W wide(uint64_t v) { return _mm512_set1_epi64(static_cast<long long>(v)); }
  static W wide_counters(uint64_t first) {
    return wide_add(wide(first), _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7));
  }
  static W wide_add(W a, W b) { return _mm512_add_epi64(a, b); }
  static W wide_mul(W a, W b) { return _mm512_mul_epu32(a, b); }
  static W wide_high(W v) { return _mm512_srli_epi64(v, 32); }
  static W wide_xor(W a, W b) { return _mm512_xor_si512(a, b); }
  static W wide_xor(W a, W b, W c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
  static W zip(W even, W odd) { return _mm512_mask_shuffle_epi32(even, 0xaaaa, odd, _MM_PERM_CCAA); }
  static W wide_even(uint64_t first, uint64_t stride) {
    return wide_add(wide(first), _mm512_mullo_epi64(wide(2 * stride),
                                                    _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7)));
  }
  static W pair(W product, W other, W key) {
    const W swapped = _mm512_shuffle_epi32(product, _MM_PERM_CDAB);
    return _mm512_mask_ternarylogic_epi32(swapped, 0x5555, other, key, 0x96);
  }
  static void store_pairs(uint32_t* p, W a, W b) {
    _mm512_storeu_si512(p, _mm512_unpacklo_epi64(a, b));
    _mm512_storeu_si512(p + 16, _mm512_unpackhi_epi64(a, b));
  }
};

}  // namespace
