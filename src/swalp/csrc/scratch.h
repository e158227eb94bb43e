// What products and optimizers share: sizes, scratch memory, powers of two.
#pragma once
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

namespace {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

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

// 2**exponent as two normal factors; beyond ±252 every product is 0 or infinite anyway.
struct Factors {
  float first, second;
  explicit Factors(int64_t exponent) {
    exponent = exponent < -252 ? -252 : exponent > 252 ? 252 : exponent;
    first = power(exponent / 2);
    second = power(exponent - exponent / 2);
  }
  static float power(int64_t exponent) {
    const uint32_t bits = static_cast<uint32_t>(exponent + 127) << 23;
    float value;
    memcpy(&value, &bits, 4);
    return value;
  }
};

}  // namespace
