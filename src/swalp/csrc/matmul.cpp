// Whether this machine runs the integer products, and running them.
#include "matmul.h"

#include <string.h>

#include "kernels.h"

#ifdef SWALP_HAS_AVX512
int swalp_matmul_vnni(const swalp_matmul*, int threads);
#endif

int swalp_has_multiply(void) {
#ifdef SWALP_HAS_AVX512
  // The choice of `swalp_use` holds here too.
  return strcmp(swalp_used(), "avx512") == 0 && __builtin_cpu_supports("avx512vnni");
#else
  return 0;
#endif
}

int swalp_multiply(const swalp_matmul* task, int threads) {
  if (!swalp_has_multiply()) return 1;
#ifdef SWALP_HAS_AVX512
  return swalp_matmul_vnni(task, threads);
#else
  (void)task, (void)threads;
  return 1;
#endif
}
