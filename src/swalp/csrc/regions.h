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
#endif

namespace {

#ifdef SWALP_HAS_REGIONS

// Of all regions. A child of `fork` must not be born with it held by a thread that it does not have.
std::mutex regions_lock;

inline void regions_at_fork() {
  pthread_atfork([] { regions_lock.lock(); }, [] { regions_lock.unlock(); },
                 [] { regions_lock.unlock(); });
}

constexpr size_t kLargePage = 1 << 21;
constexpr size_t kLargeResult = 4 * kLargePage;  // from here on, on large pages of its own
// Each large page that moved may be a mapping of its own, of which a process has 65,530.
constexpr size_t kMoving = kLargePage << 14;

// Bytes from `begin` to `end` of a region.
struct Stretch {
  size_t begin, end;
};

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
  return errno == EINVAL || errno == ENOSYS || errno == EPERM ? Moved::none : Moved::lost;
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
    // Private: what a child of `fork` writes is its own.
    void* found = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (found == MAP_FAILED) return;
    address_ = static_cast<uint8_t*>(found);
    memory_ = address_ + (kLargePage - reinterpret_cast<uintptr_t>(found) % kLargePage);
#ifdef MADV_HUGEPAGE
    // Memory comes in a sixth of the time, and products of matrices that lie there take a fifth less.
    madvise(memory_, size_, MADV_HUGEPAGE);
#endif
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
    taken_.insert(next, found);
    used_until_ = std::max(used_until_, found.end);
    std::vector<Stretch> spare;
    for (const Stretch& one : spare_) {
      add(spare, {one.begin, std::min(one.end, found.begin)});
      add(spare, {std::max(one.begin, found.end), one.end});
    }
    spare_.swap(spare);
    return memory_ + begin;
  }

  void leave(const uint8_t* address) {
    const auto own = from(taken_, address - memory_);
    const Stretch left = *own;
    taken_.erase(own);
    add_spare(left);
  }

  // Free memory that lies beyond `limit` goes back to the system.
  void give_back(size_t limit) {
    std::vector<Stretch> spare;
    for (const Stretch& one : spare_) {
      const size_t from = std::max(one.begin, std::min(one.end, limit));
      if (from < one.end) madvise(memory_ + from, one.end - from, MADV_DONTNEED);
      add(spare, {one.begin, from});
    }
    spare_.swap(spare);
  }

  // What no result has used since the last call goes back.
  void give_back_unused() {
    give_back(used_until_);
    used_until_ = taken_.empty() ? 0 : taken_.back().end;
  }

  // The highest large page that is memory, but not in use, moves to `hole`, which is none of this or of
  // another region.
  Moved move(uint8_t* hole) {
    for (auto one = spare_.end(); one != spare_.begin();) {
      --one;
      const size_t page = one->end / kLargePage * kLargePage - kLargePage;
      if (one->end < kLargePage || page < one->begin) continue;
      const Moved moved = move_page(memory_ + page, hole);
      if (moved != Moved::done) return moved;
      const Stretch rest{page + kLargePage, one->end};
      one->end = page;
      if (rest.begin < rest.end) one = spare_.insert(one + 1, rest) - 1;
      if (one->begin == one->end) spare_.erase(one);
      return Moved::done;
    }
    return Moved::none;
  }

  // A large page is memory now: what of it nobody has taken is free.
  void add_memory(const uint8_t* page) {
    size_t begin = page - memory_;
    const size_t end = begin + kLargePage;
    for (const Stretch& one : taken_) {
      if (one.end <= begin || end <= one.begin) continue;
      add_spare({begin, std::min(one.begin, end)});
      begin = std::min(one.end, end);
    }
    add_spare({begin, end});
  }

  // Bytes of memory that nothing uses.
  size_t free_bytes() const {
    size_t all = 0;
    for (const Stretch& one : spare_) all += one.end - one.begin;
    return all;
  }

 private:
  // The first of a list that does not begin before `begin`.
  static std::vector<Stretch>::iterator from(std::vector<Stretch>& list, size_t begin) {
    return std::lower_bound(list.begin(), list.end(), begin,
                            [](const Stretch& one, size_t at) { return one.begin < at; });
  }
  static void add(std::vector<Stretch>& list, Stretch one) {
    if (one.begin < one.end) list.push_back(one);
  }
  // Whether a stretch of the list lies in part or whole on a large page.
  static bool meets(const std::vector<Stretch>& list, size_t page) {
    return std::any_of(list.begin(), list.end(), [page](const Stretch& one) {
      return one.begin < page + kLargePage && page < one.end;
    });
  }
  void add_spare(Stretch one) {
    if (one.begin >= one.end) return;
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
  size_t used_until_ = 0;       // the highest end in use since the window began
};

class Regions {
 public:
  // `size`: of a region, in bytes. `window`: results in which memory that none of them touched goes
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
    if (++results_ % window_ == 0)
      for (Region& region : regions_) region.give_back_unused();
    return place(bytes);
  }

  // Returns whether it was taken here.
  bool leave(uint8_t* address) {
    if (address < lowest_ || address >= highest_) return false;
    const std::lock_guard<std::mutex> held(regions_lock);
    for (Region& region : regions_) {
      if (!region.holds(address)) continue;
      region.leave(address);
      return true;
    }
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

  // Whether all that is taken here begins on a multiple of that.
  bool aligns(size_t bytes) const { return page_ % bytes == 0; }

  size_t free_bytes() const {
    const std::lock_guard<std::mutex> held(regions_lock);
    size_t all = 0;
    for (const Region& region : regions_) all += region.free_bytes();
    return all;
  }

  void release() {
    const std::lock_guard<std::mutex> held(regions_lock);
    for (Region& region : regions_) region.give_back(0);
    regions_.remove_if([](const Region& region) { return region.idle(); });
  }

 private:
  uint8_t* place(size_t bytes) {
    for (Region& region : regions_)
      if (uint8_t* found = place(region, bytes)) return found;
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
    lowest_ = std::min(lowest_.load(), region.begin());
    highest_ = std::max(highest_.load(), region.begin() + region.size());
    return place(region, bytes);
  }

  // In that region, with memory that is free elsewhere where it has none.
  static uint8_t* place(Region& region, size_t bytes) {
    std::vector<uint8_t*> holes;
    uint8_t* const found = region.take(bytes, holes);
    for (uint8_t* const hole : holes) {
      const Moved moved = move_to(hole);
      if (moved == Moved::lost) return place(region, bytes);  // there nothing lies any more
      if (moved == Moved::none) break;
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
  int64_t results_ = 0;
};

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
