// Convolutions of int8 codes for one instruction set: compiled once for each, with SWALP_BUILD its name.
//
// No image is unfolded into columns. Output and input gradient are one computation, a correlation: each
// destination position sums, over the taps that reach a source position, products of channels. A tile
// is up to 12 destination positions by 32 destination channels, whose sums stay in registers. Its
// positions are neighbours in a row of a wide image, read from a copy with a margin for the padding;
// or the same position in neighbouring images, so that no tap into the padding is ever multiplied.
//
// The weight gradient sums over images and positions: four images lie side by side, so that any tap,
// stride and dilation is an offset into the same memory.
//
// The instruction multiplies unsigned by signed bytes: one operand has 128 added, and 128 times the
// sum of the other is taken off.
#include "convolution.h"

#include <stdlib.h>

#include <utility>
#include <vector>

#include "dot.h"
#include "parallel.h"

namespace {

#if defined(__AVX512VNNI__)
constexpr int kRows = 12;  // positions of a tile: 24 registers of sums
#else
constexpr int kRows = 4;
#endif
constexpr int kVectors = 2, kWide = kVectors * kLanes;
constexpr int64_t kPanel = 4 * kWide;             // bytes for four of the contraction
constexpr int64_t kStrip = 384 << 10;             // bytes of a source with margins: it stays in L2
constexpr int64_t kImages = 256 << 10;            // the same of 32 channels of images side by side
constexpr int64_t kFewProducts = 1 << 20;         // below which a second thread costs more than it saves

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Memory that a thread keeps from call to call, as fresh pages cost more than what is done with them.
class Workspace {
 public:
  ~Workspace() { free(memory_); }
  uint8_t* at_least(int64_t bytes) {
    const size_t wanted = (static_cast<size_t>(bytes) + 4095) / 4096 * 4096;
    if (wanted > size_) {
      free(memory_);
      memory_ = static_cast<uint8_t*>(aligned_alloc(4096, wanted));
      size_ = memory_ ? wanted : 0;
    }
    return memory_;
  }

 private:
  uint8_t* memory_ = nullptr;
  size_t size_ = 0;
};
thread_local Workspace shared, own;  // of a call; of each thread that works on it

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

// Packed weights: for each group and each 32 destination channels, for each tap, [source / 4][32][4]
// bytes; then, in the same order, for each tap 128 times the sums of the 32 channels.
struct Weights {
  int64_t groups, source, dest, taps;  // channels of a group
  int64_t steps, blocks;

  Weights(const swalp_convolution& c, bool backward)
      : groups(c.groups), source(c.in_channels / c.groups), dest(c.out_channels / c.groups),
        taps(c.kernel[0] * c.kernel[1]) {
    if (backward) {
      const int64_t out = dest;
      dest = source;
      source = out;
    }
    steps = ceil_div(source, 4);
    blocks = ceil_div(dest, kWide);
  }
  int64_t block_bytes() const { return taps * steps * kPanel; }
  int64_t sums_at() const { return groups * blocks * block_bytes(); }
  int64_t bytes() const { return sums_at() + groups * blocks * taps * kWide * 4; }
};

// A tile's taps, and what becomes of its sums.
struct Tile {
  std::vector<int64_t> source, weight;  // for each tap: offset in bytes, index
  int64_t steps, row;                   // of the contraction; bytes from one position to the next
  const int8_t* weights;
  const int32_t* sums;
  int columns;
  int64_t out_row;  // floats from one position to the next
  Scale scale;
  const float* bias;
};

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
    const int8_t* b = t.weights + t.weight[tap] * t.steps * kPanel;
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
        const Sums x = four_everywhere(a + r % 3 * row);
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
using Heights = std::make_integer_sequence<int, kRows>;

// `count` positions, in tiles of nearly equal height.
void tiles(const Tile& t, int64_t count, const uint8_t* from, float* out) {
  const int64_t pieces = ceil_div(count, kRows);
  int64_t at = 0;
  for (int64_t piece = 0; piece < pieces; ++piece) {
    const int64_t end = count * (piece + 1) / pieces;
    const TileFunction run = t.columns > kLanes ? tile_of<2>(end - at, Heights())
                                                : tile_of<1>(end - at, Heights());
    run(t, from + at * t.row, out + at * t.out_row);
    at = end;
  }
}

// 2**exponent as two normal factors; beyond ±252 every product is 0 or infinite anyway.
Scale scale_of(int64_t exponent) {
  exponent = exponent < -252 ? -252 : exponent > 252 ? 252 : exponent;
  const auto power = [](int64_t e) {
    const uint32_t bits = static_cast<uint32_t>(e + 127) << 23;
    float value;
    memcpy(&value, &bits, 4);
    return value;
  };
  return {power(exponent / 2), power(exponent - exponent / 2)};
}

void flip(const int8_t* from, int64_t n, uint8_t* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<uint8_t>(from[i] ^ -128);
}

// y = correlation of the source codes with packed weights.
class Correlation {
 public:
  Correlation(const swalp_convolution& c, bool backward)
      : batch_(c.batch), height_(axis_of(c, 0, backward)), width_(axis_of(c, 1, backward)),
        w_(c, backward), pixel_(w_.groups * w_.steps * 4) {}

