// Philox4x32-10 as a stream of bytes: the upper 16 random bits of element i lie at byte 2 * i. The
// lower 16, which are rarely wanted, come one by one. `swalp/noise.py` has the definition.
#pragma once
#include "kernels.h"
#include "parallel.h"

namespace {

// Words that `fill` may write beyond those asked for: a vector of blocks, and one cut off in front.
constexpr int64_t kPadding = 4 * (Lanes::counters + 1);

constexpr int kPerBlock = 8;  // elements of a Philox block
constexpr uint64_t kLower = uint64_t{1} << 63;  // in the number of a block, of its elements' lower bits

constexpr uint32_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;

struct Noise {
  bool used = false;
  uint32_t step = 0, call = 0;
  uint64_t key0[10], key1[10];  // of each round, as 64-bit words to broadcast
  // key0 of even rounds, key1 of odd ones: of this round above, of the next below
  uint64_t both[10];

  explicit Noise(const swalp_rounding& r) {
    used = r.rule == SWALP_STOCHASTIC;
    step = r.step;
    call = r.call;
    uint32_t k0 = static_cast<uint32_t>(r.seed), k1 = static_cast<uint32_t>(r.seed >> 32);
    for (int round = 0; round < 10; ++round) {
      key0[round] = k0;
      key1[round] = k1;
      k0 += 0x9E3779B9;
      k1 += 0xBB67AE85;
      both[round] = round % 2 ? key1[round] << 32 | k1 : key0[round] << 32 | k0;
    }
    both[9] = key1[9] << 32;
  }
};

// What the first rounds of blocks have in common whose numbers have the upper word `high`: two words of the
// counter are the same for all, and so are half the products of the first two rounds.
struct Start {
  uint64_t first2, second0, second2, third2;

  Start(const Noise& noise, uint32_t high) {
    const uint64_t p1 = uint64_t{kMultiplier1} * noise.step;  // round 1
    const uint64_t p0 = kMultiplier0 * ((p1 >> 32) ^ high ^ noise.key0[0]);  // round 2
    first2 = noise.call ^ noise.key1[0];
    second0 = static_cast<uint32_t>(p1) ^ noise.key0[1];
    second2 = (p0 >> 32) ^ noise.key1[1];
    third2 = static_cast<uint32_t>(p0) ^ (Lanes::xors_three ? 0 : noise.key1[2]);
  }

