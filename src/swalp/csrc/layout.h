// Which elements, in which order, by which thread.
#pragma once
#include <stdlib.h>
#include <string.h>

#include <utility>

#include "guess.h"
#include "noise.h"
#include "parallel.h"
#include "passed.h"
#include "spans.h"

namespace {

// Below this many elements a second thread costs more than it saves, and on a busy machine a
// parallel region can stall for milliseconds.
constexpr int64_t kSerial = 1 << 16;
constexpr int64_t kNoise = kChunk / 2 + kPadding;  // words of that
constexpr int64_t kStretch = 512;     // pieces that are worked on in order of memory: 2 MB or more
constexpr int64_t kTile = 16384;      // the same of a transposed tile, at most: it stays in L2
constexpr int64_t kBuffer = kTile + kPadding;  // with its rows' ends and beginnings
constexpr int64_t kBoundary = 64;     // bytes that any vector may want its address to be a multiple of
constexpr int64_t kRows = 256;        // positions of a transposed tile, at most

// From this many elements on results are written past the caches, which could not hold them anyway:
// 32 MB of floats, not read before they are written.
constexpr int64_t kStreamed = 1 << 23;
// From here on the likely exponent of a block is tried first: smaller blocks are still in the caches
// when they are read for the second time.
constexpr int64_t kGuessed = 1 << 20;
constexpr int64_t kOwned = 1 << 16;  // elements that stay in a thread's caches
// Codes, which products read in other parts, from here on, if there are several threads.
constexpr int64_t kShared = 1 << 18;

int64_t elements(const swalp_layout& l) {
  int64_t n = 1;
  for (int axis = 0; axis < l.dims; ++axis) n *= l.size[axis];
  return n;
}

struct Task {
  const swalp_format& format;
  const swalp_layout& layout;
  const Rule rule;
  const Noise noise;
  const Kernel kernel;
  const float* x;
  char* out;
  int64_t item;  // bytes of an output element
  bool reused;   // what lies at x; other threads will write there
  int threads;
  bool transposed;  // and the order matters
  bool streams;     // past the caches
  int64_t rows, columns;  // of a transposed tile

  Task(const swalp_format& f, const swalp_rounding& r, const swalp_layout& l, const float* from,
       void* to, int32_t output, bool is_reused, int wanted)
      : format(f), layout(l), rule(r), noise(r), kernel(choose(f, r, output)), x(from),
        out(static_cast<char*>(to)),
        item(output == SWALP_FLOAT32 ? 4 : output == SWALP_CODE8 ? 1 : 2), reused(is_reused && !l.apart),
        threads(wanted),
        transposed(noise.used && l.channels > 0),
        streams(to != from && reinterpret_cast<uintptr_t>(to) % kBoundary == 0 &&
                (output == SWALP_FLOAT32 ? elements(l) >= kStreamed
                                         : wanted > 1 && elements(l) >= kShared)),
        rows(0), columns(0) {
    if (!transposed) return;
    if (l.positions % kPerBlock == 0) {
      columns = l.channels < 512 ? l.channels : 512;
      rows = 2 * kChunk / columns / 8 * 8;
      rows = rows < 8 ? 8 : rows > kRows ? kRows : rows;
    } else {  // noise by whole channels, or long stretches of them
      rows = l.positions < kRows ? l.positions : kRows;
      const int64_t wide = kTile / rows / 64 * 64;  // whole vectors
      columns = l.channels < wide ? l.channels : wide;
    }
  }

  // Whether elements are not to be read where they lie.
  bool gathers() const { return layout.apart || layout.passed; }