  int run(const int8_t* x, const void* packed, int64_t exponent, const float* bias, float* y,
          int threads) {
    x_ = x, packed_ = static_cast<const int8_t*>(packed), bias_ = bias, y_ = y;
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
  int64_t pixel_;  // bytes of a source position, each group's channels filled up to a multiple of 4
  const int8_t *x_, *packed_;
  const float* bias_;
  float* y_;
  int64_t exponent_;

  // Whether tiles are neighbours in a row, not in the batch. Measured: rows of 16 gain by it, rows of
  // 8 lose, whose taps into the padding are then multiplied.
  bool by_rows() const {
    const int64_t in_row = ceil_div(width_.dest, width_.phases);
    return in_row >= kRows || in_row > batch_;
  }

  Tile tile_for(int64_t group, int64_t block, int64_t row, int64_t out_row) const {
    const int64_t first = block * kWide, all = group * w_.blocks + block;
    const int32_t* sums = reinterpret_cast<const int32_t*>(packed_ + w_.sums_at());
    return {{}, {}, w_.steps, row, packed_ + all * w_.block_bytes(), sums + all * w_.taps * kWide,
            static_cast<int>(smaller(kWide, w_.dest - first)), out_row, scale_of(exponent_),
            bias_ ? bias_ + group * w_.dest + first : nullptr};
  }

  // The channels of a stretch of positions, each with 128 added.
  void copy(const int8_t* from, int64_t positions, uint8_t* to) const {
    const int64_t channels = w_.source * w_.groups;
    if (pixel_ == channels) return flip(from, positions * channels, to);
    for (int64_t p = 0; p < positions; ++p)
      for (int64_t g = 0; g < w_.groups; ++g)
        for (int64_t s = 0; s < 4 * w_.steps; ++s)
          *to++ = s < w_.source ? static_cast<uint8_t>(*from++ ^ -128) : 128;
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
    uint8_t* strip = own.at_least((high > low ? high - low : 0) * row + 64);
    if (!strip) return false;
    const int64_t channels = w_.source * w_.groups;
    for (int64_t s = low; s < high; ++s) {
      uint8_t* to = strip + (s - low) * row;
      memset(to, 128, static_cast<size_t>(left * pixel_));
      copy(x_ + (image * height_.source + s) * width_.source * channels, width_.source,
           to + left * pixel_);
      memset(to + (left + width_.source) * pixel_, 128, static_cast<size_t>(right * pixel_));
    }
    const int64_t out = w_.dest * w_.groups;
    for (int64_t g = 0; g < w_.groups; ++g)
      for (int64_t block = 0; block < w_.blocks; ++block) {
        Tile t = tile_for(g, block, width_.step * pixel_, width_.phases * out);
        for (int64_t d = first; d < last; ++d)
          for (int64_t phase = 0; phase < smaller(width_.phases, width_.dest); ++phase) {
            t.source.clear();
            t.weight.clear();
            height_.visit(d, [&](int64_t k, int64_t s) {
              for (const Axis::Tap& tap : width_.taps[static_cast<size_t>(phase)]) {
                t.source.push_back((s - low) * row + (left + tap.base) * pixel_);
                t.weight.push_back(k * kernel_width() + tap.index);
              }
            });
            const int64_t count = ceil_div(width_.dest - phase, width_.phases);
            float* to = y_ + ((image * height_.dest + d) * width_.dest + phase) * out + g * w_.dest +
                        block * kWide;
            tiles(t, count, strip + g * w_.steps * 4, to);
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
    uint8_t* source = shared.at_least(sources * batch_ * pixel_ + 64);
    if (!source) return -1;
    parallel(sources, threads, [&](int64_t begin, int64_t end) {
      for (; begin < end; ++begin)
        for (int64_t n = 0; n < batch_; ++n)
          copy(x_ + (n * sources + begin) * channels, 1, source + (begin * batch_ + n) * pixel_);
      return false;
    });
    const int64_t positions = height_.dest * width_.dest, out = w_.dest * w_.groups;
    parallel(w_.groups * w_.blocks * positions, threads, [&](int64_t begin, int64_t end) {
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
        tiles(t, batch_, source + g * w_.steps * 4, y_ + position * out + g * w_.dest + block * kWide);
      }
      return false;
    });
    return 0;
  }
};

// The weight gradient. Of the images a chunk is taken at a time; four of them side by side are a quad.
// x: for each group and each 32 input channels [height][width][quad][32][4] unsigned bytes;
// dy: for each group and each R <= 12 output channels [height][width][quad][R][4] signed bytes.
template <int R, int V>
void accumulate(const int64_t* run, int64_t runs, const int8_t* a, const uint8_t* b, int32_t* sums,
                bool first) {
  Sums sum[R][V];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v)
      sum[r][v] = first ? zeros() : load(sums + r * kWide + v * kLanes);
  for (; runs > 0; --runs, run += 3) {
    const int8_t* x = a + run[0] * R * 4;
    const uint8_t* y = b + run[1] * kPanel;
    for (int64_t k = run[2]; k > 0; --k, x += 4 * R, y += kPanel) {
      Sums w[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) w[v] = load(y + 4 * kLanes * v);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const Sums four = four_everywhere(x + 4 * r);
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) sum[r][v] = dot(sum[r][v], w[v], four);
      }
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) store(sums + r * kWide + v * kLanes, sum[r][v]);
}

using Accumulate = void (*)(const int64_t*, int64_t, const int8_t*, const uint8_t*, int32_t*, bool);

template <int V, int... R>
Accumulate accumulate_of(int64_t rows, std::integer_sequence<int, R...>) {
  static constexpr Accumulate all[] = {accumulate<R + 1, V>...};
  return all[rows - 1];
}

// [count][4] bytes of the same channels of four images `stride` apart, of which `images` are there.
template <bool flipped>
void side_by_side(const int8_t* from, int64_t stride, int64_t images, int count, uint8_t* to) {
#if defined(__AVX512VNNI__)
  for (int c = 0; c < count; c += kLanes) {
    const int left = count - c;
    const __mmask16 there = static_cast<__mmask16>(left >= kLanes ? 0xffff : (1 << left) - 1);
    __m512i quad = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      if (i < images) {
        const __m128i bytes = _mm_maskz_loadu_epi8(there, from + i * stride + c);
        quad = _mm512_or_si512(quad, _mm512_slli_epi32(_mm512_cvtepu8_epi32(bytes), 8 * i));
      }
    if (flipped) quad = _mm512_xor_si512(quad, _mm512_set1_epi8(-128));
    _mm512_mask_storeu_epi32(to + 4 * c, there, quad);
  }
#else
  for (int c = 0; c < count; ++c)
    for (int i = 0; i < 4; ++i) {
      const int8_t code = i < images ? from[i * stride + c] : int8_t{0};
      to[4 * c + i] = static_cast<uint8_t>(flipped ? code ^ -128 : code);
    }
#endif
}

// Rows of `taps` floats for each of `count` channels, from [tap][32].
void interleave(const float (*from)[kWide], int64_t taps, int count, float* to) {
  for (int c = 0; c < count; ++c)
    for (int64_t t = 0; t < taps; ++t) *to++ = from[t][c];
}

class WeightGradient {
 public:
  explicit WeightGradient(const swalp_convolution& c)
      : c_(c), in_(c.in_channels / c.groups), out_(c.out_channels / c.groups),
        taps_(c.kernel[0] * c.kernel[1]), sources_(c.in_size[0] * c.in_size[1]),
        dests_(c.out_size[0] * c.out_size[1]), blocks_(ceil_div(in_, kWide)),
        tiles_(ceil_div(out_, kRows)), rows_(ceil_div(out_, tiles_)) {
    // Rounded up, the last tile may be left without rows.
    tiles_ = ceil_div(out_, rows_);
    const int64_t quads = ceil_div(c.batch, 4);
    quads_ = kImages / (sources_ * kPanel);
    quads_ = quads_ < 1 ? 1 : quads_ > quads ? quads : quads_;
    for (int64_t kh = 0; kh < c.kernel[0]; ++kh)
      for (int64_t kw = 0; kw < c.kernel[1]; ++kw) runs_.push_back(runs_of(kh, kw));
  }

