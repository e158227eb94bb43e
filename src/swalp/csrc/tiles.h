// What the two computations of convolutions share: sizes of tiles, memory for operands.
#pragma once
#include <utility>
#include <vector>

#if defined(__AMX_INT8__)
#include "amx.h"
#include "transpose.h"
#endif
#include "convolution.h"
#include "dot.h"
#include "parallel.h"

namespace {

#if defined(__AMX_INT8__)
constexpr int kRows = kSide;  // positions of a tile
#elif defined(__AVX512VNNI__)
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

thread_local Workspace shared, own;  // of a call; of each thread that works on it

#if !defined(__AMX_INT8__)
using Heights = std::make_integer_sequence<int, kRows>;

// Of the processor nothing is held beyond an instruction.
struct Registers {
  void shape(int64_t, int64_t) {}
};
#endif

}  // namespace
