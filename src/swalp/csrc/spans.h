// Loops over elements that are neighbours in memory, one function for each format, rule and output.
#pragma once
#include <type_traits>

#include "blocks.h"
#include "kernels.h"
#include "rounding.h"

namespace {

constexpr int64_t kChunk = 1024;  // elements whose noise is made at a time: it stays in L1

// Blocks of fewer neighbours are no work for vectors one by one: each element gets its exponent.
constexpr int64_t kShort = 2 * Lanes::N;

// Quantizes n elements. Returns whether a NaN was lost.
template <class Op, class Out>
inline __attribute__((always_inline)) bool each(const Op& op, const float* x, Out* out, int64_t n,
                                                const Words& words) {
  constexpr int N = Lanes::N;
  const uint16_t* const upper = words.upper + words.at;
  M nan = Lanes::all(false);
  const auto random = [&](int64_t i) __attribute__((always_inline)) {
    if constexpr (Op::stochastic) return Random{Lanes::load(upper + i), words, i};
    else return Random{Lanes::set(0), words, i};
  };
  const auto one = [&](const float* from, Out* to, const Random& bits) __attribute__((always_inline)) {
    const F v = Lanes::load(from);
    if constexpr (sizeof(Out) == 4) Lanes::store(to, op.value(v, bits));
    else Lanes::store(to, op.code(v, bits, nan));
  };
  int64_t i = 0;
  if constexpr (sizeof(Out) == 1 && Op::fours) {
    for (; i + 4 * N <= n; i += 4 * N)
      if (!op.template codes<Lanes>(x + i, upper + i, out + i))
        for (int k = 0; k < 4 * N; k += N) one(x + i + k, out + i + k, random(i + k));
  } else if constexpr (sizeof(Out) == 1 && Op::simple) {
    for (; i + 4 * N <= n; i += 4 * N) {
      I code[4];
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) code[k] = op.code(Lanes::load(x + i + k * N), random(i + k * N), nan);
      Lanes::store(out + i, code[0], code[1], code[2], code[3]);
    }
  }
  for (; i + N <= n; i += N) one(x + i, out + i, random(i));
  if (i < n) {
    float from[N] = {};
    Out to[N];
    uint16_t bits[N];
    for (int k = 0; k < N; ++k) bits[k] = 0xffff;  // no zero is undecided
    for (int k = 0; i + k < n; ++k) {
      from[k] = x[i + k];
      if constexpr (Op::stochastic) bits[k] = upper[i + k];
    }
    one(from, to, Random{Lanes::load(bits), words, i});
    for (int k = 0; i + k < n; ++k) out[i + k] = to[k];
  }
  return !op.f.has_nan && Lanes::any(nan);
}

// The same, each element with a shared exponent of its own: `make` gives the op of a vector of them.
template <class Out, class Make>
inline __attribute__((always_inline)) bool each_with(const float* x, Out* out, int64_t n, const Words& words,
                                                     const int32_t* shared, const Make& make) {
  constexpr int N = Lanes::N;
  bool lost = false;
  int64_t i = 0;
  for (; i + N <= n; i += N)
    lost |= each(make(Lanes::load(shared + i)), x + i, out + i, N, words.from(i));
  if (i == n) return lost;
  int32_t rest[N] = {};
  for (int k = 0; i + k < n; ++k) rest[k] = shared[i + k];
  return lost | each(make(Lanes::load(rest)), x + i, out + i, n - i, words.from(i));
}

int32_t gap_of(const swalp_format& f, int32_t shared) {
  const int32_t gap = shared + f.gap_offset;
  return gap < kLowestGap ? kLowestGap : gap;
}

bool is_extreme(int32_t gap) { return gap > kOrdinaryGap || gap < -kOrdinaryGap; }

using Span = bool (*)(const swalp_format&, const Rule&, const float* x, void* out, int64_t n,
                      const Words& words, Scale scale);
using Rows = bool (*)(const swalp_format&, const Rule&, const float* x, void* out, int64_t rows,
                      int64_t length, const Words& words, int32_t* shared);
using Columns = bool (*)(const swalp_format&, const Rule&, const float* x, void* out, int64_t n,
                         const Words& words, const int32_t* shared);

constexpr int64_t kUsual = 32;  // elements of a block of microscaling, whose loops are unrolled