  int run(const int8_t* x, const int8_t* dy, int64_t exponent, bool channels_last, float* dw,
          int threads) {
    const int64_t products = c_.batch * dests_ * c_.out_channels * in_ * taps_;
    if (c_.out_channels * in_ * taps_ == 0) return 0;
    if (products < kFewProducts) threads = 1;
    const int64_t x_bytes = c_.groups * blocks_ * sources_ * quads_ * kPanel;
    const int64_t dy_bytes = round(c_.groups * tiles_ * dests_ * quads_ * rows_ * 4 + 64);
    const int64_t sum_bytes = c_.groups * blocks_ * tiles_ * taps_ * rows_ * kWide * 4;
    const int64_t sign_bytes = c_.groups * tiles_ * taps_ * kLanes * 4;
    const int64_t place_bytes = c_.groups * tiles_ * dests_ * kLanes * 4;
    uint8_t* memory = shared.at_least(x_bytes + dy_bytes + sum_bytes + sign_bytes + place_bytes);
    if (!memory) return -1;
    quad_x_ = memory;
    quad_dy_ = reinterpret_cast<int8_t*>(memory + x_bytes);
    sums_ = reinterpret_cast<int32_t*>(memory + x_bytes + dy_bytes);
    signs_ = sums_ + sum_bytes / 4;
    places_ = signs_ + sign_bytes / 4;
    bool failed = false;
    const int64_t all = ceil_div(c_.batch, 4);
    for (int64_t quad = 0; quad == 0 || quad < all; quad += quads_) {
      const int64_t count = smaller(quads_, all - quad);
      const bool first = quad == 0, last = quad + quads_ >= all;
      const int64_t of_x = c_.groups * blocks_ * c_.in_size[0];
      parallel(of_x + c_.groups * tiles_, threads, [&](int64_t begin, int64_t end) {
        for (; begin < end; ++begin)
          if (begin < of_x) pack_x(x, begin, quad, count);
          else pack_dy(dy, begin - of_x, quad, count, first);
        return false;
      });
      failed |= parallel(c_.groups * blocks_ * tiles_, threads, [&](int64_t begin, int64_t end) {
        float* buffer = nullptr;
        if (last) buffer = reinterpret_cast<float*>(own.at_least(taps_ * kWide * 4));
        if (last && !buffer) return true;
        for (; begin < end; ++begin) {
          add_up(begin, count, first);
          if (last) finish(begin, scale_of(exponent), channels_last, buffer, dw);
        }
        return false;
      });
    }
    return failed ? -1 : 0;
  }

