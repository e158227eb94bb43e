// Chooses the build of the kernels that this machine runs.
#include "kernels.h"

#include <string.h>
#ifdef SWALP_HAS_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

extern const swalp_build swalp_build_scalar;
#ifdef SWALP_HAS_AVX2
extern const swalp_build swalp_build_avx2;
#endif
#ifdef SWALP_HAS_AVX512
extern const swalp_build swalp_build_avx512;
#endif

namespace {

// Best first. The features are those that CMakeLists.txt compiles each build for.
const swalp_build* find(const char* name) {
  const auto wanted = [name](const char* build) { return !name || strcmp(name, build) == 0; };
#ifdef SWALP_HAS_AVX512
  if (wanted("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
    return &swalp_build_avx512;
#endif
#ifdef SWALP_HAS_AVX2
  if (wanted("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("bmi2"))
    return &swalp_build_avx2;
#endif
  return wanted("scalar") ? &swalp_build_scalar : nullptr;
}

const swalp_build* active = find(nullptr);

// Whether products of codes may use AMX beside AVX-512: "amx" as a choice.
bool with_amx = true;

bool has_vnni() {
#ifdef SWALP_HAS_AVX512
  return __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

// Whether the processor has tiles of 8-bit integers and Linux lets this process use them. It is asked
// once, when they are first wanted: afterwards it refuses signal stacks that they would not fit on.
bool has_amx() {
#ifdef SWALP_HAS_AMX
  static const bool found = [] {
    unsigned a, b, c, d;
    constexpr unsigned tiles = 1u << 24, int8 = 1u << 25;
    if (!has_vnni() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    if (!(d & tiles) || !(d & int8)) return false;
    constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM
    return syscall(SYS_arch_prctl, request, tile_data) == 0;
  }();
  return found;
#else
  return false;
#endif
}

}  // namespace

int swalp_quantize(const swalp_format* f, const swalp_rounding* r, const swalp_layout* l,
                   const float* x, void* out, int32_t output, int32_t* exponents, int32_t reused,
                   int threads) {
  return active->quantize(f, r, l, x, out, output, exponents, reused, threads);
}

int swalp_quantize_part(const swalp_format* f, const swalp_rounding* r, const swalp_part* part,
                        const float* x, int8_t* out, int32_t* exponent, int threads) {
  return active->quantize_part(f, r, part, x, out, exponent, threads);
}

void swalp_causal(int64_t planes, int64_t rows, int64_t columns, int64_t first, float factor, float* x,
                  int threads) {
  active->causal(planes, rows, columns, first, factor, x, threads);
}

void swalp_relu(int64_t n, const float* x, float* out, uint8_t* passed, int threads) {
  active->relu(n, x, out, passed, threads);
}

void swalp_relu_gradient(int64_t n, const float* gradient, const uint8_t* passed, float* out,
                         int threads) {
  active->relu_gradient(n, gradient, passed, out, threads);
}

int swalp_quantize_many(const swalp_format* f, int64_t count, const swalp_rounding* r,
                        const swalp_layout* const* l, const float* const* x, float* const* out,
                        int threads) {
  // Below this, threads are more use each with a tensor of its own than all within one.
  constexpr int64_t small = 1 << 18;
  constexpr int64_t serial = 1 << 17;  // some 100 us: a parallel region may have to wait for a thread
  const auto size = [l](int64_t i) {
    int64_t n = 1;
    for (int axis = 0; axis < l[i]->dims; ++axis) n *= l[i]->size[axis];
    return n;
  };
  int status = 0;
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (size(i) >= small)
      status |= active->quantize(f, r + i, l[i], x[i], out[i], SWALP_FLOAT32, nullptr, 0, threads);
    else total += size(i);
  }
  if (total < serial) threads = 1;
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(dynamic, 8) reduction(| : status) if (threads > 1)
#endif
  for (int64_t i = 0; i < count; ++i)
    if (size(i) < small)
      status |= active->quantize(f, r + i, l[i], x[i], out[i], SWALP_FLOAT32, nullptr, 0, 1);
  return status;
}

void swalp_unpack(const swalp_format* f, const swalp_layout* l, const void* codes,
                  int32_t code_type, const int32_t* exponents, const float* table, float* out,
                  int threads) {
  active->unpack(f, l, codes, code_type, exponents, table, out, threads);
}

void swalp_split(const void* halves, int64_t count, int32_t is_signed, void* codes, int threads) {
  active->split(halves, count, is_signed, codes, threads);
}

void swalp_join(const void* codes, int64_t count, void* halves, int threads) {
  active->join(codes, count, halves, threads);
}

void swalp_average(const swalp_average_arguments* a, const swalp_format* f, const swalp_layout* l,
                   int threads) {
  active->average(a, f, l, threads);
}

int swalp_average_rounded(float weight, const swalp_rounded_average* average, int threads) {
  return active->average_rounded(weight, average, threads);
}

void swalp_noise(const swalp_rounding* r, int64_t start, int64_t count, uint32_t* out) {
  active->noise(r, start, count, out);
}

int swalp_sgd_step(const swalp_sgd* hyper, const swalp_sgd_parameter* parameters, int64_t count,
                   int threads) {
  return active->sgd(hyper, parameters, count, threads);
}

int swalp_adam_step(const swalp_adam* hyper, const swalp_adam_parameter* parameters, int64_t count,
                    int threads) {
  return active->adam(hyper, parameters, count, threads);
}

int swalp_least_squares(const swalp_descent* d, float rate, const float* x, const float* y,
                        const int64_t* rows, int64_t steps) {
  return active->least_squares(d, rate, x, y, rows, steps);
}

int swalp_softmax_regression(const swalp_descent* d, const swalp_softmax* problem, float rate,
                             const int64_t* rows, int64_t steps) {
  return active->softmax(d, problem, rate, rows, steps);
}

int swalp_scalars(const swalp_descent* d, float rate, int skewed, const swalp_rounding* draws,
                  const float* table, int64_t steps) {
  return active->scalars(d, rate, skewed, draws, table, steps);
}

int swalp_use(const char* name) {
  const bool amx = strcmp(name, "amx") == 0;
  const swalp_build* build = find(amx ? "avx512" : name);
  if (!build || (amx && !has_amx())) return 0;
  active = build;
  with_amx = amx;
  return 1;
}

const char* swalp_used(void) { return swalp_uses_amx() ? "amx" : active->name; }

int swalp_uses_vnni(void) { return strcmp(active->name, "avx512") == 0 && has_vnni(); }

int swalp_uses_amx(void) { return with_amx && swalp_uses_vnni() && has_amx(); }

int swalp_has_threads(void) {
#ifdef _OPENMP
  return 1;
#else
  return 0;
#endif
}
