// Products of int8 codes with AVX2: exact int32 sums, applied exponents, float32 or int32 out.
//
// AVX2's products of bytes saturate. Its products of 16-bit integers, two neighbours at a time, do not:
// both operands are packed as such, and a product of pairs is added to int32 modulo 2**32, so that the
// sum is right whenever it fits: k <= 2**17 for codes within ±127. It takes half the multiplications
// of float32.
#include <immintrin.h>

#include "dot.h"
#include "product.h"

namespace {

// Pairs [k2][lane][2] of 16-bit integers, two neighbours of the contraction side by side; of up to 8
// outer indices, in steps of `step` bytes. Each store is of 8 lanes; what is missing is 0.
void pack_across(const Operand& x, int64_t depth, int64_t count, int64_t step, uint8_t* out) {
  for (int64_t k = 0; k < depth; k += 2, out += step) {
    int64_t row[2] = {};
    for (int64_t i = 0; i < 2 && k + i < depth; ++i) {
      const int8_t* from = x.data + (k + i) * x.inner;
      if (count == 8) memcpy(row + i, from, 8);
      else memcpy(row + i, from, static_cast<size_t>(count));
    }
    const __m128i pairs = _mm_unpacklo_epi8(_mm_cvtsi64_si128(row[0]), _mm_cvtsi64_si128(row[1]));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_cvtepi8_epi16(pairs));
  }
}

// r[i] = pair i of each of eight rows of eight pairs.
void transpose(__m128i (&r)[8]) {
  __m128i t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm_unpacklo_epi16(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm_unpackhi_epi16(r[2 * i], r[2 * i + 1]);
  }
  __m128i u[8];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    u[4 * i] = _mm_unpacklo_epi32(t[4 * i], t[4 * i + 2]);
    u[4 * i + 1] = _mm_unpackhi_epi32(t[4 * i], t[4 * i + 2]);
    u[4 * i + 2] = _mm_unpacklo_epi32(t[4 * i + 1], t[4 * i + 3]);
    u[4 * i + 3] = _mm_unpackhi_epi32(t[4 * i + 1], t[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[2 * i] = _mm_unpacklo_epi64(u[i], u[i + 4]);
    r[2 * i + 1] = _mm_unpackhi_epi64(u[i], u[i + 4]);
  }
}

// The same where the contraction is contiguous in memory.
void pack_along(const Operand& x, int64_t depth, int64_t count, int64_t step, uint8_t* out) {
  for (int64_t k = 0; k < depth; k += 16) {
    const int64_t left = depth - k;
    __m128i row[8];
#pragma GCC unroll 8
    for (int64_t i = 0; i < 8; ++i) {
      row[i] = _mm_setzero_si128();
      if (i >= count) continue;
      const int8_t* from = x.data + i * x.outer + k;
      if (left >= 16) {
        row[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
      } else {
        int8_t bytes[16] = {};
        memcpy(bytes, from, static_cast<size_t>(left));
        row[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
      }
    }
    transpose(row);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i, out += step) {
      if (2 * i >= left) return;
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_cvtepi8_epi16(row[i]));
    }
  }
}

void pack(const Operand& x, int64_t depth, int64_t count, int64_t step, uint8_t* out) {
  if (x.inner == 1) pack_along(x, depth, count, step, out);
  else pack_across(x, depth, count, step, out);
}

constexpr int64_t kTall = 6, kWide = 16;

// Masked stores are slow on AMD's processors: only where a register is cut.
Sums load(const void* at, int64_t count) {
  if (count >= kLanes) return load(at);
  int32_t some[kLanes] = {};
  memcpy(some, at, static_cast<size_t>(count) * 4);
  return load(some);
}
void store(void* at, Sums x, int64_t count) {
  if (count >= kLanes) return store(at, x);
  int32_t some[kLanes];
  store(some, x);
  memcpy(at, some, static_cast<size_t>(count) * 4);
}

// A tile of up to 6 x 16: R rows, Z registers of columns of which the last may be cut.
template <int R, int Z>
void tile(int64_t depth, const int8_t* const* rows, int64_t, int64_t, const uint8_t* panel,
          const int32_t*, void* out, int64_t stride, int64_t columns, const Finish& f) {
  Sums sum[R][Z];
  unrolled<R>([&](auto r) SWALP_INLINE {
    unrolled<Z>([&](auto z) SWALP_INLINE { sum[r][z] = zeros(); });
  });
  f.result->turn();
  const int8_t* left = rows[0];
  for (int64_t k = 0; k < depth; k += kTerms, panel += 4 * kWide, left += 4 * kTall) {
    Sums b[Z];
    unrolled<Z>([&](auto z) SWALP_INLINE { b[z] = load(panel + 4 * kLanes * z); });
    unrolled<R>([&](auto r) SWALP_INLINE {
      const Sums a = lane_everywhere(left + 4 * r);
      unrolled<Z>([&](auto z) SWALP_INLINE { sum[r][z] = dot(sum[r][z], a, b[z]); });
    });
  }
  const Scale scale(f.scale);
  unrolled<Z>([&](auto z) SWALP_INLINE {
    const int64_t count = columns - kLanes * z;
    Floats bias = floats_everywhere(0);
    if (f.bias) bias = _mm256_castsi256_ps(load(f.bias + kLanes * z, count));
    unrolled<R>([&](auto r) SWALP_INLINE {
      int32_t* at = static_cast<int32_t*>(out) + r * stride + kLanes * z;
      Sums s = sum[r][z];
      if (!f.first) s = add(s, load(at, count));
      if (f.last && !f.integers) {
        Floats v = scale(s);
        if (f.bias) v = add(v, bias);
        if (f.passed) {
          const __m256 pass = _mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_NLE_UQ);
          v = _mm256_and_ps(pass, v);
          f.passed[(r * stride + kLanes * z) / 8] = static_cast<uint8_t>(_mm256_movemask_ps(pass));
        }
        s = _mm256_castps_si256(v);
      }
      store(at, s, count);
    });
  });
}

