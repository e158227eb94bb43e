// Products of int8 codes with AVX-512 VNNI: exact int32 sums, applied exponents, float32 or int32 out.
//
// The instruction multiplies unsigned with signed bytes, four neighbours at a time, and adds to int32
// without saturation. The right operand is packed with 128 added; the left is read as it is. What 128
// times the left adds is 128 times the sum of its row, and is taken off at the end. All of it modulo
// 2**32, so that the sum is right whenever it fits: k <= 2**17 for codes within ±127.
#include "matmul.h"

#include <immintrin.h>
#include <stdlib.h>
#include <string.h>

#include <utility>
#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

constexpr int64_t kRows = 6, kWide = 64;     // a tile of the result: 24 registers of sums
constexpr int64_t kDepth = 1024;             // of the contraction, at a time: a panel is 64 KB
constexpr int64_t kRowBlock = 96, kColumnBlock = 256;  // of a thread's piece of work
constexpr int64_t kSerial = int64_t{1} << 22;  // products below which a thread more costs more
constexpr int64_t kPanel = 4 * kWide;        // bytes of a panel for each four of the contraction

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// A matrix, outer x contraction, of which one stride is 1.
struct Operand {
  const int8_t* data;
  int64_t outer, inner;  // strides
};

// Bytes [k4][64][4] of `count` <= 64 outer indices, for `depth` of the contraction: four neighbours
// of the contraction side by side. What is missing is 0; `flip` adds 128 to what is there.
void pack_across(const Operand& x, int64_t depth, int64_t count, bool flip, uint8_t* out) {
  const __m512i sign = _mm512_set1_epi8(flip ? -128 : 0);
  const __mmask64 there = count == kWide ? ~__mmask64{0} : (__mmask64{1} << count) - 1;
  for (int64_t k = 0; k < depth; k += 4, out += kPanel) {
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

// What becomes of the sums.
struct Finish {
  bool first, last, integers;
  float scale, rest;  // 2**exponent as two factors, each a normal number
  const float* bias;  // of the tile's columns, or null
};

// body(0), body(1) .. as constants, so that arrays indexed by them live in registers.
template <class Body, int... i>
inline __attribute__((always_inline)) void unrolled(const Body& body,
                                                    std::integer_sequence<int, i...>) {
  (body(std::integral_constant<int, i>()), ...);
}
template <int n, class Body> inline __attribute__((always_inline)) void unrolled(const Body& body) {
  unrolled(body, std::make_integer_sequence<int, n>());
}
#define SWALP_INLINE __attribute__((always_inline))

// A tile of up to 6 x 64: R rows, Z registers of columns of which the last may be cut.
template <int R, int Z>
void tile(int64_t depth, const int8_t* const* rows, int64_t step, const uint8_t* panel,
          const int32_t* sums, void* out, int64_t stride, __mmask16 last, const Finish& f) {
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
  const __m512 scale = _mm512_set1_ps(f.scale), rest = _mm512_set1_ps(f.rest);
  unrolled<R>([&](auto r) SWALP_INLINE {
    unrolled<Z>([&](auto z) SWALP_INLINE {
      int32_t* at = static_cast<int32_t*>(out) + r * stride + 16 * z;
      const __mmask16 there = z == Z - 1 ? last : static_cast<__mmask16>(0xffff);
      __m512i s = _mm512_sub_epi32(sum[r][z], _mm512_set1_epi32(sums[r]));
      if (!f.first) s = _mm512_add_epi32(s, _mm512_maskz_loadu_epi32(there, at));
      if (f.last && !f.integers) {
        __m512 v = _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(s), scale), rest);
        if (f.bias) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(there, f.bias + 16 * z));
        s = _mm512_castps_si512(v);
      }
      _mm512_mask_storeu_epi32(at, there, s);
    });
  });
}

using Tile = void (*)(int64_t, const int8_t* const*, int64_t, const uint8_t*, const int32_t*, void*,
                      int64_t, __mmask16, const Finish&);

template <int R> constexpr Tile of_width(int z) {
  return z == 1 ? tile<R, 1> : z == 2 ? tile<R, 2> : z == 3 ? tile<R, 3> : tile<R, 4>;
}

