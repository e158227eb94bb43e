// What PyTorch knows of a tensor, asked without the interpreter, in which these questions take longer
// than rounding a thousand numbers.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

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
        float32_(torch.attr("float32")), int8_(torch.attr("int8")), uint8_(torch.attr("uint8")),
        int32_(torch.attr("int32")), cpu_(torch.attr("device")("cpu")), empty_(torch.attr("empty")),
        empty_like_(torch.attr("empty_like")),
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
  Memory in_order(nb::handle x) const { return just_memory(x) ? memory(x) : Memory{}; }

  // The same, if it has that shape.
  Memory in_order(nb::handle x, const std::vector<int64_t>& shape) const {
    Look at;
    if (!just_memory(x) || !look(x, at) || !at.float32_in_order() || at.shape() != shape) return {};
    return {static_cast<float*>(at.data()), at.count()};
  }

  // Where the memory of such tensors lies; None: one is not. There may be empty ones.
  nb::object addresses(nb::sequence tensors) const {
    nb::list found;
    for (nb::handle x : tensors) {
      Look at;
      if (!just_memory(x) || !look(x, at) || !at.float32_in_order()) return nb::none();
      found.append(reinterpret_cast<uintptr_t>(at.data()));
    }
    return found;
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
    Look at;
    const int64_t count = look(x, at) && at.float32_in_order() ? at.count() : 0;
    return count ? Memory{static_cast<float*>(at.data()), count} : Memory{};
  }

  // Calls `see` with each of the numbers that say how a tensor lies in memory.
  template <class See> void layout(nb::handle x, const See& see) const {
    see(negated(x));
    Look at;
    if (!look(x, at)) return;
    const DLTensor& seen = at.seen;
    for (const int64_t each : {reinterpret_cast<int64_t>(at.data()), int64_t{seen.device.type},
                               int64_t{seen.device.id}, int64_t{seen.type.code}, int64_t{seen.type.bits},
                               int64_t{seen.type.lanes}, int64_t{seen.dims}})
      see(each);
    for (int32_t axis = 0; axis < seen.dims; ++axis) see(seen.shape[axis]), see(seen.strides[axis]);
  }

  // Calls `see` with the tensors that hold one: with a packed one's codes and exponents.
  template <class See> void parts(nb::handle x, bool packed, const See& see) const {
    if (!packed) return see(x);
    see(x.attr(codes_));
    const nb::object exponents = x.attr(exponents_);
    if (!exponents.is_none()) see(exponents);
  }

  // A tensor as DLPack describes it, for as long as it lives and keeps its layout.
  struct Look {
    DLTensor seen = {};
    std::vector<int64_t> sizes, steps;  // where PyTorch does not show its own

    void* data() const { return static_cast<uint8_t*>(seen.data) + seen.byte_offset; }
    int64_t count() const {
      int64_t all = 1;
      for (int32_t axis = 0; axis < seen.dims; ++axis) all *= seen.shape[axis];
      return all;
    }
    std::vector<int64_t> shape() const { return {seen.shape, seen.shape + seen.dims}; }
    bool contiguous() const {
      int64_t after = 1;
      for (int32_t axis = seen.dims; axis-- > 0; after *= seen.shape[axis])
        if (seen.shape[axis] != 1 && seen.strides[axis] != after) return false;
      return true;
    }
    bool float32_in_order() const {  // on the CPU
      return seen.device.type == 1 && is(seen, 2, 32) && (contiguous() || !count());
    }
  };

  static bool is(const DLTensor& seen, uint8_t code, uint8_t bits) {
    return seen.type.code == code && seen.type.bits == bits && seen.type.lanes == 1;
  }

  // Whether its memory has the other signs.
  bool negated(nb::handle x) const { return is_true(PyObject_CallMethodNoArgs(x.ptr(), is_neg_.ptr())); }

  // Of what is known to have memory.
  uintptr_t address(nb::handle x) const {
    Look at;
    return look(x, at) ? reinterpret_cast<uintptr_t>(at.data()) : 0;
  }

  // False: it has no memory, as on the device meta, sparse ones, gradients that are taken back at once.
  bool look(nb::handle x, Look& at) const {
    if (exchange_) {
      if (!exchange_->look(x.ptr(), &at.seen)) return true;
      PyErr_Clear();
      return false;
    }
    if (!is_true(PyObject_CallOneArg(has_storage_.ptr(), x.ptr()))) return false;
    for (nb::handle each : x.attr(shape_)) at.sizes.push_back(nb::cast<int64_t>(each));
    for (nb::handle each : x.attr("stride")()) at.steps.push_back(nb::cast<int64_t>(each));
    const nb::object type = x.attr("dtype"), device = x.attr("device");
    const auto bits = static_cast<uint8_t>(8 * nb::cast<int>(type.attr("itemsize")));
    const auto other = static_cast<uint16_t>(PyObject_Hash(type.ptr()));  // a type that nobody asks for
    at.seen.type = type.is(float32_) ? DLDataType{2, 32, 1} : type.is(int8_) ? DLDataType{0, 8, 1}
                   : type.is(uint8_) ? DLDataType{1, 8, 1} : type.is(int32_) ? DLDataType{0, 32, 1}
                                     : DLDataType{255, bits, other};
    const bool here = nb::cast<bool>(x.attr("is_cpu"));
    at.seen.device = {here ? 1 : 2, static_cast<int32_t>(PyObject_Hash(device.ptr()))};
    at.seen.dims = static_cast<int32_t>(at.sizes.size());
    at.seen.shape = at.sizes.data();
    at.seen.strides = at.steps.data();
    at.seen.data = here ? reinterpret_cast<void*>(nb::cast<uintptr_t>(x.attr("data_ptr")())) : nullptr;
    return true;
  }

  bool of_one_shape(nb::handle x, nb::handle y) const { return x.attr(shape_).equal(y.attr(shape_)); }

  // What a dict has at a key, held, as other threads may clear the dict; null: nothing.
  static nb::object at_key(nb::handle all, nb::handle key) {
    PyObject* const found = PyDict_GetItemWithError(all.ptr(), key.ptr());
    if (!found && PyErr_Occurred()) throw nb::python_error();
    return nb::borrow(found);
  }
  nb::object at_shape(nb::handle all, nb::handle x) const { return at_key(all, nb::object(x.attr(shape_))); }

  // Whether tensors made here become PyTorch's in C: by `taken`.
  bool takes() const { return exchange_ && exchange_->to_object; }
  nb::object taken(DLManagedTensorVersioned* made) const {
    void* object = nullptr;
    if (exchange_->to_object(made, &object)) {
      made->deleter(made);
      throw nb::python_error();
    }
    return nb::steal(static_cast<PyObject*>(object));
  }

  nb::object empty_like(nb::handle x) const { return empty_like_(x); }
  nb::object empty(const std::vector<int64_t>& shape) const {  // float32, on the CPU
    return empty_(shape, nb::arg("dtype") = float32_, nb::arg("device") = cpu_);
  }
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
    int (*to_object)(DLManagedTensorVersioned* tensor, void** object);  // 0: well, and the tensor is taken
    int (*look)(void* object, DLTensor* out);  // 0: well
    void (*current_stream)();
  };

  // A tensor or parameter whose memory has its signs.
  bool just_memory(nb::handle x) const {
    const nb::handle type = nb::handle(reinterpret_cast<PyObject*>(Py_TYPE(x.ptr())));
    return (type.is(tensor_) || type.is(parameter_)) && !negated(x);
  }

  // Of a new object; null: an error.
  static bool is_true(PyObject* answer) {
    const nb::object held = nb::steal(answer);
    const int found = answer ? PyObject_IsTrue(answer) : -1;
    if (found < 0) throw nb::python_error();
    return found == 1;
  }
  static nb::object name(const char* text) { return nb::steal(PyUnicode_InternFromString(text)); }

  const nb::object tensor_, parameter_, float32_, int8_, uint8_, int32_, cpu_;
  const nb::object empty_, empty_like_, grad_enabled_, has_storage_, threads_, written_, forward_ad_, fresh_seed_;
  const nb::object level_ = name("_current_level"), requires_grad_ = name("requires_grad"),
                   is_neg_ = name("is_neg"), shape_ = name("shape"), codes_ = name("codes"),
                   exponents_ = name("exponents");
  std::vector<nb::object> watchers_;
  const DLExchange* exchange_ = nullptr;
};

