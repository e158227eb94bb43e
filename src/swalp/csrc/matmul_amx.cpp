// Products of int8 codes with AMX: exact int32 sums, applied exponents, float32 or int32 out.
#include "amx.h"
#include "matmul_avx512.h"

namespace {

constexpr int64_t kDeep = 4 * kQuads;      // of the contraction at a time
constexpr int64_t kPanel = kDeep * kSide;  // bytes of a panel for that

int64_t padded(int64_t depth) { return ceil_div(depth, kDeep) * kDeep; }

// A tile of up to R * 16 rows x Z * 16 columns.
template <int R, int Z>
void tile(int64_t depth, const int8_t* const* rows, int64_t height, int64_t step, const uint8_t* panel,
          const int32_t*, void* out, int64_t stride, int64_t columns, const Finish& f) {
  const int8_t *upper = rows[0], *lower = rows[R == 2 ? 16 : 0];
  const int64_t row = height > 1 ? rows[1] - rows[0] : 0;
  written();
  clear_sums<R, Z>();
  for (int64_t k = 0; k < depth; k += kDeep, upper += step, lower += step, panel += kPanel) {
    add_products<R, Z>(upper, lower, row, panel);
    f.rows->turn();
    f.result->turn();
  }
  alignas(64) int32_t sums[16 * R * kSide];
  store_sums<R, Z>(sums);
  const __mmask16 last = static_cast<__mmask16>(0xffff >> (-columns & 15));
  ended(f, [&](const auto& sixteen) SWALP_INLINE {
    for (int64_t r = 0; r < height; ++r)
      unrolled<Z>([&](auto z) SWALP_INLINE {
        const int64_t element = r * stride + 16 * z;
        const __mmask16 there = z == Z - 1 ? last : static_cast<__mmask16>(0xffff);
        sixteen.store(_mm512_load_si512(sums + r * kSide + 16 * z), there, 16 * z, element,
                      static_cast<int32_t*>(out) + element);
      });
  });
}

class Amx {
 public:
  static constexpr int64_t kRows = kSide, kWide = kSide;
  static constexpr int64_t kTall = kSide;                  // rows of a panel of the left operand
  static constexpr int64_t kDepth = 1024, kAlign = kDeep;  // a panel is 32 KB
  static constexpr int64_t kStep = kDeep;  // bytes of a row side by side in a panel
  static constexpr int64_t kRowBlock = 64, kColumnBlock = 512;  // of a thread's piece of work
  static constexpr bool kSums = false;

  static int64_t turns(int64_t depth) { return ceil_div(depth, kDeep); }
  static int64_t right_bytes(int64_t depth) { return padded(depth) * kSide; }
  static int64_t left_bytes(int64_t depth) { return padded(depth) * kSide; }

  // A row is read 64 bytes at a time where it lies; not beyond its end.
  static bool in_place(const swalp_matmul& task) {
    return task.left_inner == 1 && task.k % kDeep == 0;
  }

  static void pack_right(const Operand& x, int64_t depth, int64_t count, uint8_t* panel) {
    pack<kSide>(x, depth, count, false, panel);
    const int64_t end = ceil_div(depth, 4) * 4;
    memset(panel + end * kSide, 0, static_cast<size_t>((padded(depth) - end) * kSide));
  }

  // [k / 64][32][64]: what is missing of the contraction is 0.
  static void pack_left(const Operand& x, int64_t depth, int64_t count, uint8_t* panel, int32_t*) {
    if (!panel) return;
    for (int64_t k = 0; k < depth; k += kDeep, panel += kPanel) {
      const int64_t deep = smaller(kDeep, depth - k);
      const Operand part{x.data + k * x.inner, x.outer, x.inner};
      if (x.inner == 1) {
        const __mmask64 there = ~__mmask64{0} >> (kDeep - deep);
        for (int64_t i = 0; i < count; ++i)
          _mm512_store_si512(panel + i * kDeep, _mm512_maskz_loadu_epi8(there, part.data + i * x.outer));
      } else {
        alignas(64) uint8_t across[kPanel];
        pack_right(part, deep, count, across);
        for (int64_t i = 0; i < count; i += 16) {
          __m512i row[16];
#pragma GCC unroll 16
          for (int64_t j = 0; j < 16; ++j)
            row[j] = _mm512_load_si512(across + j * 4 * kSide + i * 4);
          transpose(row);
#pragma GCC unroll 16
          for (int64_t j = 0; j < 16; ++j) _mm512_store_si512(panel + (i + j) * kDeep, row[j]);
        }
      }
    }
  }

  Tile tile_of(int64_t rows, int64_t columns) {
    registers_.shape(rows, kQuads);
    if (rows <= 16) return columns <= 16 ? tile<1, 1> : tile<1, 2>;
    return columns <= 16 ? tile<2, 1> : tile<2, 2>;
  }

 private:
  Registers registers_;
};

}  // namespace

int swalp_matmul_amx(const swalp_matmul*, int threads);

int swalp_matmul_amx(const swalp_matmul* task, int threads) { return multiply<Amx>(task, threads); }
