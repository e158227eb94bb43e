// Stochastic gradient descent on convex problems: many steps of one trajectory in one call.
//
// Equal to src/swalp/lab/definition.py bit for bit: its order of operations, nothing fused. Loops over
// 16 lanes are written so that a compiler turns them into vectors without changing any order.
#pragma once
#include "optim.h"

namespace {

constexpr int kSums = 16;  // partial sums of an inner product; lanes that classes are padded to

// The iterate's way from one step to the next: rounding, and the sums of the iterates taken.
class Descent {
 public:
  const int64_t n;

  explicit Descent(const swalp_descent& given)
      : n(given.size), d(given), given_role(given.role ? *given.role : swalp_role{}),
        role(given_role, SWALP_FLOAT32), noise(given_role.rounding), t(given.step) {}

  // `moved`, rounded with the noise of the next step, becomes the iterate.
  void keep(const float* moved) {
    ++t;
    float* const w = d.weight;
    if (d.role) {
      noise.step = static_cast<uint32_t>(t);
      const Scale scale = role.format.blocked ? scale_of(role.format, largest(moved, n)) : Scale{};
      alignas(64) uint32_t buffer[kNoise];
      for (int64_t at = 0; at < n; at += kChunk) {
        const int64_t count = n - at < kChunk ? n - at : kChunk;
        const Words words = fill(noise, at, count, buffer);
        role.kernel.span(role.format, role.rule, moved + at, w + at, count, words, scale);
      }
    } else {
      for (int64_t k = 0; k < n; ++k) w[k] = moved[k];
    }
    if (t <= d.start || (t - d.start) % d.every) return;
    for (int64_t k = 0; k < n; ++k) d.sum[k] += static_cast<double>(w[k]);
    if (!d.squares) return;
    for (int64_t k = 0; k < n; ++k) {
      const double v = w[k];
      d.squares[k] += v * v;
    }
  }

  uint32_t next() const { return static_cast<uint32_t>(t + 1); }
  const float* weight() const { return d.weight; }

