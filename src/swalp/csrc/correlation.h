// Output and input gradient of a convolution of int8 codes: one computation, a correlation.
//
// No image is unfolded into columns. Each destination position sums, over the taps that reach a source
// position, products of channels. A tile is up to kRows destination positions by kWide destination
// channels, whose sums stay in registers. Its positions are neighbours in a row of a wide image, read
// from a copy with a margin for the padding; or the same position in neighbouring images, so that no
// tap into the padding is ever multiplied.
//
// Where the instruction wants one operand unsigned, the source has 128 added; 128 times the sum of
// the weights is taken off.
#pragma once
#include "tiles.h"

namespace {

// One axis of a correlation. Destination coordinate d = phases * j + r has the taps of phase r, which
// read source coordinates base + step * j, where there are such.
struct Axis {
  struct Tap {
    int64_t index, base;
  };
  int64_t source, dest, phases, step;
  std::vector<std::vector<Tap>> taps;

  template <class Visit> void visit(int64_t d, const Visit& each) const {
    for (const Tap& tap : taps[static_cast<size_t>(d % phases)]) {
      const int64_t s = tap.base + step * (d / phases);
      if (s >= 0 && s < source) each(tap.index, s);
    }
  }
};

Axis axis_of(const swalp_convolution& c, int axis, bool backward) {
  const int64_t stride = c.stride[axis], pad = c.padding[axis], dilation = c.dilation[axis];
  if (!backward) {
    Axis a{c.in_size[axis], c.out_size[axis], 1, stride, {{}}};
    for (int64_t k = 0; k < c.kernel[axis]; ++k) a.taps[0].push_back({k, k * dilation - pad});
    return a;
  }
  Axis a{c.out_size[axis], c.in_size[axis], stride, 1, {}};
  for (int64_t r = 0; r < stride; ++r) {
    a.taps.emplace_back();
    for (int64_t k = 0; k < c.kernel[axis]; ++k) {
      const int64_t at = r + pad - k * dilation;
      if (at % stride == 0) a.taps.back().push_back({k, at / stride});
    }
  }
  return a;
}

// Packed weights: for each group and each kWide destination channels, for each tap,
// [source / kTerms][kWide][kTerms] plain codes; then, if sources are shifted, in the same order, for
// each tap 128 times the sums of the kWide channels.
struct Weights {
  int64_t groups, source, dest, taps;  // channels of a group
  int64_t steps, blocks, together;     // steps that one instruction takes

  Weights(const swalp_convolution& c, bool backward)
      : groups(c.groups), source(c.in_channels / c.groups), dest(c.out_channels / c.groups),
        taps(c.kernel[0] * c.kernel[1]) {
    if (backward) {
      const int64_t out = dest;
      dest = source;
      source = out;
    }
    steps = ceil_div(source, kTerms);
    together = 1;
#if defined(__AMX_INT8__)
    const int64_t pieces = ceil_div(steps, kQuads);
    together = ceil_div(steps, pieces);
    steps = pieces * together;
#endif
    blocks = ceil_div(dest, kWide);
  }
  int64_t block_bytes() const { return taps * steps * kPanel; }
  int64_t sums_at() const { return groups * blocks * block_bytes(); }
  int64_t bytes() const { return sums_at() + (kShifted ? groups * blocks * taps * kWide * 4 : 0); }
};

// A tile's taps, and what becomes of its sums.
struct Tile {
  std::vector<int64_t> source, weight;  // for each tap: offset in bytes, index
  int64_t steps, together;              // of the contraction; of them, that one instruction takes
  int64_t row;                          // bytes from one position to the next
  const uint8_t* weights;
  const int32_t* sums;
  int columns;
  int64_t out_row;  // floats from one position to the next
  Scale scale;
  const float* bias;
  Coming* result;  // where the next tile goes

