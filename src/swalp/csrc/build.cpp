// All kernels for one instruction set: compiled once for each, with SWALP_BUILD its name.
//
// Everything here has internal linkage: the linker must never pick one build's code for another.
#if defined(__AVX512F__)
#include "lanes_avx512.h"
#elif defined(__AVX2__)
#include "lanes_avx2.h"
#else
#include "lanes_scalar.h"
#endif

#include <string.h>

#include "average.h"
#include "average_rounded.h"
#include "convex.h"
#include "decode.h"
#include "optim.h"
#include "scratch.h"

namespace {

int quantize(const swalp_format* f, const swalp_rounding* r, const swalp_layout* l, const float* x,
             void* out, int32_t output, int32_t* exponents, int32_t reused, int threads) {
  const int64_t n = elements(*l);
  if (n == 0) return 0;
  if (n < kSerial) threads = 1;
  const Task task(*f, *r, *l, x, out, output, reused && threads > 1, threads);
  if (!f->blocked || (l->dims == 1 && l->extent[0] == n)) return task.run_block(0, n, exponents);
  if (l->dims == 1) return task.run_runs(n, l->extent[0], exponents);
  if (exponents) return run_strips(task, exponents);
  int32_t* own = static_cast<int32_t*>(malloc(Strips(*l, 1).blocks() * sizeof(int32_t)));
  if (!own) return -1;
  const int lost = run_strips(task, own);
  free(own);
  return lost;
}

int quantize_part(const swalp_format* f, const swalp_rounding* r, const swalp_part* part, const float* x,
                  int8_t* out, int32_t* exponent, int threads) {
  swalp_part p = *part;
  if (p.row_stride == p.columns) {  // rows follow each other
    p.columns *= p.rows;
    p.rows = 1;
  }
  if (p.rows == 1 && p.plane_stride == p.columns) {
    p.columns *= p.planes;
    p.planes = 1;
  }
  if (p.planes * p.rows * p.columns < kSerial) threads = 1;
  const swalp_role both = {*f, *r};
  const Role role(both, SWALP_CODE8);
  Raised most;
  const int64_t chunks = (p.columns + kChunk - 1) / kChunk;  // of a row
  const bool lost = parallel(p.planes * p.rows * chunks, threads, [&](int64_t begin, int64_t end) {
    alignas(64) uint32_t buffer[kNoise];
    bool any = false;
    for (; begin < end; ++begin) {
      const int64_t row = begin / chunks, column = begin % chunks * kChunk;
      const int64_t left = p.columns - column, count = left < kChunk ? left : kChunk;
      const float* const from = x + row * p.columns + column;
      const int64_t at = row / p.rows * p.plane_stride + row % p.rows * p.row_stride + column;
      most.raise(largest(from, count));
      any |= role.span(from, out + at, p.start + at, count, {*exponent, false}, buffer);
    }
    return any;
  });
  if (f->blocked) *exponent = shared_exponent(*f, most.value().magnitude);
  return lost;
}

void causal(int64_t planes, int64_t rows, int64_t columns, int64_t first, float factor, float* x,
            int threads) {
  if (planes * rows * columns < kSerial) threads = 1;
  parallel(planes * rows, threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      float* const at = x + row * columns;
      const int64_t after = first + row % rows + 1, seen = after < columns ? after : columns;
      for (int64_t i = 0; i < seen; ++i) at[i] *= factor;
      for (int64_t i = seen; i < columns; ++i) at[i] = -__builtin_inff();
    }
    return false;
  });
}

