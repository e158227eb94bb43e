// What the two computations of convolutions share: sizes of tiles, scratch memory, scales.
#pragma once
#include <stdlib.h>

#include <utility>
#include <vector>

#include "convolution.h"
#include "dot.h"
#include "parallel.h"

namespace {

#if defined(__AVX512VNNI__)
constexpr int kRows = 12;  // positions of a tile: 24 registers of sums
#elif defined(__AVX2__)
constexpr int kRows = 6;  // 12 registers of sums
#else
constexpr int kRows = 4;
#endif
constexpr int kVectors = 2, kWide = kVectors * kLanes;
constexpr int64_t kPanel = 4 * kWide;             // bytes for kTerms of the contraction
constexpr int64_t kStrip = 384 << 10;             // bytes of a source with margins: it stays in L2
constexpr int64_t kImages = 64 << 10;             // the same of 32 channels of images side by side
constexpr int64_t kFewProducts = 1 << 20;         // below which a second thread costs more than it saves

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Memory that a thread keeps from call to call, as fresh pages cost more than what is done with them.
class Workspace {
 public:
  ~Workspace() { free(memory_); }
  uint8_t* at_least(int64_t bytes) {
    const size_t wanted = (static_cast<size_t>(bytes) + 4095) / 4096 * 4096;
    if (wanted > size_) {
      free(memory_);
      memory_ = static_cast<uint8_t*>(aligned_alloc(4096, wanted));
      size_ = memory_ ? wanted : 0;
    }
    return memory_;
  }

 private:
  uint8_t* memory_ = nullptr;
  size_t size_ = 0;
};
thread_local Workspace shared, own;  // of a call; of each thread that works on it

// 2**exponent as two normal factors; beyond ±252 every product is 0 or infinite anyway.
Scale scale_of(int64_t exponent) {
  exponent = exponent < -252 ? -252 : exponent > 252 ? 252 : exponent;
  const auto power = [](int64_t e) {
    const uint32_t bits = static_cast<uint32_t>(e + 127) << 23;
    float value;
    memcpy(&value, &bits, 4);
    return value;
  };
  return {power(exponent / 2), power(exponent - exponent / 2)};
}

using Heights = std::make_integer_sequence<int, kRows>;

}  // namespace