  // A tile asks for some of it with each instruction's products; or with each tap, where registers are few.
#if defined(__AMX_INT8__)
  int64_t turns_of_tap() const { return steps / together; }
#else
  int64_t turns_of_tap() const { return 1; }
#endif
  Coming coming(const float* next) const {
    const int64_t turns = static_cast<int64_t>(source.size()) * turns_of_tap();
    return Coming(next, 4 * out_row, kRows, 4 * columns, turns > 0 ? turns : 1);
  }
};

#if defined(__AMX_INT8__)
// Of the positions those that are missing are read, too: what lies there is not used.
template <int R, int V> void tile(const Tile& t, const uint8_t* from, int64_t rows, float* out) {
  written();
  clear_sums<R, V>();
  for (size_t tap = 0; tap < t.source.size(); ++tap) {
    const uint8_t* a = from + t.source[tap];
    const uint8_t* b = t.weights + t.weight[tap] * t.steps * kPanel;
    for (int64_t k = 0; k < t.steps; k += t.together, a += 4 * t.together, b += t.together * kPanel) {
      add_products<R, V>(a, a + 16 * t.row, t.row, b);
      t.result->turn();
    }
  }
  alignas(64) int32_t sums[16 * R * kSide];
  store_sums<R, V>(sums);
  for (int v = 0; v < V; ++v) {
    const int left = t.columns - v * kLanes, count = left < kLanes ? left : kLanes;
    const Floats bias = t.bias ? load_floats(t.bias + v * kLanes, count) : t.scale(zeros());
    for (int64_t r = 0; r < rows; ++r) {
      Floats y = t.scale(load(sums + r * kSide + v * kLanes));
      if (t.bias) y = add(y, bias);
      float* to = out + r * t.out_row + v * kLanes;
      if (count == kLanes) store(to, y);
      else store(to, y, count);
    }
  }
}

// `count` positions; the next tile of others goes to `after`.
void tiles(Tile& t, int64_t count, const uint8_t* from, float* out, const float* after) {
  for (int64_t at = 0; at < count; at += kRows) {
    const int64_t rows = smaller(kRows, count - at);
    Coming result = t.coming(at + rows < count ? out + (at + rows) * t.out_row : after);
    t.result = &result;
    const auto run = rows > 16 ? t.columns > kLanes ? tile<2, 2> : tile<2, 1>
                               : t.columns > kLanes ? tile<1, 2> : tile<1, 1>;
    run(t, from + at * t.row, rows, out + at * t.out_row);
  }
}
#else
// Keeps the compiler from making one pointer of each row: there are not as many registers.
#define SWALP_ONE_POINTER(p) __asm__("" : "+r"(p))

template <int R, int V> void tile(const Tile& t, const uint8_t* from, float* out) {
  Sums sum[R][V];
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v)
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) sum[r][v] = zeros();
  const int64_t row = t.row;
  for (size_t tap = 0; tap < t.source.size(); ++tap) {
    const uint8_t *a0 = from + t.source[tap], *a3 = a0 + 3 * row, *a6 = a3 + 3 * row,
                  *a9 = a6 + 3 * row;
    const uint8_t* b = t.weights + t.weight[tap] * t.steps * kPanel;
    t.result->turn();
    for (int64_t k = t.steps; k > 0; --k, b += kPanel) {
      SWALP_ONE_POINTER(a0);
      SWALP_ONE_POINTER(a3);
      SWALP_ONE_POINTER(a6);
      SWALP_ONE_POINTER(a9);
      Sums w[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) w[v] = load(b + 4 * kLanes * v);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const uint8_t* a = r < 3 ? a0 : r < 6 ? a3 : r < 9 ? a6 : a9;
        const Sums x = lane_everywhere(a + r % 3 * row);
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) sum[r][v] = dot(sum[r][v], x, w[v]);
      }
      a0 += 4;
      a3 += 4;
      a6 += 4;
      a9 += 4;
    }
  }
  const bool whole = t.columns == V * kLanes;
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) {
    Sums sign = zeros();
    if (kShifted)
      for (const int64_t tap : t.weight) sign = add(sign, load(t.sums + tap * kWide + v * kLanes));
    const int count = whole ? kLanes : t.columns - v * kLanes < kLanes ? t.columns - v * kLanes : kLanes;
    const Floats bias = t.bias ? load_floats(t.bias + v * kLanes, count) : t.scale(zeros());
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      Floats y = t.scale(subtract(sum[r][v], sign));
      if (t.bias) y = add(y, bias);
      float* to = out + r * t.out_row + v * kLanes;
      if (whole) store(to, y);
      else store(to, y, count);
    }
  }
}

using TileFunction = void (*)(const Tile&, const uint8_t*, float*);

template <int V, int... R>
TileFunction tile_of(int64_t rows, std::integer_sequence<int, R...>) {
  static constexpr TileFunction all[] = {tile<R + 1, V>...};
  return all[rows - 1];
}
// `count` positions, in tiles of nearly equal height; the next tile of others goes to `after`.
void tiles(Tile& t, int64_t count, const uint8_t* from, float* out, const float* after) {
  const int64_t pieces = ceil_div(count, kRows);
  int64_t at = 0;
  for (int64_t piece = 0; piece < pieces; ++piece) {
    const int64_t end = count * (piece + 1) / pieces;
    Coming result = t.coming(end < count ? out + end * t.out_row : after);
    t.result = &result;
    const TileFunction run = t.columns > kLanes ? tile_of<2>(end - at, Heights())
                                                : tile_of<1>(end - at, Heights());
    run(t, from + at * t.row, out + at * t.out_row);
    at = end;
  }
}
#endif

