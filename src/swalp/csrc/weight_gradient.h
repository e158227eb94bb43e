// The weight gradient of a convolution of int8 codes: sums over images and positions.
//
// kTerms images, a bundle, lie side by side, so that any tap, stride and dilation is an offset into the
// same memory. A tile is up to kRows output channels by kWide input channels of one tap. Where images
// have 128 added, 128 times the sum of the output gradients that a tap meets is taken off. With AMX an
// instruction takes up to sixteen bundles, and a part of the work is a band of rows: what it reads of
// so many images would fill no cache.
#pragma once
#include "tiles.h"

namespace {

// Adds to the sums of a tile what its runs meet: three numbers each, the first step in dy and in x, and how
// many steps, of which `together` are taken at once.
using Accumulate = void (*)(const int64_t* run, int64_t runs, int64_t together, const uint8_t* a,
                            const uint8_t* b, int32_t* sums, bool first);

#if defined(__AMX_INT8__)
constexpr int64_t kBlock = 64 * kSide;  // bytes of a block of dy: up to sixteen bundles of 32 channels
constexpr int64_t kBand = 768 << 10;    // of blocks of x and of dy, of all groups, in a part of the work

// x: for each group and each kWide input channels [rows][width][bundle][kWide][kTerms] codes;
// dy: for each group and each kSide output channels [rows][width][kSide][64], of which `together`
// bundles of kTerms are used.
template <int R, int V>
void accumulate(const int64_t* run, int64_t runs, int64_t together, const uint8_t* a,
                const uint8_t* b, int32_t* sums, bool first) {
  written();
  if (first) clear_sums<R, V>();
  else load_sums<R, V>(sums);
  for (; runs > 0; --runs, run += 3) {
    const uint8_t* x = a + run[0] / together * kBlock;
    const uint8_t* y = b + run[1] * kPanel;
    for (int64_t k = run[2]; k > 0; k -= together, x += kBlock, y += together * kPanel)
      add_products<R, V>(x, x + kBlock / 2, 64, y);
  }
  store_sums<R, V>(sums);
}

// Of `height` output and `width` input channels.
Accumulate accumulate_for(int64_t height, int64_t width) {
  if (height > 16) return width > kLanes ? accumulate<2, 2> : accumulate<2, 1>;
  return width > kLanes ? accumulate<1, 2> : accumulate<1, 1>;
}
#else
// Of the images a chunk is taken at a time, in bundles.
// x: for each group and each kWide input channels [height][width][bundle][kWide][kTerms] shifted codes;
// dy: for each group and each R <= kRows output channels [height][width][bundle][R][kTerms] plain ones.
template <int R, int V>
void accumulate(const int64_t* run, int64_t runs, int64_t, const uint8_t* a, const uint8_t* b,
                int32_t* sums, bool first) {
  Sums sum[R][V];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v)
      sum[r][v] = first ? zeros() : load(sums + r * kWide + v * kLanes);
  for (; runs > 0; --runs, run += 3) {
    const uint8_t* x = a + run[0] * R * 4;
    const uint8_t* y = b + run[1] * kPanel;
    for (int64_t k = run[2]; k > 0; --k, x += 4 * R, y += kPanel) {
      Sums w[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) w[v] = load(y + 4 * kLanes * v);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const Sums lane = lane_everywhere(x + 4 * r);
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) sum[r][v] = dot(sum[r][v], w[v], lane);
      }
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) store(sums + r * kWide + v * kLanes, sum[r][v]);
}

template <int V, int... R>
Accumulate accumulate_of(int64_t rows, std::integer_sequence<int, R...>) {
  static constexpr Accumulate all[] = {accumulate<R + 1, V>...};
  return all[rows - 1];
}

// Of a tile's rows and `width` input channels.
Accumulate accumulate_for(int64_t rows, int64_t width) {
  return width > kLanes ? accumulate_of<2>(rows, Heights()) : accumulate_of<1>(rows, Heights());
}
#endif

// [count][kTerms] codes, shifted if `shift`, of the same channels of kTerms images `stride` apart, of
// which `images` are there.
template <bool shift>
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
    if (shift && kShifted) quad = _mm512_xor_si512(quad, _mm512_set1_epi8(-128));
    _mm512_mask_storeu_epi32(to + 4 * c, there, quad);
  }
