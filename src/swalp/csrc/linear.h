// A linear layer's passes, each in one call: small layers take no longer than the interpreter between
// their kernels, which have filled the caches.
#pragma once
#include <nanobind/nanobind.h>

#include <stdexcept>
#include <tuple>
#include <vector>

#include "packing.h"
#include "products.h"

namespace {

using Rounding = std::tuple<int32_t, int32_t, uint64_t, uint32_t, uint32_t>;

swalp_rounding rounding(const Rounding& fields) {
  const auto& [rule, bits, seed, step, call] = fields;
  return {rule, bits, seed, step, call};
}

// A matrix of codes with one exponent, or none: codes, exponent and gap, as `swalp.matmul.operands` has it.
struct Codes {
  Planes planes = {nullptr, 0, 0};
  const int8_t* exponent = nullptr;
  int gap = 0;

  operator Operand() const { return {planes, exponent, false}; }
  Codes transposed() const { return {planes.transposed(), exponent, gap}; }
};

// Of the parts of such a tuple; false: it is something else, or not readable.
bool codes_of(const Torch& torch, nb::tuple operand, Codes& found, Torch::Look& at) {
  if (!torch.look(operand[0], at) || !Torch::is(at.seen, 0, 8) || at.seen.dims < 2) return false;
  const auto [raised, count] = elements_of<int8_t>(torch, operand[1]);
  if (count > 1) return false;
  found.exponent = raised;
  found.gap = nb::cast<int>(operand[2]);
  if (at.seen.dims == 2) {
    found.planes = Planes(at);
  } else {  // as a matrix: all but the last dimension joined
    if (!at.contiguous()) return false;
    const int64_t width = at.seen.shape[at.seen.dims - 1];
    found.planes = Planes(at.data(), width ? at.count() / width : 0, width);
  }
  return found.planes.readable();
}

Codes matrix(const Block& block, int gap, int64_t rows, int64_t width) {
  return {Planes(at<void>(block.data), rows, width), at<int8_t>(block.raised), gap};
}

// left @ right + bias, whose rows lie one after another in `out`.
void multiply(const Torch& torch, const Codes& left, const Codes& right, nb::handle out, const Bias& bias,
              uint8_t* passed, int threads) {
  const Planes to(reinterpret_cast<void*>(torch.address(out)), left.planes.rows, right.planes.columns);
  if (!multiply(left, right, to, false, int64_t{left.gap} + right.gap, bias, passed, threads))
    throw std::logic_error("a linear layer of no inputs, or of codes that no kernel reads");
}

// The result for `x`, its codes, their exponent or None, and a bit for each element whether it passed ReLU,
// or None. None, and nothing done: something has to be looked at more closely, as a NaN. Sums must fit an
// int32. `bias`: a tensor of floats, a tuple like `weight`, or None. `transposed`: whether `weight` is
// (inputs, outputs).
nb::object linear(const Torch& torch, const Buffers& floats, const Buffers& buffers,
                  const swalp_format& f, int gap, const Rounding& rule, nb::handle x, nb::tuple weight,
                  bool transposed, nb::handle bias, bool rectified) {
  Torch::Look seen, of_weight;
  Codes right;
  if (!torch.takes() || !torch.look(x, seen) || seen.seen.dims < 2) return nb::none();
  if (!codes_of(torch, weight, right, of_weight) || of_weight.seen.dims != 2) return nb::none();
  if (!transposed) right = right.transposed();
  const int64_t inputs = right.planes.rows, outputs = right.planes.columns;
  if (!inputs || !outputs || seen.seen.shape[seen.seen.dims - 1] != inputs || !seen.count()) return nb::none();
  if (rectified && outputs % 16) return nb::none();
  Bias added;
  if (nb::isinstance<nb::tuple>(bias)) {
    const auto parts = nb::borrow<nb::tuple>(bias);
    added = Bias(torch, nb::none(), parts[0], parts[1], nb::cast<int>(parts[2]));
  } else {
    added = Bias(torch, bias, nb::none(), nb::none(), 0);
  }
  const int threads = torch.threads();
  const Block block = block_of(torch, buffers, f, x, nb::none(), rounding(rule), threads);
  if (!block.codes.is_valid() || block.lost) return nb::none();
  std::vector<int64_t> shape = seen.shape();
  shape.back() = outputs;
  const nb::object y = floats.floats(torch, shape);
  const Codes left = matrix(block, gap, seen.count() / inputs, inputs);
  const nb::object passed = rectified ? buffers.bits(torch, left.planes.rows * outputs) : nb::none();
  if (y.is_none() || passed.is_none() == rectified) return nb::none();
  multiply(torch, left, right, y, added, rectified ? at<uint8_t>(torch.address(passed)) : nullptr, threads);
  return nb::make_tuple(y, block.codes, block.exponent, passed);
}

// Gradients of the input, of the weight and of the bias, or None for each that is not wanted: that of the
// input is if there is a `weight`. None, and nothing done: something has to be looked at more closely.
//
// `mine`: whether nobody else refers to `grad`; then its memory is let go as soon as there are codes of it.
// `passed`: a bit for each element, whether it passed ReLU, or None.
nb::object linear_gradients(const Torch& torch, const Buffers& floats, const Buffers& buffers,
                            const swalp_format& f, int gap, const Rounding& rule, nb::handle grad, bool mine,
                            nb::handle passed, nb::tuple input, nb::handle weight, bool transposed,
                            bool of_weight, bool of_bias) {
  Torch::Look seen, of_input, weight_at;
  Codes x, w;
  if (!torch.takes() || !torch.look(grad, seen) || seen.seen.dims < 2 || !seen.count()) return nb::none();
  if (!codes_of(torch, input, x, of_input)) return nb::none();
  const int64_t outputs = seen.seen.shape[seen.seen.dims - 1], rows = seen.count() / outputs;
  if (rows != x.planes.rows) return nb::none();
  if (!weight.is_none()) {
    if (!codes_of(torch, nb::borrow<nb::tuple>(weight), w, weight_at) || weight_at.seen.dims != 2) return nb::none();
    if (transposed) w = w.transposed();
    if (w.planes.rows != outputs || w.planes.columns != x.planes.columns) return nb::none();
  }
  std::vector<int64_t> input_shape = seen.shape();
  input_shape.back() = x.planes.columns;
  const int threads = torch.threads();
  const Block block = block_of(torch, buffers, f, grad, passed, rounding(rule), threads);
  if (!block.codes.is_valid() || block.lost) return nb::none();
  if (mine) grad.attr("set_")();
  const Codes errors = matrix(block, gap, rows, outputs);
  nb::object dx = nb::none(), dw = nb::none(), db = nb::none();
  if (!weight.is_none()) {
    dx = floats.floats(torch, input_shape);
    if (dx.is_none()) throw std::bad_alloc();
    multiply(torch, errors, w, dx, {}, nullptr, threads);
  }
  if (of_weight) {
    const Codes &left = transposed ? x : errors, &right = transposed ? errors : x;
    dw = floats.floats(torch, {left.planes.columns, right.planes.columns});
    if (dw.is_none()) throw std::bad_alloc();
    multiply(torch, left.transposed(), right, dw, {}, nullptr, threads);
  }
  if (of_bias) {
    db = torch.empty({outputs});
    channel_sums(static_cast<const int8_t*>(errors.planes.data), rows, outputs, errors.exponent, gap,
                 at<float>(torch.address(db)), threads);
  }
  return nb::make_tuple(dx, dw, db);
}

}  // namespace
