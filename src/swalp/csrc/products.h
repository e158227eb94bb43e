// Products of tensors of codes.
#pragma once
#include <nanobind/nanobind.h>

#include <algorithm>
#include <cmath>
#include <new>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

#include "buffers.h"
#include "convolution.h"
#include "matmul.h"

namespace {

// A matrix, or a batch of them: where its elements lie.
struct Planes {
  void* data = nullptr;
  int64_t batch = 1, rows = 0, columns = 0, batch_stride = 0, row_stride = 0, column_stride = 0;

  // A contiguous one.
  Planes(void* elements, int64_t height, int64_t width)
      : data(elements), rows(height), columns(width), row_stride(width), column_stride(1) {
    settle();
  }

  // The last two dimensions of a tensor, and a batch before them if there is one.
  explicit Planes(const Torch::Look& at) : data(at.data()) {
    if (at.seen.dims < 2 || at.seen.dims > 3)
      throw nb::value_error("matmul: two or three dimensions in memory");
    const int64_t *shape = at.seen.shape, *strides = at.seen.strides;
    if (at.seen.dims == 3) batch = *shape++, batch_stride = *strides++;
    rows = shape[0], columns = shape[1], row_stride = strides[0], column_stride = strides[1];
    settle();
  }

  // Whether the kernels can read it as an operand: rows or columns lie one after another.
  bool readable() const { return row_stride == 1 || column_stride == 1; }

  Planes transposed() const {
    Planes turned = *this;
    std::swap(turned.rows, turned.columns);
    std::swap(turned.row_stride, turned.column_stride);
    return turned;
  }

 private:
  void settle() {
    if (rows == 1 && columns == 1) row_stride = column_stride = 1;  // of one number they mean nothing
  }
};

// A tensor in memory.
Torch::Look seen_of(const Torch& torch, nb::handle x) {
  Torch::Look at;
  if (!torch.look(x, at)) throw nb::value_error("a tensor without memory");
  return at;
}

// Address and number of what a tensor has; null and 0 of None.
template <class T> std::tuple<T*, int64_t> elements_of(const Torch& torch, nb::handle x) {
  if (x.is_none()) return {nullptr, 0};
  const Torch::Look at = seen_of(torch, x);
  return {static_cast<T*>(at.data()), at.count()};
}

// An operand of a product: value = code * 2**exponent.
struct Operand {
  Planes codes;
  const int8_t* exponents = nullptr;  // or none
  bool each = false;                  // one for each matrix
};

// What is added to each row: values, or codes, their exponent, and a gap.
struct Bias {
  const float* values = nullptr;
  const int8_t* codes = nullptr;
  int64_t count = 0;
  const int8_t* exponent = nullptr;
  int gap = 0;

