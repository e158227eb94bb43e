// Exponents that tensors had of late: the likely next one saves a pass over the tensor.
#pragma once
#include <atomic>

#include "blocks.h"
#include "noise.h"

namespace {

// Of one tensor, known by its noise, and from element `first` on. What is remembered, and what of that
// is lost as tensors share a word of the table or threads write it at once, changes no result.
class Guess {
 public:
  Guess(const Noise& noise, int64_t first) {
    uint64_t key = noise.key0[0] ^ noise.key1[0] << 32 ^ static_cast<uint64_t>(first) << 7;
    for (const uint64_t more : {uint64_t{noise.call}, uint64_t{0}})
      key = ((key ^ key >> 32) + more) * 0x9E3779B97F4A7C15;
    word_ = &table[key >> 32 & (kWords - 1)];
    tag_ = key >> kBits << kBits;
  }

  // Whether there is one, and which: that it had most often of late, of several the lowest, as a
  // search that ends early shows that it was too low.
  bool next(int32_t* exponent) const {
    const uint64_t word = word_->load(std::memory_order_relaxed);
    if (word >> kBits << kBits != tag_) return false;
    int most = 0;
    for (int i = 0; i < kKept; ++i) {
      int count = 0;
      for (int j = 0; j < kKept; ++j) count += of(word, j) == of(word, i);
      if (count > most || (count == most && of(word, i) < *exponent)) *exponent = of(word, i);
      most = count > most ? count : most;
    }
    return true;
  }

  // What it was.
  void found(int32_t exponent) {
    if (exponent != static_cast<int8_t>(exponent)) return;
    const uint64_t byte = static_cast<uint8_t>(exponent), all = (uint64_t{1} << kBits) - 1;
    uint64_t word = word_->load(std::memory_order_relaxed);
    word = word >> kBits << kBits == tag_ ? word << 8 | byte : byte * 0x0101010101;
    word_->store((word & all) | tag_, std::memory_order_relaxed);
  }

 private:
  static constexpr int kKept = 5, kBits = 8 * kKept;
  static constexpr uint64_t kWords = 4096;
  inline static std::atomic<uint64_t> table[kWords];

  std::atomic<uint64_t>* word_;
  uint64_t tag_;  // in the upper bits

  static int32_t of(uint64_t word, int i) { return static_cast<int8_t>(word >> 8 * i); }
};

}  // namespace
