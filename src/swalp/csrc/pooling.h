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

void max_pool_gradient(const swalp_pooling* pooling, const float* dy, const uint8_t* taps, float* dx,
                       int threads) {
  const swalp_pooling& p = *pooling;
  const int64_t image = p.in_size[0] * p.in_size[1] * p.channels;
  if (p.batch * image < kFewProducts / 16) threads = 1;
  parallel(p.batch, threads, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) {
      float* to = dx + begin * image;
      memset(to, 0, static_cast<size_t>(image) * 4);
      for (int64_t oh = 0; oh < p.out_size[0]; ++oh)
        for (int64_t ow = 0; ow < p.out_size[1]; ++ow) {
          const int64_t out = ((begin * p.out_size[0] + oh) * p.out_size[1] + ow) * p.channels;
          window_taps(p, oh, ow, [&](int64_t tap, int64_t at) {
            float* place = to + at * p.channels;
            for (int64_t c = 0; c < p.channels; ++c)
              place[c] += taps[out + c] == tap ? dy[out + c] : 0.0f;
          });
        }
    }
    return false;
  });
}

}  // namespace