// The same of `count` rows of `length` elements that follow each other: `make` gives the op of a row.
template <class Out, class Make>
inline __attribute__((always_inline)) bool each_row(const float* x, Out* out, int64_t count, int64_t length,
                                                    const Words& words, const Make& make) {
  bool lost = false;
  if (length == kUsual)
    for (int64_t row = 0; row < count; ++row)
      lost |= each(make(row), x + row * kUsual, out + row * kUsual, kUsual, words.from(row * kUsual));
  else
    for (int64_t row = 0; row < count; ++row)
      lost |= each(make(row), x + row * length, out + row * length, length, words.from(row * length));
  return lost;
}

// Each of the ops with the shared exponents that it was made for.
template <template <int> class Op, int way> struct Plain {
  template <class Out>
  static bool run(const swalp_format& f, const Rule& rule, const float* x, Out* out, int64_t count,
                  int64_t length, const Words& words, const Scale* scales) {
    return each_row(x, out, count, length, words, [&](int64_t row) __attribute__((always_inline)) {
      return Op<way>(f, rule, Lanes::set(scales[row].exponent));
    });
  }
  template <class Out>
  static bool run_each(const swalp_format& f, const Rule& rule, const float* x, Out* out, int64_t n,
                       const Words& words, const int32_t* shared) {
    return each_with(x, out, n, words, shared, [&](I own) __attribute__((always_inline)) {
      return Op<way>(f, rule, own);
    });
  }
};

template <int way> struct Minifloats {
  static constexpr int general = way == kFast16 ? kSplit16 : way == kFast32 ? kSplit32 : way;
  static constexpr bool quick = way == kNearest || way == kFast16 || way == kFast32;
  using Quick = Plain<Usual, quick ? way : kNearest>;

  template <class Out>
  static bool run(const swalp_format& f, const Rule& rule, const float* x, Out* out, int64_t count,
                  int64_t length, const Words& words, const Scale* scales) {
    if (are_usual(f, count, [&](int64_t i) { return scales[i].exponent; }))
      return Quick::run(f, rule, x, out, count, length, words, scales);
    return Plain<Mini, general>::run(f, rule, x, out, count, length, words, scales);
  }
  template <class Out>
  static bool run_each(const swalp_format& f, const Rule& rule, const float* x, Out* out, int64_t n,
                       const Words& words, const int32_t* shared) {
    if (are_usual(f, n, [&](int64_t i) { return shared[i]; }))
      return Quick::run_each(f, rule, x, out, n, words, shared);
    return Plain<Mini, general>::run_each(f, rule, x, out, n, words, shared);
  }

 private:
  template <class Exponent>
  static bool are_usual(const swalp_format& f, int64_t count, const Exponent& exponent) {
    if constexpr (!quick) return false;
    int32_t least = exponent(0), most = least;
    for (int64_t i = 1; i < count; ++i) {
      least = exponent(i) < least ? exponent(i) : least;
      most = exponent(i) > most ? exponent(i) : most;
    }
    return Usual<quick ? way : kNearest>::holds(f, least, most);
  }
};

template <int way> struct Gridded {
  template <class Out>
  static bool run(const swalp_format& f, const Rule& rule, const float* x, Out* out, int64_t count,
                  int64_t length, const Words& words, const Scale* scales) {
    const auto rows = [&](auto range, int64_t first, int64_t many) __attribute__((always_inline)) {
      return each_row(x + first * length, out + first * length, many, length, words.from(first * length),
                      [&](int64_t row) __attribute__((always_inline)) {
                        const I gaps = Lanes::set(gap_of(f, scales[first + row].exponent));
                        return Grid<way, decltype(range)::value>(f, rule, gaps);
                      });
    };
    const bool evenly = f.min_integer == -f.max_integer;
    bool all = evenly;
    for (int64_t i = 0; i < count; ++i)
      all &= scales[i].bounded && !is_extreme(gap_of(f, scales[i].exponent));
    if constexpr (may_be_bounded)
      if (all) return rows(OfRange<kBoundedEvenly>(), 0, count);
    bool lost = false;
    for (int64_t i = 0; i < count; ++i) {
      const bool extreme = is_extreme(gap_of(f, scales[i].exponent));
      if constexpr (may_be_bounded)
        if (scales[i].bounded && !extreme) {
          lost |= evenly ? rows(OfRange<kBoundedEvenly>(), i, 1) : rows(OfRange<kBounded>(), i, 1);
          continue;
        }
      lost |= extreme ? rows(OfRange<kExtreme>(), i, 1) : rows(OfRange<kOrdinary>(), i, 1);
    }
    return lost;
  }
  template <class Out>
  static bool run_each(const swalp_format& f, const Rule& rule, const float* x, Out* out, int64_t n,
                       const Words& words, const int32_t* shared) {
    bool extreme = false;
    for (int64_t i = 0; i < n; ++i) extreme |= is_extreme(shared[i] + f.gap_offset);
    if (extreme)
      return each_with(x, out, n, words, shared, [&](I own) __attribute__((always_inline)) {
        const I gaps = Lanes::add(own, Lanes::set(f.gap_offset));
        return Grid<way, kExtreme>(f, rule, Lanes::max(gaps, Lanes::set(kLowestGap)));
      });
    return each_with(x, out, n, words, shared, [&](I own) __attribute__((always_inline)) {
      return Grid<way, kOrdinary>(f, rule, Lanes::add(own, Lanes::set(f.gap_offset)));
    });
  }

 private:
  static constexpr bool may_be_bounded = way == kNearest || way == kFast16 || way == kFast32;
  template <int range> using OfRange = std::integral_constant<int, range>;
};

