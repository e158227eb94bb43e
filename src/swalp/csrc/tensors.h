// Tensors made here, as DLPack describes them (https://dmlc.github.io/dlpack): PyTorch takes one, and
// calls `deleter` when nothing uses its memory, in any thread.
#pragma once
#include <stdint.h>

#include <memory>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#include "regions.h"

namespace {

struct DLDevice {
  int32_t type;  // 1: the CPU
  int32_t id;
};

struct DLDataType {
  uint8_t code;  // 0: int, 1: unsigned int, 2: float
  uint8_t bits;
  uint16_t lanes;
};

struct DLTensor {
  void* data;
  DLDevice device;
  int32_t dims;
  DLDataType type;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct DLManagedTensor {
  DLTensor tensor;
  void* context;
  void (*deleter)(DLManagedTensor*);
};

// From version 1 on.
struct DLManagedTensorVersioned {
  uint32_t major, minor;
  void* context;
  void (*deleter)(DLManagedTensorVersioned*);
  uint64_t flags;  // 0: it may be written to, and is no copy
  DLTensor tensor;
};

constexpr const char* kCapsule = "dltensor";  // of a DLManagedTensor, while nobody has taken it

// A tensor in memory of `regions`, which outlive it, or, without, of the C library; `Managed` is one of
// the two.
template <class Managed> struct RegionTensor {
  static constexpr std::align_val_t kBoundary{64};  // as PyTorch's tensors

  Managed managed = {};
  std::vector<int64_t> shape, strides;
  std::shared_ptr<Regions> regions;

  // Null: there is no memory. `strides`: empty if the tensor is contiguous.
  static Managed* make(const std::shared_ptr<Regions>& regions, std::vector<int64_t> shape,
                       std::vector<int64_t> strides, size_t bytes, DLDataType type) {
    auto own = std::make_unique<RegionTensor>();
    own->shape = std::move(shape);
    own->strides = std::move(strides);
    own->regions = regions;
    const auto dims = static_cast<int32_t>(own->shape.size());
    void* const data = regions ? regions->take(bytes) : ::operator new(bytes, kBoundary, std::nothrow);
    if (!data) return nullptr;
    int64_t* const steps = own->strides.empty() ? nullptr : own->strides.data();
    if constexpr (std::is_same_v<Managed, DLManagedTensorVersioned>) own->managed.major = 1;
    own->managed.tensor = {data, {1, 0}, dims, type, own->shape.data(), steps, 0};
    own->managed.context = own.get();
    own->managed.deleter = [](Managed* tensor) {
      auto* gone = static_cast<RegionTensor*>(tensor->context);
      auto* const memory = static_cast<uint8_t*>(tensor->tensor.data);
      if (gone->regions) gone->regions->leave(memory);
      else ::operator delete(memory, kBoundary);
      delete gone;
    };
    return &own.release()->managed;
  }
};

}  // namespace
