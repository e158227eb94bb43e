// Taking an iterate into an average that is itself kept in codes: Q_SWA, in place, block by block.
//
// Equal to `moving_mean` of `swalp.averaging` and then `pack`, bit for bit.
#pragma once
#include "optim.h"

namespace {

// X: what the iterate is kept in, codes or float32.
template <class X> struct RoundedAverage {
  static constexpr int values = 1;
  using Shared = Block<values>;

  const float moves;
  const swalp_rounded_average& p;
  const Role role;
  const swalp_format& x_format;

  RoundedAverage(const float& weight, const swalp_rounded_average& average)
      : moves(weight), p(average), role(average.role, SWALP_CODE8),
        x_format(average.x_format ? *average.x_format : average.role.format) {}

  void search(Shared&, int64_t, int64_t) const {}

  void step(Shared& b, int64_t begin, int64_t count, uint32_t*) const {
    const int64_t block = b.base / b.length;
    const Stored<X> iterate(x_format, p.x_exponents, block);
    const Stored<int8_t> average(role.format, p.exponents, block);
    const F weight = Lanes::set(moves);
    I most = Lanes::set(0);
    for (int64_t done = 0; done < count; done += kChunk) {
      const int64_t at = begin + done, left = count - done, n = left < kChunk ? left : kChunk;
      alignas(64) int8_t room[kChunk];
      alignas(64) X x_room[kRoom<X>];
      const int8_t* const kept = role.kept(p.average, b.base + at, n, room);
      const X* const x = x_codes(b.base + at, n, x_room);
      float* const next = b.kept[0] + at;
      vectors(n, [&, iterate, average](int64_t i, int64_t left, auto is_whole)
                     __attribute__((always_inline)) {
        constexpr bool whole = decltype(is_whole)::value;
        const F before = average.template get<whole>(kept + i, left);
        const F difference = Lanes::sub(iterate.template get<whole>(x + i, left), before);
        const F moved = Lanes::add(before, Lanes::mul(difference, weight));
        store<whole>(next + i, moved, left);
        most = Lanes::max_unsigned(most, order(moved));
      });
    }
    raise(&b.most[0], Lanes::largest_unsigned(most));
  }

  void keep(Shared& b, int64_t begin, int64_t count, uint32_t* buffer) const {
    const int32_t shared = shared_exponent(role.format, b.most[0]);
    for (int64_t done = 0; done < count; done += kChunk) {
      const int64_t at = begin + done, left = count - done, n = left < kChunk ? left : kChunk;
      role.template keep<int8_t>(b.kept[0] + at, p.average, b.base + at, n, shared, buffer);
    }
  }

  void finish(const Shared& b) const {
    keep_exponent(p.exponents, b.base / b.length, role.format, b.most[0]);
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
