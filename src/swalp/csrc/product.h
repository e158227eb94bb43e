// Products of int8 codes for one instruction set, which `Isa` describes: exact int32 sums, applied
// exponents, float32 or int32 out.
//
// Operands are packed into panels that a tile of the result reads from end to end: of the right one
// always, kColumns at a time, of the left one unless its rows can be read where they lie.
#pragma once
#include <utility>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "matmul.h"
#include "parallel.h"
#include "scratch.h"

namespace {

constexpr int64_t kSerial = int64_t{1} << 22;  // products below which a thread more costs more
constexpr int64_t kColumns = 512;              // of the right operand, packed at a time
constexpr int64_t kApart = 240;  // rows of a thread's own, from which on it packs for itself alone

// A matrix, outer x contraction, of which one stride is 1.
struct Operand {
  const int8_t* data;
  int64_t outer, inner;  // strides
};

// What becomes of the sums.
struct Finish {
  bool first, last, integers;
  Factors scale;      // 2**exponent
  const float* bias;  // of the tile's columns, or null
  uint8_t* passed;    // from the tile on, for ReLU; or null
  Coming *result, *rows;  // where the next tile goes; of the left operand, what those after that read
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

// A tile of the result: the depth of the contraction, the rows of the left operand, how many, and the
// bytes from one step of it to the next, the panel of the right operand, what to take off each row's
// sums, where the result goes, its rows' stride, its columns.
using Tile = void (*)(int64_t, const int8_t* const*, int64_t, int64_t, const uint8_t*,
                      const int32_t*, void*, int64_t, int64_t, const Finish&);

thread_local Workspace workspace;

// One matrix product, and where its packed operands lie.
template <class Isa> struct Product {
  const swalp_matmul& p;
  Operand left, right;
  void* out;
  bool pack_left;
  int64_t left_panels, right_panels;  // of all rows; of the columns of a stretch

  explicit Product(const swalp_matmul& task)
      : p(task), left{task.left, task.left_outer, task.left_inner},
        right{task.right, task.right_outer, task.right_inner}, out(task.out),
        pack_left(!Isa::in_place(task)), left_panels(ceil_div(task.m, Isa::kTall)),
        right_panels(ceil_div(smaller(task.n, kColumns), Isa::kWide)) {
    static_assert(kColumns % Isa::kColumnBlock == 0 && Isa::kColumnBlock % Isa::kWide == 0);
  }

  // The contraction in equal parts of at most kDepth.
  static int64_t depth_of(int64_t k) {
    return ceil_div(ceil_div(k, ceil_div(k, Isa::kDepth)), Isa::kAlign) * Isa::kAlign;
  }

  int64_t bytes() const {
    const int64_t depth = smaller(p.k, depth_of(p.k));
    const int64_t left = pack_left ? left_panels * Isa::left_bytes(depth) : 0;
    return sums_bytes() + right_panels * Isa::right_bytes(depth) + left;
  }

  // A part of the work: `depth` of the contraction from `k` on, `columns` of the result from `n` on.
  struct Part {
    int64_t k, depth, n, columns;
  };

  // Pieces of packing: each panel of the part's right operand, then, once, each of the left.
  int64_t packings(const Part& part) const {
    return ceil_div(part.columns, Isa::kWide) + (part.n == 0 ? left_panels : 0);
  }

  void pack_piece(int64_t piece, const Part& part, uint8_t* memory) const {
    const int64_t k = part.k, depth = part.depth, panels = ceil_div(part.columns, Isa::kWide);
    if (piece < panels) {
      const int64_t first = part.n + piece * Isa::kWide;
      const Operand x{right.data + first * right.outer + k * right.inner, right.outer, right.inner};
      return Isa::pack_right(x, depth, smaller(Isa::kWide, p.n - first),
                             right_in(memory, piece, depth));
    }
    const int64_t first = (piece - panels) * Isa::kTall;
    const Operand x{left.data + first * left.outer + k * left.inner, left.outer, left.inner};
    uint8_t* panel = pack_left ? left_in(memory, piece - panels, depth) : nullptr;
    Isa::pack_left(x, depth, smaller(Isa::kTall, p.m - first), panel, sums_in(memory) + first);
  }

  int64_t sums_bytes() const { return Isa::kSums ? left_panels * Isa::kTall * 4 : 0; }
  int32_t* sums_in(uint8_t* memory) const { return reinterpret_cast<int32_t*>(memory); }
  uint8_t* right_in(uint8_t* memory, int64_t panel, int64_t depth) const {
    return memory + sums_bytes() + panel * Isa::right_bytes(depth);
  }
  uint8_t* left_in(uint8_t* memory, int64_t panel, int64_t depth) const {
    return right_in(memory, right_panels, depth) + panel * Isa::left_bytes(depth);
  }

  const int8_t* row_in(uint8_t* memory, int64_t row, int64_t depth) const {
    const uint8_t* panel = left_in(memory, row / Isa::kTall, depth);
    return reinterpret_cast<const int8_t*>(panel + row % Isa::kTall * Isa::kStep);
  }

  // One of `team` equal shares of a part: block of columns after block, in each some rows of tiles.
  void share(int64_t mine, int64_t team, const Part& part, const Finish& f, uint8_t* memory) const {
    const int64_t tiles = ceil_div(p.m, Isa::kRows), end = part.n + part.columns;
    Isa isa;  // what the processor holds for it, as long as this lives
    int64_t from = tiles * part.columns * mine / team, to = tiles * part.columns * (mine + 1) / team;
    for (int64_t n = part.n; n < end; n += Isa::kColumnBlock) {
      const int64_t width = smaller(Isa::kColumnBlock, end - n);
      const auto row_of = [=](int64_t work) {
        return work <= 0 ? 0 : smaller(p.m, ceil_div(work, width) * Isa::kRows);
      };
      const int64_t last = row_of(to);
      for (int64_t m = row_of(from); m < last; m += Isa::kRowBlock)
        block(isa, m, smaller(last, m + Isa::kRowBlock), n, n + width, part, f, memory);
      from -= tiles * width;
      to -= tiles * width;
    }
  }

  // Rows m0 to m1 and columns n0 to n1 of the result.
  void block(Isa& isa, int64_t m0, int64_t m1, int64_t n0, int64_t n1, const Part& part,
             const Finish& f, uint8_t* memory) const {
    const int64_t k = part.k, depth = part.depth;
    const int32_t* sums = sums_in(memory);
    const auto place = [&](int64_t i, int64_t j) { return static_cast<int32_t*>(out) + i * p.out_outer + j; };
    const int64_t tiles = ceil_div(n1 - n0, Isa::kWide) * ceil_div(m1 - m0, Isa::kRows), turns = Isa::turns(depth);
    // Sums of rows have been made of what lies there, just now.
    const int64_t after = pack_left || Isa::kSums ? 0 : smaller(p.m - m1, Isa::kRowBlock);
    Coming coming(left.data + m1 * left.outer + k, left.outer, after, depth, tiles * turns);
    for (int64_t n = n0; n < n1; n += Isa::kWide) {
      const int64_t width = smaller(Isa::kWide, n1 - n);
      const uint8_t* panel = right_in(memory, (n - part.n) / Isa::kWide, depth);
      Finish here = f;
      here.rows = &coming;
      if (f.bias) here.bias = f.bias + n;
      for (int64_t m = m0; m < m1; m += Isa::kRows) {
        const int64_t height = smaller(Isa::kRows, m1 - m);
        const int8_t* rows[Isa::kRows];
        for (int64_t r = 0; r < height; ++r)
          rows[r] = pack_left ? row_in(memory, m + r, depth) : left.data + (m + r) * left.outer + k;
        const bool lower = m + Isa::kRows < m1, right_of = n + Isa::kWide < n1;
        const int32_t* const next = lower      ? place(m + Isa::kRows, n)
                                    : right_of ? place(m0, n + Isa::kWide)
                                               : place(m1, n0);
        Coming result(next, 4 * p.out_outer, Isa::kRows, 4 * Isa::kWide, turns);
        here.result = &result;
        if (f.passed) here.passed = f.passed + (m * p.out_outer + n) / 8;
        isa.tile_of(height, width)(depth, rows, height,
                                   pack_left ? Isa::kStep * Isa::kTall : Isa::kStep, panel, sums + m,
                                   place(m, n), p.out_outer, width, here);
      }
    }
  }

  Finish finish(const Part& part, int64_t exponent) const {
    return {part.k == 0, part.k + part.depth == p.k, p.integers != 0, Factors(exponent),
            p.bias, p.passed, nullptr, nullptr};
  }

  template <class Work> void each_part(const Work& work) const {
    for (int64_t k = 0, step = depth_of(p.k); k < p.k; k += step)
      for (int64_t n = 0; n < p.n; n += kColumns)
        work(Part{k, smaller(step, p.k - k), n, smaller(kColumns, p.n - n)});
  }

  void serial(int64_t exponent, uint8_t* memory) const {
    each_part([&](const Part& part) {
      const Finish f = finish(part, exponent);
      for (int64_t i = 0; i < packings(part); ++i) pack_piece(i, part, memory);
      share(0, 1, part, f, memory);
    });
  }

  void parallel(int64_t exponent, uint8_t* memory, int threads) const {
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
    each_part([&](const Part& part) {
      const Finish f = finish(part, exponent);
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < packings(part); ++i) pack_piece(i, part, memory);
      share(omp_get_thread_num(), omp_get_num_threads(), part, f, memory);
#pragma omp barrier
    });
#else
    (void)threads;
    serial(exponent, memory);
#endif
  }
};

int64_t exponent_of(const swalp_matmul& task, int64_t i) {
  int64_t exponent = task.exponent;
  if (task.left_exponents) exponent += task.left_exponents[task.left_exponent_each ? i : 0];
  if (task.right_exponents) exponent += task.right_exponents[task.right_exponent_each ? i : 0];
  return exponent;
}

// Tiles begin to end of rows of the result, made by one thread from end to end: of those rows it will
// read where work over elements follows. What it packs nobody else reads (parallel.h).
template <class Isa> bool rows_apart(const swalp_matmul& task, int64_t begin, int64_t end) {
  const int64_t first = begin * Isa::kRows;
  swalp_matmul mine = task;
  mine.m = smaller(task.m, end * Isa::kRows) - first;
  mine.left += first * task.left_outer;
  mine.out = static_cast<int32_t*>(task.out) + first * task.out_outer;
  if (task.passed) mine.passed += first * task.out_outer / 8;
  const Product<Isa> product(mine);
  uint8_t* memory = workspace.at_least(product.bytes());
  if (memory) product.serial(exponent_of(task, 0), memory);
  return memory != nullptr;
}

// Of matrix `i` of a batch.
swalp_matmul at(const swalp_matmul& task, int64_t i) {
  swalp_matmul one = task;
  const int64_t group = task.group ? i / task.group : 0, place = task.group ? i % task.group : i;
  one.left += group * task.left_group + place * task.left_batch;
  one.right += group * task.right_group + place * task.right_batch;
  one.out = static_cast<int32_t*>(task.out) + group * task.out_group + place * task.out_batch;
  return one;
}

template <class Isa> int multiply(const swalp_matmul* task, int threads) {
  const int64_t products = task->m * task->n * task->k;
  if (task->batch * task->m * task->n == 0) return 0;
  if (task->batch == 1 && threads > 1 && products >= kSerial) {
    if (task->m >= kApart * threads) {
      const auto failed = [&](int64_t begin, int64_t end) { return !rows_apart<Isa>(*task, begin, end); };
      return parallel(ceil_div(task->m, Isa::kRows), threads, failed) ? -1 : 0;
    }
    const Product<Isa> product(*task);
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
    const Product<Isa> product(one);
    uint8_t* memory = workspace.at_least(product.bytes());
    if (memory) product.serial(exponent_of(*task, i), memory);
    else failed = true;
  }
  return failed ? -1 : 0;
}

}  // namespace
