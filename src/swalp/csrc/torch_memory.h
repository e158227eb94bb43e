// PyTorch's large tensors on the CPU, in regions; `share_with_torch` in swalp/buffers.py says why.
// PyTorch has no setting for where they lie. But all of them come from its `c10::alloc_cpu` and go to
// `c10::free_cpu`, which their own library libc10.so calls through two pointers of the dynamic linker:
// these are changed. Those to the C library's functions are left to tools that watch memory.
#pragma once
#include <stdint.h>
#include <string.h>

#include <atomic>
#include <memory>

#include "regions.h"

#if defined(SWALP_HAS_REGIONS) && defined(__linux__) && defined(__LP64__)
#include <link.h>
#define SWALP_HAS_TORCH_MEMORY
#endif

namespace {

#ifdef SWALP_HAS_TORCH_MEMORY

class TorchMemory {
 public:
  // Where tensors of `smallest` bytes and more lie from now on, once and for all. Null: they do not, as the
  // pointers are not found, cannot be written, or do not lead where they should: the linker writes to them
  // at the first call, and somebody else may have. Then nothing has changed.
  static std::shared_ptr<Regions> hold(size_t smallest, size_t region, int64_t window) {
    if (regions_) return *regions_;
    Pointers found;
    dl_iterate_phdr(
        [](dl_phdr_info* library, size_t, void* to) {
          const char* const name = library->dlpi_name ? strrchr(library->dlpi_name, '/') : nullptr;
          if (!name || strcmp(name, "/libc10.so")) return 0;
          static_cast<Pointers*>(to)->find(*library);
          return 1;
        },
        &found);
    if (!found.allocate || !found.free) return nullptr;
    smallest_ = smallest;
    allocate_ = reinterpret_cast<Allocate*>(*found.allocate);
    free_ = reinterpret_cast<Free*>(*found.free);
    // To the process's end, as tensors may live that long.
    regions_ = new std::shared_ptr<Regions>(std::make_shared<Regions>(region, window, false));
    // The second first: nothing may be taken here that would not be left here.
    __atomic_store_n(found.free, reinterpret_cast<void*>(free), __ATOMIC_SEQ_CST);
    __atomic_store_n(found.allocate, reinterpret_cast<void*>(allocate), __ATOMIC_SEQ_CST);
    return *regions_;
  }

 private:
  using Allocate = void*(size_t);
  using Free = void(void*);

  // Those of a library to its own two functions; null: not found, not led there, or not to be written.
  struct Pointers {
    void **allocate = nullptr, **free = nullptr;

    void find(const dl_phdr_info& library) {
      const ElfW(Dyn)* entry = nullptr;
      ElfW(Addr) fixed = 0, fixed_end = 0;  // what is read-only once it is loaded
      for (const ElfW(Phdr)* part = library.dlpi_phdr; part != library.dlpi_phdr + library.dlpi_phnum;
           ++part) {
        const ElfW(Addr) begin = library.dlpi_addr + part->p_vaddr;
        if (part->p_type == PT_DYNAMIC) entry = reinterpret_cast<const ElfW(Dyn)*>(begin);
        if (part->p_type == PT_GNU_RELRO) fixed = begin, fixed_end = begin + part->p_memsz;
      }
      const ElfW(Rela)* relocations = nullptr;
      const ElfW(Sym)* symbols = nullptr;
      const char* names = nullptr;
      size_t bytes = 0;
      for (; entry && entry->d_tag != DT_NULL; ++entry) {
        // Some C libraries leave addresses relative to the library.
        const ElfW(Addr) value = entry->d_un.d_ptr;
        const ElfW(Addr) address = value < library.dlpi_addr ? library.dlpi_addr + value : value;
        if (entry->d_tag == DT_PLTREL && entry->d_un.d_val != DT_RELA) return;
        if (entry->d_tag == DT_PLTRELSZ) bytes = entry->d_un.d_val;
        if (entry->d_tag == DT_JMPREL) relocations = reinterpret_cast<const ElfW(Rela)*>(address);
        if (entry->d_tag == DT_SYMTAB) symbols = reinterpret_cast<const ElfW(Sym)*>(address);
        if (entry->d_tag == DT_STRTAB) names = reinterpret_cast<const char*>(address);
      }
      if (!relocations || !symbols || !names) return;
      for (size_t i = 0; i < bytes / sizeof *relocations; ++i) {
        const ElfW(Sym)& symbol = symbols[ELF64_R_SYM(relocations[i].r_info)];
        const char* const name = names + symbol.st_name;
        void*** const found = !strcmp(name, "_ZN3c109alloc_cpuEm")  ? &allocate
                              : !strcmp(name, "_ZN3c108free_cpuEPv") ? &free
                                                                     : nullptr;
        const ElfW(Addr) at = library.dlpi_addr + relocations[i].r_offset;
        if (!found || (at >= fixed && at < fixed_end)) continue;
        auto** const pointer = reinterpret_cast<void**>(at);
        if (reinterpret_cast<ElfW(Addr)>(*pointer) == library.dlpi_addr + symbol.st_value) *found = pointer;
      }
    }
  };

  static void* allocate(size_t bytes) {
    std::atomic_thread_fence(std::memory_order_acquire);  // of what was stored before the pointers
    if (bytes >= smallest_ && bytes <= PTRDIFF_MAX)
      if (void* const found = (*regions_)->take(bytes)) return found;
    return allocate_(bytes);  // which says what is wrong, if it is
  }
  static void free(void* address) {
    std::atomic_thread_fence(std::memory_order_acquire);
    if (!(*regions_)->leave(static_cast<uint8_t*>(address))) free_(address);
  }

  static inline std::shared_ptr<Regions>* regions_ = nullptr;
  static inline size_t smallest_ = 0;
  static inline Allocate* allocate_ = nullptr;  // PyTorch's own
  static inline Free* free_ = nullptr;
};

#else

class TorchMemory {
 public:
  static std::shared_ptr<Regions> hold(size_t, size_t, int64_t) { return nullptr; }
};

#endif

}  // namespace
