// Max pooling of images with the channels last, keeping for each result which tap it came from.
#pragma once
#include "tiles.h"

namespace {

constexpr int64_t kChannels = 64;  // at a time

// visit(tap, row * width + column) for the taps of a window that lie in the image, in order.
template <class Visit>
void window_taps(const swalp_pooling& p, int64_t oh, int64_t ow, const Visit& visit) {
  for (int64_t kh = 0; kh < p.kernel[0]; ++kh) {
    const int64_t ih = oh * p.stride[0] - p.padding[0] + kh;
    if (ih < 0 || ih >= p.in_size[0]) continue;
    for (int64_t kw = 0; kw < p.kernel[1]; ++kw) {
      const int64_t iw = ow * p.stride[1] - p.padding[1] + kw;
      if (iw >= 0 && iw < p.in_size[1]) visit(kh * p.kernel[1] + kw, ih * p.in_size[1] + iw);
    }
  }
}

void max_pool(const swalp_pooling* pooling, const float* x, float* y, uint8_t* taps, int threads) {
  const swalp_pooling& p = *pooling;
  const int64_t rows = p.batch * p.out_size[0];
  if (rows * p.out_size[1] * p.channels < kFewProducts / 16) threads = 1;
  parallel(rows, threads, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) {
      const int64_t n = begin / p.out_size[0], oh = begin % p.out_size[0];
      const float* image = x + n * p.in_size[0] * p.in_size[1] * p.channels;
      for (int64_t ow = 0; ow < p.out_size[1]; ++ow) {
        const int64_t out = (begin * p.out_size[1] + ow) * p.channels;
        for (int64_t c0 = 0; c0 < p.channels; c0 += kChannels) {
          const int64_t width = smaller(kChannels, p.channels - c0);
          float best[kChannels];
          int32_t which[kChannels];
          bool first = true;
          window_taps(p, oh, ow, [&](int64_t tap, int64_t at) {
            const float* from = image + at * p.channels + c0;
            const int32_t number = static_cast<int32_t>(tap);
            for (int64_t c = 0; c < width; ++c) {
              const float v = from[c];
              // The first of equals; a NaN above all.
              const bool take = first | (v > best[c]) | (v != v);
              best[c] = take ? v : best[c];
              which[c] = take ? number : which[c];
            }
            first = false;
          });
          for (int64_t c = 0; c < width; ++c) {
            y[out + c0 + c] = best[c];
            taps[out + c0 + c] = static_cast<uint8_t>(which[c]);
          }
        }
      }
    }
    return false;
  });
}

// place[c] (+)= gradient[c] where its tap is `number`, else 0.
template <bool adding>
void give(const float* gradient, const uint8_t* taps, uint8_t number, int64_t count, float* place) {
  int64_t c = 0;
#if defined(__AVX512VNNI__)
  for (; c + kLanes <= count; c += kLanes) {
    const __m128i here = _mm_loadu_si128(reinterpret_cast<const __m128i*>(taps + c));
    const __mmask16 mine = _mm_cmpeq_epi8_mask(here, _mm_set1_epi8(static_cast<char>(number)));
    __m512 v = _mm512_maskz_loadu_ps(mine, gradient + c);
    if (adding) v = _mm512_add_ps(v, _mm512_loadu_ps(place + c));
    _mm512_storeu_ps(place + c, v);
  }
#endif
  for (; c < count; ++c) {
    const float v = taps[c] == number ? gradient[c] : 0.0f;
    place[c] = adding ? place[c] + v : v;
  }
}

void max_pool_gradient(const swalp_pooling* pooling, const float* dy, const uint8_t* taps, float* dx,
                       int threads) {
  const swalp_pooling& p = *pooling;
  const int64_t image = p.in_size[0] * p.in_size[1] * p.channels;
  bool apart = true, all = true;  // windows that do not overlap; that leave no position out
  for (int axis = 0; axis < 2; ++axis) {
    apart &= p.stride[axis] >= p.kernel[axis];
    all &= p.stride[axis] == p.kernel[axis] && p.padding[axis] == 0 &&
           p.out_size[axis] * p.kernel[axis] == p.in_size[axis];
  }
  if (p.batch * image < kFewProducts / 16) threads = 1;
  parallel(p.batch, threads, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) {
      float* to = dx + begin * image;
      if (!all) memset(to, 0, static_cast<size_t>(image) * 4);
      for (int64_t oh = 0; oh < p.out_size[0]; ++oh)
        for (int64_t ow = 0; ow < p.out_size[1]; ++ow) {
          const int64_t out = ((begin * p.out_size[0] + oh) * p.out_size[1] + ow) * p.channels;
          window_taps(p, oh, ow, [&](int64_t tap, int64_t at) {
            const uint8_t number = static_cast<uint8_t>(tap);
            float* place = to + at * p.channels;
            if (apart) give<false>(dy + out, taps + out, number, p.channels, place);
            else give<true>(dy + out, taps + out, number, p.channels, place);
          });
        }
    }
    return false;
  });
}

}  // namespace