void relu(int64_t n, const float* x, float* out, uint8_t* passed, int threads) {
  if (n < kSerial) threads = 1;
  parallel((n + 7) / 8, threads, [&](int64_t begin, int64_t end) {
    int64_t byte = begin;
#if defined(__AVX512F__)
    for (; byte + 1 < end && 8 * byte + 16 <= n; byte += 2) {
      const __m512 v = _mm512_loadu_ps(x + 8 * byte);
      const __mmask16 keep = _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NLE_UQ);
      _mm512_storeu_ps(out + 8 * byte, _mm512_maskz_mov_ps(keep, v));
      memcpy(passed + byte, &keep, 2);
    }
#elif defined(__AVX2__)
    for (; byte < end && 8 * byte + 8 <= n; ++byte) {
      const __m256 v = _mm256_loadu_ps(x + 8 * byte);
      const __m256 keep = _mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_NLE_UQ);
      _mm256_storeu_ps(out + 8 * byte, _mm256_and_ps(keep, v));
      passed[byte] = static_cast<uint8_t>(_mm256_movemask_ps(keep));
    }
#endif
    for (; byte < end; ++byte) {
      const int64_t at = 8 * byte, count = n - at < 8 ? n - at : 8;
      uint8_t bits = 0;
      for (int64_t i = 0; i < count; ++i) {
        const float v = x[at + i];
        const bool keep = !(v <= 0);  // a NaN stays one
        bits = static_cast<uint8_t>(bits | keep << i);
        out[at + i] = keep ? v : 0.0f;
      }
      passed[byte] = bits;
    }
    return false;
  });
}

void relu_gradient(int64_t n, const float* gradient, const uint8_t* passed, float* out,
                   int threads) {
  if (n < kSerial) threads = 1;
  parallel((n + 7) / 8, threads, [&](int64_t begin, int64_t end) {
    const int64_t at = 8 * begin, last = 8 * end < n ? 8 * end : n;
    keep_passed(gradient + at, passed + begin, last - at, out + at);
    return false;
  });
}

// work(at, count, their exponents) over all stretches of elements with one exponent, or, where that
// changes from one to the next, over rows.
template <class Work>
void each_stretch(const swalp_format& f, const swalp_layout& l, const int32_t* exponents,
                  int threads, const Work& work) {
  const int64_t n = elements(l);
  if (!f.blocked || (l.dims == 1 && l.extent[0] == n)) {
    parallel(n, threads, [&](int64_t b, int64_t e) {
      work(b, e - b, Exponents{exponents, false});
      return false;
    });
  } else if (l.dims == 1) {
    const int64_t length = l.extent[0], blocks = n / length;
    if (length >= kSerial)
      for (int64_t block = 0; block < blocks; ++block)
        parallel(length, threads, [&](int64_t b, int64_t e) {
          work(block * length + b, e - b, Exponents{exponents + block, false});
          return false;
        });
    else
      parallel(blocks, threads, [&](int64_t b, int64_t e) {
        if (length == 1) work(b, e - b, Exponents{exponents + b, true});
        else
          for (; b < e; ++b) work(b * length, length, Exponents{exponents + b, false});
        return false;
      });
  } else {
    const Strips strips(l, threads);
    const bool each = l.extent[l.dims - 1] == 1;
    parallel(strips.grid[strips.owner], threads, [&](int64_t b, int64_t e) {
      strips.walk(b, e, !each, [&](int64_t at, int64_t count, int64_t block) {
        work(at, count, Exponents{exponents + block, each});
      });
      return false;
    });
  }
}

template <class Code>
void unpack_codes(const swalp_format& f, const swalp_layout& l, const Code* codes,
                  const int32_t* exponents, const float* table, float* out, int threads) {
  each_stretch(f, l, exponents, threads, [&](int64_t at, int64_t count, Exponents shared) {
    decode(f, codes + at, count, shared, table, out + at);
  });
}

void unpack(const swalp_format* f, const swalp_layout* l, const void* codes, int32_t code_type,
            const int32_t* exponents, const float* table, float* out, int threads) {
  const int64_t n = elements(*l);
  if (n == 0) return;
  if (n < kSerial) threads = 1;
  if (code_type == SWALP_CODE8)
    unpack_codes(*f, *l, static_cast<const int8_t*>(codes), exponents, table, out, threads);
  else
    unpack_codes(*f, *l, static_cast<const int16_t*>(codes), exponents, table, out, threads);
}

void split(const void* halves, int64_t count, int32_t is_signed, void* codes, int threads) {
  if (count < kSerial) threads = 1;
  parallel((count + 1) / 2, threads, [&](int64_t b, int64_t e) {
    const int64_t last = 2 * e < count ? 2 * e : count;
    split_halves(static_cast<const uint8_t*>(halves) + b, last - 2 * b, is_signed,
                 static_cast<int8_t*>(codes) + 2 * b);
    return false;
  });
}