  // n elements from `at` on, of which there are at most kChunk: where they lie, or gathered in `room`.
  const float* from(int64_t at, int64_t n, float* room) const {
    if (!gathers()) return x + at;
    if (layout.passed) {  // chunks begin with a byte of it
      keep_passed(x + at, layout.passed + at / 8, n, room);
      return room;
    }
    const int last = layout.apart - 1;
    const int64_t length = layout.apart_size[last];
    int64_t index[SWALP_MAX_DIMS], row = at / length, column = at % length, offset = 0;
    for (int axis = last - 1; axis >= 0; --axis) {
      index[axis] = row % layout.apart_size[axis];
      row /= layout.apart_size[axis];
      offset += index[axis] * layout.apart_stride[axis];
    }
    for (int64_t done = 0; done < n;) {
      const int64_t left = length - column, count = left < n - done ? left : n - done;
      memcpy(room + done, x + offset + column, count * sizeof(float));
      done += count;
      column = 0;
      for (int axis = last - 1; axis >= 0; --axis) {
        offset += layout.apart_stride[axis];
        if (++index[axis] < layout.apart_size[axis]) break;
        offset -= index[axis] * layout.apart_stride[axis];
        index[axis] = 0;
      }
    }
    return room;
  }

  // What is to be gathered in pieces, and else at once: the largest of n elements from `at` on.
  Largest largest_of(int64_t at, int64_t n) const {
    if (!gathers()) return largest(x + at, n);
    Largest most;
    for (int64_t done = 0; done < n; done += kChunk) {
      alignas(64) float room[kChunk];
      const int64_t left = n - done, count = left < kChunk ? left : kChunk;
      most.join(largest(from(at + done, count, room), count));
    }
    return most;
  }

  bool span(int64_t at, int64_t n, const Words& words, Scale scale) const {
    return kernel.span(format, rule, x + at, out + at * item, n, words, scale);
  }

  // Elements at..at + n - 1, of which there are at most kChunk, by work(where to): to their place, or
  // on their way there. `settle` comes after the last.
  template <class Work> bool put(int64_t at, int64_t n, const Work& work) const {
    const int64_t bytes = n * item;
    if (!streams || at * item % kBoundary || bytes % kBoundary) return work(out + at * item);
    alignas(kBoundary) float words[kChunk];
    const bool lost = work(words);
    float* const to = reinterpret_cast<float*>(out + at * item);
    for (int64_t i = 0; i < bytes / 4; i += Lanes::N) Lanes::stream(to + i, Lanes::load(words + i));
    return lost;
  }

  void settle() const {
    if (streams) Lanes::fence();
  }

  // The range [base, base + length) of memory, in pieces of the noise. Transposed: it holds whole
  // (positions, channels) planes.
  int64_t pieces(int64_t length) const {
    if (!transposed) return (length + kChunk - 1) / kChunk;
    const int64_t plane = layout.positions * layout.channels;
    return length / plane * ((layout.positions + rows - 1) / rows);
  }

  bool run_pieces(int64_t base, int64_t length, int64_t begin, int64_t end, Scale scale) const {
    bool lost = false;
    // The end of a range that was just searched for its largest is still in the cache: it comes
    // first. Within a stretch the order is that of memory, which the processor expects.
    for (; end > begin; end -= kStretch) {
      const int64_t low = end - kStretch < begin ? begin : end - kStretch;
      lost |= run_stretch(base, length, low, end, scale);
    }
    return lost;
  }

  bool run_stretch(int64_t base, int64_t length, int64_t begin, int64_t end, Scale scale) const {
    alignas(64) uint32_t buffer[kBuffer];
    bool lost = false;
    for (int64_t piece = begin; piece < end; ++piece)
      lost |= run_piece(base, length, piece, scale, buffer);
    settle();
    return lost;
  }

  // Where a piece lies, and its elements.
  std::pair<int64_t, int64_t> place(int64_t base, int64_t length, int64_t piece) const {
    if (!transposed) {
      const int64_t at = piece * kChunk, left = length - at;
      return {base + at, left < kChunk ? left : kChunk};
    }
    const int64_t positions = layout.positions, bands = (positions + rows - 1) / rows;
    const int64_t first = piece % bands * rows, left = positions - first;
    return {base + (piece / bands * positions + first) * layout.channels,
            (left < rows ? left : rows) * layout.channels};
  }