 private:
  struct Run {
    int64_t dest, source, positions;
  };
  const swalp_convolution& c_;
  int64_t in_, out_, taps_;  // channels of a group
  int64_t sources_, dests_, blocks_, tiles_, rows_, quads_;
  std::vector<std::vector<Run>> runs_;  // of each tap: neighbours in both images
  uint8_t* quad_x_;
  int8_t* quad_dy_;
  int32_t *sums_, *signs_, *places_;

  static int64_t round(int64_t bytes) { return ceil_div(bytes, 64) * 64; }

  std::vector<Run> runs_of(int64_t kh, int64_t kw) const {
    std::vector<Run> runs;
    const auto source = [&](int axis, int64_t at, int64_t k) {
      return at * c_.stride[axis] + k * c_.dilation[axis] - c_.padding[axis];
    };
    for (int64_t oh = 0; oh < c_.out_size[0]; ++oh) {
      const int64_t ih = source(0, oh, kh);
      if (ih < 0 || ih >= c_.in_size[0]) continue;
      for (int64_t ow = 0; ow < c_.out_size[1]; ++ow) {
        const int64_t iw = source(1, ow, kw);
        if (iw < 0 || iw >= c_.in_size[1]) continue;
        const int64_t dest = oh * c_.out_size[1] + ow, from = ih * c_.in_size[1] + iw;
        if (!runs.empty() && runs.back().dest + runs.back().positions == dest &&
            runs.back().source + runs.back().positions == from)
          ++runs.back().positions;
        else runs.push_back({dest, from, 1});
      }
    }
    return runs;
  }

