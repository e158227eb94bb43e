// One vector of elements onto the values of a format: the heart of every kernel.
//
// Stochastic rounding takes |x| / gap = s = w + f up if U + 1/2 < 2**n * f, for n random bits U.
// If n = 16 + m, the upper 16 bits H of U decide unless H <= 2**16 * f < H + 1: once in 2**16. Then
// r = 2**16 * f - H is rounded up if L + 1/2 < 2**m * r, for the lower bits L of U.
#pragma once
#include "noise.h"

namespace {

using F = Lanes::F;
using I = Lanes::I;
using M = Lanes::M;

// How to round. Fast16, Fast32: stochastic with s up to Lanes::exact_limit, in one shift; Fast16 with
// 16 random bits exactly. Split16, Split32: stochastic in general. The number is that of the most bits.
enum Way { kNearest, kDirected, kFast16, kFast32, kSplit16, kSplit32 };

// The random bits of a vector of elements.
struct Random {
  I upper;  // the upper 16
  const Words& words;
  int64_t at;

  // The lower 16, of the lanes where it is true.
  inline __attribute__((always_inline)) I lower(M wanted) const {
    int32_t bits[Lanes::N];
    Lanes::store(bits, Lanes::select(wanted, Lanes::set(1), Lanes::set(0)));
    for (int k = 0; k < Lanes::N; ++k)
      if (bits[k])
        bits[k] = static_cast<int32_t>(lower_half(*words.noise, words.element(words.at + at + k)));
    return Lanes::load(bits);
  }
};

I twice_plus_one(I v) { return Lanes::or_(Lanes::left<1>(v), Lanes::set(1)); }

F power_of_two(I exponent) {
  return Lanes::floats(Lanes::left<23>(Lanes::add(exponent, Lanes::set(127))));
}

// The code of NaN where x is one, which is one more `seen`.
I or_nan(I nan_code, M nan, I code, M& seen) {
  seen = Lanes::either(seen, nan);
  return Lanes::select(nan, nan_code, code);
}
I or_nan(const swalp_format& f, M nan, I code, M& seen) { return or_nan(Lanes::set(f.nan_code), nan, code, seen); }

// The rounding rule, ready to use.
struct Rule {
  bool truncates, up_if_positive, up_if_negative;
  int shift;    // U, or L where there is one, is a half word >> shift
  float twice;  // 2 << the bits of that

