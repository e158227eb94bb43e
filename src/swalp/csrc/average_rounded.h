// Taking an iterate into an average that is itself kept in codes: Q_SWA, in place, block by block.
//
// Equal to `moving_mean` of `swalp.averaging` and then `pack`, bit for bit.
#pragma once
#include "optim.h"

namespace {

// X: what the iterate is kept in, codes or float32.
template <class X> struct RoundedAverage {
  static constexpr int values = 1;
  static constexpr bool grouped = false;
  using Shared = Block<values>;

  const float moves;
  const swalp_rounded_average& p;
  const Role role;
  const swalp_format& x_format;

  RoundedAverage(const float& weight, const swalp_rounded_average& average)
      : moves(weight), p(average), role(average.role, SWALP_CODE8),
        x_format(average.x_format ? *average.x_format : average.role.format) {}

  Shared block(int64_t i) const {
    Shared b = {i * p.length, p.length};
    b.before[0] = exponent_of(p.exponents, i);
    return b;
  }

  void search(Shared&, int64_t, int64_t) const {}
  void survey(Shared&, int64_t, int64_t) const {}
  bool settled(const Shared&) const { return !role.format.blocked; }

  void step(Shared& b, int64_t begin, int64_t count, const Scratch<values>& to, uint32_t*) const {
    const Stored<X> iterate(x_format, exponent_of(p.x_exponents, b.base / b.length));
    const Stored<int8_t> average(role.format, b.before[0]);
    const F weight = Lanes::set(moves);
    I most = Lanes::set(0);
    chunks(begin, count, [&](int64_t at, int64_t n) {
      alignas(64) int8_t room[kChunk];
      alignas(64) X x_room[kRoom<X>];
      const int8_t* const kept = role.kept(p.average, b.base + at, n, room);
      const X* const x = x_codes(b.base + at, n, x_room);
      float* const next = to.of[0] + (at - begin);
      most = vectors(n, most, [=](int64_t i, int64_t left, auto is_whole, I so_far)
                                  __attribute__((always_inline)) {
        constexpr bool whole = decltype(is_whole)::value;
        const F before = average.template get<whole>(kept + i, left);
        const F difference = Lanes::sub(iterate.template get<whole>(x + i, left), before);
        const F moved = Lanes::add(before, Lanes::mul(difference, weight));
        store<whole>(next + i, moved, left);
        return Lanes::max_unsigned(so_far, twice_bits(moved));
      });
    });
    b.most[0].raise(largest_of(most, to.of[0], count));
  }

  void keep(Shared& b, int64_t begin, int64_t count, const Scratch<values>& from, const Raised* most,
            uint32_t* buffer) const {
    const Scale scale = scale_of(role.format, most[0].value());
    chunks(begin, count, [&](int64_t at, int64_t n) {
      role.template keep<int8_t>(from.of[0] + (at - begin), p.average, b.base + at, n, scale, buffer);
    });
  }

  void finish(const Shared& b, const Raised* most) const {
    keep_exponent(p.exponents, b.base / b.length, role.format, most[0]);
  }

 private:
  const X* x_codes(int64_t at, int64_t n, X* room) const {
    if constexpr (sizeof(X) == 1) {
      if (p.x_halved) {
        split_halves(static_cast<const uint8_t*>(p.x) + at / 2, n, true, room);
        return room;
      }
    }
    return static_cast<const X*>(p.x) + at;
  }
};

int average_rounded(float weight, const swalp_rounded_average* average, int threads) {
  return average->x_format ? optimize<RoundedAverage<int8_t>>(weight, average, 1, threads)
                           : optimize<RoundedAverage<float>>(weight, average, 1, threads);
}

}  // namespace
