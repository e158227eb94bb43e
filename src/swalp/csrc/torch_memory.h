// PyTorch's large tensors on the CPU, in regions; `share_with_torch` in swalp/buffers.py says why.
// PyTorch has no setting for where they lie, but all of them come from `posix_memalign` and go to `free`,
// which its library libc10.so calls through two pointers of the dynamic linker: these are changed.
#pragma once
#include <stdint.h>
#include <string.h>

#include <algorithm>
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
  // From now on tensors of `smallest` bytes and more lie in these regions, once in a process. Returns
  // whether they do: not if the pointers are not found, cannot be written, or have not been used yet, as
  // the linker would write to them then. In that case nothing has changed.
  static bool hold(const std::shared_ptr<Regions>& regions, size_t smallest) {
    if (regions_) return false;
    Pointers found;
    dl_iterate_phdr(
        [](dl_phdr_info* library, size_t, void* to) {
          const char* const name = library->dlpi_name ? strrchr(library->dlpi_name, '/') : nullptr;
          if (!name || strcmp(name, "/libc10.so")) return 0;
          static_cast<Pointers*>(to)->find(*library);
          return 1;
        },
        &found);
    if (!found.used(found.allocate) || !found.used(found.free)) return false;
    smallest_ = smallest;
    regions_ = new std::shared_ptr<Regions>(regions);  // to the process's end, as tensors may live that long
    allocate_ = reinterpret_cast<Allocate*>(*found.allocate);
    free_ = reinterpret_cast<Free*>(*found.free);
    // The second first: nothing may be taken here that would not be left here.
    __atomic_store_n(found.free, reinterpret_cast<void*>(release), __ATOMIC_SEQ_CST);
    __atomic_store_n(found.allocate, reinterpret_cast<void*>(allocate), __ATOMIC_SEQ_CST);
    return true;
  }

 private:
  using Allocate = int(void**, size_t, size_t);
  using Free = void(void*);

  // Those of a library; null: not found, or for the linker alone to write.
  struct Pointers {
    void **allocate = nullptr, **free = nullptr;
    ElfW(Addr) begin = UINTPTR_MAX, end = 0;  // of the library

    // Before its first call a pointer leads to code of the library that asks the linker.
    bool used(void** pointer) const {
      const auto target = pointer ? reinterpret_cast<ElfW(Addr)>(*pointer) : begin;
      return target < begin || target >= end;
    }

    void find(const dl_phdr_info& library) {
      const ElfW(Dyn)* entry = nullptr;
      ElfW(Addr) fixed = 0, fixed_end = 0;  // what is read-only once it is loaded
      for (const ElfW(Phdr)* part = library.dlpi_phdr; part != library.dlpi_phdr + library.dlpi_phnum;
           ++part) {
        const ElfW(Addr) from = library.dlpi_addr + part->p_vaddr, to = from + part->p_memsz;
        if (part->p_type == PT_LOAD) begin = std::min(begin, from), end = std::max(end, to);
        if (part->p_type == PT_DYNAMIC) entry = reinterpret_cast<const ElfW(Dyn)*>(from);
        if (part->p_type == PT_GNU_RELRO) fixed = from, fixed_end = to;
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
        const ElfW(Addr) at = library.dlpi_addr + relocations[i].r_offset;
        if (at >= fixed && at < fixed_end) continue;
        const char* const name = names + symbols[ELF64_R_SYM(relocations[i].r_info)].st_name;
        if (!strcmp(name, "posix_memalign")) allocate = reinterpret_cast<void**>(at);
        if (!strcmp(name, "free")) free = reinterpret_cast<void**>(at);
      }
    }
  };

  static int allocate(void** to, size_t alignment, size_t bytes) {
    if (bytes >= smallest_ && (*regions_)->aligns(alignment)) {
      if (uint8_t* const found = (*regions_)->take(bytes)) {
        *to = found;
        return 0;
      }
    }
    return allocate_(to, alignment, bytes);
  }
  static void release(void* address) {
    if (!(*regions_)->leave(static_cast<uint8_t*>(address))) free_(address);
  }

  static inline std::shared_ptr<Regions>* regions_ = nullptr;
  static inline size_t smallest_ = 0;
  static inline Allocate* allocate_ = nullptr;  // the C library's, or somebody else's in between
  static inline Free* free_ = nullptr;
};

#else

class TorchMemory {
 public:
  static bool hold(const std::shared_ptr<Regions>&, size_t) { return false; }
};

#endif

}  // namespace