#else
  int c = 0;
#if defined(__AVX2__)
  for (; c + kLanes <= count && images == kTerms; c += kLanes) {
    const __m128i a = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + c));
    const __m128i b = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + stride + c));
    store(to + 4 * c, _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(a, b)));
  }
#endif
  using Code = std::conditional_t<shift, Shifted, Plain>;
  Code* codes = reinterpret_cast<Code*>(to);
  for (; c < count; ++c)
    for (int i = 0; i < kTerms; ++i) {
      const int8_t code = i < images ? from[i * stride + c] : int8_t{0};
      codes[kTerms * c + i] = static_cast<Code>(shift ? shifted(code) : code);
    }
#endif
}

// Rows of `taps` floats for each of `count` channels, from [tap][kWide]. The nine of most convolutions without a
// loop.
void interleave(const float (*from)[kWide], int64_t taps, int count, float* to) {
  for (int c = 0; c < count; ++c, to += taps) {
    if (taps == 9) {
#pragma GCC unroll 9
      for (int t = 0; t < 9; ++t) to[t] = from[t][c];
    } else {
      for (int64_t t = 0; t < taps; ++t) to[t] = from[t][c];
    }
  }
}

class WeightGradient {
 public:
  explicit WeightGradient(const swalp_convolution& c)
      : c_(c), in_(c.in_channels / c.groups), out_(c.out_channels / c.groups),
        taps_(c.kernel[0] * c.kernel[1]), blocks_(ceil_div(in_, kWide)),
        tiles_(ceil_div(out_, kRows)), runs_(static_cast<size_t>(taps_)) {
    const int64_t bundles = ceil_div(c.batch, kTerms);
#if defined(__AMX_INT8__)
    rows_ = kRows;
    bundles_ = bundles == 0 ? 1 : ceil_div(bundles, ceil_div(bundles, kQuads));
    band_ = kBand / ((c.in_size[1] * c.stride[0] + c.out_size[1]) * c.groups * kBlock + 1);
    band_ = smaller(band_, c.out_size[0]);
#else
    rows_ = ceil_div(out_, tiles_);
    tiles_ = ceil_div(out_, rows_);  // rounded up, the last tile may be left without rows
    bundles_ = kImages / (c.in_size[0] * c.in_size[1] * kPanel);
    bundles_ = bundles_ < 1 ? 1 : bundles_ > bundles ? bundles : bundles_;
    band_ = c.out_size[0];
#endif
    band_ = band_ < 1 ? 1 : band_;
    const int64_t reach = (band_ - 1) * c.stride[0] + (c.kernel[0] - 1) * c.dilation[0] + 1;
    sources_ = (band_ < c.out_size[0] ? smaller(reach, c.in_size[0]) : c.in_size[0]) * c.in_size[1];
    dests_ = band_ * c.out_size[1];
  }