  explicit Rule(const swalp_rounding& r) {
    truncates = r.rule == SWALP_ZERO;
    up_if_positive = r.rule == SWALP_POSITIVE;
    up_if_negative = r.rule == SWALP_NEGATIVE;
    shift = (r.bits > 16 ? 32 : 16) - r.bits;
    twice = static_cast<float>(2 << (16 - shift));
  }
};

// Whether the lower bits take r, in [0, 1), up, where `undecided`.
inline __attribute__((always_inline)) M lower_takes_up(F r, M undecided, const Random& random,
                                                       const Rule& rule) {
  const I odd = twice_plus_one(Lanes::right_unsigned_by(random.lower(undecided), rule.shift));  // 2 L + 1
  return Lanes::both(undecided, Lanes::less(Lanes::convert(odd), Lanes::mul(r, Lanes::set(rule.twice))));
}

// s >= 0 to an integer, for s <= 2**24. `x`: the number itself, for its sign and because s may have
// become 0 for an x that is not.
template <int way>
inline __attribute__((always_inline)) I round_magnitude(F s, F x, const Random& random, const Rule& rule) {
  if constexpr (way == kNearest) {
    return Lanes::nearest(s);
  } else if constexpr (way == kDirected) {
    const I whole = Lanes::truncate(s);
    const M inexact = Lanes::either(
        Lanes::less(Lanes::convert(whole), s),
        Lanes::without(Lanes::equal(whole, Lanes::set(0)), Lanes::equal(x, Lanes::set(0.0f))));
    const M sign = Lanes::sign(x);
    const M up = Lanes::either(Lanes::both(sign, Lanes::all(rule.up_if_negative)),
                               Lanes::without(Lanes::all(rule.up_if_positive), sign));
    return Lanes::increment(Lanes::both(inexact, up), whole);
  } else {
    // f = s - w is exact, and every product with a power of two.
    const I whole = Lanes::truncate(s);
    const F f = Lanes::sub(s, Lanes::convert(whole));
    if constexpr (way == kSplit16) {
      const I odd = twice_plus_one(Lanes::right_unsigned_by(random.upper, rule.shift));  // 2 U + 1
      const M up = Lanes::less(Lanes::convert(odd), Lanes::mul(f, Lanes::set(rule.twice)));
      return Lanes::increment(up, whole);
    }
    // r is exact where it is in [0, 1), and elsewhere on the right side of that.
    const F r = Lanes::sub(Lanes::mul(f, Lanes::set(0x1p16f)), Lanes::convert(random.upper));
    const M below = Lanes::less(r, Lanes::set(1.0f));
    M up = Lanes::without(Lanes::all(true), below);
    const M undecided = Lanes::without(below, Lanes::less(r, Lanes::set(0.0f)));
    if (__builtin_expect(Lanes::any(undecided), false))
      up = Lanes::either(up, lower_takes_up(r, undecided, random, rule));
    return Lanes::increment(up, whole);
  }
}

// The same for kFast16 and kFast32: |x| = `size` to the integer s, where `scale` takes it to 2**16 * s.
template <int way>
inline __attribute__((always_inline)) I shifted(F size, F scale, const Random& random, const Rule& rule) {
  const I down = Lanes::sub(Lanes::set(0xffff), random.upper);
  if constexpr (way == kFast16) {
    // K = ceil(2**16 * s - 1/2) = 2**16 * w + k and q = (K + 2**16 - 1 - U) >> 16 = w + [k > U],
    // as 0 <= k + 2**16 - 1 - U < 2**17.
    return Lanes::right<16>(Lanes::add(Lanes::ceil_minus_half(size, scale), down));
  } else {
    // The same sum for H, with the integer K = floor(2**16 * s), as H < k or not. It is undecided
    // where H = k: where the sum ends in ones.
    const F large = Lanes::mul(size, scale);
    const I k = Lanes::truncate(large);
    const I sum = Lanes::add(k, down);
    const I steps = Lanes::right<16>(sum);
    if (__builtin_expect(!Lanes::any_low_ones(sum), true)) return steps;
    const M undecided = Lanes::equal(Lanes::and_(sum, Lanes::set(0xffff)), Lanes::set(0xffff));
    const F r = Lanes::sub(large, Lanes::convert(k));
    return Lanes::increment(lower_takes_up(r, undecided, random, rule), steps);
  }
}

// Below this gap every nonzero float32 is a multiple of 2**24 gaps: only blocks without a finite
// nonzero element have it, and of them only infinities are not 0: 2**24 gaps, which underflow.
constexpr int32_t kLowestGap = -226;
constexpr int32_t kOrdinaryGap = 100;  // magnitude of the largest gap exponent that is not extreme

// Integers times 2**gap, clamped: fixed point, block floating point.
//
// An ordinary gap is applied with one factor each way. An extreme one (below) first moves x to where
// every factor is a normal float32: exactly, or where the bits lost are too small to matter. Bounded
// and BoundedEvenly: an ordinary gap, and a `Scale` that is bounded; evenly if the lowest integer is
// that of the highest. Neither has to look for NaN.
enum Range { kOrdinary, kExtreme, kBounded, kBoundedEvenly };

template <int way, int range> struct Grid {
  static constexpr bool stochastic = way >= kFast16, simple = true;
  static constexpr bool fast = way == kFast16 || way == kFast32;
  static constexpr bool extreme = range == kExtreme, bounded = range >= kBounded;
  static constexpr bool fours = Lanes::fours && fast && bounded;

  const swalp_format& f;
  const Rule rule;
  F before, after, low, high, scale, gap;
  M vanishing;

  // `g`: the gap's exponent, of each lane; at least kLowestGap.
  Grid(const swalp_format& format, const Rule& r, I g) : f(format), rule(r) {
    I moved = g;
    if constexpr (extreme) {
      const M inside = Lanes::both(Lanes::less(g, Lanes::set(kOrdinaryGap + 1)),
                                   Lanes::less(Lanes::set(-kOrdinaryGap - 1), g));
      const M tiny = Lanes::less(g, Lanes::set(0));
      const I k = Lanes::select(inside, Lanes::set(0),
                                Lanes::select(tiny, Lanes::set(126), Lanes::set(-30)));
      before = power_of_two(k);
      after = power_of_two(Lanes::sub(Lanes::set(0), k));
      moved = Lanes::add(g, k);
      vanishing = Lanes::less(g, Lanes::set(kLowestGap + 1));
    }
    const F lowest = Lanes::select(Lanes::less(g, Lanes::set(f.symmetric_from)),
                                   Lanes::set(static_cast<float>(f.min_integer)),
                                   Lanes::set(static_cast<float>(-f.max_integer)));
    gap = power_of_two(moved);
    low = Lanes::mul(lowest, gap);
    high = Lanes::mul(Lanes::set(static_cast<float>(f.max_integer)), gap);
    scale = power_of_two(Lanes::sub(Lanes::set(fast ? 16 : 0), moved));
  }

  inline __attribute__((always_inline)) F magnitude(F moved) const {
    if constexpr (range == kBoundedEvenly) return Lanes::smaller_magnitude(moved, high);
    if constexpr (range == kBounded) return Lanes::abs(Lanes::min(moved, high));
    return Lanes::abs(Lanes::min(Lanes::max(moved, low), high));
  }

  // The codes, of a byte, of four vectors, if `fours`. False, and nothing written: where the lower bits must
  // decide.
  template <class V>
  inline __attribute__((always_inline)) bool codes(const float* x, const uint16_t* upper, int8_t* out) const {
    I k[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const F v = V::load(x + i * V::N);
      // What is clamped above is so as a code.
      const F size = range == kBoundedEvenly ? V::smaller_magnitude(v, high) : V::abs(v);
      if constexpr (way == kFast16) k[i] = V::ceil_above(size, scale);
      else k[i] = V::floor_above(size, scale);
    }
    return V::round_up(x, k, upper, way == kFast32, f.max_integer, out);
  }

  // The value of x, for kFast16, if `bounded` and of codes of a byte: a little less to do than in general.
  inline __attribute__((always_inline)) F value_of_code(F x, I upper) const {
    const I steps = Lanes::right<16>(Lanes::sub(Lanes::ceil_above(magnitude(x), scale), upper));
    return Lanes::product_with_sign(x, steps, gap);
  }

  inline __attribute__((always_inline)) I integers(F x, const Random& random) const {
    F moved = x;
    if constexpr (extreme) moved = Lanes::mul(x, before);
    if constexpr (way == kNearest) {
      if constexpr (range != kBounded) moved = Lanes::max(moved, low);
      return Lanes::nearest(Lanes::mul(Lanes::min(moved, high), scale));
    }
    const F size = magnitude(moved);
    const I steps = fast ? shifted<way>(size, scale, random, rule)
                         : round_magnitude<way>(Lanes::mul(size, scale), x, random, rule);
    return Lanes::with_sign(x, steps);
  }

  inline __attribute__((always_inline)) F value(F x, const Random& random) const {
    if constexpr (fast && !extreme) {
      const F v = Lanes::product_with_sign(x, shifted<way>(magnitude(x), scale, random, rule), gap);
      return bounded ? v : Lanes::keep_nan(x, v);
    }
    F v = Lanes::mul(Lanes::convert(integers(x, random)), gap);
    if constexpr (extreme) v = Lanes::add(Lanes::mul(v, after), Lanes::set(0.0f));  // no -0
    return bounded ? v : Lanes::keep_nan(x, v);
  }

  inline __attribute__((always_inline)) I code(F x, const Random& random, M& seen) const {
    I q = integers(x, random);
    if constexpr (bounded) return q;
    // Only infinities are not 0 there, and their values vanish in float32.
    if constexpr (extreme) q = Lanes::select(vanishing, Lanes::set(0), q);
    return or_nan(f, Lanes::is_nan(x), q, seen);
  }
};

// Values of a minifloat times 2**shared.
template <int way> struct Mini {
  static constexpr bool stochastic = way >= kFast16, simple = false, fours = false;

  const swalp_format& f;
  const Rule rule;
  const I shared;

  Mini(const swalp_format& format, const Rule& r, I e) : f(format), rule(r), shared(e) {}

  struct Rounded {
    I steps, gap;  // |x| = steps * 2**(gap - 127) before overflow, relative to 2**shared
  };

  inline __attribute__((always_inline)) Rounded round(F x, const Random& random) const {
    const I size = Lanes::and_(Lanes::bits(x), Lanes::set(0x7fffffff));
    const M subnormal = Lanes::less(size, Lanes::set(0x00800000));
    // The bits of a float32 with an exponent field wide enough that none is subnormal: the number
    // size * 2**-149, from the bits of the float32 `size`.
    I extended = Lanes::select(
        subnormal, Lanes::sub(Lanes::bits(Lanes::convert(size)), Lanes::set(149 << 23)), size);
    extended = Lanes::max(extended, Lanes::set(-(100 << 23)));  // of 0: below all, and no overflow
    const I relative = Lanes::sub(extended, Lanes::left<23>(shared));
    const I field = Lanes::right<23>(relative);  // floor(log2) + 127
    const M normal = Lanes::less(Lanes::set(f.min_normal + 126), field);
    const I gap = Lanes::select(normal, Lanes::sub(field, Lanes::set(f.mantissa_bits)),
                                Lanes::set(f.lowest_gap + 127));
    // s = |x| / 2**(gap + shared) by giving the significand its exponent. Below 2**-60 it makes no
    // difference by how much.
    const I exponent = Lanes::max(Lanes::sub(field, gap), Lanes::set(-60));
    F s = Lanes::floats(Lanes::or_(Lanes::and_(relative, Lanes::set(0x007fffff)),
                                   Lanes::left<23>(Lanes::add(exponent, Lanes::set(127)))));
    s = Lanes::select(Lanes::equal(size, Lanes::set(0)), Lanes::set(0.0f), s);
    I steps = round_magnitude<way>(s, x, random, rule);
    if constexpr (way == kNearest) {
      if (f.mantissa_bits == 0) {
        // Neighbours are exponent fields: of 2**e and 2**(e+1) the even one is nearer to 1.5 * 2**e.
        const I odd = Lanes::and_(Lanes::add(field, Lanes::set(f.bias - 127)), Lanes::set(1));
        const M tie = Lanes::both(normal, Lanes::equal(s, Lanes::set(1.5f)));
        steps = Lanes::select(tie, Lanes::add(Lanes::set(1), odd), steps);
      }
    }
    return {steps, gap};
  }

  // Where rounding stops at the largest value instead of overflowing.
  M truncates(F x) const {
    const M sign = Lanes::sign(x);
    const M positive = Lanes::all(rule.up_if_positive), negative = Lanes::all(rule.up_if_negative);
    const M directed = Lanes::either(Lanes::both(positive, sign), Lanes::without(negative, sign));
    return Lanes::either(Lanes::all(way == kDirected && rule.truncates), directed);
  }

  inline __attribute__((always_inline)) F value(F x, const Random& random) const {
    const Rounded r = round(x, random);
    // In two factors, as 2**gap may be no normal float32. The product is exact, or infinite.
    const I exponent = Lanes::sub(r.gap, Lanes::set(127));
    const I half = Lanes::right<1>(exponent);
    F v = Lanes::mul(Lanes::convert(r.steps), power_of_two(half));
    v = Lanes::mul(v, power_of_two(Lanes::sub(exponent, half)));
    const F largest = Lanes::set(f.largest);
    const M infinite = Lanes::equal(Lanes::abs(x), infinity());
    const M above = Lanes::less(largest, v);
    v = Lanes::select(Lanes::either(above, infinite), largest, v);
    if (!f.saturating) {
      const F beyond = f.overflow_is_nan ? not_a_number() : infinity();
      v = Lanes::select(Lanes::either(Lanes::without(above, truncates(x)), infinite), beyond, v);
    }
    if (!f.has_zero) v = Lanes::max(Lanes::set(f.smallest), v);
    if (f.is_signed) {
      M sign = Lanes::sign(x);
      if (f.fnuz) sign = Lanes::without(sign, Lanes::equal(v, Lanes::set(0.0f)));
      v = Lanes::select(sign, Lanes::floats(Lanes::or_(Lanes::bits(v), Lanes::set(INT32_MIN))), v);
    } else {
      v = Lanes::select(Lanes::less(x, Lanes::set(0.0f)), not_a_number(), v);
    }
    if (f.blocked) v = Lanes::mul(v, scale());
    return Lanes::keep_nan(x, v);
  }

  inline __attribute__((always_inline)) I code(F x, const Random& random, M& seen) const {
    const Rounded r = round(x, random);
    // Codes count the values. In the units of the lowest gap a normal value's code is its exponent
    // above that, and the steps, which bring the hidden bit as one more exponent.
    const I field = Lanes::sub(r.gap, Lanes::set(f.min_normal - f.mantissa_bits + 127));
    I code = Lanes::add(Lanes::left_by(field, f.mantissa_bits), r.steps);
    if (f.lowest_gap == f.min_normal && f.mantissa_bits > 0) {
      // Without subnormals the gap below the smallest normal value is that value: step 1 is its code.
      const M below = Lanes::both(Lanes::equal(r.gap, Lanes::set(f.lowest_gap + 127)),
                                  Lanes::less(r.steps, Lanes::set(2)));
      code = Lanes::select(below, Lanes::left_by(r.steps, f.mantissa_bits), code);
    }
    if (!f.has_zero) code = Lanes::max(Lanes::sub(code, Lanes::set(1)), Lanes::set(0));
    const I largest = Lanes::set(f.largest_code);
    const M infinite = Lanes::equal(Lanes::abs(x), infinity());
    const M above = Lanes::less(largest, code);
    code = Lanes::select(Lanes::either(above, infinite), largest, code);
    M nan = Lanes::is_nan(x);
    if (!f.saturating) {
      const M beyond = Lanes::either(Lanes::without(above, truncates(x)), infinite);
      if (f.overflow_is_nan) nan = Lanes::either(nan, beyond);
      else code = Lanes::select(beyond, Lanes::set(f.inf_code), code);
    }
    M sign = Lanes::sign(x);
    if (!f.is_signed) nan = Lanes::either(nan, Lanes::less(x, Lanes::set(0.0f)));
    if (f.fnuz) sign = Lanes::without(sign, Lanes::equal(code, Lanes::set(0)));
    code = Lanes::or_(code, Lanes::select(sign, Lanes::set(f.sign_code), Lanes::set(0)));
    return or_nan(f, nan, code, seen);
  }

  static F infinity() { return Lanes::floats(Lanes::set(0x7f800000)); }
  static F not_a_number() { return Lanes::floats(Lanes::set(0x7fc00000)); }

  // 2**shared; -127 is the one exponent of a subnormal float32.
  F scale() const {
    const M lowest = Lanes::less(shared, Lanes::set(-126));
    return Lanes::select(lowest, Lanes::floats(Lanes::set(1 << 22)), power_of_two(shared));
  }
};

// The same of the usual kind: each value is an integer of `mantissa_bits + 1` bits times a gap that is a
// normal float32, as its inverse is, and what is beyond the largest becomes that.
template <int way> struct Usual {
  static constexpr bool stochastic = way >= kFast16, simple = false, fours = false;
  static constexpr bool fast = way == kFast16 || way == kFast32;

  const swalp_format& f;
  const Rule rule;
  // Of the format, which what is stored could overwrite, as far as a compiler knows.
  const bool is_signed;
  const int to_code;  // shift of a field
  const I nan_code, sign_code, hidden;  // `hidden`: bits that take a field to that of its gap
  I lowest, inverse;  // bits of 2**e for the smallest normal value, and of scale * 2**e for all
  F high;

  Usual(const swalp_format& format, const Rule& r, I shared)
      : f(format), rule(r), is_signed(f.is_signed), to_code(23 - f.mantissa_bits), nan_code(Lanes::set(f.nan_code)),
        sign_code(Lanes::set(f.sign_code)), hidden(Lanes::set(f.mantissa_bits << 23)) {
    const I up = Lanes::left<23>(shared);
    lowest = Lanes::add(Lanes::set((f.min_normal + 127) << 23), up);
    high = Lanes::floats(Lanes::add(Lanes::bits(Lanes::set(f.largest)), up));
    inverse = Lanes::set(static_cast<int32_t>(uint32_t{254} + (fast ? 16 : 0) + f.mantissa_bits) << 23);
  }

  // Whether a format is one, with shared exponents from `least` to `most`.
  static bool holds(const swalp_format& f, int32_t least, int32_t most) {
    uint32_t bits;
    __builtin_memcpy(&bits, &f.largest, 4);
    const int32_t top = static_cast<int32_t>(bits >> 23);
    return f.saturating && f.has_zero && !f.fnuz && f.mantissa_bits > 0 &&
           f.lowest_gap == f.min_normal - f.mantissa_bits &&
           (!fast || static_cast<float>(2 << f.mantissa_bits) <= Lanes::exact_limit) &&
           f.min_normal + 127 + least > 16 + f.mantissa_bits && top + most < 255;
  }

  struct Rounded {
    I steps, field;  // |x| = steps * 2**-mantissa_bits times the power of two that has the bits `field`
  };

  inline __attribute__((always_inline)) Rounded round(F x, const Random& random) const {
    const F size = Lanes::min(Lanes::abs(x), high);
    const I field = Lanes::max(Lanes::and_(Lanes::bits(size), Lanes::set(0x7f800000)), lowest);
    const F scale = Lanes::floats(Lanes::sub(inverse, field));
    if constexpr (way == kNearest) return {Lanes::nearest(Lanes::mul(size, scale)), field};
    return {shifted<way>(size, scale, random, rule), field};
  }

  inline __attribute__((always_inline)) F value(F x, const Random& random) const {
    const Rounded r = round(x, random);
    F v = Lanes::mul(Lanes::convert(r.steps), Lanes::floats(Lanes::sub(r.field, hidden)));
    if (is_signed) v = Lanes::floats(Lanes::or_(Lanes::bits(v), Lanes::and_(Lanes::bits(x), Lanes::set(INT32_MIN))));
    else v = Lanes::select(Lanes::less(x, Lanes::set(0.0f)), Lanes::floats(Lanes::set(0x7fc00000)), v);
    return Lanes::keep_nan(x, v);
  }

  inline __attribute__((always_inline)) I code(F x, const Random& random, M& seen) const {
    const Rounded r = round(x, random);
    // Codes count the values: an exponent more is 2**mantissa_bits more.
    I code = Lanes::add(Lanes::right_unsigned_by(Lanes::sub(r.field, lowest), to_code), r.steps);
    M nan = Lanes::is_nan(x);
    if (is_signed) code = Lanes::or_(code, Lanes::select(Lanes::sign(x), sign_code, Lanes::set(0)));
    else nan = Lanes::either(nan, Lanes::less(x, Lanes::set(0.0f)));
    return or_nan(nan_code, nan, code, seen);
  }
};

// The two values ±largest.
template <int way> struct Sign {
  static constexpr bool stochastic = way >= kFast16, simple = false, fours = false;

  const swalp_format& f;
  const Rule rule;
  F before, scale;

  Sign(const swalp_format& format, const Rule& r, I) : f(format), rule(r) {
    // |x| / largest in two steps, as 1 / largest may be no float32.
    const int32_t exponent = f.gap_offset;  // of largest
    before = power_of_two(Lanes::set(-(exponent / 2)));
    scale = power_of_two(Lanes::set(exponent / 2 - exponent));
  }

  inline __attribute__((always_inline)) M negative(F x, const Random& random) const {
    const M sign = Lanes::less(x, Lanes::set(0.0f));
    if constexpr (way == kNearest) return sign;
    const M beyond = Lanes::without(Lanes::all(true), Lanes::less(Lanes::abs(x), Lanes::set(f.largest)));
    if constexpr (way == kDirected) {
      const M above = Lanes::both(sign, beyond);
      const M below = Lanes::either(sign, Lanes::without(Lanes::all(true), beyond));
      return rule.up_if_positive ? above : below;
    } else {
      // The sign flips if U + 1/2 < 2**n * (1 - s) / 2: if 2**(n + 1) * s < 2 * (2**n - 1 - 2 U).
      F s = Lanes::mul(Lanes::mul(Lanes::abs(x), before), scale);
      s = Lanes::select(beyond, Lanes::set(0.0f), s);
      const auto less_than = [this](F y, int32_t from, I u) {  // twice * y < 2 * (from - 2 u)
        const I limit = Lanes::sub(Lanes::set(2 * from), Lanes::left<2>(u));
        return Lanes::less(Lanes::mul(y, Lanes::set(rule.twice)), Lanes::convert(limit));
      };
      const int32_t all = 1 << (16 - rule.shift);
      M flip;
      if constexpr (way == kSplit16) {
        flip = less_than(s, all - 1, Lanes::right_unsigned_by(random.upper, rule.shift));
      } else {
        // With a = 2**16 - 2 - 2 H and y = 2**16 * s - a, that is 2**m * y < 2**(m + 1) - 1 - 2 L, whose
        // right side lies between 0 and 2 * 2**m. y is exact where it does.
        const I a = Lanes::sub(Lanes::set(0xfffe), Lanes::left<1>(random.upper));
        const F y = Lanes::sub(Lanes::mul(s, Lanes::set(0x1p16f)), Lanes::convert(a));
        const M below = Lanes::less(y, Lanes::set(2.0f));
        const M undecided = Lanes::both(below, Lanes::less(Lanes::set(0.0f), y));
        flip = Lanes::without(below, undecided);
        if (__builtin_expect(Lanes::any(undecided), false)) {
          const I l = Lanes::right_unsigned_by(random.lower(undecided), rule.shift);
          flip = Lanes::either(flip, Lanes::both(undecided, less_than(y, 2 * all - 1, l)));
        }
      }
      flip = Lanes::without(flip, beyond);
      return Lanes::either(Lanes::without(sign, flip), Lanes::without(flip, sign));
    }
  }

  inline __attribute__((always_inline)) F value(F x, const Random& random) const {
    const F v = Lanes::select(negative(x, random), Lanes::set(-f.largest), Lanes::set(f.largest));
    return Lanes::keep_nan(x, v);
  }

  inline __attribute__((always_inline)) I code(F x, const Random& random, M& seen) const {
    const I code = Lanes::select(negative(x, random), Lanes::set(0), Lanes::set(1));
    return or_nan(f, Lanes::is_nan(x), code, seen);
  }
};

}  // namespace