struct Avx2 {
  static constexpr int64_t kRows = 6, kWide = ::kWide;  // a tile of the result: 12 registers of sums
  static constexpr int64_t kTall = ::kTall;             // rows of a panel of the left operand
  static constexpr int64_t kDepth = 1024, kAlign = 16;  // a panel is 32 KB
  static constexpr int64_t kStep = 4;  // bytes of a row side by side in a panel
  static constexpr int64_t kRowBlock = 96, kColumnBlock = 256;  // of a thread's piece of work
  static constexpr bool kSums = false;

  static int64_t turns(int64_t) { return 1; }
  static int64_t right_bytes(int64_t depth) { return ceil_div(depth, 2) * 4 * kWide; }
  // The last store of 8 lanes reaches beyond the 6 that are wanted.
  static int64_t left_bytes(int64_t depth) {
    return ceil_div(ceil_div(depth, 2) * 4 * kTall + 8, 64) * 64;
  }
  static bool in_place(const swalp_matmul&) { return false; }

  static void pack_right(const Operand& x, int64_t depth, int64_t count, uint8_t* panel) {
    for (int64_t i = 0; i < count; i += 8)
      pack({x.data + i * x.outer, x.outer, x.inner}, depth, smaller(8, count - i), 4 * kWide,
           panel + 4 * i);
  }
  static void pack_left(const Operand& x, int64_t depth, int64_t count, uint8_t* panel, int32_t*) {
    pack(x, depth, count, 4 * kTall, panel);
  }

  Tile tile_of(int64_t rows, int64_t columns) const {
    static constexpr Tile all[] = {tile<1, 1>, tile<2, 1>, tile<3, 1>, tile<4, 1>,
                                   tile<5, 1>, tile<6, 1>, tile<1, 2>, tile<2, 2>,
                                   tile<3, 2>, tile<4, 2>, tile<5, 2>, tile<6, 2>};
    return all[(columns > 8 ? kRows : 0) + rows - 1];
  }
};

}  // namespace

int swalp_matmul_avx2(const swalp_matmul*, int threads);

int swalp_matmul_avx2(const swalp_matmul* task, int threads) { return multiply<Avx2>(task, threads); }
