// Convolutions for one instruction set: compiled once for each, with SWALP_BUILD its name.
//
// Everything here has internal linkage: the linker must never pick one build's code for another.
#include "correlation.h"
#include "pooling.h"
#include "weight_gradient.h"

namespace {

int64_t packed_bytes(const swalp_convolution* c, int32_t backward) {
  return Weights(*c, backward != 0).bytes();
}

// The first `taps` codes of kTerms rows side by side: a lane for each tap, `step` bytes apart.
void rows_side_by_side(const int8_t* from, int64_t stride, int64_t taps, uint8_t* to, int64_t step) {
  uint8_t lanes[64];
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
  const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + stride));
  store(lanes, _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(a, b)));
  store(lanes + 32, _mm256_cvtepi8_epi16(_mm_unpackhi_epi8(a, b)));
#elif defined(__SSE2__)
  __m128i row[4];
  for (int i = 0; i < 4; ++i)
    row[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * stride));
  const __m128i a = _mm_unpacklo_epi8(row[0], row[1]), b = _mm_unpackhi_epi8(row[0], row[1]);
  const __m128i c = _mm_unpacklo_epi8(row[2], row[3]), d = _mm_unpackhi_epi8(row[2], row[3]);
  __m128i* at = reinterpret_cast<__m128i*>(lanes);
  _mm_storeu_si128(at, _mm_unpacklo_epi16(a, c));
  _mm_storeu_si128(at + 1, _mm_unpackhi_epi16(a, c));
  _mm_storeu_si128(at + 2, _mm_unpacklo_epi16(b, d));
  _mm_storeu_si128(at + 3, _mm_unpackhi_epi16(b, d));
#else
  for (int64_t t = 0; t < taps; ++t)
    for (int i = 0; i < 4; ++i) lanes[4 * t + i] = static_cast<uint8_t>(from[i * stride + t]);
#endif
  for (int64_t t = 0; t < taps; ++t) memcpy(to + t * step, lanes + 4 * t, 4);
}

void pack(const swalp_convolution* c, int32_t backward, int32_t channels_last, const int8_t* weight,
          void* packed, int threads) {
  const Weights w(*c, backward != 0);
  // Strides of a weight's axes, as it lies in memory, and of a block's channels in it.
  const int64_t in = c->in_channels / c->groups;
  const int64_t in_stride = channels_last ? 1 : w.taps, tap_stride = channels_last ? in : 1;
  const int64_t out_stride = in * w.taps, codes = c->out_channels * out_stride;
  const int64_t dest_stride = backward ? in_stride : out_stride;
  const int64_t source_stride = backward ? out_stride : in_stride;
  uint8_t* bytes = static_cast<uint8_t*>(packed);
  int32_t* sums = reinterpret_cast<int32_t*>(bytes + w.sums_at());
  if (w.bytes() < kFewProducts / 16) threads = 1;
  parallel(w.groups * w.blocks, threads, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) {
      const int64_t g = begin / w.blocks, first = begin % w.blocks * kWide;
      const int64_t width = smaller(kWide, w.dest - first);
      const int8_t* from = weight + g * (c->out_channels / c->groups) * out_stride + first * dest_stride;
      uint8_t* to = bytes + begin * w.block_bytes();
      if (width < kWide || w.source < kTerms * w.steps) memset(to, 0, static_cast<size_t>(w.block_bytes()));
      const int64_t tap_bytes = w.steps * kPanel;
      constexpr int64_t kAhead = 4;  // steps: from row to row, or line to line, the processor does not expect it
      for (int64_t s = 0; s < w.source; s += kTerms)
        for (int64_t d = 0; d < width; ++d) {
          const int8_t* code = from + d * dest_stride + s * source_stride;
          const int64_t count = smaller(kTerms, w.source - s);
          uint8_t* place = to + s / kTerms * kPanel + d * 4;
          for (int i = 0; i < kTerms; ++i) fetch(code + (kAhead * kTerms + i) * source_stride);
          // Sixteen bytes at a time, where there are so many.
          if (tap_stride == 1 && w.taps > 1 && w.taps <= 16 && count == kTerms &&
              code + (kTerms - 1) * source_stride + 16 <= weight + codes)
            rows_side_by_side(code, source_stride, w.taps, place, tap_bytes);
          else
            for (int64_t i = 0; i < count; ++i)
              for (int64_t t = 0; t < w.taps; ++t) {
                const Plain one = code[i * source_stride + t * tap_stride];
                memcpy(place + t * tap_bytes + i * sizeof one, &one, sizeof one);
              }
        }
      if (!kShifted) continue;
      int32_t* sum = sums + begin * w.taps * kWide;
      const Sums ones = everywhere(0x01010101);
      for (int64_t t = 0; t < w.taps; ++t)
        for (int v = 0; v < kVectors; ++v) {
          Sums total = zeros();
          const uint8_t* panel = to + t * tap_bytes + v * 4 * kLanes;
          for (int64_t k = 0; k < w.steps; ++k) total = dot(total, ones, load(panel + k * kPanel));
          store(sum + t * kWide + v * kLanes, times128(total));
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

void channel_sums(const int8_t* codes, int64_t rows, int64_t channels, int64_t* sums, int threads) {
  constexpr int64_t kShort = 128;  // rows whose sums fit 16 bits
  memset(sums, 0, static_cast<size_t>(channels) * 8);
  if (rows * channels < kFewProducts) threads = 1;
  // Threads share the rows of narrow matrices in stretches; sums of integers come in any order.
  parallel(ceil_div(rows, kShort), threads, [&](int64_t begin, int64_t end) {
    constexpr int64_t kColumns = 256;
    for (int64_t c0 = 0; c0 < channels; c0 += kColumns) {
      const int64_t width = smaller(kColumns, channels - c0);
      int64_t mine[kColumns] = {};
      for (int64_t stretch = begin; stretch < end; ++stretch) {
        int16_t part[kColumns] = {};
        const int64_t last = smaller(rows, (stretch + 1) * kShort);
        for (int64_t r = stretch * kShort; r < last; ++r) {
          const int8_t* row = codes + r * channels + c0;
          for (int64_t c = 0; c < width; ++c) part[c] = static_cast<int16_t>(part[c] + row[c]);
        }
        for (int64_t c = 0; c < width; ++c) mine[c] += part[c];
      }
      for (int64_t c = 0; c < width; ++c)
        __atomic_fetch_add(sums + c0 + c, mine[c], __ATOMIC_RELAXED);
    }
    return false;
  });
}

}  // namespace

#define SWALP_JOIN_(name) swalp_##name
#define SWALP_JOIN(name) SWALP_JOIN_(name)
extern const swalp_convolution_build SWALP_JOIN(SWALP_BUILD);
const swalp_convolution_build SWALP_JOIN(SWALP_BUILD) = {packed_bytes, pack, forward, input_gradient,
                                                         weight_gradient, channel_sums, max_pool,
                                                         max_pool_gradient};
