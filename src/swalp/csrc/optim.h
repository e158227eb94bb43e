// Optimizer steps on packed parameters: codes in, codes out, in place, in a scratch of fixed size.
//
// A parameter is worked off block by block. A short block: the gradient's exponent; the step in
// float32, with the largest magnitudes of what will be kept; then their codes. Of a long block the
// exponents come first, by a look at all of it, and then the steps and the codes of one chunk after
// another. The shortest go many at a time. Equal to `sgd_step` and `adam_step` of `swalp.optim` in the
// arithmetic of PyTorch's vector units, in which x + alpha * y is one fused operation.
#pragma once
#include <float.h>
#include <math.h>
#include <string.h>

#include <type_traits>
#include <vector>

#include "decode.h"
#include "halves.h"
#include "layout.h"
#include "scratch.h"

namespace {

// One role at one parameter.
struct Role {
  const swalp_format& format;
  const Rule rule;
  const Noise noise;
  const Kernel kernel;
  const bool halved;
  const float* const table;
  const bool in_byte;  // what is bounded can be rounded with `value_of_code`

  Role(const swalp_role& role, int output)
      : format(role.format), rule(role.rounding), noise(role.rounding),
        kernel(choose(role.format, role.rounding, output)), halved(role.halved), table(role.table),
        in_byte(format.kind == SWALP_GRID && format.min_integer >= -128 && format.max_integer <= 127 &&
                role.rounding.rule == SWALP_STOCHASTIC && role.rounding.bits == 16) {}

  bool span(const float* x, void* out, int64_t at, int64_t n, Scale scale, uint32_t* buffer) const {
    return kernel.span(format, rule, x, out, n, fill(noise, at, n, buffer), scale);
  }

  // The numbers from element `at` of what is kept on: there, or split into `room`.
  template <class Kept> const Kept* kept(const void* all, int64_t at, int64_t n, Kept* room) const {
    if constexpr (sizeof(Kept) == 1) {
      if (halved) {
        split_halves(static_cast<const uint8_t*>(all) + at / 2, n, true, room);
        return room;
      }
    }
    return static_cast<const Kept*>(all) + at;
  }

  // What `round` writes, n numbers, goes to their places from element `at` of what is kept on.
  template <class Kept, class Round>
  bool place(void* all, int64_t at, int64_t n, const Round& round) const {
    if constexpr (sizeof(Kept) == 1) {
      if (halved) {
        alignas(64) int8_t codes[kChunk];
        const bool lost = round(codes);
        join_halves(codes, n, static_cast<uint8_t*>(all) + at / 2);
        return lost;
      }
    }
    return round(static_cast<Kept*>(all) + at);
  }

  // Rounds n numbers to their places from element `at` of what is kept on.
  template <class Kept>
  bool keep(const float* x, void* all, int64_t at, int64_t n, Scale scale, uint32_t* buffer) const {
    return place<Kept>(all, at, n, [&](void* out) { return span(x, out, at, n, scale, buffer); });
  }

  // The values from element `at` of what is kept on: there, or in `room`.
  template <class Kept>
  const float* values(const void* all, int64_t at, int64_t n, Exponents exponents, float* room) const {
    if constexpr (sizeof(Kept) == 4) return static_cast<const float*>(all) + at;
    alignas(64) int8_t codes[kChunk];
    decode(format, kept<int8_t>(all, at, n, codes), n, exponents, table, room);
    return room;
  }

  // Rounds blocks of `length` neighbours, kChunk elements at most, from element `at` of what is rounded on.
  // `exponents`: of all blocks.
  bool rows(const float* x, void* out, int64_t at, int64_t count, int64_t length, int8_t* exponents,
            uint32_t* buffer) const {
    const int64_t n = count * length;
    if (!format.blocked) return span(x, out, at, n, {}, buffer);
    int32_t shared[kChunk];
    const bool lost = kernel.rows(format, rule, x, out, count, length, fill(noise, at, n, buffer), shared);
    if (exponents)
      for (int64_t i = 0; i < count; ++i) exponents[at / length + i] = static_cast<int8_t>(shared[i]);
    return lost;
  }

