// The C interface of the kernels: raw pointers, sizes, a thread count. No Python, no PyTorch.
//
// Every function equals src/swalp/quantize/reference.py (codes: codes.py) bit for bit, whatever the
// instruction set, the number of threads and the floating-point modes of the caller.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { SWALP_GRID, SWALP_MINIFLOAT, SWALP_BINARY };                      // kind of a format
enum { SWALP_NEAREST, SWALP_ZERO, SWALP_POSITIVE, SWALP_NEGATIVE, SWALP_STOCHASTIC };  // rules
enum { SWALP_FLOAT32, SWALP_CODE8, SWALP_CODE16, SWALP_BFLOAT16 };       // what is written or read
enum { SWALP_MAX_DIMS = 8 };

// A format, resolved to numbers. "Gap" is log2 of the distance between neighbours.
typedef struct {
  int32_t kind;
  int32_t blocked;           // 1: a shared exponent for each block
  int32_t element_exponent;  // shared = clip(floor(log2(max)) - element_exponent, ...)
  int32_t min_exponent, max_exponent;
  // Grid: value = integer * 2**(shared + gap_offset), shared = 0 unless blocked.
  int32_t gap_offset, min_integer, max_integer;
  int32_t symmetric_from;    // from this gap on the lowest integer is -max_integer
  // Minifloat: values of the element format, times 2**shared.
  int32_t mantissa_bits, min_normal, lowest_gap, bias, has_zero, is_signed, saturating, fnuz;
  int32_t overflow_is_nan;   // without saturation: NaN, not infinity
  int32_t largest_code, inf_code, sign_code;
  int32_t has_nan, nan_code;  // of any kind: whether a code stands for NaN, and which
  float largest, smallest;   // largest also: the magnitude of a binary format
} swalp_format;

typedef struct {
  int32_t rule, bits;
  uint64_t seed;
  uint32_t step, call;
} swalp_rounding;

// Which elements share an exponent, and where they lie. `x` is dense. With `channels` = 0 memory is
// in row-major order; otherwise row-major order is (outer, channels, positions) and memory order is
// (outer, positions, channels), and the blocks are contiguous in memory: one dimension. With `apart`
// axes, `x` is not dense: in row-major order it has those sizes and strides, the last stride 1, while
// the result is dense; then one exponent is shared by all elements, or none. With `passed`, likewise, an
// element is 0 where its bit is.
typedef struct {
  int32_t dims;
  int64_t size[SWALP_MAX_DIMS];    // row-major, axes merged where that changes nothing
  int64_t extent[SWALP_MAX_DIMS];  // of a block along each axis; divides the size
  int64_t positions, channels;
  int32_t apart;
  int64_t apart_size[SWALP_MAX_DIMS], apart_stride[SWALP_MAX_DIMS];
  const uint8_t* passed;  // or NULL: a bit for each element
} swalp_layout;

// Quantize `x` to float32 values or integer codes in `out` (which may be `x`).
//
// `exponents`: int32, one for each block in row-major order, or NULL. `reused`: whether other results
// will use the memory of `x`, so that it is left as written (parallel.h). `threads` is an upper bound.
// Returns 1 if codes were wanted for a NaN that has none (its code means nothing), -1 if memory ran
// out, else 0.
int swalp_quantize(const swalp_format*, const swalp_rounding*, const swalp_layout*, const float* x,
                   void* out, int32_t output, int32_t* exponents, int32_t reused, int threads);

// A part of a block: (planes, rows, columns), in a whole where planes and rows lie so far apart.
typedef struct {
  int64_t start;  // index of its first element in the whole, for the noise
  int64_t planes, rows, columns;
  int64_t plane_stride, row_stride;
} swalp_part;

// A part of a block to codes of 8 bits with a given exponent, in one pass.
//
// `x`: the part alone, contiguous. `out`: its first element's code, in the whole. `exponent`: the one
// given, then that which the part would have alone. Returns 1 if a NaN had no code (then 0), else 0.
int swalp_quantize_part(const swalp_format*, const swalp_rounding*, const swalp_part*, const float* x,
                        int8_t* out, int32_t* exponent, int threads);

