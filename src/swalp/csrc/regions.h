// Memory of large results, used again; swalp/buffers.py says why. Results lie side by side in regions
// of address space, each on the lowest place that it fits in: what one leaves free joins its free
// neighbours, so the pages in use are those of the most that ever was alive at once.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <algorithm>
#include <list>
#include <mutex>
#include <utility>
#include <vector>

#if __has_include(<sys/mman.h>)
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>
#define SWALP_HAS_REGIONS
#endif

namespace {

#ifdef SWALP_HAS_REGIONS

// Of all regions. A child of `fork` must not be born with it held by a thread that it does not have.
std::mutex regions_lock;

inline void regions_at_fork() {
  pthread_atfork([] { regions_lock.lock(); }, [] { regions_lock.unlock(); },
                 [] { regions_lock.unlock(); });
}

// A stretch of address space: which parts are taken, and how much of it is memory. Unless said
// otherwise, by who holds the lock.
class Region {
 public:
  explicit Region(size_t size) : size_(size) {
    // Private: what a child of `fork` writes is its own.
    void* found = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memory_ = found == MAP_FAILED ? nullptr : static_cast<uint8_t*>(found);
  }
  ~Region() {
    if (memory_) munmap(memory_, size_);
  }
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;

  bool exists() const { return memory_ != nullptr; }
  bool idle() const { return taken_.empty(); }
  bool holds(const void* address) const {
    const auto* byte = static_cast<const uint8_t*>(address);
    return byte >= memory_ && byte < memory_ + size_;
  }

  // The lowest free stretch; null: there is none.
  uint8_t* take(size_t bytes) {
    size_t start = 0;
    auto next = taken_.begin();
    for (; next != taken_.end() && next->first - start < bytes; ++next) start = next->second;
    if (size_ - start < bytes) return nullptr;
    taken_.insert(next, {start, start + bytes});
    recent_ = std::max(recent_, start + bytes);
    touched_ = std::max(touched_, recent_);
    return memory_ + start;
  }

  void leave(const uint8_t* address) {
    const size_t start = address - memory_;
    taken_.erase(std::lower_bound(taken_.begin(), taken_.end(), std::make_pair(start, size_t{0})));
  }

  // Pages from one byte to another go back to the system. No lock is needed for what is taken.
  void give_back(size_t begin, size_t end) {
    if (begin < end) madvise(memory_ + begin, end - begin, MADV_DONTNEED);
  }

  // Free pages beyond the first `keep` bytes go back.
  void give_back(size_t keep) {
    const size_t last = taken_.empty() ? 0 : taken_.back().second;
    size_t start = 0;
    for (const auto& [first, end] : taken_) {
      give_back(std::max(start, keep), first);
      start = end;
    }
    give_back(std::max(start, keep), std::max(last, touched_));
    touched_ = std::max(last, std::min(keep, touched_));
    recent_ = last;
  }
  void give_back_unused() { give_back(recent_); }

  // Memory comes back from the system in a fraction of the time in pages of 2 MB.
  void in_large_pages() {
#ifdef MADV_HUGEPAGE
    madvise(memory_, size_, MADV_HUGEPAGE);
#endif
  }

  size_t offset(const uint8_t* address) const { return address - memory_; }

  // Bytes of memory up to `limit` that nothing uses.
  size_t free_bytes(size_t limit) const {
    const size_t last = std::min(touched_, limit);
    size_t used = 0;
    for (const auto& [start, end] : taken_)
      used += std::max(std::min(end, last), start) - start;
    return last - used;
  }

 private:
  uint8_t* memory_;
  size_t size_;
  std::vector<std::pair<size_t, size_t>> taken_;  // start and end of what is in use, in order
  size_t touched_ = 0;                            // end of what may be memory
  size_t recent_ = 0;                             // the highest end in use since the window began
};

class Regions {
 public:
  // `size`: of a region, in bytes. `window`: results in which memory that none of them touched goes
  // back to the system.
  Regions(size_t size, int64_t window) : size_(size), window_(window), page_(sysconf(_SC_PAGESIZE)) {}

  // Null: there is no memory.
  uint8_t* take(size_t bytes) {
    bytes = whole(bytes);
    const std::lock_guard<std::mutex> held(regions_lock);
    if (++results_ % window_ == 0)
      for (Region& region : regions_) region.give_back_unused();
    for (Region& region : regions_)
      if (uint8_t* found = region.take(bytes)) return found;
    regions_.emplace_back(std::max(bytes, size_));
    if (!regions_.back().exists()) {  // address space is limited, or counted as memory
      regions_.pop_back();
      regions_.emplace_back(bytes);
    }
    Region& region = regions_.back();
    if (!region.exists()) {
      regions_.pop_back();
      return nullptr;
    }
    if (saves_) region.in_large_pages();
    return region.take(bytes);
  }

  void leave(uint8_t* address, size_t bytes) {
    bytes = whole(bytes);
    std::unique_lock<std::mutex> held(regions_lock);
    for (Region& region : regions_) {
      if (!region.holds(address)) continue;
      if (saves_) {
        const size_t start = region.offset(address), end = start + bytes;
        const size_t low = bytes <= kept_ ? std::max(start, kept_) : start;
        held.unlock();
        region.give_back(low, end);
        held.lock();
      }
      region.leave(address);
      return;
    }
  }

  bool holds(const void* address) const {
    const std::lock_guard<std::mutex> held(regions_lock);
    return std::any_of(regions_.begin(), regions_.end(),
                       [&](const Region& region) { return region.holds(address); });
  }

  size_t free_bytes() const {
    const std::lock_guard<std::mutex> held(regions_lock);
    size_t all = 0;
    for (const Region& region : regions_) all += region.free_bytes(saves_ ? kept_ : SIZE_MAX);
    return all;
  }

  void release() {
    const std::lock_guard<std::mutex> held(regions_lock);
    for (Region& region : regions_) region.give_back(0);
    regions_.remove_if([](const Region& region) { return region.idle(); });
  }

  // From now on, memory goes back as soon as nothing uses it, but for `keep` bytes of each region.
  void save(size_t keep) {
    const std::lock_guard<std::mutex> held(regions_lock);
    saves_ = true;
    kept_ = whole(keep);
    for (Region& region : regions_) {
      region.in_large_pages();
      region.give_back(kept_);
    }
  }

 private:
  size_t whole(size_t bytes) const { return (bytes + page_ - 1) / page_ * page_; }

  const size_t size_;
  const int64_t window_;
  const size_t page_;
  std::list<Region> regions_;
  int64_t results_ = 0;
  bool saves_ = false;
  size_t kept_ = 0;
};

#else  // the C library's allocator, then

inline void regions_at_fork() {}

class Regions {
 public:
  Regions(size_t, int64_t) {}
  uint8_t* take(size_t) { return nullptr; }
  void leave(uint8_t*, size_t) {}
  bool holds(const void*) const { return false; }
  size_t free_bytes() const { return 0; }
  void release() {}
  void save(size_t) {}
};

#endif

}  // namespace