  // The same to their places.
  template <class Kept>
  bool keep_rows(const float* x, void* all, int64_t at, int64_t count, int64_t length, int8_t* exponents,
                 uint32_t* buffer) const {
    return place<Kept>(all, at, count * length,
                       [&](void* out) { return rows(x, out, at, count, length, exponents, buffer); });
  }
};

// Elements of a chunk that may have to be split into codes of a byte.
template <class Kept> constexpr int64_t kRoom = sizeof(Kept) == 1 ? kChunk : 1;

// A vector from memory. The last one of a stretch may not be `whole`: n elements are there, and the
// others count as 0.
template <bool whole, class T>
inline __attribute__((always_inline)) auto load(const T* from, int64_t n) {
  if constexpr (whole) return Lanes::load(from);
  T copy[Lanes::N] = {};
  for (int64_t k = 0; k < n; ++k) copy[k] = from[k];
  return Lanes::load(copy);
}

template <bool whole>
inline __attribute__((always_inline)) void store(float* to, F v, int64_t n) {
  if constexpr (whole) return Lanes::store(to, v);
  float copy[Lanes::N];
  Lanes::store(copy, v);
  for (int64_t k = 0; k < n; ++k) to[k] = copy[k];
}

// state = body(i, n, whole, state) for each vector of n elements. What goes from one vector to the next
// is a value, as what a body refers to would be written to memory each time.
template <class State, class Body>
inline __attribute__((always_inline)) State vectors(int64_t n, State state, const Body& body) {
  int64_t i = 0;
  for (; i + Lanes::N <= n; i += Lanes::N) state = body(i, n - i, std::true_type(), state);
  return i < n ? body(i, n - i, std::false_type(), state) : state;
}

// Numbers of a block as they are kept: floats on their grid, or codes. `plain`: without an extreme
// exponent, and none of them NaN.
template <class Kept> struct Stored;

template <> struct Stored<float> {
  static constexpr int output = SWALP_FLOAT32;
  Stored(const swalp_format&, int32_t) {}
  bool are_plain(const float*, int64_t) const { return true; }
  bool are_scaled(float) const { return true; }
  template <bool> F scaled(float factor) const { return Lanes::set(factor); }
  template <bool whole, bool plain = false> F get(const float* from, int64_t n) const {
    return load<whole>(from, n);
  }
  template <bool whole, bool> F times(const float* from, int64_t n, F factor) const {
    return Lanes::mul(load<whole>(from, n), factor);
  }
};

template <> struct Stored<int8_t> {
  static constexpr int output = SWALP_CODE8;
  int32_t gap;
  bool has_nan, extreme;
  int nan_code;
  I nan;
  F first, second;  // 2**gap is `first`, or if `extreme` their product: with a code, exact
  Stored(const swalp_format& f, int32_t shared)
      : gap(gap_of(f, shared)), has_nan(f.has_nan), nan_code(f.nan_code), nan(Lanes::set(f.nan_code)) {
    extreme = gap < -126 || gap > 126;
    const int32_t half = extreme ? gap / 2 : gap;
    first = power_of_two(Lanes::set(half));
    second = power_of_two(Lanes::set(gap - half));
  }
  bool are_plain(const int8_t* from, int64_t n) const {
    if (extreme || !has_nan) return !extreme;
    int8_t lowest = INT8_MAX;  // NaN has the lowest code
    for (int64_t i = 0; i < n; ++i) lowest = from[i] < lowest ? from[i] : lowest;
    return lowest != nan_code;
  }
  // Whether 2**gap times that is a normal number, or 0: what makes codes values can take it along, as it is
  // exact, and rounds the product of all three once.
  bool are_scaled(float factor) const {
    uint32_t bits;
    memcpy(&bits, &factor, sizeof bits);
    const int32_t field = bits >> 23 & 0xff;  // of the exponent
    return factor == 0 || (field > 0 && field < 255 && field + gap > 0 && field + gap < 255);
  }
  // The factor for `times`, which multiplies values by it.
  template <bool plain> F scaled(float factor) const {
    return plain ? Lanes::mul(first, Lanes::set(factor)) : Lanes::set(factor);
  }
  template <bool whole, bool plain> F times(const int8_t* from, int64_t n, F factor) const {
    if constexpr (plain) return Lanes::mul(Lanes::convert(load<whole>(from, n)), factor);
    return Lanes::mul(get<whole>(from, n), factor);
  }
  template <bool whole, bool plain = false> F get(const int8_t* from, int64_t n) const {
    const I code = load<whole>(from, n);
    F value = Lanes::mul(Lanes::convert(code), first);
    if (plain) return value;
    if (extreme) value = Lanes::mul(value, second);
    if (!has_nan) return value;
    return Lanes::select(Lanes::equal(code, nan), Lanes::floats(Lanes::set(0x7fc00000)), value);
  }
};

constexpr int32_t kZeroExponent = 0;
constexpr Exponents kNoExponents = {&kZeroExponent, false};

int32_t exponent_of(const int8_t* exponents, int64_t block) { return exponents ? exponents[block] : 0; }

// The same of each element of short blocks.
struct EachExponent {
  int32_t of[kChunk];