// Scores of causal attention, (planes, rows, columns), in place: times `factor`, and -infinity where
// the column is after the row, which is `first` in the whole for row 0.
void swalp_causal(int64_t planes, int64_t rows, int64_t columns, int64_t first, float factor, float* x,
                  int threads);

// ReLU, and a bit for each element, whether it passed; and the gradient where it did.
void swalp_relu(int64_t n, const float* x, float* out, uint8_t* passed, int threads);
void swalp_relu_gradient(int64_t n, const float* gradient, const uint8_t* passed, float* out,
                         int threads);

// The same for many row-major tensors, to float32 values: threads share the small ones among them.
// Returns -1 if memory ran out, else 0.
int swalp_quantize_many(const swalp_format*, int64_t count, const swalp_rounding*,
                        const swalp_layout* const*, const float* const* x, float* const* out,
                        int threads);

// Codes to float32 values. `table`: the values of all codes of 1 or 2 bytes, if they are bit patterns, or
// NULL.
void swalp_unpack(const swalp_format*, const swalp_layout*, const void* codes, int32_t code_type,
                  const int32_t* exponents, const float* table, float* out, int threads);

// `count` codes, a byte each, from two to a byte (the even one low), and back. With `is_signed` the
// fourth bit is the sign.
void swalp_split(const void* halves, int64_t count, int32_t is_signed, void* codes, int threads);
void swalp_join(const void* codes, int64_t count, void* halves, int threads);

// Take an iterate into an average, in place. `average`: float32 with as many residuals in `residual`
// (a compensated mean), float32 alone, float64, or int64 (the sum of codes; `weight` is not used).
// `x`: float32, bfloat16 or, with a format, codes as for `swalp_unpack`; in the memory order of the
// average. average += weight * (x - average).
enum { SWALP_COMPENSATED, SWALP_MOVING32, SWALP_MOVING64, SWALP_SUM };   // kind of an average
typedef struct {
  int32_t kind, type;  // type: of `x`
  double weight;
  void* average;
  float* residual;
  const void* x;
  const int32_t* exponents;
  const float* table;
} swalp_average_arguments;
void swalp_average(const swalp_average_arguments*, const swalp_format*, const swalp_layout*,
                   int threads);

// `count` elements of noise as the kernels see it, from element `start` on: 16-bit or 32-bit words.
void swalp_noise(const swalp_rounding*, int64_t start, int64_t count, uint32_t* out);

// Optimizer steps. Each role of a parameter: how what it keeps, or its gradient, is rounded.
typedef struct {
  swalp_format format;
  swalp_rounding rounding;
  int32_t halved;      // two codes lie in each byte
  const float* table;  // values of codes that are bit patterns, as for `swalp_unpack`
} swalp_role;

// What is kept lies in `packed` codes of 4 or 8 bits with exponents, or in floats on their grid without.
// A parameter has `blocks` blocks of `length` elements, one after the other; halved codes need an even
// length, or one block. `reused`: the memory of the gradient, as for `swalp_quantize`.
typedef struct {
  float lr, momentum, weight_decay;
  int32_t nesterov, packed, has_gradient, has_momentum;
} swalp_sgd;

typedef struct {
  int64_t blocks, length;
  const float* gradient;
  int32_t reused;
  void *weight, *momentum;
  int8_t *weight_exponents, *momentum_exponents;  // NULL without blocks
  swalp_role gradient_role, momentum_role, weight_role;
} swalp_sgd_parameter;

// share1 = 1 - beta1, share2 = 1 - beta2, correction2 = sqrt(1 - beta2**t), rate = lr / (1 - beta1**t);
// decoupled: weight_decay holds the factor 1 - lr * weight_decay.
typedef struct {
  float rate, share1, beta2, share2, correction2, eps, weight_decay;
  int32_t decoupled, packed, has_gradient;
} swalp_adam;

