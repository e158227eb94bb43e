// Tensors rounded: to values, to codes.
#pragma once
#include <nanobind/nanobind.h>

#include <algorithm>
#include <new>
#include <vector>

#include "buffers.h"
#include "kernels.h"

namespace {

// Below this a call is over before another Python thread could have started.
constexpr int64_t kHoldLock = 1 << 16;

int64_t elements(const swalp_layout& l) {
  int64_t n = 1;
  for (int axis = 0; axis < l.dims; ++axis) n *= l.size[axis];
  return n;
}

swalp_layout flat(int64_t n) {
  swalp_layout l = {};
  l.dims = 1;
  l.size[0] = l.extent[0] = n;
  return l;
}

// Blocks' exponents, which tensors hold in 1, 2 or 4 bytes each, as the kernels take them: in 4.
class Exponents {
 public:
  Exponents(uintptr_t address, int bytes, const swalp_layout& l) : address_(address), bytes_(bytes) {
    if (!address || bytes == 4) return;
    int64_t blocks = 1;
    for (int axis = 0; axis < l.dims; ++axis) blocks *= l.size[axis] / l.extent[axis];
    wide_.resize(blocks);
  }

  int32_t* get() { return wide_.empty() ? at<int32_t>(address_) : wide_.data(); }

  void widen() {
    if (bytes_ == 1) std::copy_n(at<int8_t>(address_), wide_.size(), wide_.begin());
    if (bytes_ == 2) std::copy_n(at<int16_t>(address_), wide_.size(), wide_.begin());
  }

  void narrow() const {
    if (bytes_ == 1) std::copy(wide_.begin(), wide_.end(), at<int8_t>(address_));
    if (bytes_ == 2) std::copy(wide_.begin(), wide_.end(), at<int16_t>(address_));
  }

 private:
  uintptr_t address_;
  int bytes_;
  std::vector<int32_t> wide_;
};

bool quantize(const swalp_format& f, const swalp_layout& l, uintptr_t x, uintptr_t out,
              int32_t output, uintptr_t exponents, int exponent_bytes, int32_t rule, int32_t bits,
              uint64_t seed, uint32_t step, uint32_t call, int threads) {
  const swalp_rounding r = {rule, bits, seed, step, call};
  Exponents shared(exponents, exponent_bytes, l);
  const auto run = [&](bool reused) {
    const int lost = swalp_quantize(&f, &r, &l, at<float>(x), at<void>(out), output, shared.get(),
                                    reused, threads);
    shared.narrow();
    return lost;
  };
  int lost;
  if (elements(l) < kHoldLock) {
    lost = run(false);
  } else {
    nb::gil_scoped_release unlocked;
    lost = run(Regions::any_holds(at<void>(x)));
  }
  if (lost < 0) throw std::bad_alloc();
  return lost != 0;
}

// Codes of one block, or of none: their tensor, the exponent's or None, where both lie, and whether a NaN
// was lost.
struct Block {
  nb::object codes, exponent;
  uintptr_t data = 0, raised = 0;
  bool lost = false;
};

// Of a contiguous tensor; without codes, and nothing done: it is something else. `passed`: a tensor of bits,
// where elements count as they are and not as 0, or None.
Block block_of(const Torch& torch, const Buffers& buffers, const swalp_format& f, nb::handle x,
               nb::handle passed, const swalp_rounding& r, int threads) {
  Torch::Look seen;
  if (torch.negated(x) || !torch.look(x, seen) || seen.seen.device.type != 1) return {};
  const int64_t count = seen.count();
  if (!Torch::is(seen.seen, 2, 32) || !count || !seen.contiguous()) return {};
  swalp_layout layout = flat(count);
  if (!passed.is_none()) {
    Torch::Look bits;
    if (!torch.look(passed, bits) || !bits.contiguous() || 8 * bits.count() < count) return {};
    layout.passed = static_cast<const uint8_t*>(bits.data());
  }
  const std::vector<int64_t> shape = seen.shape();
  Block made = {buffers.codes(torch, shape), nb::none()};
  if (f.blocked) made.exponent = buffers.codes(torch, std::vector<int64_t>(shape.size(), 1));
  if (made.codes.is_none() || made.exponent.is_none() == (f.blocked != 0)) return {};
  made.data = torch.address(made.codes);
  made.raised = f.blocked ? torch.address(made.exponent) : 0;
  made.lost = quantize(f, layout, reinterpret_cast<uintptr_t>(seen.data()), made.data, SWALP_CODE8, made.raised,
                       1, r.rule, r.bits, r.seed, r.step, r.call, threads);
  return made;
}

// Codes, exponent, and whether a NaN was lost; None, and nothing done: as above.
nb::object pack_block(const Torch& torch, const Buffers& buffers, const swalp_format& f, nb::handle x,
                      nb::handle passed, int32_t rule, int32_t bits, uint64_t seed, uint32_t step, uint32_t call) {
  if (!torch.takes()) return nb::none();
  const Block made = block_of(torch, buffers, f, x, passed, {rule, bits, seed, step, call}, torch.threads());
  if (!made.codes.is_valid()) return nb::none();
  return nb::make_tuple(made.codes, made.exponent, made.lost);
}

}  // namespace
