// Chooses the build of the convolutions that this machine runs.
#include "convolution.h"

#include <string.h>

#include "kernels.h"

extern const swalp_convolution_build swalp_convolution_scalar;
#ifdef SWALP_HAS_AVX2
extern const swalp_convolution_build swalp_convolution_avx2;
#endif
#ifdef SWALP_HAS_AMX
extern const swalp_convolution_build swalp_convolution_amx;
#endif
#ifdef SWALP_HAS_AVX512
extern const swalp_convolution_build swalp_convolution_vnni;
#endif

namespace {

// The choice of `swalp_use` holds here too. `amx`: whether its registers would not be mostly empty.
const swalp_convolution_build& chosen(bool amx) {
  (void)amx;
#ifdef SWALP_HAS_AMX
  if (amx && swalp_uses_amx()) return swalp_convolution_amx;
#endif
#ifdef SWALP_HAS_AVX512
  if (swalp_uses_vnni()) return swalp_convolution_vnni;
#endif
#ifdef SWALP_HAS_AVX2
  if (strcmp(swalp_used(), "scalar") != 0) return swalp_convolution_avx2;
#endif
  return swalp_convolution_scalar;
}

// Measured: with fewer channels of a group, or fewer images, VNNI takes a third to nine tenths of the time.
// What packs a weight must choose as what reads it, so there nothing but the channels counts.
bool fills_amx(int64_t groups, int64_t source) { return source > (groups > 1 ? 16 : 8); }
const swalp_convolution_build& for_product(const swalp_convolution& c, bool backward) {
  return chosen(fills_amx(c.groups, (backward ? c.out_channels : c.in_channels) / c.groups));
}
const swalp_convolution_build& for_weight(const swalp_convolution& c) {
  const int64_t in = c.in_channels / c.groups, out = c.out_channels / c.groups;
  return chosen(c.batch >= 16 && fills_amx(c.groups, in < out ? in : out));
}

}  // namespace

int swalp_has_fast_convolution(void) { return &chosen(true) != &swalp_convolution_scalar; }

int64_t swalp_convolution_packed_bytes(const swalp_convolution* c, int32_t backward) {
  return for_product(*c, backward != 0).packed_bytes(c, backward);
}

void swalp_convolution_pack(const swalp_convolution* c, int32_t backward, int32_t channels_last,
                            const int8_t* weight, void* packed, int threads) {
  for_product(*c, backward != 0).pack(c, backward, channels_last, weight, packed, threads);
}

int swalp_convolution_forward(const swalp_convolution* c, const int8_t* x, const void* packed,
                              int64_t exponent, const float* bias, float* y, int threads) {
  return for_product(*c, false).forward(c, x, packed, exponent, bias, y, threads);
}

int swalp_convolution_input_gradient(const swalp_convolution* c, const int8_t* dy,
                                     const void* packed, int64_t exponent, float* dx, int threads) {
  return for_product(*c, true).input_gradient(c, dy, packed, exponent, dx, threads);
}

int swalp_convolution_weight_gradient(const swalp_convolution* c, const int8_t* x, const int8_t* dy,
                                      int64_t exponent, int32_t channels_last, float* dw,
                                      int threads) {
  return for_weight(*c).weight_gradient(c, x, dy, exponent, channels_last, dw, threads);
}

void swalp_convolution_channel_sums(const int8_t* codes, int64_t rows, int64_t channels,
                                    int64_t* sums, int threads) {
  chosen(true).channel_sums(codes, rows, channels, sums, threads);
}

void swalp_max_pool(const swalp_pooling* p, const float* x, float* y, uint8_t* taps, int threads) {
  chosen(true).max_pool(p, x, y, taps, threads);
}

void swalp_max_pool_gradient(const swalp_pooling* p, const float* dy, const uint8_t* taps, float* dx,
                             int threads) {
  chosen(true).max_pool_gradient(p, dy, taps, dx, threads);
}
