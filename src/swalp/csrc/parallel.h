// Work shared among threads, in the default floating-point mode.
#pragma once
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#else
#include <fenv.h>
#endif
#include <stdint.h>

#include "scratch.h"

// To write what another thread has read last takes several times as long as to write what another has
// written last, above all where the two share no cache: docs/performance.md. So
// - a thread works on the same fraction of every tensor,
// - memory that results use again is left as if written by who has read it (`leave_written`),
// - what other threads read after one has written it goes past the caches, or is made by each.

namespace {

// The default floating-point mode for as long as this lives: round to nearest, subnormals kept.
class DefaultMode {
 public:
#if defined(__x86_64__)
  DefaultMode() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~DefaultMode() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
  DefaultMode() {
    fegetenv(&saved_);
    fesetenv(FE_DFL_ENV);
  }
  ~DefaultMode() { fesetenv(&saved_); }

 private:
  fenv_t saved_;
#endif
};

// work(begin, end) over shares of 0 .. count - 1; returns whether any returned true.
template <class Work>
__attribute__((noinline)) bool parallel(int64_t count, int threads, const Work& work) {
  bool any = false;
#ifdef _OPENMP
  if (threads > count) threads = static_cast<int>(count);
  if (threads > 1) {
#pragma omp parallel num_threads(threads) reduction(|| : any)
    {
      const DefaultMode mode;
      const int64_t n = omp_get_num_threads(), t = omp_get_thread_num();
      any = work(count * t / n, count * (t + 1) / n);
    }
    return any;
  }
#endif
  const DefaultMode mode;
  any = work(0, count);
  return any;
}

// Elements that were just read, as if written: one of each line, unchanged.
inline void leave_written(const float* x, int64_t n) {
  constexpr int64_t line = 64 / sizeof(float);
  auto* const word = const_cast<volatile float*>(x);
  for (int64_t i = 0; i < n; i += line) word[i] = word[i];
}

// A line that will be read or written soon, on its way to the second cache, which waits for many at a time;
// the nearest one can wait for few, and what is worked on meanwhile needs those.
inline void fetch(const void* line) { __builtin_prefetch(line, 0, 1); }

// The same to the nearest cache, by who hardly waits for it otherwise.
inline void fetch_near(const void* line) { __builtin_prefetch(line, 0, 3); }

// Those of n elements, to the second cache.
inline void fetch(const float* x, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / static_cast<int64_t>(sizeof(float))) fetch(static_cast<const void*>(x + i));
}

// Rows that are needed soon, `bytes` of each: some of their lines are asked for at each of so many turns, as
// all at once would be waited for.
class Coming {
 public:
  Coming(const void* first, int64_t stride, int64_t rows, int64_t bytes, int64_t turns)
      : row_(static_cast<const char*>(first)), stride_(stride), left_(rows), bytes_(bytes),
        each_(ceil_div(rows * ceil_div(bytes, 64), turns)) {}

  void turn() {
    for (int64_t i = 0; i < each_ && left_ > 0; ++i) {
      fetch(row_ + at_);
      at_ += 64;
      if (at_ < bytes_) continue;
      at_ = 0;
      row_ += stride_;
      --left_;
    }
  }

 private:
  const char* row_;
  int64_t stride_, left_, bytes_, each_, at_ = 0;
};

}  // namespace