  // Instructions can take them from there: in 16 registers they would push out the words worked on.
  void stay_in_memory() const { __asm__ volatile("" : : "r"(this) : "memory"); }
};

// The four words of Philox blocks after so many rounds, `groups` vectors at a time so that their chains of
// multiplications overlap. `first`: kMultiplier0 times the lower words of their numbers.
template <class V, int groups, int rounds>
inline __attribute__((always_inline)) void philox(const Noise& noise, const Start& start,
                                                  const typename V::W* first, typename V::W (*c)[4]) {
  using W = typename V::W;
  const W m0 = V::wide(kMultiplier0), m1 = V::wide(kMultiplier1);
#pragma GCC unroll 4
  for (int g = 0; g < groups; ++g) {
    const W q1 = V::wide_mul(m1, V::wide_xor(V::wide_high(first[g]), V::wide(start.first2)));
    c[g][0] = V::wide_xor(V::wide_high(q1), V::wide(start.second0));
    c[g][1] = q1;
    c[g][2] = V::wide_xor(first[g], V::wide(start.second2));
    c[g][3] = V::wide(start.third2);
  }
#pragma GCC unroll 8
  for (int round = 2; round < rounds; ++round) {
#pragma GCC unroll 4
    for (int g = 0; g < groups; ++g) {
      W q0 = V::wide_mul(m0, c[g][0]), q1 = V::wide_mul(m1, c[g][2]);
      if constexpr (V::xors_three) {
        c[g][0] = V::wide_xor(V::wide_high(q1), c[g][1], V::wide(noise.key0[round]));
        c[g][2] = V::wide_xor(V::wide_high(q0), c[g][3], V::wide(noise.key1[round]));
      } else {
        // The upper half of a product meets this round's key, the lower the next one's: both at once, every
        // other round.
        W& keyed = round % 2 ? q0 : q1;
        keyed = V::wide_xor(keyed, V::wide(noise.both[round]));
        c[g][0] = V::wide_xor(V::wide_high(q1), c[g][1]);
        c[g][2] = V::wide_xor(V::wide_high(q0), c[g][3]);
      }
      c[g][1] = q1;
      c[g][3] = q0;
    }
  }
}

// The blocks of a vector whose words after nine rounds are c.
template <class V>
inline __attribute__((always_inline)) void store_last(const Noise& noise, const typename V::W (&c)[4], uint32_t* out) {
  const auto q0 = V::wide_mul(V::wide(kMultiplier0), c[0]), q1 = V::wide_mul(V::wide(kMultiplier1), c[2]);
  const auto key0 = V::wide(V::xors_three ? noise.key0[9] : 0);  // or c[1] has it
  V::store_pairs(out, V::pair(q1, c[1], key0), V::pair(q0, c[3], V::wide(noise.key1[9])));
}

// Vectors of Philox blocks that are worked on together: more of them hide the multiplications'
// latency, fewer fit the registers.
constexpr int kGroups = Lanes::N > 8 ? 4 : Lanes::N > 1 ? 3 : 1;

// Of blocks that follow each other `product` is kMultiplier0 times the numbers of the first vector, and then of
// the vector after these groups.
template <class V, int groups>
inline __attribute__((always_inline)) void fill_groups(const Noise& noise, const Start& start,
                                                       typename V::W& product, uint32_t* out) {
  using W = typename V::W;
  constexpr uint64_t further = uint64_t{kMultiplier0} * V::counters;
  W first[groups], c[groups][4];
#pragma GCC unroll 4
  for (int g = 0; g < groups; ++g) {
    first[g] = product;
    product = V::wide_add(product, V::wide(further));
  }
  philox<V, groups, 9>(noise, start, first, c);
#pragma GCC unroll 4
  for (int g = 0; g < groups; ++g)
    store_last<V>(noise, c[g], out + 4 * g * V::counters);
}

// Writes the Philox blocks first .. first + count - 1, rounded up to a multiple of Lanes::counters. That waits
// for no memory: meanwhile as many elements from `coming` on are asked for, if it is not null.
template <class V>
void fill_blocks(const Noise& noise, uint64_t first, int64_t count, uint32_t* out, const float* coming = nullptr) {
  using W = typename V::W;
  constexpr int many = kGroups * V::counters;
  const W m0 = V::wide(kMultiplier0);
  int64_t done = 0;
  // The upper word of the counter must be the same in all lanes.
  const bool crosses = (first >> 32) != ((first + static_cast<uint64_t>(count) + many) >> 32);
  if (!crosses) {
    const Start start(noise, static_cast<uint32_t>(first >> 32));
    if (V::counters < 8) start.stay_in_memory();
    W product = V::wide_mul(m0, V::wide_counters(first));
    for (; done + many <= count; done += many) {
      if (coming) fetch(coming + kPerBlock * done, kPerBlock * many);
      fill_groups<V, kGroups>(noise, start, product, out + 4 * done);
    }
    if (coming) fetch(coming + kPerBlock * done, kPerBlock * (count - done));
    for (; kGroups > 2 && done + 2 * V::counters <= count; done += 2 * V::counters)
      fill_groups<V, 2>(noise, start, product, out + 4 * done);
    for (; done < count; done += V::counters)
      fill_groups<V, 1>(noise, start, product, out + 4 * done);
    return;
  }
  for (; done < count; ++done) {  // once in 2**34 elements: one block in all lanes
    const uint64_t block = first + static_cast<uint64_t>(done);
    const W product[1] = {V::wide_mul(m0, V::wide(block))};
    W c[1][4];
    uint32_t words[4 * V::counters];
    philox<V, 1, 9>(noise, Start(noise, static_cast<uint32_t>(block >> 32)), product, c);
    store_last<V>(noise, c[0], words);
    for (int w = 0; w < 4; ++w) out[4 * done + w] = words[w];
  }
}

// The lower 16 random bits of an element: what `fill_blocks` would write for its block.
inline __attribute__((always_inline)) uint32_t lower_half(const Noise& noise, int64_t element) {
  const uint64_t block = static_cast<uint64_t>(element / kPerBlock) | kLower;
  uint64_t c[4] = {static_cast<uint32_t>(block), block >> 32, noise.step, noise.call};
#pragma GCC unroll 1
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = kMultiplier0 * c[0], p1 = kMultiplier1 * c[2];
    c[0] = (p1 >> 32) ^ c[1] ^ noise.key0[round];
    c[1] = static_cast<uint32_t>(p1);
    c[2] = (p0 >> 32) ^ c[3] ^ noise.key1[round];
    c[3] = static_cast<uint32_t>(p0);
  }
  const int place = static_cast<int>(element % kPerBlock);
  return static_cast<uint32_t>(c[place / 2] >> 16 * (place % 2)) & 0xffff;
}

// The random bits of elements that are neighbours in memory.
struct Words {
  const uint16_t* upper = nullptr;  // the upper bits
  const Noise* noise = nullptr;
  int64_t first = 0;                // row-major index of the element of upper[0]
  // If not 0, upper[p * row + c] is of the element first + c * stride + p.
  int64_t row = 0, stride = 0;
  int64_t at = 0;                   // where the elements of interest begin