  bool run_piece(int64_t base, int64_t length, int64_t piece, Scale scale, uint32_t* buffer) const {
    const auto [at, n] = place(base, length, piece);
    bool lost;
    if (transposed) {
      lost = run_tile(base, piece, scale, buffer);
    } else {
      // Of a short block all is in the caches: what comes then is the next.
      const float* const coming = layout.apart ? nullptr : x + at + (length <= kOwned ? length : n);
      const Words words = fill(noise, at, n, buffer, 0, coming);
      alignas(64) float room[kChunk];
      const float* const own = from(at, n, room);
      lost = put(at, n, [&, count = n](void* to) {
        return kernel.span(format, rule, own, to, count, words, scale);
      });
    }
    if (reused) leave_written(x + at, n);
    return lost;
  }

  bool run_tile(int64_t base, int64_t piece, Scale scale, uint32_t* buffer) const {
    const int64_t positions = layout.positions, channels = layout.channels;
    const int64_t bands = (positions + rows - 1) / rows;
    const int64_t plane = base + piece / bands * positions * channels;
    const int64_t p0 = piece % bands * rows;
    const int64_t height = positions - p0 < rows ? positions - p0 : rows;
    bool lost = false;
    for (int64_t c0 = 0; c0 < channels; c0 += columns) {
      const int64_t width = channels - c0 < columns ? channels - c0 : columns;
      const int64_t first = plane + c0 * positions + p0;  // row-major index
      const bool lanes = height % kPerBlock == 0 && width >= Lanes::N / 2;
      const int64_t row = lanes ? (width + Lanes::N - 1) / Lanes::N * Lanes::N : width;
      alignas(64) uint32_t scratch[kBuffer];
      const Words words = fill_transposed(noise, first, positions, height, width, row,
                                          reinterpret_cast<uint16_t*>(buffer), scratch);
      const int64_t at = plane + p0 * channels + c0;
      if (width == channels && row == width) {
        lost |= span(at, height * width, words, scale);
        continue;
      }
      for (int64_t p = 0; p < height; ++p)
        lost |= span(at + p * channels, width, words.from(p * row), scale);
    }
    return lost;
  }

  // One exponent, or none, for [base, base + length): all threads work on it.
  bool run_block(int64_t base, int64_t length, int32_t* exponent) const {
    Scale scale = {};
    if (format.blocked) {
      Guess guess(noise, base);
      Raised most;
      const bool guessed = guesses(length);
      int32_t likely;
      bool lost = false, searched = false;
      if (guessed && guess.next(&likely)) searched = run_guessed(base, length, likely, most, &lost);
      if (!searched)
        parallel((length + kChunk - 1) / kChunk, threads, [&](int64_t begin, int64_t end) {
          const int64_t at = begin * kChunk, left = length - at, n = (end - begin) * kChunk;
          most.raise(largest_of(base + at, left < n ? left : n));
          return false;
        });
      scale = scale_of(format, most.value());
      if (exponent) *exponent = scale.exponent;
      if (guessed) guess.found(scale.exponent);
      if (searched && scale.exponent == likely) return lost;
    }
    return parallel(pieces(length), threads, [&](int64_t begin, int64_t end) {
      return run_pieces(base, length, begin, end, scale);
    });
  }

  // Whether a pass is worth saving, the tensor is known by its noise, and it is there once more.
  bool guesses(int64_t length) const {
    return noise.used && length >= kGuessed && static_cast<const void*>(out) != x;
  }

  // Rounds with a likely exponent, while the largest is searched; false, and that is not all of it, if
  // the exponent was found to be too low.
  bool run_guessed(int64_t base, int64_t length, int32_t likely, Raised& most, bool* lost) const {
    std::atomic<bool> low{false};
    *lost = parallel(pieces(length), threads, [&](int64_t begin, int64_t end) {
      alignas(64) uint32_t buffer[kBuffer];
      Largest mine;
      bool any = false;
      for (; begin < end && !low.load(std::memory_order_relaxed); ++begin) {
        const auto [at, n] = place(base, length, begin);
        const Largest here = largest_of(at, n);
        if (shared_exponent(format, here.magnitude) > likely) {
          low.store(true, std::memory_order_relaxed);
          break;
        }
        mine.join(here);
        any |= run_piece(base, length, begin, scale_at(format, here, likely), buffer);
      }
      settle();
      most.raise(mine);
      return any;
    });
    return !low;
  }