// y = correlation of the source codes with packed weights.
class Correlation {
 public:
  Correlation(const swalp_convolution& c, bool backward)
      : batch_(c.batch), height_(axis_of(c, 0, backward)), width_(axis_of(c, 1, backward)),
        w_(c, backward), pixel_(w_.groups * w_.steps * 4) {}

  int run(const int8_t* x, const void* packed, int64_t exponent, const float* bias, float* y,
          int threads) {
    x_ = x, packed_ = static_cast<const uint8_t*>(packed), bias_ = bias, y_ = y;
    exponent_ = exponent;
    const int64_t positions = height_.dest * width_.dest;
    if (batch_ * positions * w_.dest == 0) return 0;
    if (batch_ * positions * w_.dest * w_.groups * w_.source * w_.taps < kFewProducts) threads = 1;
    return by_rows() ? run_by_rows(threads) : run_by_images(threads);
  }

 private:
  int64_t batch_;
  Axis height_, width_;
  Weights w_;
  int64_t pixel_;  // bytes of a source position; each group's channels fill a multiple of kTerms
  const int8_t* x_;
  const uint8_t* packed_;
  const float* bias_;
  float* y_;
  int64_t exponent_;

  // Whether tiles are neighbours in a row, not in the batch. Measured: rows of 16 gain by it, rows of
  // 8 lose, whose taps into the padding are then multiplied.
  bool by_rows() const {
    const int64_t in_row = ceil_div(width_.dest, width_.phases);
    return in_row >= smaller(kRows, 16) || in_row > batch_;
  }

  // Bytes beyond the last position that a tile reads and does not use, of rows of `row` bytes.
  static int64_t slack(int64_t row) { return kRows * row + 64; }

  Tile tile_for(int64_t group, int64_t block, int64_t row, int64_t out_row) const {
    const int64_t first = block * kWide, all = group * w_.blocks + block;
    const int32_t* sums = reinterpret_cast<const int32_t*>(packed_ + w_.sums_at());
    return {{}, {}, w_.steps, w_.together, row, packed_ + all * w_.block_bytes(),
            sums + all * w_.taps * kWide, static_cast<int>(smaller(kWide, w_.dest - first)), out_row,
            Scale(Factors(exponent_)), bias_ ? bias_ + group * w_.dest + first : nullptr, nullptr};
  }

  // The channels of a stretch of positions, shifted. (Sizes as values: a byte that is written may be of
  // those in memory, as far as a compiler knows, which then takes one at a time.)
  void copy(const int8_t* from, int64_t positions, uint8_t* bytes) const {
    Shifted* to = reinterpret_cast<Shifted*>(bytes);
    const int64_t source = w_.source, padded = kTerms * w_.steps, groups = w_.groups;
    const int64_t stretches = source == padded ? 1 : positions * groups;
    const int64_t there = source == padded ? positions * groups * source : source;
    for (int64_t i = 0; i < stretches; ++i, from += there) {
      for (int64_t k = 0; k < there; ++k) *to++ = shifted(from[k]);
      for (int64_t k = source; k < padded; ++k) *to++ = shifted(int8_t{0});
    }
  }

  int run_by_rows(int threads) const {
    int64_t left = 0, right = 0;  // margins
    for (const auto& phase : width_.taps)
      for (const Axis::Tap& tap : phase) {
        const int64_t last = tap.base + width_.step * ((width_.dest - 1) / width_.phases);
        if (-tap.base > left) left = -tap.base;
        if (last - width_.source + 1 > right) right = last - width_.source + 1;
      }
    const int64_t row = (left + width_.source + right) * pixel_;
    int64_t low = 0, high = 0;  // source rows that a destination row reaches
    for (const auto& phase : height_.taps)
      for (const Axis::Tap& tap : phase) low = smaller(low, tap.base), high = -smaller(-high, -tap.base);
    int64_t rows = kStrip / row - (high - low);  // of the source, that a band adds
    rows = rows < 1 ? 1 : rows;
    int64_t band = rows / height_.step * height_.phases;
    const int64_t most = ceil_div(height_.dest, ceil_div(threads, batch_));
    band = band < 1 ? 1 : band > most ? most : band;
    const int64_t bands = ceil_div(height_.dest, band);
    bool failed = false;
    failed |= parallel(batch_ * bands, threads, [&](int64_t begin, int64_t end) {
      Registers registers;
      registers.shape(kRows, w_.together);
      for (; begin < end; ++begin) {
        const int64_t first = begin % bands * band;
        if (!run_band(begin / bands, first, smaller(first + band, height_.dest), left, right, row))
          return true;
      }
      return false;
    });
    return failed ? -1 : 0;
  }

