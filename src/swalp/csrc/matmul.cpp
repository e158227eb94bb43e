// Chooses the build of the integer products that this machine runs.
#include "matmul.h"

#include <string.h>

#include "kernels.h"

#ifdef SWALP_HAS_AMX
int swalp_matmul_amx(const swalp_matmul*, int threads);
#endif
#ifdef SWALP_HAS_AVX512
int swalp_matmul_vnni(const swalp_matmul*, int threads);
#endif
#ifdef SWALP_HAS_AVX2
int swalp_matmul_avx2(const swalp_matmul*, int threads);
#endif

namespace {

struct Choice {
  const char* name;
  int (*run)(const swalp_matmul*, int threads);
};

// The choice of `swalp_use` holds here too.
Choice chosen(bool amx) {
  (void)amx;
#ifdef SWALP_HAS_AMX
  if (amx && swalp_uses_amx()) return {"AMX", swalp_matmul_amx};
#endif
#ifdef SWALP_HAS_AVX512
  if (swalp_uses_vnni()) return {"AVX-512 VNNI", swalp_matmul_vnni};
#endif
#ifdef SWALP_HAS_AVX2
  if (strcmp(swalp_used(), "scalar") != 0) return {"AVX2", swalp_matmul_avx2};
#endif
  return {"", nullptr};
}

// Whether the registers of AMX would not be mostly empty: with fewer rows, or sums of fewer products,
// VNNI takes up to two thirds of the time.
bool fills_amx(const swalp_matmul& task) { return task.m > 8 && task.k > 16; }

}  // namespace

const char* swalp_multiply_used(void) { return chosen(true).name; }

int swalp_multiply(const swalp_matmul* task, int threads) {
  const Choice choice = chosen(fills_amx(*task));
  return choice.run ? choice.run(task, threads) : 1;
}