  int64_t element(int64_t i) const {
    return row ? first + i % row * stride + i / row : first + i;
  }
  Words from(int64_t i) const {
    Words moved = *this;
    moved.at += i;
    return moved;
  }
};

// The noise of the elements start .. start + count - 1, somewhere in `buffer`, which holds count / 2
// words, and kPadding more. Nothing if none is used. As many elements from `coming` on are asked for.
Words fill(const Noise& noise, int64_t start, int64_t count, uint32_t* buffer, uint64_t part = 0,
           const float* coming = nullptr) {
  if (!noise.used) {
    if (coming) fetch(coming, count);
    return {};
  }
  const int64_t first = start / kPerBlock, skip = start % kPerBlock;
  const int64_t blocks = (skip + count + kPerBlock - 1) / kPerBlock;
  fill_blocks<Lanes>(noise, static_cast<uint64_t>(first) | part, blocks, buffer, coming);
  return {reinterpret_cast<const uint16_t*>(buffer) + skip, &noise, start};
}

// The same transposed, for memory whose fastest axis is not the fastest of the row-major index:
// out[p * row + c] is the noise of element start + c * stride + p, p < positions, c < channels.
//
// Fast: start, stride and positions are multiples of kPerBlock, so that a lane can run the Philox
// blocks of a channel and nothing need be shuffled. Writes up to the next multiple of N channels.
template <class V>
void fill_lanes(const Noise& noise, int64_t start, int64_t stride, int64_t positions,
                int64_t channels, int64_t row, uint16_t* out) {
  using W = typename V::W;
  const uint64_t first = start / kPerBlock, step = stride / kPerBlock;
  const W m0 = V::wide(kMultiplier0);
  const Start begun(noise, static_cast<uint32_t>(first >> 32));
  for (int64_t p = 0; p < positions; p += kPerBlock)
    for (int64_t c = 0; c < channels; c += V::N) {
      const uint64_t block = first + p / kPerBlock + c * step;
      const W products[2] = {V::wide_mul(m0, V::wide_even(block, step)),
                             V::wide_mul(m0, V::wide_even(block + step, step))};
      W words[2][4];
      philox<V, 2, 10>(noise, begun, products, words);
      for (int w = 0; w < 4; ++w) {
        const typename V::I both = V::zip(words[0][w], words[1][w]);
        int16_t* at = reinterpret_cast<int16_t*>(out) + (p + 2 * w) * row + c;
        V::store(at, both);
        V::store(at + row, V::template right_unsigned<16>(both));
      }
    }
}

// out[p * row + c] = in[c * stride + p], eight positions at a time so that the rows written to stay
// in the nearest cache.
void transpose(const uint16_t* in, int64_t stride, int64_t positions, int64_t channels, int64_t row,
               uint16_t* out) {
  int64_t p = 0;
  for (; p + 8 <= positions; p += 8)
    for (int64_t c = 0; c < channels; ++c)
      for (int k = 0; k < 8; ++k) out[(p + k) * row + c] = in[c * stride + p + k];
  for (; p < positions; ++p)
    for (int64_t c = 0; c < channels; ++c) out[p * row + c] = in[c * stride + p];
}

// General: contiguous noise, copied to its places. `scratch`: channels * positions + 2 * kPerBlock
// elements, and kPadding words.
void fill_scattered(const Noise& noise, int64_t start, int64_t stride, int64_t positions,
                    int64_t channels, int64_t row, uint16_t* out, uint32_t* scratch) {
  if (positions == stride) {  // whole channels: one stretch
    const Words in = fill(noise, start, channels * positions, scratch);
    return transpose(in.upper, positions, positions, channels, row, out);
  }
  for (int64_t c = 0; c < channels; ++c)
    transpose(fill(noise, start + c * stride, positions, scratch).upper, 0, positions, 1, row, out + c);
}

Words fill_transposed(const Noise& noise, int64_t start, int64_t stride, int64_t positions,
                      int64_t channels, int64_t row, uint16_t* out, uint32_t* scratch) {
  const Words words = {out, &noise, start, row, stride};
  if constexpr (Lanes::N > 1) {
    const uint64_t last = static_cast<uint64_t>(start + (channels + Lanes::N) * stride) / kPerBlock;
    const bool aligned = start % kPerBlock == 0 && stride % kPerBlock == 0 && positions % kPerBlock == 0;
    if (aligned && channels >= Lanes::N / 2 && last >> 32 == 0) {
      fill_lanes<Lanes>(noise, start, stride, positions, channels, row, out);
      return words;
    }
  }
  fill_scattered(noise, start, stride, positions, channels, row, out, scratch);
  return words;
}

}  // namespace
