// Products of int8 codes with AMX: exact int32 sums, applied exponents, float32 or int32 out.
//
// The instruction multiplies 16 rows of 64 signed bytes with 64 rows of 16 columns, four neighbours of
// the contraction side by side, and adds to int32 modulo 2**32. Of the eight registers four are sums,
// of 32 x 32 elements; a step loads two of the left and two of the right operand for four products.
#include "matmul_avx512.h"

namespace {

constexpr int64_t kSide = 32;  // rows and columns of a tile of the result: two registers each
constexpr int64_t kDeep = 64;  // of the contraction, that a register has
constexpr int64_t kPanel = kDeep * kSide;  // bytes of a panel for each kDeep of the contraction

// What is in memory is there: GCC does not know that loading a tile, or the shapes, reads it.
inline void written(const void* memory) { __asm__ volatile("" : : "r"(memory) : "memory"); }

int64_t padded(int64_t depth) { return ceil_div(depth, kDeep) * kDeep; }

// How the processor's eight registers are cut: rows, and bytes of a row, of each.
struct __attribute__((packed)) Shapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16];

  // Sums 0, 1 of the upper rows, 2, 3 of the lower; left operand 4, 5; right operand 6, 7.
  explicit Shapes(int64_t height) {
    const uint8_t upper = static_cast<uint8_t>(smaller(height, 16));
    const uint8_t lower = static_cast<uint8_t>(height > 16 ? height - 16 : 16);
    const uint8_t all[16] = {upper, upper, lower, lower, upper, lower, 16, 16};
    memcpy(rows, all, sizeof rows);
  }
};
static_assert(sizeof(Shapes) == 64, "as the processor reads them");

// A tile of up to R * 16 rows x Z * 16 columns.
template <int R, int Z>
void tile(int64_t depth, const int8_t* const* rows, int64_t height, int64_t step, const uint8_t* panel,
          const int32_t*, void* out, int64_t stride, int64_t columns, const Finish& f) {
  const int8_t *upper = rows[0], *lower = rows[R == 2 ? 16 : 0];
  const int64_t row = height > 1 ? rows[1] - rows[0] : 0;
  written(panel);
  _tile_zero(0);
  if (Z == 2) _tile_zero(1);
  if (R == 2) _tile_zero(2);
  if (R == 2 && Z == 2) _tile_zero(3);
  for (int64_t k = 0; k < depth; k += kDeep, upper += step, lower += step, panel += kPanel) {
    _tile_loadd(4, upper, row);
    _tile_loadd(6, panel, 4 * kSide);
    _tile_dpbssd(0, 4, 6);
    if (Z == 2) {
      _tile_loadd(7, panel + 64, 4 * kSide);
      _tile_dpbssd(1, 4, 7);
    }
    if (R == 2) {
      _tile_loadd(5, lower, row);
      _tile_dpbssd(2, 5, 6);
      if (Z == 2) _tile_dpbssd(3, 5, 7);
    }
  }
  alignas(64) int32_t sums[16 * R][kSide];
  _tile_stored(0, sums[0], 4 * kSide);
  if (Z == 2) _tile_stored(1, sums[0] + 16, 4 * kSide);
  if (R == 2) _tile_stored(2, sums[16 * R - 16], 4 * kSide);
  if (R == 2 && Z == 2) _tile_stored(3, sums[16 * R - 16] + 16, 4 * kSide);
  const __mmask16 last = static_cast<__mmask16>(0xffff >> (-columns & 15));
  const Sixteen sixteen(f);
  for (int64_t r = 0; r < height; ++r)
    unrolled<Z>([&](auto z) SWALP_INLINE {
      const int64_t element = r * stride + 16 * z;
      const __mmask16 there = z == Z - 1 ? last : static_cast<__mmask16>(0xffff);
      sixteen.store(_mm512_load_si512(sums[r] + 16 * z), there, 16 * z, element,
                    static_cast<int32_t*>(out) + element);
    });
}

class Amx {
 public:
  static constexpr int64_t kRows = kSide, kWide = kSide;
  static constexpr int64_t kTall = kSide;                  // rows of a panel of the left operand
  static constexpr int64_t kDepth = 1024, kAlign = kDeep;  // a panel is 32 KB
  static constexpr int64_t kStep = kDeep;  // bytes of a row side by side in a panel
  static constexpr int64_t kRowBlock = 128, kColumnBlock = 512;  // of a thread's piece of work
  static constexpr bool kSums = false;

  Amx() = default;
  Amx(const Amx&) = delete;
  Amx& operator=(const Amx&) = delete;
  ~Amx() {
    if (height_) _tile_release();
  }

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
    if (rows != height_) {
      const Shapes shapes(rows);
      written(&shapes);
      _tile_loadconfig(&shapes);
      height_ = rows;
    }
    if (rows <= 16) return columns <= 16 ? tile<1, 1> : tile<1, 2>;
    return columns <= 16 ? tile<2, 1> : tile<2, 2>;
  }

 private:
  int64_t height_ = 0;  // rows that the registers are cut for
};

}  // namespace

int swalp_matmul_amx(const swalp_matmul*, int threads);

int swalp_matmul_amx(const swalp_matmul* task, int threads) { return multiply<Amx>(task, threads); }
