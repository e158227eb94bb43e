// What PyTorch knows of a tensor, asked without the interpreter, in which these questions take longer
// than rounding a thousand numbers.
#pragma once
#include <nanobind/nanobind.h>

#include "tensors.h"

namespace nb = nanobind;

namespace {

// Float32 on the CPU, one after another; null: it is not that, or nothing.
struct Memory {
  float* data = nullptr;
  int64_t count = 0;
};

class Torch {
 public:
  // `watchers`: functions that say whether PyTorch must see what is done. `look`: whether to look at
  // tensors from C, where PyTorch lets one.
  Torch(nb::object torch, nb::object forward_ad, nb::tuple watchers, nb::object fresh_seed, bool look)
      : tensor_(torch.attr("Tensor")), parameter_(torch.attr("nn").attr("Parameter")),
        float32_(torch.attr("float32")), empty_like_(torch.attr("empty_like")),
        grad_enabled_(torch.attr("is_grad_enabled")), has_storage_(torch.attr("_C").attr("_has_storage")),
        threads_(torch.attr("get_num_threads")),
        written_(torch.attr("autograd").attr("graph").attr("increment_version")),
        forward_ad_(std::move(forward_ad)), fresh_seed_(std::move(fresh_seed)) {
    for (nb::handle each : watchers) watchers_.push_back(nb::borrow(each));
    const nb::object capsule = nb::getattr(tensor_, "__dlpack_c_exchange_api__", nb::none());
    if (!look || capsule.is_none()) return;
    const auto* found = static_cast<const DLExchange*>(PyCapsule_GetPointer(capsule.ptr(), DLExchange::kName));
    if (!found) PyErr_Clear();
    if (found && found->major == 1 && found->look) exchange_ = found;
  }

  // Whether nobody watches: no mode, no transformation of functions, no tracing, no forward gradients.
  bool unwatched() const {
    for (const nb::object& asked : watchers_)
      if (is_true(PyObject_CallNoArgs(asked.ptr()))) return false;
    return nb::cast<int>(forward_ad_.attr(level_)) < 0;
  }

  // Of a tensor or parameter that is just its memory.
  Memory in_order(nb::handle x) const {
    const nb::handle type = nb::handle(reinterpret_cast<PyObject*>(Py_TYPE(x.ptr())));
    if (!type.is(tensor_) && !type.is(parameter_)) return {};
    return is_true(PyObject_CallMethodNoArgs(x.ptr(), is_neg_.ptr())) ? Memory{} : memory(x);
  }

  // The same, with no gradient to record.
  Memory plain(nb::handle x) const {
    const Memory found = in_order(x);
    const bool records = found.data && is_true(PyObject_GetAttr(x.ptr(), requires_grad_.ptr())) &&
                         is_true(PyObject_CallNoArgs(grad_enabled_.ptr()));
    return records ? Memory{} : found;
  }

  // Of what is no subclass, without a look at its signs.
  Memory memory(nb::handle x) const {
    if (!exchange_) {
      if (!is_true(PyObject_CallOneArg(has_storage_.ptr(), x.ptr())) || !nb::cast<bool>(x.attr("is_cpu")))
        return {};
      if (!x.attr("dtype").is(float32_) || !nb::cast<bool>(x.attr("is_contiguous")())) return {};
      return {reinterpret_cast<float*>(nb::cast<uintptr_t>(x.attr("data_ptr")())),
              nb::cast<int64_t>(x.attr("numel")())};
    }
    DLTensor seen;
    if (!look(x, seen)) return {};
    if (seen.device.type != 1 || seen.type.code != 2 || seen.type.bits != 32 || seen.type.lanes != 1) return {};
    int64_t count = 1;
    for (int32_t axis = seen.dims; axis-- > 0; count *= seen.shape[axis])
      if (seen.shape[axis] != 1 && seen.strides[axis] != count) return {};
    if (!count) return {};
    return {reinterpret_cast<float*>(static_cast<uint8_t*>(seen.data) + seen.byte_offset), count};
  }

