// Products of int8 codes with AVX-512 VNNI: exact int32 sums, applied exponents, float32 or int32 out.
//
// The instruction multiplies unsigned with signed bytes, four neighbours at a time, and adds to int32
// without saturation. The right operand is packed with 128 added; the left is read as it is. What 128
// times the left adds is 128 times the sum of its row, and is taken off at the end. All of it modulo
// 2**32, so that the sum is right whenever it fits: k <= 2**17 for codes within ±127.
#include "matmul_avx512.h"

namespace {

constexpr int64_t kWide = 64;
constexpr int64_t kPanel = 4 * kWide;  // bytes of a panel for each four of the contraction

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
void tile(int64_t depth, const int8_t* const* rows, int64_t, int64_t step, const uint8_t* panel,
          const int32_t* sums, void* out, int64_t stride, int64_t columns, const Finish& f) {
  f.result->turn();
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
  ended(f, [&](const auto& sixteen) SWALP_INLINE {
    unrolled<R>([&](auto r) SWALP_INLINE {
      unrolled<Z>([&](auto z) SWALP_INLINE {
        const int64_t element = r * stride + 16 * z;
        const __mmask16 there = z == Z - 1 ? last : static_cast<__mmask16>(0xffff);
        const __m512i s = _mm512_sub_epi32(sum[r][z], _mm512_set1_epi32(sums[r]));
        sixteen.store(s, there, 16 * z, element, static_cast<int32_t*>(out) + element);
      });
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
  static constexpr int64_t kStep = 4;  // bytes of a row side by side in a panel
  static constexpr int64_t kRowBlock = 96, kColumnBlock = 256;  // of a thread's piece of work
  static constexpr bool kSums = true;

  static int64_t turns(int64_t) { return 1; }
  static int64_t right_bytes(int64_t depth) { return ceil_div(depth, 4) * kPanel; }
  static int64_t left_bytes(int64_t depth) { return right_bytes(depth); }

  // A row is read four bytes at a time where it lies; not beyond its end.
  static bool in_place(const swalp_matmul& task) { return task.left_inner == 1 && task.k % 4 == 0; }

  static void pack_right(const Operand& x, int64_t depth, int64_t count, uint8_t* panel) {
    pack<kWide>(x, depth, count, true, panel);
  }
  static void pack_left(const Operand& x, int64_t depth, int64_t count, uint8_t* panel,
                        int32_t* sums) {
    if (!panel) return sums_of_rows(x, depth, count, sums);
    pack<kWide>(x, depth, count, false, panel);
    sums_of_panel(panel, depth, sums);
  }

  Tile tile_of(int64_t rows, int64_t columns) const {
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