// Which tensors there were, and how they lay in memory. It holds none of them, as Python's collector could
// not see that: who asks must, so that no other takes an address.
class Layouts {
 public:
  // `packed`: the class of packed tensors.
  Layouts(const Torch& torch, nb::handle packed, nb::list tensors) {
    for (nb::handle each : tensors) {
      tensors_.push_back({each.ptr(), Py_TYPE(each.ptr()), nb::isinstance(each, packed)});
      torch.parts(each, tensors_.back().packed, [&](nb::handle part) {
        seen_.push_back(reinterpret_cast<int64_t>(part.ptr()));
        torch.layout(part, [&](int64_t number) { seen_.push_back(number); });
      });
    }
  }

  // Whether these are the same, where they were.
  bool hold(const Torch& torch, const std::vector<nb::object>& tensors) const {
    size_t which = 0, at = 0;
    bool same = tensors.size() == tensors_.size();
    for (const nb::object& each : tensors) {
      if (!same) return false;
      const Known& known = tensors_[which++];
      same = each.ptr() == known.tensor && Py_TYPE(each.ptr()) == known.type;
    }
    const auto check = [&](int64_t number) { same = same && at < seen_.size() && seen_[at++] == number; };
    for (const Known& each : tensors_) {
      if (!same) return false;
      torch.parts(each.tensor, each.packed, [&](nb::handle part) {
        check(reinterpret_cast<int64_t>(part.ptr()));
        if (same) torch.layout(part, check);
      });
    }
    return same && at == seen_.size();
  }

 private:
  struct Known {
    PyObject* tensor;
    PyTypeObject* type;  // PyTorch can exchange what two objects are
    bool packed;
  };
  std::vector<Known> tensors_;
  std::vector<int64_t> seen_;
};

}  // namespace