Tile tile_of(int64_t rows, int64_t columns) {
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

// The contraction in equal parts of at most kDepth.
int64_t depth_of(int64_t k) { return ceil_div(ceil_div(k, ceil_div(k, kDepth)), 64) * 64; }

// 2**exponent as two normal factors; beyond ±252 every product is 0 or infinite anyway.
void factors(int64_t exponent, Finish& f) {
  exponent = exponent < -252 ? -252 : exponent > 252 ? 252 : exponent;
  const int64_t half = exponent / 2;
  const auto power = [](int64_t e) {
    const uint32_t bits = static_cast<uint32_t>(e + 127) << 23;
    float value;
    memcpy(&value, &bits, 4);
    return value;
  };
  f.scale = power(half);
  f.rest = power(exponent - half);
}

// Memory that a thread keeps from call to call, as a fresh page costs more than a panel.
struct Workspace {
  uint8_t* memory = nullptr;
  size_t size = 0;
  ~Workspace() { free(memory); }
  uint8_t* at_least(size_t bytes) {
    if (bytes <= size) return memory;
    free(memory);
    size = (bytes + 4095) / 4096 * 4096;
    memory = static_cast<uint8_t*>(aligned_alloc(4096, size));
    if (!memory) size = 0;
    return memory;
  }
};
thread_local Workspace workspace;

// One matrix product, and where its packed operands lie.
struct Product {
  const swalp_matmul& p;
  Operand left, right;
  void* out;
  bool pack_left;
  int64_t left_panels, right_panels;

  explicit Product(const swalp_matmul& task)
      : p(task), left{task.left, task.left_outer, task.left_inner},
        right{task.right, task.right_outer, task.right_inner}, out(task.out),
        // A row is read four bytes at a time where it lies; not beyond its end.
        pack_left(task.left_inner != 1 || task.k % 4 != 0), left_panels(ceil_div(task.m, kWide)),
        right_panels(ceil_div(task.n, kWide)) {}

  static int64_t panel_bytes(int64_t depth) { return ceil_div(depth, 4) * kPanel; }

  size_t bytes() const {
    const int64_t panels = right_panels + (pack_left ? left_panels : 0);
    const int64_t depth = smaller(p.k, depth_of(p.k));
    return static_cast<size_t>(panels * panel_bytes(depth) + left_panels * kWide * 4);
  }

  // Pieces of packing: each panel of the right operand, then each of the left.
  int64_t packings() const { return right_panels + left_panels; }

  void pack_piece(int64_t piece, int64_t k, int64_t depth, uint8_t* memory) const {
    int32_t* sums = sums_in(memory);
    if (piece < right_panels) {
      const int64_t first = piece * kWide;
      const Operand x{right.data + first * right.outer + k * right.inner, right.outer, right.inner};
      return pack(x, depth, smaller(kWide, p.n - first), true, right_in(memory, piece, depth));
    }
    const int64_t first = (piece - right_panels) * kWide, count = smaller(kWide, p.m - first);
    const Operand x{left.data + first * left.outer + k * left.inner, left.outer, left.inner};
    if (!pack_left) return sums_of_rows(x, depth, count, sums + first);
    uint8_t* panel = left_in(memory, piece - right_panels, depth);
    pack(x, depth, count, false, panel);
    sums_of_panel(panel, depth, sums + first);
  }

  int32_t* sums_in(uint8_t* memory) const { return reinterpret_cast<int32_t*>(memory); }
  uint8_t* right_in(uint8_t* memory, int64_t panel, int64_t depth) const {
    return memory + left_panels * kWide * 4 + panel * panel_bytes(depth);
  }
  uint8_t* left_in(uint8_t* memory, int64_t panel, int64_t depth) const {
    return right_in(memory, right_panels + panel, depth);
  }

  int64_t row_blocks() const { return ceil_div(p.m, kRowBlock); }
  int64_t pieces() const { return row_blocks() * ceil_div(p.n, kColumnBlock); }

  void piece(int64_t index, int64_t k, int64_t depth, Finish f, uint8_t* memory) const {
    const int64_t m0 = index % row_blocks() * kRowBlock, n0 = index / row_blocks() * kColumnBlock;
    const int64_t m1 = smaller(p.m, m0 + kRowBlock), n1 = smaller(p.n, n0 + kColumnBlock);
    const int32_t* sums = sums_in(memory);
    for (int64_t n = n0; n < n1; n += kWide) {
      const int64_t width = smaller(kWide, n1 - n);
      const __mmask16 last = static_cast<__mmask16>(0xffff >> (-width & 15));
      const uint8_t* panel = right_in(memory, n / kWide, depth);
      Finish here = f;
      if (f.bias) here.bias = f.bias + n;
      for (int64_t m = m0; m < m1; m += kRows) {
        const int64_t height = smaller(kRows, m1 - m);
        const int8_t* rows[kRows];
        for (int64_t r = 0; r < height; ++r)
          rows[r] = pack_left ? reinterpret_cast<const int8_t*>(
                                    left_in(memory, (m + r) / kWide, depth) + (m + r) % kWide * 4)
                              : left.data + (m + r) * left.outer + k;
        void* to = static_cast<int32_t*>(out) + m * p.out_outer + n;
        tile_of(height, width)(depth, rows, pack_left ? kPanel : 4, panel, sums + m, to,
                               p.out_outer, last, here);
      }
    }
  }

  Finish finish(int64_t k, int64_t depth, int64_t exponent) const {
    Finish f{k == 0, k + depth == p.k, p.integers != 0, 1, 1, p.bias};
    factors(exponent, f);
    return f;
  }

  void serial(int64_t exponent, uint8_t* memory) const {
    for (int64_t k = 0, step = depth_of(p.k); k < p.k; k += step) {
      const int64_t depth = smaller(step, p.k - k);
      for (int64_t i = 0; i < packings(); ++i) pack_piece(i, k, depth, memory);
      for (int64_t i = 0; i < pieces(); ++i)
        piece(i, k, depth, finish(k, depth, exponent), memory);
    }
  }

  void parallel(int64_t exponent, uint8_t* memory, int threads) const {
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
    for (int64_t k = 0, step = depth_of(p.k); k < p.k; k += step) {
      const int64_t depth = smaller(step, p.k - k);
#pragma omp for schedule(static)
      for (int64_t i = 0; i < packings(); ++i) pack_piece(i, k, depth, memory);
#pragma omp for schedule(static)
      for (int64_t i = 0; i < pieces(); ++i)
        piece(i, k, depth, finish(k, depth, exponent), memory);
    }
#else
    (void)threads;
    serial(exponent, memory);
#endif
  }
};

// Of matrix `i` of a batch.
swalp_matmul at(const swalp_matmul& task, int64_t i) {
  swalp_matmul one = task;
  one.left += i * task.left_batch;
  one.right += i * task.right_batch;
  one.out = static_cast<int32_t*>(task.out) + i * task.out_batch;
  return one;
}

int64_t exponent_of(const swalp_matmul& task, int64_t i) {
  int64_t exponent = task.exponent;
  if (task.left_exponents) exponent += task.left_exponents[task.left_exponent_each ? i : 0];
  if (task.right_exponents) exponent += task.right_exponents[task.right_exponent_each ? i : 0];
  return exponent;
}

}  // namespace

int swalp_matmul_vnni(const swalp_matmul*, int threads);

int swalp_matmul_vnni(const swalp_matmul* task, int threads) {
  const int64_t products = task->m * task->n * task->k;
  if (task->batch * task->m * task->n == 0) return 0;
  if (task->batch == 1 && threads > 1 && products >= kSerial) {
    const Product product(*task);
    uint8_t* memory = workspace.at_least(product.bytes());
    if (!memory) return -1;
    product.parallel(exponent_of(*task, 0), memory, threads);
    return 0;
  }
  bool failed = false;
  if (products * task->batch < kSerial) threads = 1;
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static) reduction(|| : failed) if (threads > 1)
#endif
  for (int64_t i = 0; i < task->batch; ++i) {
    const swalp_matmul one = at(*task, i);
    const Product product(one);
    uint8_t* memory = workspace.at_least(product.bytes());
    if (memory) product.serial(exponent_of(*task, i), memory);
    else failed = true;
  }
  return failed ? -1 : 0;
}