 private:
  const swalp_descent& d;
  const swalp_role given_role;  // which `role` refers to
  const Role role;
  Noise noise;
  int64_t t;
};

float inner(const float* a, const float* b, int64_t n) {
  float sums[kSums] = {};
  int64_t k = 0;
  for (; k + kSums <= n; k += kSums)
    for (int lane = 0; lane < kSums; ++lane) sums[lane] += a[k + lane] * b[k + lane];
  for (int lane = 0; k + lane < n; ++lane) sums[lane] += a[k + lane] * b[k + lane];
  for (int half = kSums / 2; half; half /= 2)
    for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  return sums[0];
}

int least_squares(const swalp_descent* given, float rate, const float* x, const float* y,
                  const int64_t* rows, int64_t steps) {
  const DefaultMode mode;
  Descent descent(*given);
  const int64_t n = descent.n;
  float* const moved = static_cast<float*>(malloc(n * sizeof(float)));
  if (!moved) return -1;
  for (int64_t i = 0; i < steps; ++i) {
    const float* const row = x + rows[i] * n;
    const float* const w = descent.weight();
    const float c = rate * (inner(row, w, n) - y[rows[i]]);
    for (int64_t k = 0; k < n; ++k) moved[k] = w[k] - c * row[k];
    descent.keep(moved);
  }
  free(moved);
  return 0;
}

// exp of `kSums` numbers that are not positive; `definition.exp` explains it.
void exponentials(float* x) {
  constexpr float taylor[] = {1.0f / 5040, 1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  for (int lane = 0; lane < kSums; ++lane) {
    const float v = x[lane] > -87.0f ? x[lane] : -87.0f;
    constexpr float to_integer = 12582912.0f;  // 1.5 * 2**23: adding it rounds to nearest even
    const float n = (v * 1.4426950408889634f + to_integer) - to_integer;
    const float r = (v - n * 0.693359375f) - n * -2.12194440e-4f;
    float value = taylor[0];
    for (int k = 1; k < 8; ++k) value = value * r + taylor[k];
    const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
    float power;
    __builtin_memcpy(&power, &bits, 4);
    x[lane] = value * power;
  }
}

// Examples as their nonzero features: a product with 0 changes no sum here, as weights and errors are
// finite and no sum is -0. Rows of W, of the gradient and of logits are padded to whole strips of
// kSums classes, whose weights and errors are 0.
int softmax(const swalp_descent* given, const swalp_softmax* problem, float rate,
            const int64_t* rows, int64_t steps) {
  const DefaultMode mode;
  const swalp_softmax& p = *problem;
  Descent descent(*given);
  const int64_t features = p.features, classes = p.classes;
  const int64_t wide = (classes + kSums - 1) / kSums * kSums;
  const int64_t padded = features * wide;
  float* const scratch =
      static_cast<float*>(malloc((2 * padded + wide + features * classes) * sizeof(float)));
  if (!scratch) return -1;
  float *const w = scratch, *const gradient = w + padded, *const logits = gradient + padded;
  float* const moved = logits + wide;
  const float share = 1.0f / static_cast<float>(p.batch);
  for (int64_t k = 0; k < padded; ++k) w[k] = 0;
  for (int64_t i = 0; i < steps; ++i) {
    const float* const kept = descent.weight();
    for (int64_t k = 0; k < features; ++k)
      for (int64_t c = 0; c < classes; ++c) w[k * wide + c] = kept[k * classes + c];
    for (int64_t k = 0; k < padded; ++k) gradient[k] = 0;
    for (int64_t b = 0; b < p.batch; ++b) {
      const int64_t row = rows[i * p.batch + b], begin = p.offsets[row], end = p.offsets[row + 1];
      for (int64_t strip = 0; strip < wide; strip += kSums) {
        float sums[kSums] = {};
        for (int64_t k = begin; k < end; ++k) {
          const float v = p.values[k];
          const float* const from = w + p.columns[k] * wide + strip;
          for (int lane = 0; lane < kSums; ++lane) sums[lane] += v * from[lane];
        }
        for (int lane = 0; lane < kSums; ++lane) logits[strip + lane] = sums[lane];
      }
      float most = logits[0];
      for (int64_t c = 1; c < classes; ++c) most = logits[c] > most ? logits[c] : most;
      for (int64_t c = 0; c < wide; ++c) logits[c] -= most;
      for (int64_t strip = 0; strip < wide; strip += kSums) exponentials(logits + strip);
      float total = 0;
      for (int64_t c = 0; c < classes; ++c) total += logits[c];
      for (int64_t c = 0; c < classes; ++c) logits[c] /= total;
      for (int64_t c = classes; c < wide; ++c) logits[c] = 0;
      logits[p.labels[row]] -= 1.0f;
      for (int64_t strip = 0; strip < wide; strip += kSums) {
        float error[kSums];
        for (int lane = 0; lane < kSums; ++lane) error[lane] = logits[strip + lane];
        for (int64_t k = begin; k < end; ++k) {
          const float v = p.values[k];
          float* const to = gradient + p.columns[k] * wide + strip;
          for (int lane = 0; lane < kSums; ++lane) to[lane] += v * error[lane];
        }
      }
    }
    for (int64_t k = 0; k < features; ++k)
      for (int64_t c = 0; c < classes; ++c) {
        const float g = gradient[k * wide + c] * share + p.l2 * w[k * wide + c];
        moved[k * classes + c] = w[k * wide + c] - rate * g;
      }
    descent.keep(moved);
  }
  free(scratch);
  return 0;
}

int scalars(const swalp_descent* given, float rate, int skewed, const swalp_rounding* draws,
            const float* table, int64_t steps) {
  const DefaultMode mode;
  Descent descent(*given);
  const int64_t n = descent.n;
  const size_t words = static_cast<size_t>(n / 2 + kPadding + 8);
  float* const moved = static_cast<float*>(malloc(n * sizeof(float) + words * sizeof(uint32_t)));
  if (!moved) return -1;
  uint32_t* const buffer = reinterpret_cast<uint32_t*>(moved + n);
  Noise noise(*draws);
  for (int64_t i = 0; i < steps; ++i) {
    noise.step = descent.next();
    const uint16_t* const drawn = fill(noise, 0, n, buffer).upper;
    const float* const w = descent.weight();
    for (int64_t k = 0; k < n; ++k) moved[k] = table[drawn[k]];
    if (skewed)
      for (int64_t k = 0; k < n; ++k) {
        const float square = w[k] * w[k];
        moved[k] = w[k] - rate * ((w[k] + square / (1.0f + square)) + moved[k]);
      }
    else
      for (int64_t k = 0; k < n; ++k) moved[k] = w[k] - rate * (w[k] + moved[k]);
    descent.keep(moved);
  }
  free(moved);
  return 0;
}

}  // namespace
