// Convolutions of int8 codes in one or two dimensions: raw pointers, sizes, a thread count.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Index 0 of each pair is the height, 1 the width; a convolution in one dimension has height 1.
typedef struct {
  int64_t batch, groups, in_channels, out_channels;  // channels of all groups together
  int64_t in_size[2], out_size[2], kernel[2], stride[2], padding[2], dilation[2];
} swalp_convolution;

// Images are (batch, height, width, channels) in memory, weights (out, in / groups, height, width) or,
// with `channels_last`, (out, height, width, in / groups). Sums are int32 and exact if they fit; a
// result is the float32 nearest to its sum, times 2**exponent, plus the bias of its channel, if any.

// Weights, packed for `forward`, or for `input_gradient` if `backward`: how many bytes, and to do it.
int64_t swalp_convolution_packed_bytes(const swalp_convolution*, int32_t backward);
void swalp_convolution_pack(const swalp_convolution*, int32_t backward, int32_t channels_last,
                            const int8_t* weight, void* packed, int threads);

// Each returns -1 without memory, else 0.
int swalp_convolution_forward(const swalp_convolution*, const int8_t* x, const void* packed,
                              int64_t exponent, const float* bias, float* y, int threads);
int swalp_convolution_input_gradient(const swalp_convolution*, const int8_t* dy, const void* packed,
                                     int64_t exponent, float* dx, int threads);
int swalp_convolution_weight_gradient(const swalp_convolution*, const int8_t* x, const int8_t* dy,
                                      int64_t exponent, int32_t channels_last, float* dw,
                                      int threads);

// sums[c] = the sum of column c of codes (rows, channels).
void swalp_convolution_channel_sums(const int8_t* codes, int64_t rows, int64_t channels,
                                    int64_t* sums, int threads);

typedef struct {
  int64_t batch, channels;
  int64_t in_size[2], out_size[2], kernel[2], stride[2], padding[2];
} swalp_pooling;

// The largest of each window of images (batch, height, width, channels), and which of its at most 256
// taps that was, the first of equals; and the gradient, given to those.
void swalp_max_pool(const swalp_pooling*, const float* x, float* y, uint8_t* taps, int threads);
void swalp_max_pool_gradient(const swalp_pooling*, const float* dy, const uint8_t* taps, float* dx,
                             int threads);

// Whether the machine and the build have AVX2 or more: without it the results are the same, slowly.
int swalp_has_fast_convolution(void);

#ifdef __cplusplus
}

struct swalp_convolution_build {
  decltype(&swalp_convolution_packed_bytes) packed_bytes;
  decltype(&swalp_convolution_pack) pack;
  decltype(&swalp_convolution_forward) forward;
  decltype(&swalp_convolution_input_gradient) input_gradient;
  decltype(&swalp_convolution_weight_gradient) weight_gradient;
  decltype(&swalp_convolution_channel_sums) channel_sums;
  decltype(&swalp_max_pool) max_pool;
  decltype(&swalp_max_pool_gradient) max_pool_gradient;
};
#endif