  Exponents read(const int8_t* exponents, int64_t first, int64_t count, int64_t length) {
    of[0] = 0;
    for (int64_t block = 0; exponents && block < count; ++block)
      for (int64_t i = 0; i < length; ++i) of[block * length + i] = exponents[first + block];
    return {of, exponents != nullptr};
  }
};

void keep_exponent(int8_t* exponents, int64_t block, const swalp_format& f, const Raised& most) {
  if (exponents) exponents[block] = static_cast<int8_t>(shared_exponent(f, most.value().magnitude));
}

// The numbers that all threads at a block share. Magnitudes are those of `order`.
template <int values> struct Block {
  int64_t base, length;
  int32_t before[values] = {};  // exponents of what is kept, until this step
  Raised gradient;              // the largest magnitudes: of the gradient,
  Raised most[values];          // of what will be rounded,
  Raised surveyed[values + 1];  // and of that and one number more, before any noise
  int flags = 0;                // of SWALP_LOST, SWALP_STRANGE

  void flag(int bit) { __atomic_fetch_or(&flags, bit, __ATOMIC_RELAXED); }
  void own() {  // by one thread
    gradient.own();
    for (Raised& each : most) each.own();
    for (Raised& each : surveyed) each.own();
  }
};

// Steps of a parameter do not keep more floats than this for a block before its exponents are known.
constexpr int64_t kKept = 1 << 14;
constexpr int64_t kGrouped = 128;  // blocks up to this length go many at a time
constexpr int64_t kAligned = 16;  // floats of a line of the cache: a vector across two takes twice the time

// The step of a part of a block, of at most kKept elements: what will be rounded.
template <int values> struct Scratch {
  float* of[values];
  Scratch(float* floats, int64_t stride) {
    for (int k = 0; k < values; ++k) of[k] = floats + k * stride;
  }
};

// The gradient of a chunk, a vector at a time: as it is,
struct Given {
  const float* from;
  template <bool whole> F get(int64_t i, int64_t left) const { return load<whole>(from + i, left); }
};

// or rounded on the way. As much that follows is on its way to the cache then: from block to block the
// processor does not expect it.
template <int range> struct OnTheWay {
  const float* from;
  int64_t n;
  const Grid<kFast16, range> grid;
  const uint16_t* upper;
  template <bool whole> inline __attribute__((always_inline)) F get(int64_t i, int64_t left) const {
    fetch_near(from + n + i);
    return grid.value_of_code(load<whole>(from + i, left), Lanes::load(upper + i));
  }
};

// body(gradient) with that of a chunk, rounded if it has a role.
template <class Parameter, class B, class Body>
void with_gradient(const Role* role, const Parameter& p, const B& b, int64_t at, int64_t n, uint32_t* buffer,
                   const Body& body) {
  const float* const g = p.gradient + b.base + at;
  if (!role) return body(Given{g});
  const swalp_format& f = role->format;
  const Scale scale = scale_of(f, b.gradient.value());
  const int32_t gap = gap_of(f, scale.exponent);
  if (role->in_byte && scale.bounded && !is_extreme(gap)) {
    const uint16_t* const upper = fill(role->noise, b.base + at, n, buffer).upper;
    if (f.min_integer == -f.max_integer)
      body(OnTheWay<kBoundedEvenly>{g, n, {f, role->rule, Lanes::set(gap)}, upper});
    else
      body(OnTheWay<kBounded>{g, n, {f, role->rule, Lanes::set(gap)}, upper});
  } else {
    alignas(64) float rounded[kChunk];
    fetch(g + n, n);
    role->span(g, rounded, b.base + at, n, scale, buffer);
    body(Given{rounded});
  }
  if (p.reused) leave_written(g, n);
}

// body(at, n) for the chunks of [begin, begin + count).
template <class Body>
inline __attribute__((always_inline)) void chunks(int64_t begin, int64_t count, const Body& body) {
  for (int64_t done = 0; done < count; done += kChunk)
    body(begin + done, count - done < kChunk ? count - done : kChunk);
}

// From twice the bits of vectors of numbers; those numbers are looked at again if one is not finite.
Largest largest_of(I most, const float* numbers, int64_t n) {
  const uint32_t bits = Lanes::largest_unsigned(most);
  return bits < kStrange ? Largest{bits + kZero, true} : largest(numbers, n);
}

Largest largest_of(I most) {  // nobody asks for the magnitude beside what is not finite
  const uint32_t bits = Lanes::largest_unsigned(most);
  return bits < kStrange ? Largest{bits + kZero, true} : Largest{0, false};
}

// The number that has a magnitude, and the other way round.
double value_of(const Raised& most) {
  const uint32_t magnitude = most.value().magnitude;
  const uint32_t bits = magnitude > kZero ? (magnitude - kZero) >> 1 : 0;
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

uint32_t magnitude_of(double value) {
  const float x = static_cast<float>(value);
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return 2 * bits + kZero;
}

// Whether any magnitude within `error` of the largest one leads to the same exponent.
bool settles(const swalp_format& f, const Raised& most, double error) {
  const double x = value_of(most);
  // Some more: for the rounding here, and of the smallest numbers.
  const double low = (x - error) * (1 - 1e-6) - 1e-44, high = (x + error) * (1 + 1e-6) + 1e-44;
  if (!(high < FLT_MAX)) return false;
  return shared_exponent(f, magnitude_of(low > 0 ? low : 0)) == shared_exponent(f, magnitude_of(high));
}

template <class Kept> struct SgdStep {
  static constexpr int values = 2;
  static constexpr bool grouped = true;
  enum { kVelocity, kMoved, kDirection };
  using Shared = Block<values>;

  const swalp_sgd& h;
  const swalp_sgd_parameter& p;
  const Role gradient, momentum, weight;

  SgdStep(const swalp_sgd& hyper, const swalp_sgd_parameter& parameter)
      : h(hyper), p(parameter), gradient(parameter.gradient_role, SWALP_FLOAT32),
        momentum(parameter.momentum_role, Stored<Kept>::output),
        weight(parameter.weight_role, Stored<Kept>::output) {}

  Shared block(int64_t i) const {
    Shared b = {i * p.length, p.length};
    b.before[kVelocity] = exponent_of(p.momentum_exponents, i);
    b.before[kMoved] = exponent_of(p.weight_exponents, i);
    return b;
  }

  void search(Shared& b, int64_t at, int64_t n) const {
    if (h.has_gradient) b.gradient.raise(largest(p.gradient + b.base + at, n));
  }

  // The same, and what the step would be with the gradient as it is: close enough to the step, most
  // times, to know its exponents.
  void survey(Shared& b, int64_t begin, int64_t count) const {
    if (!has_exponents()) return search(b, begin, count);
    Surveyed most;
    chunks(begin, count, [&](int64_t at, int64_t n) {
      most = walk(b, at, n, Given{p.gradient + b.base + at}, nullptr, nullptr, most);
    });
    b.gradient.raise(largest_of(most.gradient, p.gradient + b.base + begin, count));
    b.surveyed[kVelocity].raise(largest_of(most.velocity));
    b.surveyed[kMoved].raise(largest_of(most.moved));
    b.surveyed[kDirection].raise(largest_of(most.direction));
  }

  // Whether the exponents follow from what was surveyed. The gradient moves by at most a gap when it
  // is rounded; u is more than the rounding of an operation adds, relative to its result.
  bool settled(const Shared& b) const {
    if (!has_exponents()) return true;
    for (const Raised& most : b.surveyed)
      if (!most.value().finite) return false;
    if (!h.has_gradient) return true;
    const swalp_format& f = gradient.format;
    if (f.kind != SWALP_GRID || f.min_integer > -f.max_integer) return false;
    const double gap = ldexp(1, gap_of(f, shared_exponent(f, b.gradient.value().magnitude))), u = ldexp(1, -22);
    if (value_of(b.gradient) > (f.max_integer + 1.0) * gap) return false;  // it is clamped
    const double d = value_of(b.surveyed[kDirection]), v = value_of(b.surveyed[kVelocity]);
    const double w = value_of(b.surveyed[kMoved]), rho = h.momentum, rate = fabs(h.lr);
    double error = gap + u * (d + gap);
    if (h.has_momentum) {
      error += u * (v + error);
      if (!settles(momentum.format, b.surveyed[kVelocity], error)) return false;
      if (h.nesterov) error += rho * error + u * (rho * v + d + 2 * error);
    }
    error = rate * error;
    return settles(weight.format, b.surveyed[kMoved], error + u * (w + error));
  }

  void step(Shared& b, int64_t begin, int64_t count, const Scratch<values>& to, uint32_t* buffer) const {
    Most most;
    chunks(begin, count, [&](int64_t at, int64_t n) {
      with_gradient(h.has_gradient ? &gradient : nullptr, p, b, at, n, buffer, [&](const auto& g) {
        most = walk(b, at, n, g, to.of[kVelocity] + (at - begin), to.of[kMoved] + (at - begin), most);
      });
    });
    b.most[kVelocity].raise(largest_of(most.velocity, to.of[kVelocity], count));
    const Largest moved = largest_of(most.moved, to.of[kMoved], count);
    if (!moved.finite) b.flag(SWALP_STRANGE);
    b.most[kMoved].raise(moved);
  }

  void keep(Shared& b, int64_t begin, int64_t count, const Scratch<values>& from, const Raised* most,
            uint32_t* buffer) const {
    const Scale v = scale_of(momentum.format, most[kVelocity].value());
    const Scale w = scale_of(weight.format, most[kMoved].value());
    bool lost = false;
    chunks(begin, count, [&](int64_t at, int64_t n) {
      const int64_t place = b.base + at, kept = at - begin;
      if (h.has_momentum)
        lost |= momentum.template keep<Kept>(from.of[kVelocity] + kept, p.momentum, place, n, v, buffer);
      lost |= weight.template keep<Kept>(from.of[kMoved] + kept, p.weight, place, n, w, buffer);
    });
    if (lost) b.flag(SWALP_LOST);
  }

  void finish(const Shared& b, const Raised* most) const {
    const int64_t block = b.base / b.length;
    keep_exponent(p.momentum_exponents, block, momentum.format, most[kVelocity]);
    keep_exponent(p.weight_exponents, block, weight.format, most[kMoved]);
  }

  // All of it for `count` blocks that are kChunk elements at most. Returns flags.
  int group(int64_t first, int64_t count, const Scratch<values>& to, uint32_t* buffer) const {
    const int64_t length = p.length, at = first * length, n = count * length;
    alignas(64) float rounded[kChunk], w[kChunk], v[kChunk];
    EachExponent each;
    const float* g = p.gradient + at;
    if (h.has_gradient) gradient.rows(g, rounded, at, count, length, nullptr, buffer), g = rounded;
    const float* const w0 = weight.template values<Kept>(
        p.weight, at, n, each.read(p.weight_exponents, first, count, length), w);
    const float* const m0 =
        h.has_momentum ? momentum.template values<Kept>(
                             p.momentum, at, n, each.read(p.momentum_exponents, first, count, length), v)
                       : nullptr;
    float *const velocity = to.of[kVelocity], *const next = to.of[kMoved];
    const Most most = walk(n, Given{g}, w0, m0, velocity, next, Most());
    const int flags = largest_of(most.moved, next, n).finite ? 0 : SWALP_STRANGE;
    bool lost = h.has_momentum && momentum.template keep_rows<Kept>(velocity, p.momentum, at, count, length,
                                                                    p.momentum_exponents, buffer);
    lost |= weight.template keep_rows<Kept>(next, p.weight, at, count, length, p.weight_exponents, buffer);
    return lost ? flags | SWALP_LOST : flags;
  }

 private:
  bool has_exponents() const {
    return weight.format.blocked || (h.has_momentum && momentum.format.blocked);
  }

  // Largest magnitudes as `twice_bits`. What nobody wants of these would go through memory with each
  // vector: hence two.
  struct Most {
    static constexpr bool stores = true;
    I velocity = Lanes::set(0), moved = velocity;
  };
  struct Surveyed {
    static constexpr bool stores = false;
    I velocity = Lanes::set(0), moved = velocity, gradient = velocity, direction = velocity;
  };

  // The step of a chunk with the gradient g, and the largest magnitudes. With `Most` velocity and moved
  // weight are stored.
  template <class Gradient, class Wanted>
  Wanted walk(const Shared& b, int64_t at, int64_t n, const Gradient& g, float* velocity, float* next,
              Wanted most) const {
    if (weight.table || momentum.table) {
      alignas(64) float weight_values[kChunk], momentum_values[kChunk];
      const float* const w0 = weight.template values<Kept>(p.weight, b.base + at, n,
                                                           {&b.before[kMoved], false}, weight_values);
      const float* const m0 =
          h.has_momentum ? momentum.template values<Kept>(p.momentum, b.base + at, n,
                                                          {&b.before[kVelocity], false}, momentum_values)
                         : nullptr;
      return walk(n, g, w0, m0, velocity, next, most);
    }
    const Stored<Kept> weights(weight.format, b.before[kMoved]);
    const Stored<Kept> velocities(momentum.format, b.before[kVelocity]);
    alignas(64) Kept weight_room[kRoom<Kept>], momentum_room[kRoom<Kept>];
    const Kept* const w0 = weight.kept(p.weight, b.base + at, n, weight_room);
    const Kept* const m0 = h.has_momentum ? momentum.kept(p.momentum, b.base + at, n, momentum_room) : nullptr;
    return weights.are_plain(w0, n) && (!m0 || (velocities.are_plain(m0, n) && velocities.are_scaled(h.momentum)))
               ? walk<true>(n, g, weights, w0, velocities, m0, velocity, next, most)
               : walk<false>(n, g, weights, w0, velocities, m0, velocity, next, most);
  }

  // The same with the values of what is kept.
  template <class Gradient, class Wanted>
  Wanted walk(int64_t n, const Gradient& g, const float* w0, const float* m0, float* velocity, float* next,
              Wanted most) const {
    const Stored<float> as_they_are(weight.format, 0);
    return walk<true>(n, g, as_they_are, w0, as_they_are, m0, velocity, next, most);
  }

  template <bool plain, class Gradient, class Any, class Wanted>
  Wanted walk(int64_t n, const Gradient& g, const Stored<Any>& weights, const Any* w0,
              const Stored<Any>& velocities, const Any* m0, float* velocity, float* next,
              Wanted most) const {
    constexpr bool stores = Wanted::stores;
    const F decay = Lanes::set(h.weight_decay), rho = Lanes::set(h.momentum);
    const F own_rho = velocities.template scaled<plain>(h.momentum), rate = Lanes::set(-h.lr);
    const bool decays = h.weight_decay != 0, has_momentum = h.has_momentum, nesterov = h.nesterov;
    const auto larger = [](I most, F x) __attribute__((always_inline)) {
      return Lanes::max_unsigned(most, twice_bits(x));
    };
    return vectors(n, most, [=](int64_t i, int64_t left, auto is_whole, Wanted so_far)
                                __attribute__((always_inline)) {
      constexpr bool whole = decltype(is_whole)::value;
      F d = g.template get<whole>(i, left);
      if constexpr (!stores) so_far.gradient = larger(so_far.gradient, d);
      const F w = weights.template get<whole, plain>(w0 + i, left);
      if (decays) d = Lanes::fma(w, decay, d);
      if constexpr (!stores) so_far.direction = larger(so_far.direction, d);
      if (has_momentum) {
        const F v = Lanes::add(velocities.template times<whole, plain>(m0 + i, left, own_rho), d);
        if constexpr (stores) store<whole>(velocity + i, v, left);
        so_far.velocity = larger(so_far.velocity, v);
        d = nesterov ? Lanes::fma(v, rho, d) : v;
      }
      const F moved = Lanes::fma(d, rate, w);
      if constexpr (stores) store<whole>(next + i, moved, left);
      so_far.moved = larger(so_far.moved, moved);
      return so_far;
    });
  }
};

template <class Kept> struct AdamStep {
  static constexpr int values = 3;
  static constexpr bool grouped = true;
  enum { kMoment, kRoot, kMoved };
  using Shared = Block<values>;

  const swalp_adam& h;
  const swalp_adam_parameter& p;
  const Role gradient, moment, root, weight;

  AdamStep(const swalp_adam& hyper, const swalp_adam_parameter& parameter)
      : h(hyper), p(parameter), gradient(parameter.gradient_role, SWALP_FLOAT32),
        moment(parameter.moment_role, Stored<Kept>::output),
        root(parameter.root_role, Stored<Kept>::output),
        weight(parameter.weight_role, Stored<Kept>::output) {}

  Shared block(int64_t i) const {
    Shared b = {i * p.length, p.length};
    b.before[kMoment] = exponent_of(p.moment_exponents, i);
    b.before[kMoved] = exponent_of(p.weight_exponents, i);
    return b;
  }

  void search(Shared& b, int64_t at, int64_t n) const {
    if (h.has_gradient) b.gradient.raise(largest(p.gradient + b.base + at, n));
  }

  void survey(Shared& b, int64_t at, int64_t n) const { search(b, at, n); }

  bool settled(const Shared&) const { return !weight.format.blocked && !moment.format.blocked; }

  void step(Shared& b, int64_t begin, int64_t count, const Scratch<values>& to, uint32_t* buffer) const {
    Most most;
    chunks(begin, count, [&](int64_t at, int64_t n) {
      alignas(64) float roots[kChunk];
      const float* const r0 = root.template values<Kept>(p.root, b.base + at, n, kNoExponents, roots);
      with_gradient(h.has_gradient ? &gradient : nullptr, p, b, at, n, buffer,
                    [&](const auto& g) { most = walk(b, at, n, g, r0, to, at - begin, most); });
    });
    b.most[kMoment].raise(largest_of(most.moment, to.of[kMoment], count));
    const Largest moved = largest_of(most.moved, to.of[kMoved], count);
    if (!moved.finite) b.flag(SWALP_STRANGE);
    b.most[kMoved].raise(moved);
  }

  void keep(Shared& b, int64_t begin, int64_t count, const Scratch<values>& from, const Raised* most,
            uint32_t* buffer) const {
    const Scale m = scale_of(moment.format, most[kMoment].value());
    const Scale w = scale_of(weight.format, most[kMoved].value());
    bool lost = false;
    chunks(begin, count, [&](int64_t at, int64_t n) {
      const int64_t place = b.base + at, kept = at - begin;
      lost |= moment.template keep<Kept>(from.of[kMoment] + kept, p.moment, place, n, m, buffer);
      lost |= root.template keep<Kept>(from.of[kRoot] + kept, p.root, place, n, {}, buffer);
      lost |= weight.template keep<Kept>(from.of[kMoved] + kept, p.weight, place, n, w, buffer);
    });
    if (lost) b.flag(SWALP_LOST);
  }

  void finish(const Shared& b, const Raised* most) const {
    const int64_t block = b.base / b.length;
    keep_exponent(p.moment_exponents, block, moment.format, most[kMoment]);
    keep_exponent(p.weight_exponents, block, weight.format, most[kMoved]);
  }

  // All of it for `count` blocks that are kChunk elements at most. Returns flags.
  int group(int64_t first, int64_t count, const Scratch<values>& to, uint32_t* buffer) const {
    const int64_t length = p.length, at = first * length, n = count * length;
    alignas(64) float rounded[kChunk], roots[kChunk], w[kChunk], m[kChunk];
    EachExponent each;
    const float* g = p.gradient + at;
    if (h.has_gradient) gradient.rows(g, rounded, at, count, length, nullptr, buffer), g = rounded;
    const float* const r0 = root.template values<Kept>(p.root, at, n, kNoExponents, roots);
    const float* const w0 = weight.template values<Kept>(
        p.weight, at, n, each.read(p.weight_exponents, first, count, length), w);
    const float* const m0 = moment.template values<Kept>(
        p.moment, at, n, each.read(p.moment_exponents, first, count, length), m);
    const Most most = walk(n, Given{g}, r0, w0, m0, to, 0, Most());
    const int flags = largest_of(most.moved, to.of[kMoved], n).finite ? 0 : SWALP_STRANGE;
    bool lost = moment.template keep_rows<Kept>(to.of[kMoment], p.moment, at, count, length,
                                                p.moment_exponents, buffer);
    lost |= root.template keep_rows<Kept>(to.of[kRoot], p.root, at, count, length, nullptr, buffer);
    lost |= weight.template keep_rows<Kept>(to.of[kMoved], p.weight, at, count, length,
                                            p.weight_exponents, buffer);
    return lost ? flags | SWALP_LOST : flags;
  }

 private:
  struct Most {
    I moment = Lanes::set(0), moved = moment;
  };

  // The step of a chunk with the gradient g and the roots r0, stored from `place` on.
  template <class Gradient>
  Most walk(const Shared& b, int64_t at, int64_t n, const Gradient& g, const float* r0,
            const Scratch<values>& to, int64_t place, Most most) const {
    if (weight.table || moment.table) {
      alignas(64) float w[kChunk], m[kChunk];
      const float* const w0 =
          weight.template values<Kept>(p.weight, b.base + at, n, {&b.before[kMoved], false}, w);
      const float* const m0 =
          moment.template values<Kept>(p.moment, b.base + at, n, {&b.before[kMoment], false}, m);
      return walk(n, g, r0, w0, m0, to, place, most);
    }
    alignas(64) Kept weight_room[kRoom<Kept>], moment_room[kRoom<Kept>];
    const Stored<Kept> weights(weight.format, b.before[kMoved]), moments(moment.format, b.before[kMoment]);
    return walk(n, g, r0, weights, weight.kept(p.weight, b.base + at, n, weight_room), moments,
                moment.kept(p.moment, b.base + at, n, moment_room), to, place, most);
  }

  template <class Gradient>
  Most walk(int64_t n, const Gradient& g, const float* r0, const float* w0, const float* m0,
            const Scratch<values>& to, int64_t place, Most most) const {
    const Stored<float> as_they_are(weight.format, 0);
    return walk(n, g, r0, as_they_are, w0, as_they_are, m0, to, place, most);
  }

  template <class Gradient, class Any>
  Most walk(int64_t n, const Gradient& g, const float* r0, const Stored<Any>& weights, const Any* w0,
            const Stored<Any>& moments, const Any* m0, const Scratch<values>& to, int64_t place,
            Most most) const {
    const F decay = Lanes::set(h.weight_decay), share = Lanes::set(h.share1), beta2 = Lanes::set(h.beta2);
    const F share2 = Lanes::set(h.share2), correction = Lanes::set(h.correction2);
    const F eps = Lanes::set(h.eps), rate = Lanes::set(-h.rate);
    const F far = Lanes::set(h.share1 - 1);
    const bool near = h.share1 < 0.5f, decoupled = h.decoupled, decays = h.weight_decay != 0;
    float *const moment_to = to.of[kMoment] + place, *const root_to = to.of[kRoot] + place;
    float* const next = to.of[kMoved] + place;
    return vectors(n, most, [=](int64_t i, int64_t left, auto is_whole, Most so_far)
                                __attribute__((always_inline)) {
      constexpr bool whole = decltype(is_whole)::value;
      F d = g.template get<whole>(i, left);
      F w = weights.template get<whole>(w0 + i, left);
      if (decoupled) w = Lanes::mul(w, decay);  // decay = 1 - lr * weight_decay
      else if (decays) d = Lanes::fma(w, decay, d);
      const F before = moments.template get<whole>(m0 + i, left);
      // lerp from the nearer end, as PyTorch does
      const F m = near ? Lanes::fma(share, Lanes::sub(d, before), before)
                       : Lanes::fma(far, Lanes::sub(d, before), d);
      const F r1 = load<whole>(r0 + i, left);
      const F variance = Lanes::fma(Lanes::mul(share2, d), d, Lanes::mul(Lanes::mul(r1, r1), beta2));
      const F r = Lanes::sqrt(variance);
      const F moved = Lanes::add(
          w, Lanes::div(Lanes::mul(rate, m), Lanes::add(Lanes::div(r, correction), eps)));
      store<whole>(moment_to + i, m, left);
      store<whole>(root_to + i, r, left);
      store<whole>(next + i, moved, left);
      so_far.moment = Lanes::max_unsigned(so_far.moment, twice_bits(m));
      // What pads the last vector divides by eps alone: if that is 0, `largest_of` looks again.
      so_far.moved = Lanes::max_unsigned(so_far.moved, twice_bits(moved));
      return so_far;
    });
  }
};

// A long block, or one thread's part of it; `wait` for the others. Returns the largest magnitudes.
template <class Step, class Shared, class Wait>
const Raised* long_block(const Step& step, Shared& b, int64_t begin, int64_t count,
                           const Scratch<Step::values>& scratch, uint32_t* buffer, const Wait& wait) {
  step.survey(b, begin, count);
  wait();
  const bool settled = step.settled(b);
  if (!settled) {
    chunks(begin, count, [&](int64_t at, int64_t n) { step.step(b, at, n, scratch, buffer); });
    wait();
  }
  const Raised* const most = settled ? b.surveyed : b.most;
  chunks(begin, count, [&](int64_t at, int64_t n) {
    step.step(b, at, n, scratch, buffer);
    step.keep(b, at, n, scratch, most, buffer);
  });
  return most;
}

// All blocks of all parameters. At long blocks all threads work, with waits for each other. Of short
// ones each thread takes its own first, some at a time, then what others have left: of every parameter
// the same fraction in every step, as to write what another thread has read costs more than the step.
template <class Step, class Hyper, class Parameter>
int optimize(const Hyper& hyper, const Parameter* parameters, int64_t count, int threads) {
  int64_t longest = 0, elements = 0;
  for (int64_t k = 0; k < count; ++k) {
    if (parameters[k].length > longest) longest = parameters[k].length;
    elements += parameters[k].blocks * parameters[k].length;
  }
  if (elements < kSerial) threads = 1;
  const int64_t most = longest < kChunk ? kChunk : longest < kKept ? longest : kKept;
  const int64_t own = ceil_div(most, kAligned) * kAligned;
  static thread_local Workspace workspace;
  const int64_t bytes = Step::values * own * threads * static_cast<int64_t>(sizeof(float));
  float* const floats = reinterpret_cast<float*>(workspace.at_least(bytes));
  if (!floats) return -1;
  typename Step::Shared common = {};
  // Shares of short blocks that are taken: of each thread's, of each parameter.
  std::vector<int64_t> taken(static_cast<size_t>(threads * count));
  int flags = 0;
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) if (threads > 1)
#endif
  {
    const DefaultMode mode;
#ifdef _OPENMP
    const int64_t team = omp_get_num_threads(), me = omp_get_thread_num();
#else
    const int64_t team = 1, me = 0;
#endif
    const auto wait = [] {
#ifdef _OPENMP
#pragma omp barrier
#endif
    };
    alignas(64) uint32_t buffer[kNoise];
    const Scratch<Step::values> scratch(floats + Step::values * own * me, own);
    const auto run = [&](const Step& step, int64_t first, int64_t last) {
      const Parameter& p = step.p;
      int all = 0;
      if constexpr (Step::grouped) {
        if (p.length <= kGrouped) {
          const int64_t many = kChunk / p.length;
          for (int64_t i = first; i < last; i += many)
            all |= step.group(i, smaller(last - i, many), scratch, buffer);
          first = last;
        }
      }
      for (int64_t i = first; i < last; ++i) {
        typename Step::Shared b = step.block(i);
        b.own();
        const Raised* most = b.most;
        if (p.length <= kKept) {
          step.search(b, 0, p.length);
          step.step(b, 0, p.length, scratch, buffer);
          step.keep(b, 0, p.length, scratch, most, buffer);
        } else {
          most = long_block(step, b, 0, p.length, scratch, buffer, [] {});
        }
        step.finish(b, most);
        all |= b.flags;
      }
      if (all) __atomic_fetch_or(&flags, all, __ATOMIC_RELAXED);
    };
    // Up to this length a block is short: whoever is done first waits for a sixteenth of the time at most.
    const int64_t part = elements / (16 * team);
    const int64_t alone = team == 1 ? longest : part > kSerial ? part : kSerial;
    for (int64_t k = 0; k < count; ++k) {
      const Parameter& p = parameters[k];
      if (p.length <= alone) continue;
      const Step step(hyper, p);
      const int64_t all = (p.length + kChunk - 1) / kChunk;
      const int64_t begin = all * me / team * kChunk;
      const int64_t end = me + 1 == team ? p.length : all * (me + 1) / team * kChunk;
      for (int64_t i = 0; i < p.blocks; ++i) {
        wait();
        if (me == 0) common = step.block(i);
        wait();
        const Raised* most = long_block(step, common, begin, end - begin, scratch, buffer, wait);
        __atomic_fetch_or(&flags, common.flags, __ATOMIC_RELAXED);
        if (me == 0) step.finish(common, most);
      }
    }
    for (int64_t turn = 0; turn < team; ++turn) {
      const int64_t owner = (me + turn) % team;
      for (int64_t k = 0; k < count; ++k) {
        const Parameter& p = parameters[k];
        if (p.length > alone) continue;
        const int64_t hand = p.length < kSerial ? (kSerial + p.length - 1) / p.length : 1;
        const int64_t shares = (p.blocks + hand - 1) / hand;
        const int64_t begin = shares * owner / team, end = shares * (owner + 1) / team;
        int64_t* const done = &taken[static_cast<size_t>(owner * count + k)];
        for (;;) {
          const int64_t share = begin + __atomic_fetch_add(done, 1, __ATOMIC_RELAXED);
          if (share >= end) break;
          const int64_t first = share * hand;
          run(Step(hyper, p), first, smaller(p.blocks, first + hand));
        }
      }
    }
  }
  return flags;
}

int adam(const swalp_adam* hyper, const swalp_adam_parameter* parameters, int64_t count, int threads) {
  return hyper->packed ? optimize<AdamStep<int8_t>>(*hyper, parameters, count, threads)
                       : optimize<AdamStep<float>>(*hyper, parameters, count, threads);
}

int sgd(const swalp_sgd* hyper, const swalp_sgd_parameter* parameters, int64_t count, int threads) {
  return hyper->packed ? optimize<SgdStep<int8_t>>(*hyper, parameters, count, threads)
                       : optimize<SgdStep<float>>(*hyper, parameters, count, threads);
}

}  // namespace
