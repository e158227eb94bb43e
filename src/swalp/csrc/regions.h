// Memory of large results, used again; swalp/buffers.py says why. Results lie side by side in regions
// of address space, each on the lowest place that it fits in: what one leaves free joins its free
// neighbours, and where there is no memory yet, memory that is free elsewhere moves to, which takes a
// fiftieth of the time of new one. So the pages in use are those of the most that ever was alive at once.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <algorithm>
#include <atomic>
#include <list>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#if __has_include(<sys/mman.h>)
#include <errno.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>
#define SWALP_HAS_REGIONS
#if defined(__linux__) && !defined(MREMAP_DONTUNMAP)
#define MREMAP_DONTUNMAP 4  // older C libraries do not name it
#endif
#if defined(__linux__) && !defined(MAP_FIXED_NOREPLACE)
#define MAP_FIXED_NOREPLACE 0x100000
#endif
#endif

namespace {

#ifdef SWALP_HAS_REGIONS

std::mutex regions_lock;  // of all regions

constexpr size_t kLargePage = 1 << 21;
constexpr size_t kLargeResult = 4 * kLargePage;  // from here on, on large pages of its own
// Each large page that moved may be a mapping of its own, of which a process has 65,530.
constexpr size_t kMoving = kLargePage << 14;

// Bytes from `begin` to `end` of a region.
struct Stretch {
  size_t begin, end;
};

// Address space that is memory once it is written to. Null: there is none.
inline uint8_t* mapped(uint8_t* at, size_t bytes, int how) {
  // Private: what a child of `fork` writes is its own.
  void* found = mmap(at, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | how, -1, 0);
  return found == MAP_FAILED ? nullptr : static_cast<uint8_t*>(found);
}

// Memory comes in a sixth of the time, and products of matrices that lie there take a fifth less.
inline void ask_for_large_pages(uint8_t* memory, size_t bytes) {
#ifdef MADV_HUGEPAGE
  madvise(memory, bytes, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

// What became of a page that was to move: it has; there was none, or the system cannot (before Linux 5.7,
// and elsewhere), and nothing happened; or the place where it was to go may be somebody else's by now.
enum class Moved { done, none, lost };

// Memory of a page moves to another place, which has none, and leaves none behind. By who holds the lock.
inline Moved move_page(uint8_t* from, uint8_t* to) {
#ifdef MREMAP_DONTUNMAP
  static bool can = true;
  if (!can) return Moved::none;
  constexpr int how = MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP;
  if (mremap(from, kLargePage, kLargePage, how, to) == to) return Moved::done;
  can = false;
  // Unknown or forbidden: refused before the place was cleared.
  if (errno == EINVAL || errno == ENOSYS || errno == EPERM) return Moved::none;
  if (mapped(to, kLargePage, MAP_FIXED_NOREPLACE) != to) return Moved::lost;
  ask_for_large_pages(to, kLargePage);  // it was cleared, and is as it was
  return Moved::none;
#else
  (void)from, (void)to;
  return Moved::none;
#endif
}

// A stretch of address space: which parts are taken, and which of the others are memory. By who holds
// the lock.
class Region {
 public:
  explicit Region(size_t size) : mapped_(size + kLargePage), size_(size) {
    address_ = mapped(nullptr, mapped_, 0);
    if (!address_) return;
    memory_ = address_ + (kLargePage - reinterpret_cast<uintptr_t>(address_) % kLargePage);
    ask_for_large_pages(memory_, size_);
  }
  ~Region() {
    if (address_) munmap(address_, mapped_);
  }
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;

  bool exists() const { return memory_ != nullptr; }
  bool idle() const { return taken_.empty(); }
  uint8_t* begin() const { return memory_; }
  size_t size() const { return size_; }
  bool holds(const void* address) const {
    const auto* byte = static_cast<const uint8_t*>(address);
    return byte >= memory_ && byte < memory_ + size_;
  }

  // The lowest free stretch; null: there is none. `holes`: its large pages that have no memory at all.
  uint8_t* take(size_t bytes, std::vector<uint8_t*>& holes) {
    const size_t unit = bytes < kLargeResult ? 1 : kLargePage;
    size_t begin = 0;
    auto next = taken_.begin();
    for (; next != taken_.end() && next->begin < begin + bytes; ++next)
      begin = round_up(next->end, unit);
    if (size_ < begin + bytes) return nullptr;
    const Stretch found{begin, begin + bytes};
    for (size_t page = begin / kLargePage * kLargePage; page < found.end; page += kLargePage)
      if (page + kLargePage <= size_ && !meets(taken_, page) && !meets(spare_, page))
        holes.push_back(memory_ + page);
    make_room(1);
    taken_.insert(next, found);
    take_spare(found);
    return memory_ + begin;
  }

  // Returns whether it was taken.
  bool leave(const uint8_t* address) {
    const size_t begin = address - memory_;
    const auto own = from(taken_, begin);
    if (own == taken_.end() || own->begin != begin) return false;
    const Stretch left = *own;
    taken_.erase(own);
    add_spare(left);
    return true;
  }

  // Up to so many bytes of free memory go back to the system, the highest first, in large pages. Returns
  // how many.
  size_t give_back(size_t bytes) {
    size_t given = 0;
    for (size_t i = spare_.size(); i-- > 0 && given < bytes;) {
      const Stretch one = spare_[i];
      const size_t most = std::min(one.end - one.begin, bytes - given);
      const Stretch gone{round_up(one.end - most, kLargePage), one.end / kLargePage * kLargePage};
      if (gone.begin >= gone.end) continue;
      make_room(1);
      madvise(memory_ + gone.begin, gone.end - gone.begin, MADV_DONTNEED);
      take_spare(gone);
      given += gone.end - gone.begin;
    }
    return given;
  }

  // All of it, and without asking for memory.
  void give_back_all() {
    for (const Stretch& one : spare_) madvise(memory_ + one.begin, one.end - one.begin, MADV_DONTNEED);
    spare_.clear();
    free_ = 0;
  }

  // The highest large page that is memory, but not in use, moves to `hole`, which is none of this or of
  // another region.
  Moved move(uint8_t* hole) {
    for (auto one = spare_.rbegin(); one != spare_.rend(); ++one) {
      const size_t page = one->end / kLargePage * kLargePage - kLargePage;
      if (one->end < kLargePage || page < one->begin) continue;
      make_room(1);
      const Moved moved = move_page(memory_ + page, hole);
      if (moved == Moved::done) take_spare({page, page + kLargePage});
      return moved;
    }
    return Moved::none;
  }

  // A large page is memory: what of it nobody has taken is free.
  void add_memory(const uint8_t* page) {
    make_room(taken_.size());
    size_t begin = page - memory_;
    const size_t end = begin + kLargePage;
    for (const Stretch& one : taken_) {
      if (one.end <= begin || end <= one.begin) continue;
      add_spare({begin, std::min(one.begin, end)});
      begin = std::min(one.end, end);
    }
    add_spare({begin, end});
  }

  // A large page of what was taken last is somebody else's, for good.
  void give_up(const uint8_t* page) {
    const size_t begin = page - memory_, end = begin + kLargePage;
    for (Stretch& one : taken_)
      if (one.begin < end && begin < one.end) one = {std::min(one.begin, begin), std::max(one.end, end)};
  }

  // Bytes of memory that nothing uses.
  size_t free_bytes() const { return free_; }

 private:
  // The first of a list that does not begin before `begin`.
  static std::vector<Stretch>::iterator from(std::vector<Stretch>& list, size_t begin) {
    return std::lower_bound(list.begin(), list.end(), begin,
                            [](const Stretch& one, size_t at) { return one.begin < at; });
  }
  // Whether a stretch of the list lies in part or whole on a large page.
  static bool meets(const std::vector<Stretch>& list, size_t page) {
    return std::any_of(list.begin(), list.end(), [page](const Stretch& one) {
      return one.begin < page + kLargePage && page < one.end;
    });
  }
  // From now on `more` free stretches more, and all that are taken once they are left, need no memory to
  // be noted: leaving cannot fail.
  void make_room(size_t more) {
    const size_t wanted = spare_.size() + taken_.size() + more + 1;
    if (spare_.capacity() < wanted) spare_.reserve(2 * wanted);
  }
  // What of the stretch is memory is no longer free.
  void take_spare(Stretch gone) {
    auto one = std::lower_bound(spare_.begin(), spare_.end(), gone.begin,
                                [](const Stretch& each, size_t at) { return each.end <= at; });
    while (one != spare_.end() && one->begin < gone.end) {
      const Stretch was = *one;
      free_ -= std::min(was.end, gone.end) - std::max(was.begin, gone.begin);
      one = spare_.erase(one);
      if (gone.end < was.end) one = spare_.insert(one, {gone.end, was.end});
      if (was.begin < gone.begin) one = spare_.insert(one, {was.begin, gone.begin}) + 1;
    }
  }
  void add_spare(Stretch one) {
    if (one.begin >= one.end) return;
    free_ += one.end - one.begin;
    auto after = spare_.insert(from(spare_, one.begin), one);
    const auto join = [&](auto left, auto right) {
      if (left->end != right->begin) return right;
      left->end = right->end;
      return spare_.erase(right) - 1;
    };
    if (after != spare_.begin()) after = join(after - 1, after);
    if (after + 1 != spare_.end()) join(after, after + 1);
  }
  static size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

  uint8_t *address_ = nullptr, *memory_ = nullptr;  // what the system gave, and its first large page
  size_t mapped_, size_;
  std::vector<Stretch> taken_;  // what is in use, in order
  std::vector<Stretch> spare_;  // what is memory, but not in use, likewise
  size_t free_ = 0;             // bytes of it
};

class Regions {
 public:
  // `size`: of a region, in bytes. `window`: after so many results, of all, what was free all the time goes
  // back to the system. `own`: they are results of ours, not tensors of PyTorch's.
  Regions(size_t size, int64_t window, bool own = true)
      : size_(size), window_(window), own_(own), page_(sysconf(_SC_PAGESIZE)) {
    const std::lock_guard<std::mutex> held(regions_lock);
    all().push_back(this);
  }
  ~Regions() {
    const std::lock_guard<std::mutex> held(regions_lock);
    all().remove(this);
  }

  // Null: there is no memory.
  uint8_t* take(size_t bytes) {
    bytes = whole(bytes);
    const std::lock_guard<std::mutex> held(regions_lock);
    try {
      uint8_t* const found = place(bytes);
      needed();
      return found;
    } catch (const std::bad_alloc&) {  // for our own lists
      return nullptr;
    }
  }

  // Returns whether it was taken here.
  bool leave(uint8_t* address) {
    if (address < lowest_ || address >= highest_) return false;
    const std::lock_guard<std::mutex> held(regions_lock);
    for (Region& region : regions_)
      if (region.holds(address)) return region.leave(address);
    return false;
  }

  bool holds(const void* address) const {
    const std::lock_guard<std::mutex> held(regions_lock);
    return found(address);
  }

  // Whether a result of ours lies there, in any of all regions.
  static bool any_holds(const void* address) {
    const std::lock_guard<std::mutex> held(regions_lock);
    return std::any_of(all().begin(), all().end(),
                       [&](const Regions* one) { return one->own_ && one->found(address); });
  }

  size_t free_bytes() const {
    const std::lock_guard<std::mutex> held(regions_lock);
    size_t all = 0;
    for (const Region& region : regions_) all += region.free_bytes();
    return all;
  }

  void release() {
    const std::lock_guard<std::mutex> held(regions_lock);
    for (Region& region : regions_) region.give_back_all();
    drop_idle(0);
  }

  // For a child of `fork`, which would copy what is free in its parent before writing to it.
  static void give_back_all() {
    for (Regions* const each : all())
      for (Region& region : each->regions_) region.give_back_all();
  }

 private:
  // What was free whenever one of the last results had been taken is of no use.
  void needed() {
    static int64_t taken = 0;
    static size_t least = SIZE_MAX;
    size_t free = 0;
    for (const Regions* const each : all())
      for (const Region& region : each->regions_) free += region.free_bytes();
    least = std::min(least, free);
    if (++taken < window_) return;
    for (Regions* const each : all())
      for (Region& region : each->regions_) least -= region.give_back(least);
    taken = 0;
    least = SIZE_MAX;
  }

  // Regions larger than that of which nothing is in use.
  void drop_idle(size_t size) {
    regions_.remove_if([size](const Region& one) { return one.idle() && one.size() > size; });
  }

  uint8_t* place(size_t bytes) {
    for (Region& region : regions_)
      if (uint8_t* found = place(region, bytes)) return found;
    if (!add_region(std::max(bytes, size_)) && !add_region(bytes)) {
      // Address space is limited, or counted as memory.
      for (Regions* const each : all()) each->drop_idle(0);
      if (!add_region(bytes)) return nullptr;
    }
    uint8_t* const found = place(regions_.back(), bytes);
    drop_idle(size_);  // of large ones there may be many sizes, one after another
    return found;
  }

  bool add_region(size_t size) {
    regions_.emplace_back(size);
    if (!regions_.back().exists()) {
      regions_.pop_back();
      return false;
    }
    uint8_t* const begin = regions_.back().begin();
    lowest_ = std::min(lowest_.load(), begin);
    highest_ = std::max(highest_.load(), begin + size);
    return true;
  }

  // In that region, with memory that is free elsewhere where it has none. What does not move there the
  // system will give, in large pages.
  static uint8_t* place(Region& region, size_t bytes) {
    std::vector<uint8_t*> holes;
    uint8_t* const found = region.take(bytes, holes);
    Moved moved = Moved::done;
    for (uint8_t* const hole : holes) {
      if (moved == Moved::done) moved = move_to(hole);
      if (moved == Moved::lost) {
        region.give_up(hole);
        return place(region, bytes);
      }
      region.add_memory(hole);
    }
    return found;
  }

  static Moved move_to(uint8_t* hole) {
    size_t size = 0;
    for (const Regions* const each : all())
      for (const Region& region : each->regions_) size += region.size();
    if (size > kMoving) return Moved::none;
    for (Regions* const each : all())
      for (Region& region : each->regions_)
        if (const Moved moved = region.move(hole); moved != Moved::none) return moved;
    return Moved::none;
  }

  bool found(const void* address) const {
    return std::any_of(regions_.begin(), regions_.end(),
                       [&](const Region& region) { return region.holds(address); });
  }
  static std::list<Regions*>& all() {  // to the process's end, as tensors may live that long
    static auto* const list = new std::list<Regions*>;
    return *list;
  }
  size_t whole(size_t bytes) const { return (bytes + page_ - 1) / page_ * page_; }

  const size_t size_;
  const int64_t window_;
  const bool own_;
  const size_t page_;
  std::list<Region> regions_;
  // Between them all regions lie, and ever lay: most addresses of others are told without the lock.
  std::atomic<uint8_t*> lowest_{reinterpret_cast<uint8_t*>(UINTPTR_MAX)}, highest_{nullptr};
};

// A child must not be born with the lock held by a thread that it does not have.
inline void regions_at_fork() {
  pthread_atfork([] { regions_lock.lock(); }, [] { regions_lock.unlock(); },
                 [] {
                   Regions::give_back_all();
                   regions_lock.unlock();
                 });
}

#else  // the C library's allocator, then

inline void regions_at_fork() {}

class Regions {
 public:
  Regions(size_t, int64_t, bool = true) {}
  uint8_t* take(size_t) { return nullptr; }
  bool leave(uint8_t*) { return false; }
  bool holds(const void*) const { return false; }
  static bool any_holds(const void*) { return false; }
  size_t free_bytes() const { return 0; }
  void release() {}
};

#endif

}  // namespace