  // Blocks of `length` neighbours each.
  bool run_runs(int64_t total, int64_t length, int32_t* exponents) const {
    const int64_t blocks = total / length;
    if (length > kChunk && blocks < 4 * threads) {
      bool lost = false;
      for (int64_t b = 0; b < blocks; ++b)
        lost |= run_block(b * length, length, exponents ? exponents + b : nullptr);
      return lost;
    }
    if (length > kChunk || transposed)
      return parallel(blocks, threads, [&](int64_t begin, int64_t end) {
        bool lost = false;
        for (int64_t b = begin; b < end; ++b) {
          const Scale scale = scale_of(format, largest(x + b * length, length));
          if (exponents) exponents[b] = scale.exponent;
          lost |= run_pieces(b * length, length, 0, pieces(length), scale);
        }
        return lost;
      });
    return parallel(blocks, threads, [&](int64_t begin, int64_t end) {
      alignas(64) uint32_t buffer[kNoise];
      bool lost = false;
      const int64_t group = kChunk / length;
      for (int64_t b = begin; b < end; b += group) {
        const int64_t count = end - b < group ? end - b : group, at = b * length;
        const Words words = fill(noise, at, count * length, buffer, 0, x + at + count * length);
        lost |= put(at, count * length, [&](void* to) {
          return kernel.rows(format, rule, x + at, to, count, length, words,
                             exponents ? exponents + b : nullptr);
        });
      }
      settle();
      return lost;
    });
  }
};

// Blocks in general. Threads own whole blocks: shares of the first axis along which there is more
// than one (axis 0 or 1, as neighbouring axes of one kind are merged). A share is worked off in
// strips that stay in the cache, each read for its exponents and then quantized.
struct Strips {
  const swalp_layout& l;
  int owner;
  int64_t grid[SWALP_MAX_DIMS] = {};    // blocks along each axis
  int64_t stride[SWALP_MAX_DIMS];       // of elements
  int64_t grid_stride[SWALP_MAX_DIMS];  // of blocks
  int64_t step;                         // blocks of the owner's axis in a strip

  Strips(const swalp_layout& layout, int threads) : l(layout) {
    int64_t elements = 1, blocks = 1;
    for (int axis = l.dims - 1; axis >= 0; --axis) {
      grid[axis] = l.size[axis] / l.extent[axis];
      stride[axis] = elements;
      grid_stride[axis] = blocks;
      elements *= l.size[axis];
      blocks *= grid[axis];
    }
    owner = grid[0] > 1 ? 0 : 1;
    // Strips should be wide, as memory is read row by row: along the last axis, and where blocks are
    // narrow.
    step = 1;
    const int64_t block = l.extent[owner] * stride[owner];
    if (owner == l.dims - 1 || block < 256) {
      int64_t width = owner == l.dims - 1 ? l.size[owner] / threads : 256;
      width = width < 256 ? 256 : width > 16384 ? 16384 : width;
      step = (width + block - 1) / block;
    }
  }

  int64_t blocks() const { return grid[0] * grid_stride[0]; }

