// Products of int8 codes with AVX-512 VNNI: exact int32 sums, applied exponents, float32 or int32 out.
//
// The instruction multiplies unsigned with signed bytes, four neighbours at a time, and adds to int32
// without saturation. The right operand is packed with 128 added; the left is read as it is. What 128
// times the left adds is 128 times the sum of its row, and is taken off at the end. All of it modulo
// 2**32, so that the sum is right whenever it fits: k <= 2**17 for codes within ±127.
#include <immintrin.h>

#include "product.h"

namespace {

constexpr int64_t kWide = 64;
constexpr int64_t kPanel = 4 * kWide;  // bytes of a panel for each four of the contraction
constexpr int64_t kAhead = 32;         // of the contraction: what comes then is on its way to the cache

// Bytes [k4][64][4] of `count` <= 64 outer indices, for `depth` of the contraction: four neighbours
// of the contraction side by side. What is missing is 0; `flip` adds 128 to what is there.
void pack_across(const Operand& x, int64_t depth, int64_t count, bool flip, uint8_t* out) {
  const __m512i sign = _mm512_set1_epi8(flip ? -128 : 0);
  const __mmask64 there = count == kWide ? ~__mmask64{0} : (__mmask64{1} << count) - 1;
  for (int64_t k = 0; k < depth; k += 4, out += kPanel) {
    for (int64_t i = 0; i < 4; ++i) __builtin_prefetch(x.data + (k + kAhead + i) * x.inner);
    __m512i row[4];
    for (int64_t i = 0; i < 4; ++i)
      row[i] = k + i < depth ? _mm512_xor_si512(
                                   _mm512_maskz_loadu_epi8(there, x.data + (k + i) * x.inner), sign)
                             : _mm512_setzero_si512();
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

void transpose(__m512i (&r)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// The same where the contraction is contiguous in memory.
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
      uint8_t* at = out + k * kWide + group * 4;
      if (left >= 64) {
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) _mm512_storeu_si512(at + i * kPanel, row[i]);
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i)
          if (4 * i < left) _mm512_storeu_si512(at + i * kPanel, row[i]);
      }
    }
}

void pack(const Operand& x, int64_t depth, int64_t count, bool flip, uint8_t* out) {
  if (x.inner == 1) pack_along(x, depth, count, flip, out);
  else pack_across(x, depth, count, flip, out);
}

// 128 times the sums of 64 rows of a packed left operand, and of rows as they are.
void sums_of_panel(const uint8_t* panel, int64_t depth, int32_t* out) {
  const __m512i ones = _mm512_set1_epi8(1);
  __m512i sum[4] = {};
  for (int64_t k = 0; k < depth; k += 4, panel += kPanel)
#pragma GCC unroll 4
    for (int z = 0; z < 4; ++z)
      sum[z] = _mm512_dpbusd_epi32(sum[z], ones, _mm512_loadu_si512(panel + 64 * z));
  for (int z = 0; z < 4; ++z) _mm512_storeu_si512(out + 16 * z, _mm512_slli_epi32(sum[z], 7));
}

void sums_of_rows(const Operand& x, int64_t depth, int64_t count, int32_t* out) {
  const __m512i ones = _mm512_set1_epi8(1);
  for (int64_t i = 0; i < count; ++i) {
    const int8_t* row = x.data + i * x.outer;
    __m512i sum[2] = {};
    int64_t k = 0;
    for (; k + 128 <= depth; k += 128) {
      for (int64_t line = 0; line < 128; line += 64) __builtin_prefetch(row + 4 * x.outer + k + line);
      sum[0] = _mm512_dpbusd_epi32(sum[0], ones, _mm512_loadu_si512(row + k));
      sum[1] = _mm512_dpbusd_epi32(sum[1], ones, _mm512_loadu_si512(row + k + 64));
    }
    for (; k < depth; k += 64) {
      const int64_t left = depth - k;
      const __mmask64 there = left >= 64 ? ~__mmask64{0} : (__mmask64{1} << left) - 1;
      sum[0] = _mm512_dpbusd_epi32(sum[0], ones, _mm512_maskz_loadu_epi8(there, row + k));
    }
    out[i] = static_cast<int32_t>(
        static_cast<uint32_t>(_mm512_reduce_add_epi32(_mm512_add_epi32(sum[0], sum[1]))) << 7);
  }
}

