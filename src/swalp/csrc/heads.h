// Products of attention: matrices of samples' heads, and parts of them, without a tensor for each part.
#pragma once
#include <nanobind/nanobind.h>

#include <algorithm>
#include <tuple>
#include <utility>

#include "products.h"

namespace {

// (samples, heads, rows, columns) of codes, times 2**exponent, or of floats: a part of a tensor's memory.
class Heads {
 public:
  // All of a tensor of four dimensions. `exponents`: of codes: one, or None.
  Heads(const Torch& torch, nb::object tensor, nb::handle exponents, int64_t gap)
      : tensor_(std::move(tensor)), exponent_(gap) {
    const Torch::Look at = seen_of(torch, tensor_);
    const auto [raised, count] = elements_of<int8_t>(torch, exponents);
    if (at.seen.dims != 4 || count > 1) throw nb::value_error("Heads: four dimensions, and one exponent");
    if (raised) exponent_ += *raised;
    data_ = static_cast<uint8_t*>(at.data());
    bytes_ = at.seen.type.bits / 8;
    std::copy_n(at.seen.shape, 4, size_);
    std::copy_n(at.seen.strides, 4, stride_);
  }

  // Slices of samples, rows and columns, or None: all.
  Heads part(nb::handle samples, nb::handle rows, nb::handle columns) const {
    Heads some = *this;
    some.cut(0, samples);
    some.cut(2, rows);
    some.cut(3, columns);
    return some;
  }
  Heads transposed() const {
    Heads turned = *this;
    std::swap(turned.size_[2], turned.size_[3]);
    std::swap(turned.stride_[2], turned.stride_[3]);
    return turned;
  }

  int64_t exponent() const { return exponent_; }

  // The part as a tensor: what `as_strided` takes.
  nb::object view() const {
    const auto base = nb::cast<uintptr_t>(tensor_.attr("data_ptr")());
    const int64_t offset = static_cast<int64_t>(reinterpret_cast<uintptr_t>(data_) - base) / bytes_;
    const std::vector<int64_t> sizes(size_, size_ + 4), strides(stride_, stride_ + 4);
    const auto first = nb::cast<int64_t>(tensor_.attr("storage_offset")());
    return tensor_.attr("as_strided")(sizes, strides, first + offset);
  }

  // left @ right, of floats. False, and nothing done: there is nothing to sum, or neither of the last two
  // strides of an operand is 1.
  friend bool multiply(const Heads& left, const Heads& right, const Heads& out, int threads) {
    const auto same = [](const Heads& a, const Heads& b, int i, int j) { return a.size_[i] == b.size_[j]; };
    for (const Heads* each : {&left, &right}) {
      if (each->bytes_ != 1 || out.bytes_ != 4) throw nb::type_error("Heads: codes become floats");
      if (!same(*each, out, 0, 0) || !same(*each, out, 1, 1)) throw nb::value_error("Heads: of other samples");
    }
    if (!same(left, out, 2, 2) || !same(right, out, 3, 3) || !same(left, right, 3, 2) || out.stride_[3] != 1)
      throw nb::value_error("Heads: shapes do not fit");
    swalp_matmul t = {};
    t.group = out.size_[1], t.batch = out.size_[0] * t.group;
    t.m = out.size_[2], t.n = out.size_[3], t.k = left.size_[3];
    if (!t.batch || !t.m || !t.n) return true;  // there is nothing to write
    if (!t.k || !left.readable() || !right.readable()) return false;
    t.left = reinterpret_cast<int8_t*>(left.data_);
    std::tie(t.left_group, t.left_batch, t.left_outer, t.left_inner) = left.strides();
    t.right = reinterpret_cast<int8_t*>(right.data_);
    std::tie(t.right_group, t.right_batch, t.right_inner, t.right_outer) = right.strides();
    t.out = out.data_;
    int64_t one;
    std::tie(t.out_group, t.out_batch, t.out_outer, one) = out.strides();
    t.exponent = left.exponent_ + right.exponent_;
    nb::gil_scoped_release unlocked;
    run(t, threads);
    return true;
  }

 private:
  void cut(int axis, nb::handle slice) {
    if (slice.is_none()) return;
    Py_ssize_t begin, end, step;
    if (!PySlice_Check(slice.ptr())) throw nb::type_error("Heads: parts are slices");
    if (PySlice_Unpack(slice.ptr(), &begin, &end, &step) < 0) nb::raise_python_error();
    if (step != 1) throw nb::value_error("Heads: parts are in one piece");
    size_[axis] = PySlice_AdjustIndices(size_[axis], &begin, &end, step);
    data_ += begin * stride_[axis] * bytes_;
  }
  std::tuple<int64_t, int64_t, int64_t, int64_t> strides() const {
    return {stride_[0], stride_[1], stride_[2], stride_[3]};
  }
  bool readable() const { return stride_[2] == 1 || stride_[3] == 1; }

  nb::object tensor_;  // that it is a part of
  int64_t exponent_;
  uint8_t* data_;
  int64_t bytes_, size_[4], stride_[4];
};

}  // namespace