void join(const void* codes, int64_t count, void* halves, int threads) {
  if (count < kSerial) threads = 1;
  parallel((count + 1) / 2, threads, [&](int64_t b, int64_t e) {
    const int64_t last = 2 * e < count ? 2 * e : count;
    join_halves(static_cast<const int8_t*>(codes) + 2 * b, last - 2 * b,
                static_cast<uint8_t*>(halves) + b);
    return false;
  });
}

template <class Code, class Taker>
void take_codes(const Taker& take, const swalp_average_arguments& a, const swalp_format& f,
                const swalp_layout& l, int threads) {
  const Code* codes = static_cast<const Code*>(a.x);
  each_stretch(f, l, a.exponents, threads, [&](int64_t at, int64_t n, Exponents shared) {
    take_widened(take, at, n, [&](int64_t from, int64_t count, float* values) {
      decode(f, codes + at + from, count, shared.from(from), a.table, values);
    });
  });
}

template <class Taker>
void take(const Taker& take, const swalp_average_arguments& a, const swalp_format* f,
          const swalp_layout& l, int threads) {
  if (a.type == SWALP_CODE8) return take_codes<int8_t>(take, a, *f, l, threads);
  if (a.type == SWALP_CODE16) return take_codes<int16_t>(take, a, *f, l, threads);
  parallel(elements(l), threads, [&](int64_t b, int64_t e) {
    if (a.type == SWALP_FLOAT32) {
      take(b, static_cast<const float*>(a.x) + b, e - b);
    } else {
      take_widened(take, b, e - b, [&](int64_t from, int64_t count, float* values) {
        widen_bfloat16(static_cast<const uint16_t*>(a.x) + b + from, count, values);
      });
    }
    return false;
  });
}

template <class Code>
void sum_codes(const swalp_average_arguments& a, const swalp_layout& l, int threads) {
  const Sum<Code> take = {static_cast<int64_t*>(a.average)};
  parallel(elements(l), threads, [&](int64_t b, int64_t e) {
    take(b, static_cast<const Code*>(a.x) + b, e - b);
    return false;
  });
}

void average(const swalp_average_arguments* a, const swalp_format* f, const swalp_layout* l,
             int threads) {
  const int64_t n = elements(*l);
  if (n == 0) return;
  if (n < kSerial) threads = 1;
  switch (a->kind) {
    case SWALP_COMPENSATED:
      return take(Compensated{static_cast<float*>(a->average), a->residual,
                              static_cast<float>(a->weight)},
                  *a, f, *l, threads);
    case SWALP_MOVING32:
      return take(Moving<float>{static_cast<float*>(a->average), static_cast<float>(a->weight)}, *a,
                  f, *l, threads);
    case SWALP_MOVING64:
      return take(Moving<double>{static_cast<double*>(a->average), a->weight}, *a, f, *l, threads);
    default:
      return a->type == SWALP_CODE8 ? sum_codes<int8_t>(*a, *l, threads)
                                    : sum_codes<int16_t>(*a, *l, threads);
  }
}

void noise(const swalp_rounding* r, int64_t start, int64_t count, uint32_t* out) {
  const Noise stream(*r);
  alignas(64) uint32_t buffer[kNoise], more[kNoise];
  for (int64_t done = 0; done < count; done += kChunk) {
    const int64_t n = count - done < kChunk ? count - done : kChunk;
    const uint16_t* const upper = fill(stream, start + done, n, buffer).upper;
    const uint16_t* const lower = fill(stream, start + done, n, more, kLower).upper;
    for (int64_t i = 0; i < n; ++i)
      out[done + i] = r->bits > 16 ? uint32_t{upper[i]} << 16 | lower[i] : upper[i];
  }
}

}  // namespace

#define SWALP_TEXT_(name) #name
#define SWALP_TEXT(name) SWALP_TEXT_(name)
#define SWALP_JOIN_(name) swalp_build_##name
#define SWALP_JOIN(name) SWALP_JOIN_(name)
extern const swalp_build SWALP_JOIN(SWALP_BUILD);
const swalp_build SWALP_JOIN(SWALP_BUILD) = {SWALP_TEXT(SWALP_BUILD), quantize, quantize_part,
                                             causal, relu, relu_gradient, unpack, split, join, average,
                                             average_rounded, noise, sgd, adam, least_squares, softmax, scalars};
