// Philox4x32-10 as a stream of bytes: element i's random bits lie at byte 2 * i (up to 16 bits) or
// 4 * i. `swalp/noise.py` has the definition.
#pragma once
#include "kernels.h"

namespace {

// Words that `fill` may write beyond those asked for: a vector of blocks, and one cut off in front.
constexpr int64_t kPadding = 4 * (Lanes::counters + 1);

constexpr uint32_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;

struct Noise {
  bool used = false;
  int width = 0;      // bits of an element's word: 16 or 32
  int per_block = 0;  // elements of a Philox block
  uint32_t step = 0, call = 0;
  uint64_t key0[10], key1[10];  // of each round, as 64-bit words to broadcast

  explicit Noise(const swalp_rounding& r) {
    used = r.rule == SWALP_STOCHASTIC;
    width = r.bits > 16 ? 32 : 16;
    per_block = 128 / width;
    step = r.step;
    call = r.call;
    uint32_t k0 = static_cast<uint32_t>(r.seed), k1 = static_cast<uint32_t>(r.seed >> 32);
    for (int round = 0; round < 10; ++round) {
      key0[round] = k0;
      key1[round] = k1;
      k0 += 0x9E3779B9;
      k1 += 0xBB67AE85;
    }
  }
};

// The four words of the Philox blocks `low + (high << 32)`, `groups` vectors at a time so that their
// chains of multiplications overlap. Two words of the counter are the same in all lanes: so are half
// the products of the first two rounds.
template <class V, int groups>
inline __attribute__((always_inline)) void philox(const Noise& noise, const typename V::W* low,
                                                  uint32_t high, typename V::W (*c)[4]) {
  using W = typename V::W;
  const W m0 = V::wide(kMultiplier0), m1 = V::wide(kMultiplier1);
  const uint64_t p1 = uint64_t{kMultiplier1} * noise.step;  // round 1
  const uint32_t c0 = static_cast<uint32_t>(p1 >> 32) ^ high ^ static_cast<uint32_t>(noise.key0[0]);
  const uint32_t c1 = static_cast<uint32_t>(p1);
  const uint64_t p0 = uint64_t{kMultiplier0} * c0;  // round 2
  const W first2 = V::wide(noise.call ^ noise.key1[0]);
  const W second0 = V::wide(c1 ^ noise.key0[1]);
  const W second2 = V::wide((p0 >> 32) ^ noise.key1[1]);
  const W third2 = V::wide(static_cast<uint32_t>(p0) ^ noise.key1[2]);
#pragma GCC unroll 4
  for (int g = 0; g < groups; ++g) {
    const W q0 = V::wide_mul(m0, low[g]);
    const W q1 = V::wide_mul(m1, V::wide_xor(V::wide_high(q0), first2));
    c[g][0] = V::wide_xor(V::wide_high(q1), second0);
    c[g][1] = q1;
    c[g][2] = V::wide_xor(q0, second2);
  }
#pragma GCC unroll 4
  for (int g = 0; g < groups; ++g) {
    const W q0 = V::wide_mul(m0, c[g][0]), q1 = V::wide_mul(m1, c[g][2]);
    c[g][0] = V::wide_xor(V::wide_high(q1), c[g][1], V::wide(noise.key0[2]));
    c[g][1] = q1;
    c[g][2] = V::wide_xor(V::wide_high(q0), third2);
    c[g][3] = q0;
  }
#pragma GCC unroll 8
  for (int round = 3; round < 10; ++round) {
    const W k0 = V::wide(noise.key0[round]), k1 = V::wide(noise.key1[round]);
#pragma GCC unroll 4
    for (int g = 0; g < groups; ++g) {
      const W q0 = V::wide_mul(m0, c[g][0]), q1 = V::wide_mul(m1, c[g][2]);
      c[g][0] = V::wide_xor(V::wide_high(q1), c[g][1], k0);
      c[g][1] = q1;
      c[g][2] = V::wide_xor(V::wide_high(q0), c[g][3], k1);
      c[g][3] = q0;
    }
  }
}

// Vectors of Philox blocks that are worked on together: more of them hide the multiplications'
// latency, fewer fit plain registers.
constexpr int kGroups = Lanes::N > 1 ? 4 : 1;

template <class V, int groups>
inline __attribute__((always_inline)) void fill_groups(const Noise& noise, uint64_t block,
                                                       uint32_t* out) {
  using W = typename V::W;
  const uint32_t high = static_cast<uint32_t>(block >> 32);
  W low[groups], c[groups][4];
#pragma GCC unroll 4
  for (int g = 0; g < groups; ++g) low[g] = V::wide_counters(block + g * V::counters);
  philox<V, groups>(noise, low, high, c);
#pragma GCC unroll 4
  for (int g = 0; g < groups; ++g)
    V::store_words(out + 4 * g * V::counters, c[g][0], c[g][1], c[g][2], c[g][3]);
}

// Writes the Philox blocks first .. first + count - 1, rounded up to a multiple of Lanes::counters.
template <class V> void fill_blocks(const Noise& noise, uint64_t first, int64_t count, uint32_t* out) {
  constexpr int many = kGroups * V::counters;
  int64_t done = 0;
  // The upper word of the counter must be the same in all lanes.
  const bool crosses = (first >> 32) != ((first + static_cast<uint64_t>(count) + many) >> 32);
  if (!crosses) {
    for (; done + many <= count; done += many)
      fill_groups<V, kGroups>(noise, first + done, out + 4 * done);
    for (; done < count; done += V::counters)
      fill_groups<V, 1>(noise, first + done, out + 4 * done);
    return;
  }
  for (; done < count; ++done) {  // once in 2**34 elements: one block in all lanes
    const uint64_t block = first + static_cast<uint64_t>(done);
    typename V::W low[1] = {V::wide(block)}, c[1][4];
    uint32_t words[4 * V::counters];
    philox<V, 1>(noise, low, static_cast<uint32_t>(block >> 32), c);
    V::store_words(words, c[0][0], c[0][1], c[0][2], c[0][3]);
    for (int w = 0; w < 4; ++w) out[4 * done + w] = words[w];
  }
}

// The noise of the elements start .. start + count - 1, somewhere in `buffer`.
//
// `buffer` holds count * width / 32 words, and kPadding more.
const void* fill(const Noise& noise, int64_t start, int64_t count, uint32_t* buffer) {
  const int64_t first = start / noise.per_block, skip = start % noise.per_block;
  const int64_t blocks = (skip + count + noise.per_block - 1) / noise.per_block;
  fill_blocks<Lanes>(noise, static_cast<uint64_t>(first), blocks, buffer);
  return reinterpret_cast<const char*>(buffer) + skip * (noise.width / 8);
}

// The same transposed, for memory whose fastest axis is not the fastest of the row-major index:
// out[p * row + c] is the noise of element start + c * stride + p, p < positions, c < channels.
//
// Fast: start, stride and positions are multiples of per_block, so that a lane can run the Philox
// blocks of a channel and nothing need be shuffled. Writes up to the next multiple of N channels.
template <class V, class Word>
void fill_lanes(const Noise& noise, int64_t start, int64_t stride, int64_t positions,
                int64_t channels, int64_t row, Word* out) {
  using W = typename V::W;
  const int per_block = 16 / sizeof(Word);
  const uint64_t first = start / per_block, step = stride / per_block;
  for (int64_t p = 0; p < positions; p += per_block)
    for (int64_t c = 0; c < channels; c += V::N) {
      const uint64_t block = first + p / per_block + c * step;
      const W low[2] = {V::wide_even(block, step), V::wide_even(block + step, step)};
      W words[2][4];
      philox<V, 2>(noise, low, static_cast<uint32_t>(block >> 32), words);
      for (int w = 0; w < 4; ++w) {
        const typename V::I both = V::zip(words[0][w], words[1][w]);
        if constexpr (sizeof(Word) == 4) {
          V::store(reinterpret_cast<float*>(out) + (p + w) * row + c, V::floats(both));
        } else {
          int16_t* at = reinterpret_cast<int16_t*>(out) + (p + 2 * w) * row + c;
          V::store(at, both);
          V::store(at + row, V::template right_unsigned<16>(both));
        }
      }
    }
}

// out[p * row + c] = in[c * stride + p], eight positions at a time so that the rows written to stay
// in the nearest cache.
template <class Word>
void transpose(const Word* in, int64_t stride, int64_t positions, int64_t channels, int64_t row,
               Word* out) {
  int64_t p = 0;
  for (; p + 8 <= positions; p += 8)
    for (int64_t c = 0; c < channels; ++c)
      for (int k = 0; k < 8; ++k) out[(p + k) * row + c] = in[c * stride + p + k];
  for (; p < positions; ++p)
    for (int64_t c = 0; c < channels; ++c) out[p * row + c] = in[c * stride + p];
}

// General: contiguous noise, copied to its places. `scratch`: channels * (positions + 2 * per_block)
// elements, and kPadding words.
template <class Word>
void fill_scattered(const Noise& noise, int64_t start, int64_t stride, int64_t positions,
                    int64_t channels, int64_t row, Word* out, uint32_t* scratch) {
  if (positions == stride) {  // whole channels: one stretch
    const Word* in = static_cast<const Word*>(fill(noise, start, channels * positions, scratch));
    return transpose(in, positions, positions, channels, row, out);
  }
  for (int64_t c = 0; c < channels; ++c) {
    const Word* in = static_cast<const Word*>(fill(noise, start + c * stride, positions, scratch));
    transpose(in, 0, positions, 1, row, out + c);
  }
}

template <class Word>
void fill_transposed(const Noise& noise, int64_t start, int64_t stride, int64_t positions,
                     int64_t channels, int64_t row, Word* out, uint32_t* scratch) {
  if constexpr (Lanes::N > 1) {
    const int per_block = noise.per_block;
    const uint64_t last = static_cast<uint64_t>(start + (channels + Lanes::N) * stride) / per_block;
    const bool aligned = start % per_block == 0 && stride % per_block == 0 && positions % per_block == 0;
    if (aligned && channels >= Lanes::N / 2 && last >> 32 == 0)
      return fill_lanes<Lanes>(noise, start, stride, positions, channels, row, out);
  }
  fill_scattered(noise, start, stride, positions, channels, row, out, scratch);
}

}  // namespace