typedef struct {
  int64_t blocks, length;
  const float* gradient;
  int32_t reused;
  void *weight, *moment, *root;
  int8_t *weight_exponents, *moment_exponents;  // NULL without blocks
  swalp_role gradient_role, moment_role, root_role, weight_role;
} swalp_adam_parameter;

// An average kept in codes of at most 8 bits with a code for NaN, moved by weight * (x - average) and
// rounded again. `x`: codes of at most 8 bits in blocks of the same lengths or in none; with no
// format, float32. Returns -1 without memory, else 0.
typedef struct {
  int64_t blocks, length;
  const void* x;
  const int8_t* x_exponents;  // NULL without blocks
  const swalp_format* x_format;
  int32_t x_halved;
  void* average;
  int8_t* exponents;  // NULL without blocks
  swalp_role role;
} swalp_rounded_average;
int swalp_average_rounded(float weight, const swalp_rounded_average*, int threads);

enum {
  SWALP_LOST = 1,     // a NaN had no code
  SWALP_STRANGE = 2,  // a weight, not rounded yet, was infinite or NaN
};

// One step of `count` parameters. Returns -1 without memory, else which of these happened.
int swalp_sgd_step(const swalp_sgd*, const swalp_sgd_parameter*, int64_t count, int threads);
int swalp_adam_step(const swalp_adam*, const swalp_adam_parameter*, int64_t count, int threads);

// One trajectory of stochastic gradient descent: w = Q(w - rate * gradient), `step` steps taken so far.
// Step t has the noise of step t; its iterate is added to the sums if t > start and (t - start) is a
// multiple of `every`. Equal to src/swalp/lab/definition.py. The functions return -1 without memory,
// else 0, and do not share their work among threads.
typedef struct {
  int64_t size;
  float* weight;          // replaced
  double *sum, *squares;  // of the iterates taken, element by element; squares may be NULL
  const swalp_role* role;  // NULL: the iterate is not rounded
  int64_t step, start, every;
} swalp_descent;

// Examples as the nonzero features offsets[i] .. offsets[i + 1] of `columns` and `values`.
typedef struct {
  int64_t features, classes, batch;
  const int64_t *offsets, *labels;
  const int32_t* columns;
  const float* values;
  float l2;
} swalp_softmax;

// `rows`: the example of each step; of softmax, `batch` examples for each.
int swalp_least_squares(const swalp_descent*, float rate, const float* x, const float* y,
                        const int64_t* rows, int64_t steps);
int swalp_softmax_regression(const swalp_descent*, const swalp_softmax*, float rate,
                             const int64_t* rows, int64_t steps);
// `draws`: 16 random bits for each number, which pick its noise from `table`.
int swalp_scalars(const swalp_descent*, float rate, int skewed, const swalp_rounding* draws,
                  const float* table, int64_t steps);

// Choose the instruction set: 1 if this machine and build have it, else 0 and nothing changes. "amx" is
// "avx512" whose products of codes use AMX.
int swalp_use(const char* name);
const char* swalp_used(void);
// Whether that is AVX-512 on a processor with VNNI.
int swalp_uses_vnni(void);
// Whether that is so, and products of codes use AMX as well.
int swalp_uses_amx(void);
int swalp_has_threads(void);

#ifdef __cplusplus
}

// One build of the kernels for one instruction set.
struct swalp_build {
  const char* name;
  decltype(&swalp_quantize) quantize;
  decltype(&swalp_quantize_part) quantize_part;
  decltype(&swalp_causal) causal;
  decltype(&swalp_relu) relu;
  decltype(&swalp_relu_gradient) relu_gradient;
  decltype(&swalp_unpack) unpack;
  decltype(&swalp_split) split;
  decltype(&swalp_join) join;
  decltype(&swalp_average) average;
  decltype(&swalp_average_rounded) average_rounded;
  decltype(&swalp_noise) noise;
  decltype(&swalp_sgd_step) sgd;
  decltype(&swalp_adam_step) adam;
  decltype(&swalp_least_squares) least_squares;
  decltype(&swalp_softmax_regression) softmax;
  decltype(&swalp_scalars) scalars;
};
#endif