  // One row of 32 channels of the images' quads.
  void pack_x(const int8_t* x, int64_t item, int64_t quad, int64_t count) const {
    const int64_t ih = item % c_.in_size[0], block = item / c_.in_size[0] % blocks_;
    const int64_t g = item / c_.in_size[0] / blocks_, first = block * kWide;
    const int width = static_cast<int>(smaller(kWide, in_ - first));
    const int64_t image = sources_ * c_.in_channels;
    uint8_t* to = quad_x_ + ((g * blocks_ + block) * sources_ + ih * c_.in_size[1]) * count * kPanel;
    for (int64_t iw = 0; iw < c_.in_size[1]; ++iw)
      for (int64_t q = 0; q < count; ++q, to += kPanel) {
        const int64_t n = 4 * (quad + q);
        const int8_t* from = x + n * image + (ih * c_.in_size[1] + iw) * c_.in_channels + g * in_ + first;
        side_by_side<true>(from, image, smaller(4, c_.batch - n), width, to);
      }
  }

  // R channels of the images' quads, and for each tap 128 times the sum of what it will meet.
  void pack_dy(const int8_t* dy, int64_t item, int64_t quad, int64_t count, bool first) const {
    const int64_t tile = item % tiles_, g = item / tiles_;
    const int height = static_cast<int>(smaller(rows_, out_ - tile * rows_));
    const int64_t image = dests_ * c_.out_channels;
    uint8_t* to = reinterpret_cast<uint8_t*>(quad_dy_) + item * dests_ * count * rows_ * 4;
    const int8_t* packed = reinterpret_cast<const int8_t*>(to);
    for (int64_t p = 0; p < dests_; ++p)
      for (int64_t q = 0; q < count; ++q, to += 4 * rows_) {
        const int64_t n = 4 * (quad + q);
        const int8_t* from = dy + n * image + p * c_.out_channels + g * out_ + tile * rows_;
        side_by_side<false>(from, image, smaller(4, c_.batch - n), height, to);
        if (height < rows_) memset(to + 4 * height, 0, static_cast<size_t>(4 * (rows_ - height)));
      }
    const Sums ones = everywhere(0x01010101);
    int32_t* places = places_ + item * dests_ * kLanes;
    for (int64_t p = 0; p < dests_; ++p) {
      Sums sum = zeros();
      for (int64_t q = 0; q < count; ++q, packed += 4 * rows_) sum = dot(sum, ones, load(packed));
      store(places + p * kLanes, sum);
    }
    for (int64_t t = 0; t < taps_; ++t) {
      int32_t* to_sign = signs_ + (item * taps_ + t) * kLanes;
      Sums sum = first ? zeros() : load(to_sign);
      for (const Run& run : runs_[static_cast<size_t>(t)])
        for (int64_t p = 0; p < run.positions; ++p)
          sum = add(sum, times128(load(places + (run.dest + p) * kLanes)));
      store(to_sign, sum);
    }
  }

  int32_t* sums_of(int64_t item) const { return sums_ + item * taps_ * rows_ * kWide; }

  void add_up(int64_t item, int64_t count, bool first) const {
    const int64_t tile = item % tiles_, block = item / tiles_ % blocks_, g = item / tiles_ / blocks_;
    const int8_t* a = quad_dy_ + (g * tiles_ + tile) * dests_ * count * rows_ * 4;
    const uint8_t* b = quad_x_ + (g * blocks_ + block) * sources_ * count * kPanel;
    const Accumulate run = in_ - block * kWide > kLanes ? accumulate_of<2>(rows_, Heights())
                                                        : accumulate_of<1>(rows_, Heights());
    std::vector<int64_t> steps;
    for (int64_t t = 0; t < taps_; ++t) {
      steps.clear();
      for (const Run& r : runs_[static_cast<size_t>(t)])
        steps.insert(steps.end(), {r.dest * count, r.source * count, r.positions * count});
      run(steps.data(), static_cast<int64_t>(steps.size()) / 3, a, b,
          sums_of(item) + t * rows_ * kWide, first);
    }
  }

