// Optimizer steps on packed parameters: codes in, codes out, one read of the gradient.
//
// A parameter is worked off block by block. For each: the gradient's exponent; then, chunk by chunk,
// the step in float32, into a scratch that stays in the cache, with the largest magnitudes of what
// will be kept; then their codes, in place. Equal to `sgd_step` and `adam_step` of `swalp.optim` in
// the arithmetic of PyTorch's vector units, in which x + alpha * y is one fused operation.
#pragma once
#include <type_traits>

#include "halves.h"
#include "layout.h"

namespace {

// One role at one parameter.
struct Role {
  const swalp_format& format;
  const Rule rule;
  const Noise noise;
  const Kernel kernel;
  const bool halved;

  Role(const swalp_role& role, int output)
      : format(role.format), rule(role.rounding), noise(role.rounding),
        kernel(choose(role.format, role.rounding, output)), halved(role.halved) {}

  bool span(const float* x, void* out, int64_t at, int64_t n, int32_t shared, uint32_t* buffer) const {
    return kernel.span(format, rule, x, out, n, noise.used ? fill(noise, at, n, buffer) : nullptr,
                       shared);
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

  // Rounds n numbers to their places from element `at` of what is kept on.
  template <class Kept>
  bool keep(const float* x, void* all, int64_t at, int64_t n, int32_t shared, uint32_t* buffer) const {
    if constexpr (sizeof(Kept) == 1) {
      if (halved) {
        alignas(64) int8_t codes[kChunk];
        const bool lost = span(x, codes, at, n, shared, buffer);
        join_halves(codes, n, static_cast<uint8_t*>(all) + at / 2);
        return lost;
      }
    }
    return span(x, static_cast<Kept*>(all) + at, at, n, shared, buffer);
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

// body(i, n, whole) for each vector of n elements.
template <class Body> inline __attribute__((always_inline)) void vectors(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + Lanes::N <= n; i += Lanes::N) body(i, n - i, std::true_type());
  if (i < n) body(i, n - i, std::false_type());
}

// Numbers of a block as they are kept: floats on their grid, or codes.
template <class Kept> struct Stored;

template <> struct Stored<float> {
  static constexpr int output = SWALP_FLOAT32;
  Stored(const swalp_format&, const int8_t*, int64_t) {}
  template <bool whole> F get(const float* from, int64_t n) const { return load<whole>(from, n); }
};

template <> struct Stored<int8_t> {
  static constexpr int output = SWALP_CODE8;
  bool has_nan, extreme;
  I nan;
  F first, second;  // 2**gap is `first`, or if `extreme` their product: with a code, exact
  Stored(const swalp_format& f, const int8_t* exponents, int64_t block)
      : has_nan(f.has_nan), nan(Lanes::set(f.nan_code)) {
    const int32_t gap = gap_of(f, exponents ? exponents[block] : 0);
    extreme = gap < -126 || gap > 126;
    const int32_t half = extreme ? gap / 2 : gap;
    first = power_of_two(Lanes::set(half));
    second = power_of_two(Lanes::set(gap - half));
  }
  template <bool whole> F get(const int8_t* from, int64_t n) const {
    const I code = load<whole>(from, n);
    F value = Lanes::mul(Lanes::convert(code), first);
    if (extreme) value = Lanes::mul(value, second);
    if (!has_nan) return value;
    return Lanes::select(Lanes::equal(code, nan), Lanes::floats(Lanes::set(0x7fc00000)), value);
  }
};

void keep_exponent(int8_t* exponents, int64_t block, const swalp_format& f, uint32_t most) {
  if (exponents) exponents[block] = static_cast<int8_t>(shared_exponent(f, most));
}

void raise(uint32_t* most, uint32_t mine) {
  uint32_t seen = __atomic_load_n(most, __ATOMIC_RELAXED);
  while (mine > seen && !__atomic_compare_exchange_n(most, &seen, mine, true, __ATOMIC_RELAXED,
                                                     __ATOMIC_RELAXED)) {
  }
}

// The numbers that all threads share at a block.
template <int values> struct Block {
  int64_t base, length;
  float* kept[values];           // what will be rounded: scratch, `length` elements each
  uint32_t gradient = 0;         // the largest magnitudes, of the gradient
  uint32_t most[values] = {};    // and of what will be rounded
  int lost = 0;

  Block(int64_t first, int64_t count, float* scratch, int64_t stride) : base(first), length(count) {
    for (int k = 0; k < values; ++k) kept[k] = scratch + k * stride;
  }
};

// The gradient of a chunk, rounded into `rounded` if it has a role.
template <class B>
const float* gradient_of(const Role* role, const float* gradient, const B& b, int64_t at, int64_t n,
                         float* rounded, uint32_t* buffer) {
  const float* g = gradient + b.base + at;
  if (!role) return g;
  role->span(g, rounded, b.base + at, n, shared_exponent(role->format, b.gradient), buffer);
  return rounded;
}

template <class Kept> struct SgdStep {
  static constexpr int values = 2;
  enum { kVelocity, kMoved };
  using Shared = Block<values>;

  const swalp_sgd& h;
  const swalp_sgd_parameter& p;
  const Role gradient, momentum, weight;

  SgdStep(const swalp_sgd& hyper, const swalp_sgd_parameter& parameter)
      : h(hyper), p(parameter), gradient(parameter.gradient_role, SWALP_FLOAT32),
        momentum(parameter.momentum_role, Stored<Kept>::output),
        weight(parameter.weight_role, Stored<Kept>::output) {}

  void search(Shared& b, int64_t at, int64_t n) const {
    if (h.has_gradient) raise(&b.gradient, largest(p.gradient + b.base + at, n));
  }

  void step(Shared& b, int64_t begin, int64_t count, uint32_t* buffer) const {
    const int64_t block = b.base / b.length;
    const Stored<Kept> weights(weight.format, p.weight_exponents, block);
    const Stored<Kept> velocities(momentum.format, p.momentum_exponents, block);
    const F decay = Lanes::set(h.weight_decay), rho = Lanes::set(h.momentum), rate = Lanes::set(-h.lr);
    const bool decays = h.weight_decay != 0, has_momentum = h.has_momentum, nesterov = h.nesterov;
    I most_velocity = Lanes::set(0), most_moved = Lanes::set(0);
    for (int64_t done = 0; done < count; done += kChunk) {
      const int64_t at = begin + done, left = count - done, n = left < kChunk ? left : kChunk;
      alignas(64) float rounded[kChunk];
      const float* g = gradient_of(h.has_gradient ? &gradient : nullptr, p.gradient, b, at, n, rounded, buffer);
      // Locals: what lies behind a pointer would be read again after every store.
      float* const velocity = b.kept[kVelocity] + at;
      float* const next = b.kept[kMoved] + at;
      alignas(64) Kept weight_room[kRoom<Kept>], momentum_room[kRoom<Kept>];
      const Kept* const w0 = weight.kept(p.weight, b.base + at, n, weight_room);
      const Kept* const m0 = has_momentum ? momentum.kept(p.momentum, b.base + at, n, momentum_room) : nullptr;
      vectors(n, [&, weights, velocities](int64_t i, int64_t left, auto is_whole)
                     __attribute__((always_inline)) {
        constexpr bool whole = decltype(is_whole)::value;
        F d = load<whole>(g + i, left);
        const F w = weights.template get<whole>(w0 + i, left);
        if (decays) d = Lanes::fma(w, decay, d);
        if (has_momentum) {
          const F v = Lanes::add(Lanes::mul(velocities.template get<whole>(m0 + i, left), rho), d);
          store<whole>(velocity + i, v, left);
          most_velocity = Lanes::max_unsigned(most_velocity, order(v));
          d = nesterov ? Lanes::fma(v, rho, d) : v;
        }
        const F moved = Lanes::fma(d, rate, w);
        store<whole>(next + i, moved, left);
        most_moved = Lanes::max_unsigned(most_moved, order(moved));
      });
    }
    raise(&b.most[kVelocity], Lanes::largest_unsigned(most_velocity));
    raise(&b.most[kMoved], Lanes::largest_unsigned(most_moved));
  }

  void keep(Shared& b, int64_t begin, int64_t count, uint32_t* buffer) const {
    const int32_t v = shared_exponent(momentum.format, b.most[kVelocity]);
    const int32_t w = shared_exponent(weight.format, b.most[kMoved]);
    bool lost = false;
    for (int64_t done = 0; done < count; done += kChunk) {
      const int64_t at = begin + done, left = count - done, n = left < kChunk ? left : kChunk;
      const int64_t place = b.base + at;
      if (h.has_momentum)
        lost |= momentum.template keep<Kept>(b.kept[kVelocity] + at, p.momentum, place, n, v, buffer);
      lost |= weight.template keep<Kept>(b.kept[kMoved] + at, p.weight, place, n, w, buffer);
    }
    if (lost) __atomic_store_n(&b.lost, 1, __ATOMIC_RELAXED);
  }

  void finish(const Shared& b) const {
    const int64_t block = b.base / b.length;
    keep_exponent(p.momentum_exponents, block, momentum.format, b.most[kVelocity]);
    keep_exponent(p.weight_exponents, block, weight.format, b.most[kMoved]);
  }
};

template <class Kept> struct AdamStep {
  static constexpr int values = 3;
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

  void search(Shared& b, int64_t at, int64_t n) const {
    if (h.has_gradient) raise(&b.gradient, largest(p.gradient + b.base + at, n));
  }

  void step(Shared& b, int64_t begin, int64_t count, uint32_t* buffer) const {
    const int64_t block = b.base / b.length;
    const Stored<Kept> weights(weight.format, p.weight_exponents, block);
    const Stored<Kept> moments(moment.format, p.moment_exponents, block);
    const Kept* const kept_root = static_cast<Kept*>(p.root) + b.base;
    const F decay = Lanes::set(h.weight_decay), share = Lanes::set(h.share1), beta2 = Lanes::set(h.beta2);
    const F share2 = Lanes::set(h.share2), correction = Lanes::set(h.correction2);
    const F eps = Lanes::set(h.eps), rate = Lanes::set(-h.rate);
    const F far = Lanes::set(h.share1 - 1);
    const bool near = h.share1 < 0.5f, decoupled = h.decoupled, decays = h.weight_decay != 0;
    I most_moment = Lanes::set(0), most_moved = Lanes::set(0);
    for (int64_t done = 0; done < count; done += kChunk) {
      const int64_t at = begin + done, left = count - done, n = left < kChunk ? left : kChunk;
      alignas(64) float rounded[kChunk], roots[kChunk];
      const float* g = gradient_of(h.has_gradient ? &gradient : nullptr, p.gradient, b, at, n, rounded, buffer);
      for (int64_t i = 0; i < n; ++i) {
        if constexpr (sizeof(Kept) == 1) roots[i] = p.root_table[static_cast<uint8_t>(kept_root[at + i])];
        else roots[i] = kept_root[at + i];
      }
      float *const moment_to = b.kept[kMoment] + at, *const root_to = b.kept[kRoot] + at;
      float* const next = b.kept[kMoved] + at;
      alignas(64) Kept weight_room[kRoom<Kept>], moment_room[kRoom<Kept>];
      const Kept* const w0 = weight.kept(p.weight, b.base + at, n, weight_room);
      const Kept* const m0 = moment.kept(p.moment, b.base + at, n, moment_room);
      vectors(n, [&, weights, moments](int64_t i, int64_t left, auto is_whole)
                     __attribute__((always_inline)) {
        constexpr bool whole = decltype(is_whole)::value;
        F d = load<whole>(g + i, left);
        F w = weights.template get<whole>(w0 + i, left);
        if (decoupled) w = Lanes::mul(w, decay);  // decay = 1 - lr * weight_decay
        else if (decays) d = Lanes::fma(w, decay, d);
        const F before = moments.template get<whole>(m0 + i, left);
        // lerp from the nearer end, as PyTorch does
        const F m = near ? Lanes::fma(share, Lanes::sub(d, before), before)
                         : Lanes::fma(far, Lanes::sub(d, before), d);
        const F r0 = load<whole>(roots + i, left);
        const F variance = Lanes::fma(Lanes::mul(share2, d), d, Lanes::mul(Lanes::mul(r0, r0), beta2));
        const F r = Lanes::sqrt(variance);
        const F moved = Lanes::add(
            w, Lanes::div(Lanes::mul(rate, m), Lanes::add(Lanes::div(r, correction), eps)));
        store<whole>(moment_to + i, m, left);
        store<whole>(root_to + i, r, left);
        store<whole>(next + i, moved, left);
        most_moment = Lanes::max_unsigned(most_moment, order(m));
        // What pads the last vector divides by eps alone, and 0 / 0 does not count as a magnitude.
        most_moved = Lanes::max_unsigned(most_moved, order(moved));
      });
    }
    raise(&b.most[kMoment], Lanes::largest_unsigned(most_moment));
    raise(&b.most[kMoved], Lanes::largest_unsigned(most_moved));
  }

  void keep(Shared& b, int64_t begin, int64_t count, uint32_t* buffer) const {
    const int32_t m = shared_exponent(moment.format, b.most[kMoment]);
    const int32_t w = shared_exponent(weight.format, b.most[kMoved]);
    bool lost = false;
    for (int64_t done = 0; done < count; done += kChunk) {
      const int64_t at = begin + done, left = count - done, n = left < kChunk ? left : kChunk;
      const int64_t place = b.base + at;
      lost |= moment.template keep<Kept>(b.kept[kMoment] + at, p.moment, place, n, m, buffer);
      lost |= root.template keep<Kept>(b.kept[kRoot] + at, p.root, place, n, 0, buffer);
      lost |= weight.template keep<Kept>(b.kept[kMoved] + at, p.weight, place, n, w, buffer);
    }
    if (lost) __atomic_store_n(&b.lost, 1, __ATOMIC_RELAXED);
  }

  void finish(const Shared& b) const {
    const int64_t block = b.base / b.length;
    keep_exponent(p.moment_exponents, block, moment.format, b.most[kMoment]);
    keep_exponent(p.weight_exponents, block, weight.format, b.most[kMoved]);
  }
};

// All blocks of all parameters. A parameter whose blocks are short goes to one thread after another,
// block by block; long blocks have all threads work on them, one phase after another.
template <class Step, class Hyper, class Parameter>
int optimize(const Hyper& hyper, const Parameter* parameters, int64_t count, int threads) {
  constexpr int64_t kShort = kSerial;  // elements of a block that one thread takes alone
  int64_t longest = 0;
  for (int64_t k = 0; k < count; ++k)
    if (parameters[k].length > longest) longest = parameters[k].length;
  int64_t elements = 0;
  for (int64_t k = 0; k < count; ++k) elements += parameters[k].blocks * parameters[k].length;
  if (elements < kSerial) threads = 1;
  const int64_t own = longest < kShort ? longest : kShort;
  const size_t floats = static_cast<size_t>(Step::values * (longest + own * threads));
  float* scratch = static_cast<float*>(malloc(floats * sizeof(float)));
  if (!scratch) return -1;
  typename Step::Shared common(0, 0, scratch, longest);
  int lost = 0;
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
    alignas(64) uint32_t buffer[kChunk + kPadding];
    float* mine = scratch + Step::values * (longest + own * me);
    int64_t turn = 0;  // short blocks are dealt out in turns of about kShort elements
    for (int64_t k = 0; k < count; ++k) {
      const Parameter& p = parameters[k];
      const Step step(hyper, p);
      if (p.length <= own) {
        const int64_t hand = p.length < kShort ? (kShort + p.length - 1) / p.length : 1;
        for (int64_t first = 0; first < p.blocks; first += hand, ++turn) {
          if (turn % team != me) continue;
          const int64_t last = first + hand < p.blocks ? first + hand : p.blocks;
          for (int64_t i = first; i < last; ++i) {
            typename Step::Shared b(i * p.length, p.length, mine, own);
            step.search(b, 0, p.length);
            step.step(b, 0, p.length, buffer);
            step.keep(b, 0, p.length, buffer);
            step.finish(b);
            if (b.lost) __atomic_store_n(&lost, 1, __ATOMIC_RELAXED);
          }
        }
        continue;
      }
      const int64_t chunks = (p.length + kChunk - 1) / kChunk;
      const int64_t begin = chunks * me / team * kChunk;
      const int64_t end = me + 1 == team ? p.length : chunks * (me + 1) / team * kChunk;
      for (int64_t i = 0; i < p.blocks; ++i) {
#ifdef _OPENMP
#pragma omp barrier
#endif
        if (me == 0) common = typename Step::Shared(i * p.length, p.length, scratch, longest);
#ifdef _OPENMP
#pragma omp barrier
#endif
        step.search(common, begin, end - begin);
#ifdef _OPENMP
#pragma omp barrier
#endif
        step.step(common, begin, end - begin, buffer);
#ifdef _OPENMP
#pragma omp barrier
#endif
        step.keep(common, begin, end - begin, buffer);
        if (common.lost) __atomic_store_n(&lost, 1, __ATOMIC_RELAXED);
        if (me == 0) step.finish(common);
      }
    }
  }
  free(scratch);
  return lost;
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
