// AMX: eight registers of 16 rows of 64 bytes. Four are sums of 32 x 32 elements; a step multiplies two
// of the left operand with two of the right, of signed bytes, and adds to int32 modulo 2**32.
#pragma once
#include <immintrin.h>

#include "scratch.h"

namespace {

constexpr int64_t kSide = 32;   // rows and columns of a square of the result: two registers each
constexpr int64_t kQuads = 16;  // of the contraction in a register: four neighbours each
constexpr int64_t kRowBytes = 4 * kSide;  // of sums, and of four neighbours of the right operand

// The registers of this thread, as long as this lives.
class Registers {
 public:
  Registers() = default;
  Registers(const Registers&) = delete;
  Registers& operator=(const Registers&) = delete;
  ~Registers() {
    if (height_) _tile_release();
  }

  // For squares of `height` rows, `quads` of the contraction at a time.
  void shape(int64_t height, int64_t quads) {
    if (height == height_ && quads == quads_) return;
    // Sums 0, 1 of the upper rows, 2, 3 of the lower; left operand 4, 5; right operand 6, 7.
    struct __attribute__((packed)) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } shapes;
    static_assert(sizeof shapes == 64, "as the processor reads them");
    const int64_t upper = smaller(height, 16), lower = height > 16 ? height - 16 : 16;
    const int64_t rows[8] = {upper, upper, lower, lower, upper, lower, quads, quads};
    for (int i = 0; i < 8; ++i) {
      shapes.rows[i] = static_cast<uint8_t>(rows[i]);
      shapes.bytes[i] = static_cast<uint16_t>(i == 4 || i == 5 ? 4 * quads : 64);
    }
    __asm__ volatile("" : : "r"(&shapes) : "memory");  // GCC does not know that all of it is read
    _tile_loadconfig(&shapes);
    __asm__ volatile("" : : "r"(&shapes) : "memory");
    height_ = height, quads_ = quads;
  }

 private:
  int64_t height_ = 0, quads_ = 0;
};

// Sums of up to R * 16 x Z * 16 elements, in rows of kSide.
template <int R, int Z> inline void clear_sums() {
  _tile_zero(0);
  if (Z == 2) _tile_zero(1);
  if (R == 2) _tile_zero(2);
  if (R == 2 && Z == 2) _tile_zero(3);
}
template <int R, int Z> inline void load_sums(const int32_t* from) {
  _tile_loadd(0, from, kRowBytes);
  if (Z == 2) _tile_loadd(1, from + 16, kRowBytes);
  if (R == 2) _tile_loadd(2, from + 16 * kSide, kRowBytes);
  if (R == 2 && Z == 2) _tile_loadd(3, from + 16 * kSide + 16, kRowBytes);
}
template <int R, int Z> inline void store_sums(int32_t* to) {
  _tile_stored(0, to, kRowBytes);
  if (Z == 2) _tile_stored(1, to + 16, kRowBytes);
  if (R == 2) _tile_stored(2, to + 16 * kSide, kRowBytes);
  if (R == 2 && Z == 2) _tile_stored(3, to + 16 * kSide + 16, kRowBytes);
}

// Adds the products of rows from `upper` and `lower` on, `row` bytes apart, with [quads][kSide][4].
template <int R, int Z>
inline void add_products(const void* upper, const void* lower, int64_t row, const uint8_t* right) {
  _tile_loadd(4, upper, row);
  _tile_loadd(6, right, kRowBytes);
  _tile_dpbssd(0, 4, 6);
  if (Z == 2) {
    _tile_loadd(7, right + 64, kRowBytes);
    _tile_dpbssd(1, 4, 7);
  }
  if (R == 2) {
    _tile_loadd(5, lower, row);
    _tile_dpbssd(2, 5, 6);
    if (Z == 2) _tile_dpbssd(3, 5, 7);
  }
}

// What was written is in memory: GCC does not know that loading a register reads it.
inline void written() { __asm__ volatile("" : : : "memory"); }

}  // namespace