  bool run_band(int64_t image, int64_t first, int64_t last, int64_t left, int64_t right,
                int64_t row) const {
    int64_t low = height_.source, high = 0;
    for (int64_t d = first; d < last; ++d)
      height_.visit(d, [&](int64_t, int64_t s) {
        low = smaller(low, s);
        high = high > s + 1 ? high : s + 1;
      });
    uint8_t* strip = own.at_least((high > low ? high - low : 0) * row + slack(width_.step * pixel_));
    if (!strip) return false;
    const int64_t channels = w_.source * w_.groups;
    for (int64_t s = low; s < high; ++s) {
      uint8_t* to = strip + (s - low) * row;
      memset(to, kShifted ? 128 : 0, static_cast<size_t>(left * pixel_));
      copy(x_ + (image * height_.source + s) * width_.source * channels, width_.source,
           to + left * pixel_);
      memset(to + (left + width_.source) * pixel_, kShifted ? 128 : 0,
             static_cast<size_t>(right * pixel_));
    }
    const int64_t out = w_.dest * w_.groups;
    for (int64_t g = 0; g < w_.groups; ++g)
      for (int64_t block = 0; block < w_.blocks; ++block) {
        Tile t = tile_for(g, block, width_.step * pixel_, width_.phases * out);
        const int64_t phases = smaller(width_.phases, width_.dest);
        float* const from = y_ + image * height_.dest * width_.dest * out + g * w_.dest + block * kWide;
        const auto place = [&](int64_t d, int64_t phase) { return from + (d * width_.dest + phase) * out; };
        for (int64_t d = first; d < last; ++d)
          for (int64_t phase = 0; phase < phases; ++phase) {
            t.source.clear();
            t.weight.clear();
            height_.visit(d, [&](int64_t k, int64_t s) {
              for (const Axis::Tap& tap : width_.taps[static_cast<size_t>(phase)]) {
                t.source.push_back((s - low) * row + (left + tap.base) * pixel_);
                t.weight.push_back(k * kernel_width() + tap.index);
              }
            });
            const int64_t count = ceil_div(width_.dest - phase, width_.phases);
            const float* const after = phase + 1 < phases ? place(d, phase + 1)
                                       : d + 1 < last     ? place(d + 1, 0)
                                                          : place(first, 0) + kWide;
            tiles(t, count, strip + g * w_.steps * 4, place(d, phase), after);
          }
      }
    return true;
  }

  int64_t kernel_width() const {
    size_t taps = 0;
    for (const auto& phase : width_.taps) taps += phase.size();
    return static_cast<int64_t>(taps);  // each tap belongs to one phase
  }

  int run_by_images(int threads) const {
    const int64_t sources = height_.source * width_.source, channels = w_.source * w_.groups;
    uint8_t* source = shared.at_least(sources * batch_ * pixel_ + slack(pixel_));
    if (!source) return -1;
    parallel(sources, threads, [&](int64_t begin, int64_t end) {
      for (; begin < end; ++begin)
        for (int64_t n = 0; n < batch_; ++n)
          copy(x_ + (n * sources + begin) * channels, 1, source + (begin * batch_ + n) * pixel_);
      return false;
    });
    const int64_t positions = height_.dest * width_.dest, out = w_.dest * w_.groups;
    parallel(w_.groups * w_.blocks * positions, threads, [&](int64_t begin, int64_t end) {
      Registers registers;
      registers.shape(kRows, w_.together);
      for (; begin < end; ++begin) {
        const int64_t block = begin / positions % w_.blocks, g = begin / positions / w_.blocks;
        const int64_t position = begin % positions;
        Tile t = tile_for(g, block, pixel_, positions * out);
        height_.visit(position / width_.dest, [&](int64_t k, int64_t row) {
          width_.visit(position % width_.dest, [&](int64_t l, int64_t column) {
            t.source.push_back((row * width_.source + column) * batch_ * pixel_);
            t.weight.push_back(k * kernel_width() + l);
          });
        });
        float* const to = y_ + position * out + g * w_.dest + block * kWide;
        tiles(t, batch_, source + g * w_.steps * 4, to, to + out);
      }
      return false;
    });
    return 0;
  }
};

}  // namespace