  Bias() = default;
  Bias(const Torch& torch, nb::handle floats, nb::handle integers, nb::handle exponents, int gap_of_codes)
      : values(std::get<0>(elements_of<float>(torch, floats))),
        exponent(std::get<0>(elements_of<int8_t>(torch, exponents))), gap(gap_of_codes) {
    std::tie(codes, count) = elements_of<int8_t>(torch, integers);
  }
};

// One task, without the interpreter's lock.
void run(const swalp_matmul& task, int threads) {
  const int status = swalp_multiply(&task, threads);
  if (status < 0) throw std::bad_alloc();
  if (status > 0) throw std::runtime_error("this machine has no integer products");
}

// False, and nothing done: there is nothing to sum, or neither of the last two strides of an operand is 1.
// `integers`: whether `to` has int32.
bool multiply(const Operand& left, const Operand& right, const Planes& to, bool integers, int64_t exponent,
              const Bias& bias, uint8_t* passed, int threads) {
  const Planes &a = left.codes, &b = right.codes;
  if (!a.batch || !a.rows || !b.columns) return true;  // there is nothing to write
  if (!a.columns || !a.readable() || !b.readable()) return false;
  swalp_matmul t = {};
  t.batch = a.batch, t.m = a.rows, t.n = b.columns, t.k = a.columns;
  t.left = static_cast<const int8_t*>(a.data);
  t.left_batch = a.batch_stride, t.left_outer = a.row_stride, t.left_inner = a.column_stride;
  t.right = static_cast<const int8_t*>(b.data);
  t.right_batch = b.batch_stride, t.right_outer = b.column_stride, t.right_inner = b.row_stride;
  t.exponent = exponent;
  t.left_exponents = left.exponents, t.left_exponent_each = left.each;
  t.right_exponents = right.exponents, t.right_exponent_each = right.each;
  t.bias = bias.values;
  t.passed = passed;
  t.out = to.data;
  t.out_batch = to.batch_stride, t.out_outer = to.row_stride;
  t.integers = integers;
  nb::gil_scoped_release unlocked;
  std::vector<float> values(bias.codes ? t.n : 0);
  if (bias.codes) {
    const double scale = std::ldexp(1.0, (bias.exponent ? *bias.exponent : 0) + bias.gap);
    for (int64_t j = 0; j < std::min(bias.count, t.n); ++j) values[j] = static_cast<float>(bias.codes[j] * scale);
    t.bias = values.data();
  }
  run(t, threads);
  return true;
}

Operand operand(const Torch& torch, nb::handle codes, nb::handle exponents) {
  const auto [raised, count] = elements_of<int8_t>(torch, exponents);
  return {Planes(seen_of(torch, codes)), raised, count > 1};
}

bool matmul(const Torch& torch, nb::handle left, nb::handle right, nb::handle out, int64_t exponent,
            nb::handle left_exponents, nb::handle right_exponents, nb::handle bias, nb::handle bias_codes,
            nb::handle bias_exponents, int bias_gap, nb::handle passed, int threads) {
  const Torch::Look to = seen_of(torch, out);
  return multiply(operand(torch, left, left_exponents), operand(torch, right, right_exponents), Planes(to),
                  Torch::is(to.seen, 0, 32), exponent,
                  Bias(torch, bias, bias_codes, bias_exponents, bias_gap),
                  std::get<0>(elements_of<uint8_t>(torch, passed)), threads);
}

// The same into a new tensor, all of it; None, and nothing done: shapes do not fit, or as above.
nb::object product(const Torch& torch, const Buffers& buffers, nb::handle left, nb::handle right,
                   int64_t exponent, nb::handle left_exponents, nb::handle right_exponents, nb::handle bias,
                   nb::handle bias_codes, nb::handle bias_exponents, int bias_gap, nb::handle passed) {
  std::vector<int64_t> shape;
  {
    Torch::Look a, b;
    if (!torch.takes() || !torch.look(left, a) || !torch.look(right, b)) return nb::none();
    const int dims = a.seen.dims;
    if (dims < 2 || dims > 3 || b.seen.dims != dims) return nb::none();
    const int64_t *m = a.seen.shape, *n = b.seen.shape;
    if (m[dims - 1] != n[dims - 2] || (dims == 3 && m[0] != n[0]) || !m[dims - 1]) return nb::none();
    for (const nb::handle each : {left_exponents, right_exponents}) {
      Torch::Look e;
      if (each.is_none()) continue;
      if (!torch.look(each, e)) return nb::none();
      if (e.count() > 1 && (dims == 2 || e.count() != m[0] || !e.contiguous())) return nb::none();
    }
    shape.assign(m, m + dims - 1);
    shape.push_back(n[dims - 1]);
  }
  const nb::object out = buffers.floats(torch, shape);
  if (out.is_none() || !matmul(torch, left, right, out, exponent, left_exponents, right_exponents, bias,
                               bias_codes, bias_exponents, bias_gap, passed, torch.threads()))
    return nb::none();
  return out;
}

// Sums of codes (rows, channels) over the rows, times 2**(exponent + gap).
void channel_sums(const int8_t* codes, int64_t rows, int64_t channels, const int8_t* exponent, int gap,
                  float* out, int threads) {
  nb::gil_scoped_release unlocked;
  std::vector<int64_t> sums(channels);
  swalp_convolution_channel_sums(codes, rows, channels, sums.data(), threads);
  // A double holds them, and 2**exponent of any two operands: rounded once.
  const double scale = std::ldexp(1.0, gap + (exponent ? *exponent : 0));
  for (int64_t c = 0; c < channels; ++c) out[c] = static_cast<float>(static_cast<double>(sums[c]) * scale);
}

}  // namespace