  // Writes numbers that say how a tensor lies in memory.
  void layout(nb::handle x, std::vector<int64_t>& to) const {
    to.push_back(is_true(PyObject_CallMethodNoArgs(x.ptr(), is_neg_.ptr())));
    DLTensor seen;
    if (!exchange_) {
      for (const char* each : {"dtype", "device"}) to.push_back(PyObject_Hash(nb::object(x.attr(each)).ptr()));
      for (const nb::object& each : {nb::object(x.attr(shape_)), nb::object(x.attr("stride")())})
        for (nb::handle size : each) to.push_back(nb::cast<int64_t>(size));
      if (is_true(PyObject_CallOneArg(has_storage_.ptr(), x.ptr())))
        to.push_back(nb::cast<int64_t>(x.attr("data_ptr")()));
    } else if (look(x, seen)) {
      to.insert(to.end(), {reinterpret_cast<int64_t>(seen.data) + static_cast<int64_t>(seen.byte_offset),
                           seen.device.type, seen.device.id, seen.type.code, seen.type.bits, seen.dims});
      to.insert(to.end(), seen.shape, seen.shape + seen.dims);
      to.insert(to.end(), seen.strides, seen.strides + seen.dims);
    }
  }

  bool of_one_shape(nb::handle x, nb::handle y) const { return x.attr(shape_).equal(y.attr(shape_)); }
  // What a dict has at the shape of a tensor; null: nothing.
  nb::handle at_shape(nb::handle all, nb::handle x) const {
    const nb::handle found = PyDict_GetItemWithError(all.ptr(), nb::object(x.attr(shape_)).ptr());
    if (!found && PyErr_Occurred()) throw nb::python_error();
    return found;
  }
  nb::object empty_like(nb::handle x) const { return empty_like_(x); }
  int threads() const { return nb::cast<int>(threads_()); }
  nb::object fresh_seed() const { return fresh_seed_(); }
  void note_written(nb::handle x) const { written_(x); }

 private:
  // DLPack 1.3: what a library lets others do with its tensors, in C.
  struct DLExchange {
    static constexpr const char* kName = "dlpack_exchange_api";
    uint32_t major, minor;
    const void* older;
    void (*allocate)();
    void (*from_object)();
    void (*to_object)();
    int (*look)(void* object, DLTensor* out);  // 0: well
    void (*current_stream)();
  };

  // False: it has no memory, as on the device meta, sparse ones, gradients that are taken back at once.
  bool look(nb::handle x, DLTensor& seen) const {
    if (!exchange_->look(x.ptr(), &seen)) return true;
    PyErr_Clear();
    return false;
  }

  // Of a new object; null: an error.
  static bool is_true(PyObject* answer) {
    const nb::object held = nb::steal(answer);
    const int found = answer ? PyObject_IsTrue(answer) : -1;
    if (found < 0) throw nb::python_error();
    return found == 1;
  }
  static nb::object name(const char* text) { return nb::steal(PyUnicode_InternFromString(text)); }

  const nb::object tensor_, parameter_, float32_, empty_like_, grad_enabled_, has_storage_, threads_,
      written_, forward_ad_, fresh_seed_;
  const nb::object level_ = name("_current_level"), requires_grad_ = name("requires_grad"),
                   is_neg_ = name("is_neg"), shape_ = name("shape");
  std::vector<nb::object> watchers_;
  const DLExchange* exchange_ = nullptr;
};

// How tensors lay in memory. It holds none of them, as Python's collector could not see that.
class Layouts {
 public:
  Layouts(const Torch& torch, nb::list tensors) : seen_(of(torch, tensors, 0)) {}
  bool hold(const Torch& torch, nb::list tensors) const { return of(torch, tensors, seen_.size()) == seen_; }

 private:
  static std::vector<int64_t> of(const Torch& torch, nb::list tensors, size_t size) {
    std::vector<int64_t> found;
    found.reserve(size);
    for (nb::handle each : tensors) torch.layout(each, found);
    return found;
  }

  std::vector<int64_t> seen_;
};

}  // namespace