  int run(const int8_t* x, const int8_t* dy, int64_t exponent, bool channels_last, float* dw,
          int threads) {
    const int64_t products = c_.batch * c_.out_size[0] * c_.out_size[1] * c_.out_channels * in_ * taps_;
    if (c_.out_channels * in_ * taps_ == 0) return 0;
    if (products < kFewProducts) threads = 1;
    const int64_t x_bytes = c_.groups * blocks_ * sources_ * bundles_ * kPanel;
    const int64_t dy_bytes = round(c_.groups * tiles_ * dests_ * place_bytes(bundles_) + 64);
    const int64_t sum_bytes = c_.groups * blocks_ * tiles_ * taps_ * rows_ * kWide * 4;
    const int64_t sign_bytes = !kShifted ? 0 : c_.groups * tiles_ * taps_ * kLanes * 4;
    const int64_t sums_of_places = !kShifted ? 0 : c_.groups * tiles_ * dests_ * kLanes * 4;
    uint8_t* memory = shared.at_least(x_bytes + dy_bytes + sum_bytes + sign_bytes + sums_of_places);
    if (!memory) return -1;
    bundle_x_ = memory;
    bundle_dy_ = memory + x_bytes;
    sums_ = reinterpret_cast<int32_t*>(memory + x_bytes + dy_bytes);
    signs_ = sums_ + sum_bytes / 4;
    places_ = signs_ + sign_bytes / 4;
    bool failed = false;
    const int64_t all = ceil_div(c_.batch, kTerms);
    for (int64_t bundle = 0; bundle == 0 || bundle < all; bundle += bundles_)
      for (int64_t row = 0; row == 0 || row < c_.out_size[0]; row += band_) {
        const Part part = part_of(bundle, row);
        const bool first = bundle == 0 && row == 0;
        const bool last = bundle + bundles_ >= all && row + band_ >= c_.out_size[0];
        if (bundle == 0 || band_ < c_.out_size[0])
          for (int64_t t = 0; t < taps_; ++t) runs_[static_cast<size_t>(t)] = runs_of(t, part);
        failed |= pack(x, dy, part, first, threads);
        failed |= parallel(c_.groups * blocks_ * tiles_, threads, [&](int64_t begin, int64_t end) {
          Registers registers;
          registers.shape(kRows, bundles_);
          float* buffer = nullptr;
          if (last) buffer = reinterpret_cast<float*>(own.at_least(taps_ * kWide * 4));
          if (last && !buffer) return true;
          for (; begin < end; ++begin) {
            add_up(begin, part.bundles, first);
            if (last) finish(begin, Scale(Factors(exponent)), channels_last, buffer, dw);
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
  // Of the work: bundles of images, rows of dy, and the rows of x that they read.
  struct Part {
    int64_t bundle, bundles, dy_begin, dy_end, x_begin, x_end;
  };
  const swalp_convolution& c_;
  int64_t in_, out_, taps_;  // channels of a group
  int64_t blocks_, tiles_, rows_, bundles_, band_;  // bundles and rows of dy of a part
  int64_t sources_, dests_;                         // positions of a part, at most
  std::vector<std::vector<Run>> runs_;              // of each tap: neighbours in both images of a part
  uint8_t* bundle_x_;
  uint8_t* bundle_dy_;
  int32_t *sums_, *signs_, *places_;

  static int64_t round(int64_t bytes) { return ceil_div(bytes, 64) * 64; }

  // Bytes of a position of a tile of dy, and its rows that are multiplied.
#if defined(__AMX_INT8__)
  int64_t place_bytes(int64_t) const { return kBlock; }
  int64_t height_of(int64_t tile) const { return smaller(rows_, out_ - tile * rows_); }
#else
  int64_t place_bytes(int64_t bundles) const { return bundles * rows_ * 4; }
  int64_t height_of(int64_t) const { return rows_; }
#endif

  int64_t source(int axis, int64_t at, int64_t k) const {
    return at * c_.stride[axis] + k * c_.dilation[axis] - c_.padding[axis];
  }

  Part part_of(int64_t bundle, int64_t row) const {
    Part part{bundle, bundles_, row, smaller(row + band_, c_.out_size[0]), 0, c_.in_size[0]};
#if !defined(__AMX_INT8__)
    part.bundles = smaller(bundles_, ceil_div(c_.batch, kTerms) - bundle);
#endif
    if (band_ < c_.out_size[0]) {
      const int64_t begin = source(0, row, 0), end = source(0, part.dy_end - 1, c_.kernel[0] - 1) + 1;
      part.x_begin = begin < 0 ? 0 : smaller(begin, c_.in_size[0]);
      part.x_end = end < part.x_begin ? part.x_begin : smaller(end, c_.in_size[0]);
    }
    return part;
  }

  std::vector<Run> runs_of(int64_t tap, const Part& part) const {
    const int64_t kh = tap / c_.kernel[1], kw = tap % c_.kernel[1];
    std::vector<Run> runs;
    for (int64_t oh = part.dy_begin; oh < part.dy_end; ++oh) {
      const int64_t ih = source(0, oh, kh);
      if (ih < 0 || ih >= c_.in_size[0]) continue;
      for (int64_t ow = 0; ow < c_.out_size[1]; ++ow) {
        const int64_t iw = source(1, ow, kw);
        if (iw < 0 || iw >= c_.in_size[1]) continue;
        const int64_t dest = (oh - part.dy_begin) * c_.out_size[1] + ow;
        const int64_t from = (ih - part.x_begin) * c_.in_size[1] + iw;
        if (!runs.empty() && runs.back().dest + runs.back().positions == dest &&
            runs.back().source + runs.back().positions == from)
          ++runs.back().positions;
        else runs.push_back({dest, from, 1});
      }
    }
    return runs;
  }

#if defined(__AMX_INT8__)
  // Position after position of the part, of all channels: of 64 images each line is read once.
  bool pack(const int8_t* x, const int8_t* dy, const Part& part, bool, int threads) const {
    const int64_t of_x = (part.x_end - part.x_begin) * c_.in_size[1];
    const int64_t of_dy = (part.dy_end - part.dy_begin) * c_.out_size[1];
    return parallel(of_x + of_dy, threads, [&](int64_t begin, int64_t end) {
      uint8_t* buffer = own.at_least(ceil_div(c_.out_channels, kLanes) * 64 * kQuads);
      if (!buffer) return true;
      for (; begin < end; ++begin)
        if (begin < of_x) pack_x(x, begin, part);
        else pack_dy(dy, begin - of_x, part, buffer);
      return false;
    });
  }

  void pack_x(const int8_t* x, int64_t position, const Part& part) const {
    const int64_t image = c_.in_size[0] * c_.in_size[1] * c_.in_channels;
    const int64_t at = part.x_begin * c_.in_size[1] + position;
    for (int64_t q = 0; q < bundles_; ++q) {
      const int64_t n = kTerms * (part.bundle + q);
      for (int64_t g = 0; g < c_.groups; ++g)
        for (int64_t block = 0; block < blocks_; ++block) {
          const int64_t first = block * kWide;
          uint8_t* to = bundle_x_ +
                        (((g * blocks_ + block) * sources_ + position) * bundles_ + q) * kPanel;
          side_by_side<true>(x + n * image + at * c_.in_channels + g * in_ + first, image,
                             smaller(kTerms, c_.batch - n),
                             static_cast<int>(smaller(kWide, in_ - first)), to);
        }
    }
  }

  void pack_dy(const int8_t* dy, int64_t position, const Part& part, uint8_t* buffer) const {
    const int64_t image = c_.out_size[0] * c_.out_size[1] * c_.out_channels;
    const int64_t at = part.dy_begin * c_.out_size[1] + position;
    const int64_t strips = ceil_div(out_, kLanes);  // of sixteen channels of a group
    for (int64_t g = 0; g < c_.groups; ++g) {
      for (int64_t q = 0; q < bundles_; ++q) {
        const int64_t n = kTerms * (part.bundle + q);
        for (int64_t s = 0; s < strips; ++s)
          side_by_side<false>(dy + n * image + at * c_.out_channels + g * out_ + s * kLanes, image,
                              smaller(kTerms, c_.batch - n),
                              static_cast<int>(smaller(kLanes, out_ - s * kLanes)),
                              buffer + (s * kQuads + q) * 64);
      }
      for (int64_t s = 0; s < strips; ++s) {
        uint8_t* to = bundle_dy_ + ((g * tiles_ + s / 2) * dests_ + position) * kBlock +
                      s % 2 * (kBlock / 2);
        __m512i row[16];
        for (int i = 0; i < 16; ++i) row[i] = _mm512_load_si512(buffer + (s * kQuads + i) * 64);
        transpose(row);
        for (int i = 0; i < 16; ++i) _mm512_store_si512(to + i * 64, row[i]);
      }
    }
  }
#else
  bool pack(const int8_t* x, const int8_t* dy, const Part& part, bool first, int threads) const {
    const int64_t of_x = c_.groups * blocks_ * c_.in_size[0];
    return parallel(of_x + c_.groups * tiles_, threads, [&](int64_t begin, int64_t end) {
      for (; begin < end; ++begin)
        if (begin < of_x) pack_x(x, begin, part.bundle, part.bundles);
        else pack_dy(dy, begin - of_x, part.bundle, part.bundles, first);
      return false;
    });
  }

  // One row of kWide channels of the images' bundles.
  void pack_x(const int8_t* x, int64_t item, int64_t bundle, int64_t count) const {
    const int64_t ih = item % c_.in_size[0], block = item / c_.in_size[0] % blocks_;
    const int64_t g = item / c_.in_size[0] / blocks_, first = block * kWide;
    const int width = static_cast<int>(smaller(kWide, in_ - first));
    const int64_t image = sources_ * c_.in_channels;
    uint8_t* to = bundle_x_ + ((g * blocks_ + block) * sources_ + ih * c_.in_size[1]) * count * kPanel;
    for (int64_t iw = 0; iw < c_.in_size[1]; ++iw)
      for (int64_t q = 0; q < count; ++q, to += kPanel) {
        const int64_t n = kTerms * (bundle + q);
        const int8_t* from = x + n * image + (ih * c_.in_size[1] + iw) * c_.in_channels + g * in_ + first;
        side_by_side<true>(from, image, smaller(kTerms, c_.batch - n), width, to);
      }
  }

  // R channels of the images' bundles, and for each tap 128 times the sum of what it will meet.
  void pack_dy(const int8_t* dy, int64_t item, int64_t bundle, int64_t count, bool first) const {
    const int64_t tile = item % tiles_, g = item / tiles_;
    const int height = static_cast<int>(smaller(rows_, out_ - tile * rows_));
    const int64_t image = dests_ * c_.out_channels;
    uint8_t* to = bundle_dy_ + item * dests_ * count * rows_ * 4;
    const uint8_t* packed = to;
    for (int64_t p = 0; p < dests_; ++p)
      for (int64_t q = 0; q < count; ++q, to += 4 * rows_) {
        const int64_t n = kTerms * (bundle + q);
        const int8_t* from = dy + n * image + p * c_.out_channels + g * out_ + tile * rows_;
        side_by_side<false>(from, image, smaller(kTerms, c_.batch - n), height, to);
        if (height < rows_) memset(to + 4 * height, 0, static_cast<size_t>(4 * (rows_ - height)));
      }
    if (!kShifted) return;
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

#endif

  int32_t* sums_of(int64_t item) const { return sums_ + item * taps_ * rows_ * kWide; }

  void add_up(int64_t item, int64_t count, bool first) const {
    const int64_t tile = item % tiles_, block = item / tiles_ % blocks_, g = item / tiles_ / blocks_;
    const uint8_t* a = bundle_dy_ + (g * tiles_ + tile) * dests_ * place_bytes(count);
    const uint8_t* b = bundle_x_ + (g * blocks_ + block) * sources_ * count * kPanel;
    const Accumulate run = accumulate_for(height_of(tile), in_ - block * kWide);
    std::vector<int64_t> steps;
    for (int64_t t = 0; t < taps_; ++t) {
      steps.clear();
      for (const Run& r : runs_[static_cast<size_t>(t)])
        steps.insert(steps.end(), {r.dest * count, r.source * count, r.positions * count});
      run(steps.data(), static_cast<int64_t>(steps.size()) / 3, count, a, b,
          sums_of(item) + t * rows_ * kWide, first);
    }
  }

  void finish(int64_t item, const Scale& scale, bool channels_last, float* buffer, float* dw) const {
    const int64_t tile = item % tiles_, block = item / tiles_ % blocks_, g = item / tiles_ / blocks_;
    const int32_t* signs = signs_ + (g * tiles_ + tile) * taps_ * kLanes;
    const int width = static_cast<int>(smaller(kWide, in_ - block * kWide));
    float(*rows)[kWide] = reinterpret_cast<float(*)[kWide]>(buffer);
    for (int64_t r = 0; r < smaller(rows_, out_ - tile * rows_); ++r) {
      float* const to = dw + (g * out_ + tile * rows_ + r) * taps_ * in_;
      for (int64_t t = 0; t < taps_; ++t) {
        const Sums sign = everywhere(kShifted ? signs[t * kLanes + r] : 0);
        float* const row = channels_last ? to + t * in_ + block * kWide : rows[t];
        for (int v = 0; v < kVectors && v * kLanes < width; ++v) {
          const Floats y = scale(subtract(load(sums_of(item) + (t * rows_ + r) * kWide + v * kLanes), sign));
          if ((v + 1) * kLanes <= width) store(row + v * kLanes, y);
          else store(row + v * kLanes, y, width - v * kLanes);
        }
      }
      if (!channels_last) interleave(rows, taps_, width, to + block * kWide * taps_);
    }
  }
};

}  // namespace
