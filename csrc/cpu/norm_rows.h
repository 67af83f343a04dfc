// What the forward and backward norm kernels share: rows made ready, chunks, sums.
#pragma once

#include <stdlib.h>

#include "cpu/dtype.h"
#include "cpu/norm.h"
#include "cpu/vec.h"
#include "math/elementary.h"
#include "math/norm.h"

namespace qirl {
namespace QIRL_ISA {

// Element i of a row goes to virtual lane i % (16 kWays): one accumulator would wait for itself.
template <int kWays>
struct SumWays {
  static constexpr int kBlock = 16 * kWays, kParts = kBlock / kLanes;
  F lanes[kParts] = {};

  QIRL_INLINE void add(int part, F value) { lanes[part] += value; }

  QIRL_INLINE float total() const {
    Sum16 sum;
    for (int p = 0; p < Sum16::kParts; ++p) {
      F ways[kWays];
      for (int w = 0; w < kWays; ++w) ways[w] = lanes[w * Sum16::kParts + p];
      for (int width = kWays / 2; width > 0; width /= 2) {
        for (int w = 0; w < width; ++w) ways[w] += ways[w + width];
      }
      sum.lanes[p] = ways[0];
    }
    return sum.total();
  }
};

// body(i, n, part) for each vector of a row, in blocks of kParts vectors.
template <int kParts, class Body>
QIRL_HD void for_parts(int64_t size, Body body) {
  int64_t i = 0;
  for (; i + kParts * kLanes <= size; i += kParts * kLanes) {
#pragma GCC unroll 16
    for (int part = 0; part < kParts; ++part) body(i + part * kLanes, kLanes, part);
  }
  int part = 0;
  for (; i + kLanes <= size; i += kLanes) body(i, kLanes, part++);
  if (i < size) body(i, (int)(size - i), part);
}

// One sample's rows in float32, as the loops use them: f(gate), 1 + scale, shift (0 if absent).
// Each is padded with zeros to whole vectors. `token` holds one token's values.
class NormScratch {
 public:
  explicit NormScratch(const NormArgs& a) : pitch_((a.width + 15) / 16 * 16) {
    memory_ = (float*)aligned_alloc(64, sizeof(float) * pitch_ * (2 * kNormRows + 1));
    if (memory_ == nullptr) abort();
  }
  ~NormScratch() { free(memory_); }
  NormScratch(const NormScratch&) = delete;
  NormScratch& operator=(const NormScratch&) = delete;

  float* token() const { return memory_; }
  const float* row(bool at_t0, int name) const { return slot(at_t0, name); }

  QIRL_INLINE void prepare(const NormArgs& a, int64_t sample) {
    if (sample == sample_) return;
    sample_ = sample;
    for (int at_t0 = 0; at_t0 < (a.t0 ? 2 : 1); ++at_t0) {
      for (int name = 0; name < kNormRows; ++name) {
        const NormRow& r = a.rows[at_t0][name];
        float* to = slot(at_t0, name);
        r.dtype == kFloat32 ? fill<float>(a, r, sample, name, to)
                            : fill<bf16>(a, r, sample, name, to);
      }
    }
  }

 private:
  QIRL_INLINE float* slot(bool at_t0, int name) const {
    return memory_ + pitch_ * (1 + kNormRows * (at_t0 ? 1 : 0) + name);
  }

  template <class R>
  QIRL_INLINE void fill(const NormArgs& a, const NormRow& r, int64_t sample, int name, float* to) {
    for (int64_t i = 0; i < pitch_; i += kLanes) {
      F v = {};
      const int64_t left = a.width - i, n = left < 0 ? 0 : left < kLanes ? left : kLanes;
      if (r.p && n > 0) v = load_n((const R*)r.p + sample * r.stride + i, (int)n);
      if (name == kGate && a.tanh) v = hyperbolic_tangent<Ops>(v);
      if (name == kScale) v = 1.0f + v;
      store(to + i, first_lanes((int)n, v), false);
    }
  }

  int64_t pitch_, sample_ = -1;
  float* memory_;
};

// Element `at` of an array of T; an absent array stays absent.
template <class T>
QIRL_HD T* element(const void* p, int64_t at) {
  return p ? (T*)p + at : nullptr;
}

QIRL_HD bool token_at_t0(const NormArgs& a, int64_t sample, int64_t token) {
  return a.t0 && a.t0[sample * a.t0_sample + token * a.t0_token] != 0;
}

// body(sample, chunk, first token, token behind the last) for each task.
template <class Body>
QIRL_HD void for_chunks(const NormArgs& a, int64_t begin, int64_t end, Body body) {
  const int64_t per_sample = norm_chunks(a);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t sample = task / per_sample, chunk = task % per_sample;
    const int64_t first = chunk * a.chunk, last = first + a.chunk;
    body(sample, chunk, first, last < a.tokens ? last : a.tokens);
  }
}

}  // namespace QIRL_ISA
}  // namespace qirl