template <class Family, class Out>
bool span(const swalp_format& f, const Rule& rule, const float* x, void* out, int64_t n,
          const Words& words, Scale scale) {
  return Family::run(f, rule, x, static_cast<Out*>(out), 1, n, words, &scale);
}

// A shared exponent for each element.
template <class Family, class Out>
bool columns(const swalp_format& f, const Rule& rule, const float* x, void* out, int64_t n,
             const Words& words, const int32_t* shared) {
  return Family::run_each(f, rule, x, static_cast<Out*>(out), n, words, shared);
}

// Blocks that follow each other in memory: kChunk elements at most.
template <class Family, class Out>
bool rows(const swalp_format& f, const Rule& rule, const float* x, void* out, int64_t count,
          int64_t length, const Words& words, int32_t* shared) {
  if (length < kShort) {
    int32_t own[kChunk];
    for (int64_t row = 0; row < count; ++row) {
      const int32_t exponent = shared_exponent(f, largest_of_few(x + row * length, length));
      if (shared) shared[row] = exponent;
      for (int64_t i = 0; i < length; ++i) own[row * length + i] = exponent;
    }
    return columns<Family, Out>(f, rule, x, out, count * length, words, own);
  }
  Scale scales[kChunk / kShort];
  const auto find = [&](int64_t n) __attribute__((always_inline)) {
    for (int64_t row = 0; row < count; ++row) {
      scales[row] = scale_of(f, largest_here(x + row * n, n));
      if (shared) shared[row] = scales[row].exponent;
    }
  };
  if (length == kUsual) find(kUsual);
  else find(length);
  return Family::run(f, rule, x, static_cast<Out*>(out), count, length, words, scales);
}

struct Kernel {
  Span span;
  Rows rows;
  Columns columns;
};

template <class Family, class Out> Kernel kernel() {
  return {span<Family, Out>, rows<Family, Out>, columns<Family, Out>};
}

template <template <int> class Family> Kernel choose(int way, int output) {
  const auto of = [output](auto family) {
    using Chosen = decltype(family);
    return output == SWALP_FLOAT32 ? kernel<Chosen, float>()
           : output == SWALP_CODE8 ? kernel<Chosen, int8_t>()
                                   : kernel<Chosen, int16_t>();
  };
  switch (way) {
    case kNearest: return of(Family<kNearest>{});
    case kDirected: return of(Family<kDirected>{});
    case kFast16: return of(Family<kFast16>{});
    case kFast32: return of(Family<kFast32>{});
    case kSplit16: return of(Family<kSplit16>{});
    default: return of(Family<kSplit32>{});
  }
}

template <int way> using PlainSign = Plain<Sign, way>;

Kernel choose(const swalp_format& f, const swalp_rounding& r, int output) {
  int way = kNearest;
  if (r.rule == SWALP_STOCHASTIC) way = r.bits > 16 ? kSplit32 : kSplit16;
  else if (r.rule != SWALP_NEAREST) way = kDirected;
  if (f.kind == SWALP_BINARY) return choose<PlainSign>(way, output);
  const bool small = f.kind == SWALP_MINIFLOAT || static_cast<float>(-f.min_integer) <= Lanes::exact_limit;
  if (r.rule == SWALP_STOCHASTIC && r.bits >= 16 && small) way = r.bits == 16 ? kFast16 : kFast32;
  if (f.kind == SWALP_MINIFLOAT) return choose<Minifloats>(way, output);
  return choose<Gridded>(way, output);
}

}  // namespace