  void finish(int64_t item, const Scale& scale, bool channels_last, float* buffer, float* dw) const {
    const int64_t tile = item % tiles_, block = item / tiles_ % blocks_, g = item / tiles_ / blocks_;
    const int32_t* signs = signs_ + (g * tiles_ + tile) * taps_ * kLanes;
    const int width = static_cast<int>(smaller(kWide, in_ - block * kWide));
    float(*rows)[kWide] = reinterpret_cast<float(*)[kWide]>(buffer);
    for (int64_t r = 0; r < smaller(rows_, out_ - tile * rows_); ++r) {
      for (int64_t t = 0; t < taps_; ++t) {
        const Sums sign = everywhere(signs[t * kLanes + r]);
        for (int v = 0; v < kVectors; ++v)
          store(rows[t] + v * kLanes,
                scale(subtract(load(sums_of(item) + (t * rows_ + r) * kWide + v * kLanes), sign)));
      }
      float* to = dw + (g * out_ + tile * rows_ + r) * taps_ * in_;
      if (!channels_last) interleave(rows, taps_, width, to + block * kWide * taps_);
      else
        for (int64_t t = 0; t < taps_; ++t)
          memcpy(to + t * in_ + block * kWide, rows[t], static_cast<size_t>(width) * 4);
    }
  }
};

int64_t packed_bytes(const swalp_convolution* c, int32_t backward) {
  return Weights(*c, backward != 0).bytes();
}

void pack(const swalp_convolution* c, int32_t backward, int32_t channels_last, const int8_t* weight,
          void* packed, int threads) {
  const Weights w(*c, backward != 0);
  // Strides of a weight's axes, as it lies in memory, and of a block's channels in it.
  const int64_t in = c->in_channels / c->groups;
  const int64_t in_stride = channels_last ? 1 : w.taps, tap_stride = channels_last ? in : 1;
  const int64_t out_stride = in * w.taps;
  const int64_t dest_stride = backward ? in_stride : out_stride;
  const int64_t source_stride = backward ? out_stride : in_stride;
  int8_t* bytes = static_cast<int8_t*>(packed);
  int32_t* sums = reinterpret_cast<int32_t*>(bytes + w.sums_at());
  if (w.bytes() < kFewProducts / 16) threads = 1;
  parallel(w.groups * w.blocks, threads, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) {
      const int64_t g = begin / w.blocks, first = begin % w.blocks * kWide;
      const int64_t width = smaller(kWide, w.dest - first);
      const int8_t* from = weight + g * (c->out_channels / c->groups) * out_stride + first * dest_stride;
      int8_t* to = bytes + begin * w.block_bytes();
      int32_t* sum = sums + begin * w.taps * kWide;
      memset(sum, 0, static_cast<size_t>(w.taps * kWide) * 4);
      if (width < kWide || w.source % 4) memset(to, 0, static_cast<size_t>(w.block_bytes()));
      for (int64_t s = 0; s < w.source; ++s)
        for (int64_t d = 0; d < width; ++d) {
          const int8_t* code = from + d * dest_stride + s * source_stride;
          int8_t* place = to + s / 4 * kPanel + d * 4 + s % 4;
          for (int64_t t = 0; t < w.taps; ++t) {
            place[t * w.steps * kPanel] = code[t * tap_stride];
            sum[t * kWide + d] += 128 * code[t * tap_stride];
          }
        }
    }
    return false;
  });
}

int forward(const swalp_convolution* c, const int8_t* x, const void* packed, int64_t exponent,
            const float* bias, float* y, int threads) {
  return Correlation(*c, false).run(x, packed, exponent, bias, y, threads);
}

int input_gradient(const swalp_convolution* c, const int8_t* dy, const void* packed,
                   int64_t exponent, float* dx, int threads) {
  return Correlation(*c, true).run(dy, packed, exponent, nullptr, dx, threads);
}

int weight_gradient(const swalp_convolution* c, const int8_t* x, const int8_t* dy, int64_t exponent,
                    int32_t channels_last, float* dw, int threads) {
  return WeightGradient(*c).run(x, dy, exponent, channels_last != 0, dw, threads);
}

}  // namespace

#define SWALP_JOIN_(name) swalp_convolution_##name
#define SWALP_JOIN(name) SWALP_JOIN_(name)
extern const swalp_convolution_build SWALP_JOIN(SWALP_BUILD);
const swalp_convolution_build SWALP_JOIN(SWALP_BUILD) = {packed_bytes, pack, forward, input_gradient,
                                                         weight_gradient};
