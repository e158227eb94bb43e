// Codes back to the float32 values that they stand for.
#pragma once
#include "rounding.h"

namespace {

// The exponents of neighbours in memory: one that all share, or one for each.
struct Exponents {
  const int32_t* first;
  bool each;

  Exponents from(int64_t i) const { return {each ? first + i : first, each}; }
};

// Two powers of two whose product is 2**exponent, as far as float32 reaches.
struct Powers {
  F first, second;
  explicit Powers(I exponent) {
    const I e = Lanes::min(Lanes::max(exponent, Lanes::set(-252)), Lanes::set(252));
    const I half = Lanes::right<1>(e);
    first = power_of_two(half);
    second = power_of_two(Lanes::sub(e, half));
  }
};

// Reads integers times 2**gap.
struct Integers {
  const swalp_format& f;
  const M has_nan;
  const I nan_code;

  explicit Integers(const swalp_format& format)
      : f(format), has_nan(Lanes::all(f.has_nan)), nan_code(Lanes::set(f.nan_code)) {}

  Powers scale(I shared) const {
    return Powers(Lanes::max(Lanes::add(shared, Lanes::set(f.gap_offset)), Lanes::set(kLowestGap)));
  }
  inline __attribute__((always_inline)) F value(I code, const Powers& scale) const {
    const F v = Lanes::mul(Lanes::mul(Lanes::convert(code), scale.first), scale.second);
    const M nan = Lanes::both(has_nan, Lanes::equal(code, nan_code));
    return Lanes::select(nan, Lanes::set(__builtin_nanf("")), v);
  }
};

// Reads bit patterns: by arithmetic up to the largest finite value of most formats, else in a table.
template <class Code> struct Patterns {
  const swalp_format& f;
  const float* const table;
  // What `element` needs lies here, as what it stores could overwrite the format, as far as a compiler knows.
  const bool computes, has_more, is_signed;
  const int to_place, to_sign;  // shifts of the code
  const I size_bits, largest, lowest, first_normal;  // `largest`: code that is computed
  const F gap;

  Patterns(const swalp_format& format, const float* values)
      : f(format), table(values),
        computes(f.kind == SWALP_MINIFLOAT && f.has_zero && !f.fnuz && f.min_normal >= -126 &&
                 f.lowest_gap >= -126 && f.lowest_gap == f.min_normal - f.mantissa_bits),
        has_more(f.largest_code < sizes()), is_signed(f.is_signed), to_place(23 - f.mantissa_bits),
        to_sign(is_signed ? __builtin_clz(static_cast<uint32_t>(f.sign_code)) : 0),
        size_bits(Lanes::set(sizes())), largest(Lanes::set(f.largest_code)),
        lowest(Lanes::set((f.min_normal + 126) << 23)), first_normal(Lanes::set(1 << f.mantissa_bits)),
        gap(power_of_two(Lanes::set(f.lowest_gap))) {}

  Powers scale(I shared) const { return Powers(shared); }
  inline __attribute__((always_inline)) F value(I code, const Powers& scale) const {
    const F v = element(code);
    return f.blocked ? Lanes::mul(Lanes::mul(v, scale.first), scale.second) : v;
  }

 private:
  int32_t sizes() const { return f.is_signed ? f.sign_code - 1 : sizeof(Code) == 1 ? 0xff : 0xffff; }

  inline __attribute__((always_inline)) F element(I code) const {
    if (!computes) return look_up(code, table);
    const I size = Lanes::and_(code, size_bits);
    if (has_more && __builtin_expect(Lanes::any(Lanes::less(largest, size)), false)) return look_up(code, table);
    const F normal = Lanes::floats(Lanes::add(Lanes::left_by(size, to_place), lowest));
    const F v = Lanes::select(Lanes::less(size, first_normal), Lanes::mul(Lanes::convert(size), gap), normal);
    if (!is_signed) return v;
    const I sign = Lanes::and_(Lanes::left_by(code, to_sign), Lanes::set(INT32_MIN));
    return Lanes::floats(Lanes::or_(Lanes::bits(v), sign));
  }

  static F look_up(I code, const float* table) {
    int32_t codes[Lanes::N];
    float values[Lanes::N];
    Lanes::store(codes, code);
    for (int k = 0; k < Lanes::N; ++k)
      values[k] = table[sizeof(Code) == 1 ? static_cast<uint8_t>(codes[k]) : static_cast<uint16_t>(codes[k])];
    return Lanes::load(values);
  }
};

template <class Reader, class Code>
inline __attribute__((always_inline)) void read(const Reader& reader, const Code* codes, int64_t n,
                                                Exponents shared, float* out) {
  constexpr int N = Lanes::N;
  const auto scale = reader.scale(Lanes::set(reader.f.blocked ? *shared.first : 0));
  int64_t i = 0;
  if (shared.each)
    for (; i + N <= n; i += N)
      Lanes::store(out + i, reader.value(Lanes::load(codes + i), reader.scale(Lanes::load(shared.first + i))));
  else
    for (; i + N <= n; i += N) Lanes::store(out + i, reader.value(Lanes::load(codes + i), scale));
  if (i == n) return;
  Code from[N] = {};
  int32_t exponents[N] = {};
  float to[N];
  for (int k = 0; i + k < n; ++k) {
    from[k] = codes[i + k];
    if (shared.each) exponents[k] = shared.first[i + k];
  }
  const auto last = shared.each ? reader.scale(Lanes::load(exponents)) : scale;
  Lanes::store(to, reader.value(Lanes::load(from), last));
  for (int k = 0; i + k < n; ++k) out[i + k] = to[k];
}

template <class Code>
void decode(const swalp_format& f, const Code* codes, int64_t n, Exponents shared, const float* table,
            float* out) {
  if (table) read(Patterns<Code>(f, table), codes, n, shared, out);
  else read(Integers(f), codes, n, shared, out);
}

}  // namespace
