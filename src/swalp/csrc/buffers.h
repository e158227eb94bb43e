// Where results lie, and become PyTorch's tensors: `swalp/buffers.py` says why.
#pragma once
#include <nanobind/nanobind.h>

#include <memory>
#include <vector>

#include "plain.h"
#include "tensors.h"
#include "torch_memory.h"

namespace {

template <class T> T* at(uintptr_t address) { return reinterpret_cast<T*>(address); }

// Where results of `smallest` bytes and more lie.
class Buffers {
 public:
  Buffers(int64_t smallest, int64_t region, int64_t window)
      : Buffers(smallest, std::make_shared<Regions>(region, window)) {}

  // Where PyTorch's tensors of `smallest` bytes and more lie from now on, to the end of the process; None:
  // they cannot, and nothing has changed.
  static nb::object of_torch(int64_t smallest, int64_t region, int64_t window) {
    const auto regions = TorchMemory::hold(smallest, region, window);
    return regions ? nb::cast(Buffers(smallest, regions)) : nb::none();
  }

  // A tensor, or a capsule of one for `torch.from_dlpack`; None: of this size, nothing lies here. No
  // strides: it is contiguous.
  nb::object empty(const Torch& torch, const std::vector<int64_t>& shape, const std::vector<int64_t>& strides,
                   uint8_t kind, uint8_t itemsize) {
    const int64_t bytes = bytes_of(shape, itemsize);
    if (bytes < smallest_) return nb::none();
    const DLDataType type = {kind, static_cast<uint8_t>(8 * itemsize), 1};
    if (torch.takes()) return taken(torch, regions_, shape, strides, bytes, type);
    auto* const made = RegionTensor<DLManagedTensor>::make(regions_, shape, strides, bytes, type);
    if (!made) return nb::none();
    return nb::steal(PyCapsule_New(made, kCapsule, [](PyObject* capsule) {
      if (!PyCapsule_IsValid(capsule, kCapsule)) return;  // its tensor has been taken
      auto* left = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, kCapsule));
      left->deleter(left);
    }));
  }

  // A contiguous tensor of codes, large or small, where PyTorch `takes` it; None: there is no memory.
  nb::object codes(const Torch& torch, const std::vector<int64_t>& shape) const {
    return bytes(torch, shape, 0);
  }

  // Room for so many bits, likewise.
  nb::object bits(const Torch& torch, int64_t count) const { return bytes(torch, {(count + 7) / 8}, 1); }

  // Of floats; small ones are PyTorch's own, as users may see them.
  nb::object floats(const Torch& torch, const std::vector<int64_t>& shape) const {
    const int64_t bytes = bytes_of(shape, 4);
    return bytes < smallest_ ? torch.empty(shape) : taken(torch, regions_, shape, {}, bytes, {2, 32, 1});
  }

  bool holds(uintptr_t address) const { return regions_->holds(at<void>(address)); }
  size_t free_bytes() const { return regions_->free_bytes(); }
  void release() {
    nb::gil_scoped_release unlocked;
    regions_->release();
  }

 private:
  Buffers(int64_t smallest, std::shared_ptr<Regions> regions)
      : smallest_(smallest), regions_(std::move(regions)) {}

  nb::object bytes(const Torch& torch, const std::vector<int64_t>& shape, uint8_t kind) const {
    const int64_t size = bytes_of(shape, 1);
    return taken(torch, size < smallest_ ? nullptr : regions_, shape, {}, size, {kind, 8, 1});
  }
  static int64_t bytes_of(const std::vector<int64_t>& shape, int64_t itemsize) {
    for (const int64_t size : shape) itemsize *= size;
    return itemsize;
  }
  static nb::object taken(const Torch& torch, const std::shared_ptr<Regions>& regions,
                          const std::vector<int64_t>& shape, const std::vector<int64_t>& strides,
                          int64_t bytes, DLDataType type) {
    auto* const made = RegionTensor<DLManagedTensorVersioned>::make(regions, shape, strides, bytes, type);
    return made ? torch.taken(made) : nb::none();
  }

  int64_t smallest_;
  std::shared_ptr<Regions> regions_;
};

}  // namespace
