// Products of matrices of int8 codes: raw pointers, strides, a thread count.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// out[b, i, j] = 2**e * sum over l of left[b, i, l] * right[b, j, l], plus bias[j]
// with e = exponent + left_exponents[b] + right_exponents[b].
//
// Matrices lie `batch` strides apart; with a `group`, this is so within so many of them, and the groups'
// own strides lead from one to the next.
//
// Of the strides of i (or j) and of l one is 1. k > 0; a sum must fit an int32: k <= 2**17 for codes
// within ±127.
typedef struct {
  int64_t batch, m, n, k;
  const int8_t *left, *right;
  int64_t left_batch, left_outer, left_inner;     // strides of b, i, l
  int64_t right_batch, right_outer, right_inner;  // strides of b, j, l
  int64_t exponent;
  const int8_t *left_exponents, *right_exponents;  // or NULL; one, or one for each matrix
  int32_t left_exponent_each, right_exponent_each;
  const float* bias;  // or NULL
  // Or NULL: ReLU follows, and this gets a bit for each element, whether it passed. float32; batch = 1;
  // n is a multiple of 16.
  uint8_t* passed;
  void* out;  // float32, or the sums as int32
  int32_t integers;
  int64_t out_batch, out_outer;  // strides of b, i; that of j is 1
  int64_t group, left_group, right_group, out_group;  // group: or 0
} swalp_matmul;

// Returns -1 without memory, 1 where the machine or the build has no AVX2, else 0.
int swalp_multiply(const swalp_matmul*, int threads);
// The instructions that it uses, or an empty string.
const char* swalp_multiply_used(void);

#ifdef __cplusplus
}
#endif