// A tile of up to 6 x 64: R rows, Z registers of columns of which the last may be cut.
template <int R, int Z>
void tile(int64_t depth, const int8_t* const* rows, int64_t step, const uint8_t* panel,
          const int32_t* sums, void* out, int64_t stride, int64_t columns, const Finish& f) {
  __m512i sum[R][Z];
  const int8_t* row[R];
  unrolled<R>([&](auto r) SWALP_INLINE {
    row[r] = rows[r];
    unrolled<Z>([&](auto z) SWALP_INLINE { sum[r][z] = _mm512_setzero_si512(); });
  });
  for (int64_t k = 0; k < depth; k += 4, panel += kPanel) {
    __m512i b[Z];
    unrolled<Z>([&](auto z) SWALP_INLINE { b[z] = _mm512_load_si512(panel + 64 * z); });
    unrolled<R>([&](auto r) SWALP_INLINE {
      int32_t four;
      memcpy(&four, row[r], 4);
      row[r] += step;
      const __m512i a = _mm512_set1_epi32(four);
      unrolled<Z>([&](auto z) SWALP_INLINE {
        // Of the intrinsic GCC 12 makes a register that is stored to the stack each time.
        asm("vpdpbusd %2, %1, %0" : "+v"(sum[r][z]) : "v"(b[z]), "v"(a));
      });
    });
  }
  const __mmask16 last = static_cast<__mmask16>(0xffff >> (-columns & 15));
  const __m512 scale = _mm512_set1_ps(f.scale.first), rest = _mm512_set1_ps(f.scale.second);
  unrolled<R>([&](auto r) SWALP_INLINE {
    unrolled<Z>([&](auto z) SWALP_INLINE {
      int32_t* at = static_cast<int32_t*>(out) + r * stride + 16 * z;
      const __mmask16 there = z == Z - 1 ? last : static_cast<__mmask16>(0xffff);
      __m512i s = _mm512_sub_epi32(sum[r][z], _mm512_set1_epi32(sums[r]));
      if (!f.first) s = _mm512_add_epi32(s, _mm512_maskz_loadu_epi32(there, at));
      if (f.last && !f.integers) {
        __m512 v = _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(s), scale), rest);
        if (f.bias) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(there, f.bias + 16 * z));
        if (f.passed) {
          const __mmask16 pass = _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NLE_UQ);
          v = _mm512_maskz_mov_ps(pass, v);
          memcpy(f.passed + (r * stride + 16 * z) / 8, &pass, 2);
        }
        s = _mm512_castps_si512(v);
      }
      _mm512_mask_storeu_epi32(at, there, s);
    });
  });
}

template <int R> constexpr Tile of_width(int z) {
  return z == 1 ? tile<R, 1> : z == 2 ? tile<R, 2> : z == 3 ? tile<R, 3> : tile<R, 4>;
}

struct Vnni {
  static constexpr int64_t kRows = 6, kWide = ::kWide;  // a tile of the result: 24 registers of sums
  static constexpr int64_t kTall = 64;                  // rows of a panel of the left operand
  static constexpr int64_t kDepth = 1024, kAlign = 64;  // a panel is 64 KB
  static constexpr int64_t kRowBlock = 96, kColumnBlock = 256;  // of a thread's piece of work
  static constexpr bool kSums = true;

  static int64_t right_bytes(int64_t depth) { return ceil_div(depth, 4) * kPanel; }
  static int64_t left_bytes(int64_t depth) { return right_bytes(depth); }

  // A row is read four bytes at a time where it lies; not beyond its end.
  static bool in_place(const swalp_matmul& task) { return task.left_inner == 1 && task.k % 4 == 0; }

  static void pack_right(const Operand& x, int64_t depth, int64_t count, uint8_t* panel) {
    pack(x, depth, count, true, panel);
  }
  static void pack_left(const Operand& x, int64_t depth, int64_t count, uint8_t* panel,
                        int32_t* sums) {
    if (!panel) return sums_of_rows(x, depth, count, sums);
    pack(x, depth, count, false, panel);
    sums_of_panel(panel, depth, sums);
  }

  static Tile tile_of(int64_t rows, int64_t columns) {
    const int z = static_cast<int>(ceil_div(columns, 16));
    switch (rows) {
      case 1: return of_width<1>(z);
      case 2: return of_width<2>(z);
      case 3: return of_width<3>(z);
      case 4: return of_width<4>(z);
      case 5: return of_width<5>(z);
      default: return of_width<6>(z);
    }
  }
};

}  // namespace

int swalp_matmul_vnni(const swalp_matmul*, int threads);

int swalp_matmul_vnni(const swalp_matmul* task, int threads) { return multiply<Vnni>(task, threads); }

