// Eight lanes of AVX2 and FMA. `lanes_scalar.h` says what each function means.
#pragma once
#include <immintrin.h>
#include <stdint.h>

namespace {

struct Lanes {
  static constexpr int N = 8;
  static constexpr int counters = 4;
  static constexpr bool xors_three = false;
  static constexpr bool fours = false;
  static constexpr float exact_limit = 128;

  using F = __m256;
  using I = __m256i;
  using M = __m256i;  // all ones where true
  using W = __m256i;

  static I raw(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static I load(const int8_t* p) {
    return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  static I load(const int32_t* p) { return raw(p); }
  static I load(const int16_t* p) {
    return _mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static I load(const uint16_t* p) {
    return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static I load(const uint32_t* p) { return raw(p); }
  static void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  static void stream(float* p, F v) { _mm256_stream_ps(p, v); }
  static void fence() { _mm_sfence(); }
  static void store(int32_t* p, I v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  static void store(int8_t* p, I v) {
    const __m256i order = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1));
    const __m256i packed = _mm256_shuffle_epi8(v, order);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p),
                     _mm_unpacklo_epi32(_mm256_castsi256_si128(packed),
                                        _mm256_extracti128_si256(packed, 1)));
  }
  static void store(int8_t* p, I a, I b, I c, I d) {
    // The lower halves of a, b, c, d, then the upper.
    const __m256i halves = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permutevar8x32_epi32(halves, order));
  }
  static void store(int16_t* p, I v) {
    const __m256i order = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1));
    const __m256i packed = _mm256_shuffle_epi8(v, order);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm_unpacklo_epi64(_mm256_castsi256_si128(packed),
                                        _mm256_extracti128_si256(packed, 1)));
  }
  static F set(float v) { return _mm256_set1_ps(v); }
  static I set(int32_t v) { return _mm256_set1_epi32(v); }
  static M all(bool v) { return _mm256_set1_epi32(v ? -1 : 0); }

  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F sqrt(F v) { return _mm256_sqrt_ps(v); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static I bits(F v) { return _mm256_castps_si256(v); }
  static F floats(I v) { return _mm256_castsi256_ps(v); }
  static F abs(F v) { return floats(_mm256_and_si256(bits(v), set(0x7fffffff))); }
  static F smaller_magnitude(F a, F b) { return min(abs(a), b); }
  static F convert(I v) { return _mm256_cvtepi32_ps(v); }
  static I truncate(F v) { return _mm256_cvttps_epi32(v); }
  static I nearest(F v) { return _mm256_cvtps_epi32(v); }
  static I ceil_minus_half(F a, F c) {
    return _mm256_cvtps_epi32(_mm256_ceil_ps(_mm256_fmsub_ps(a, c, set(0.5f))));
  }
  static I ceil_above(F a, F c) { return add(ceil_minus_half(a, c), set(0xffff)); }

  static I add(I a, I b) { return _mm256_add_epi32(a, b); }
  static I sub(I a, I b) { return _mm256_sub_epi32(a, b); }
  static I and_(I a, I b) { return _mm256_and_si256(a, b); }
  static I or_(I a, I b) { return _mm256_or_si256(a, b); }
  static I max(I a, I b) { return _mm256_max_epi32(a, b); }
  static I min(I a, I b) { return _mm256_min_epi32(a, b); }
  static I max_unsigned(I a, I b) { return _mm256_max_epu32(a, b); }
  template <int n> static I left(I v) { return _mm256_slli_epi32(v, n); }
  template <int n> static I right(I v) { return _mm256_srai_epi32(v, n); }
  template <int n> static I right_unsigned(I v) { return _mm256_srli_epi32(v, n); }
  static I left_by(I v, int n) { return _mm256_sll_epi32(v, _mm_cvtsi32_si128(n)); }
  static I right_unsigned_by(I v, int n) { return _mm256_srl_epi32(v, _mm_cvtsi32_si128(n)); }
  static uint32_t largest_unsigned(I v) {
    __m128i m = _mm_max_epu32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    m = _mm_max_epu32(m, _mm_shuffle_epi32(m, _MM_SHUFFLE(1, 0, 3, 2)));
    m = _mm_max_epu32(m, _mm_shuffle_epi32(m, _MM_SHUFFLE(2, 3, 0, 1)));
    return static_cast<uint32_t>(_mm_cvtsi128_si32(m));
  }

  static M less(F a, F b) { return bits(_mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
  static M equal(F a, F b) { return bits(_mm256_cmp_ps(a, b, _CMP_EQ_OQ)); }
  static M is_nan(F v) { return bits(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)); }
  static M less(I a, I b) { return _mm256_cmpgt_epi32(b, a); }
  static M equal(I a, I b) { return _mm256_cmpeq_epi32(a, b); }
  static M sign(F v) { return right<31>(bits(v)); }
  static M both(M a, M b) { return _mm256_and_si256(a, b); }
  static M either(M a, M b) { return _mm256_or_si256(a, b); }
  static M without(M a, M b) { return _mm256_andnot_si256(b, a); }
  static bool any_low_ones(I v) {
    return _mm256_movemask_epi8(_mm256_cmpeq_epi16(v, all(true))) != 0;
  }
  static bool any(M m) { return !_mm256_testz_si256(m, m); }
  static I select(M m, I a, I b) { return _mm256_blendv_epi8(b, a, m); }
  static F select(M m, F a, F b) { return _mm256_blendv_ps(b, a, floats(m)); }
  static I increment(M m, I v) { return sub(v, m); }
  static I with_sign(F x, I v) { return _mm256_sign_epi32(v, bits(x)); }
  static F product_with_sign(F x, I v, F gap) { return mul(convert(with_sign(x, v)), gap); }
  static F keep_nan(F x, F v) { return select(is_nan(x), _mm256_add_ps(x, x), v); }

  static W wide(uint64_t v) { return _mm256_set1_epi64x(static_cast<long long>(v)); }
  static W wide_counters(uint64_t first) { return wide_add(wide(first), _mm256_setr_epi64x(0, 2, 1, 3)); }
  static W wide_add(W a, W b) { return _mm256_add_epi64(a, b); }
  static W wide_mul(W a, W b) { return _mm256_mul_epu32(a, b); }
  static W wide_high(W v) { return _mm256_srli_epi64(v, 32); }
  static W wide_xor(W a, W b) { return _mm256_xor_si256(a, b); }
  static W wide_xor(W a, W b, W c) { return wide_xor(wide_xor(a, b), c); }
  static W zip(W even, W odd) { return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa); }
  static W wide_even(uint64_t first, uint64_t stride) {  // counters of lanes 0, 2, 4 ...
    return wide_add(wide(first), _mm256_setr_epi64x(0, 2 * stride, 4 * stride, 6 * stride));
  }
  static W pair(W product, W other, W key) {
    const W even = _mm256_blend_epi32(wide_xor(other, key), _mm256_setzero_si256(), 0xaa);
    return wide_xor(_mm256_shuffle_epi32(product, _MM_SHUFFLE(2, 3, 0, 1)), even);
  }
  static void store_pairs(uint32_t* p, W a, W b) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_unpacklo_epi64(a, b));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), _mm256_unpackhi_epi64(a, b));
  }
};

}  // namespace