  // visit(first element, elements, first block) for each stretch of the last axis in the strip of
  // the owner's blocks [begin, end). With `segments`, stretches are cut where the block changes.
  template <class Visit>
  void walk(int64_t begin, int64_t end, bool segments, const Visit& visit) const {
    const int last = l.dims - 1;
    int64_t low[SWALP_MAX_DIMS], high[SWALP_MAX_DIMS], at[SWALP_MAX_DIMS];
    for (int axis = 0; axis < l.dims; ++axis) {
      low[axis] = axis == owner ? begin * l.extent[axis] : 0;
      high[axis] = axis == owner ? end * l.extent[axis] : l.size[axis];
      at[axis] = low[axis];
    }
    const int64_t extent = l.extent[last];
    for (;;) {
      int64_t element = low[last], block = low[last] / extent;
      for (int axis = 0; axis < last; ++axis) {
        element += at[axis] * stride[axis];
        block += at[axis] / l.extent[axis] * grid_stride[axis];
      }
      if (!segments) visit(element, high[last] - low[last], block);
      else
        for (int64_t i = low[last]; i < high[last]; i += extent, element += extent, ++block)
          visit(element, extent, block);
      int axis = last - 1;
      while (axis >= 0 && ++at[axis] == high[axis]) {
        at[axis] = low[axis];
        --axis;
      }
      if (axis < 0) return;
    }
  }

  // The same for the blocks themselves: visit(block) for each block of the strip.
  template <class Visit> void walk_blocks(int64_t begin, int64_t end, const Visit& visit) const {
    const int64_t outer = owner == 1 ? grid[0] : 1, inner = grid_stride[owner];
    for (int64_t o = 0; o < outer; ++o)
      for (int64_t b = begin * inner; b < end * inner; ++b)
        visit(o * (owner == 1 ? grid_stride[0] : 0) + b);
  }
};

bool run_strips(const Task& task, int32_t* exponents) {
  const Strips strips(task.layout, task.threads);
  const int64_t shares = (strips.grid[strips.owner] + strips.step - 1) / strips.step;
  const int64_t extent = task.layout.extent[task.layout.dims - 1];
  const bool each = extent == 1, few = extent < kShort;
  return parallel(shares, task.threads, [&](int64_t first, int64_t last) {
    alignas(64) uint32_t buffer[kNoise];
    bool lost = false;
    // Of short blocks: neighbours from `start` on, each with its exponent, until they are a chunk.
    int32_t own[kChunk];
    int64_t start = 0, count = 0;
    const auto finish = [&] {
      const Words words = fill(task.noise, start, count, buffer);
      lost |= task.kernel.columns(task.format, task.rule, task.x + start,
                                  task.out + start * task.item, count, words, own);
      count = 0;
    };
    for (int64_t share = first; share < last; ++share) {
      const int64_t begin = share * strips.step, all = strips.grid[strips.owner];
      const int64_t end = begin + strips.step < all ? begin + strips.step : all;
      // The exponents' places hold the largest magnitudes first.
      uint32_t* most = reinterpret_cast<uint32_t*>(exponents);
      strips.walk_blocks(begin, end, [&](int64_t block) { most[block] = 0; });
      strips.walk(begin, end, !each, [&](int64_t at, int64_t n, int64_t block) {
        if (each) return largest_each(task.x + at, n, most + block);
        const uint32_t here =
            few ? largest_of_few(task.x + at, n) : largest(task.x + at, n).magnitude;
        if (here > most[block]) most[block] = here;
      });
      strips.walk_blocks(begin, end, [&](int64_t block) {
        exponents[block] = shared_exponent(task.format, most[block]);
      });
      if (!few) {
        strips.walk(begin, end, true, [&](int64_t at, int64_t n, int64_t block) {
          for (int64_t done = 0; done < n; done += kChunk) {
            const int64_t here = at + done, part = n - done < kChunk ? n - done : kChunk;
            const Words words = fill(task.noise, here, part, buffer);
            lost |= task.span(here, part, words, {exponents[block], false});
          }
        });
        continue;
      }
      strips.walk(begin, end, !each, [&](int64_t at, int64_t n, int64_t block) {
        for (int64_t done = 0; done < n;) {
          if (count == kChunk || (count && at + done != start + count)) finish();
          if (count == 0) start = at + done;
          const int64_t room = kChunk - count, part = n - done < room ? n - done : room;
          if (each) memcpy(own + count, exponents + block + done, part * sizeof(int32_t));
          else
            for (int64_t i = 0; i < part; ++i) own[count + i] = exponents[block];
          count += part;
          done += part;
        }
      });
      if (count) finish();
    }
    return lost;
  });
}

}  // namespace
