// What passed ReLU, a bit for each element.
#pragma once
#if defined(__AVX2__)
#include <immintrin.h>
#endif
#include <stdint.h>
#include <string.h>

namespace {

// Elements where they passed, else 0; `out` may be `x`.
inline void keep_passed(const float* x, const uint8_t* passed, int64_t n, float* out) {
  int64_t byte = 0;
#if defined(__AVX512F__)
  for (; 8 * byte + 16 <= n; byte += 2) {
    __mmask16 keep;
    memcpy(&keep, passed + byte, 2);
    _mm512_storeu_ps(out + 8 * byte, _mm512_maskz_loadu_ps(keep, x + 8 * byte));
  }
#elif defined(__AVX2__)
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  for (; 8 * byte + 8 <= n; ++byte) {
    const __m256i mine = _mm256_and_si256(_mm256_set1_epi32(passed[byte]), bit);
    const __m256 keep = _mm256_castsi256_ps(_mm256_cmpeq_epi32(mine, bit));
    _mm256_storeu_ps(out + 8 * byte, _mm256_and_ps(keep, _mm256_loadu_ps(x + 8 * byte)));
  }
#endif
  for (int64_t i = 8 * byte; i < n; ++i) out[i] = passed[i / 8] >> i % 8 & 1 ? x[i] : 0.0f;
}

}  // namespace
