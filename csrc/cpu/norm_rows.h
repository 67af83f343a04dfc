// What the forward and backward norm kernels share: rows made ready, pairs of vectors, chunks,
// sums.
//
// Rows are walked by pairs of vectors. Where all large tensors are bfloat16 and the width is made
// of whole blocks of 32 (kSplit), a pair's first vector holds the even elements of 2 kLanes and the
// second the odd ones: a shift and a mask take them apart and put them together, where widening and
// narrowing cost three operations each. Scratch rows and sums then lie in that order.
#pragma once

#include <stdlib.h>

#include "cpu/dtype.h"
#include "cpu/norm.h"
#include "cpu/vec.h"
#include "math/elementary.h"
#include "math/norm.h"

namespace qirl {
namespace QIRL_ISA {

constexpr int kPairLanes = 2 * kLanes;
constexpr int kSumBlock = 32;  // elements whose places in a sum do not depend on kLanes

struct Pair {
  F a, b;
};

// body(part of the pair) on both vectors, into a pair.
template <class Body>
QIRL_HD Pair both(Body body) {
  return {body(0), body(1)};
}

QIRL_HD F part_of(const Pair& pair, int which) { return which == 0 ? pair.a : pair.b; }

template <bool kSplit>
QIRL_HD Pair load_whole(const float* p) {
  return {load(p), load(p + kLanes)};
}

template <bool kSplit>
QIRL_HD Pair load_whole(const bf16* p) {
  if (!kSplit) return {load(p), load(p + kLanes)};
  const U bits = (U)load((const float*)p);
  return {(F)(bits << 16), (F)(bits & 0xffff0000u)};
}

template <bool kSplit>
QIRL_HD void store_whole(float* p, const Pair& value, bool stream) {
  store(p, value.a, stream);
  store(p + kLanes, value.b, stream);
}

template <bool kSplit>
QIRL_HD void store_whole(bf16* p, const Pair& value, bool stream) {
  if (!kSplit) {
    store(p, value.a, stream);
    store(p + kLanes, value.b, stream);
    return;
  }
  const U bits = (U)value.a >> 16 | ((U)value.b & 0xffff0000u);
  store((float*)p, (F)bits, stream);
}

// The first n elements at p, zeros behind them; n below kPairLanes only where nothing is split.
template <bool kSplit, class T>
QIRL_HD Pair load_pair(const T* p, int n) {
  if (kSplit || n == kPairLanes) return load_whole<kSplit>(p);
  T padded[kPairLanes] = {};
  for (int i = 0; i < n; ++i) padded[i] = p[i];
  return load_whole<kSplit>(padded);
}

// Stores a pair that round_pair() has made representable.
template <bool kSplit, class T>
QIRL_HD void store_pair(T* p, const Pair& value, int n, bool stream) {
  if (kSplit || n == kPairLanes) return store_whole<kSplit>(p, value, stream);
  T padded[kPairLanes];
  store_whole<kSplit>(padded, value, false);
  for (int i = 0; i < n; ++i) p[i] = padded[i];
}

// Rounded to T, to be stored. A split NaN has a zero low half: it comes from a bfloat16, from a row
// made ready, or is the processor's own, and plain rounding cannot carry it out of the NaNs.
template <bool kSplit, class T>
QIRL_HD Pair round_pair(const T* tag, const Pair& value) {
  return both([&](int k) {
    const F v = part_of(value, k);
    return kSplit ? round_own(tag, v) : round_as(tag, v);
  });
}

// What round_pair() returned, as it reads back.
template <bool kSplit>
QIRL_HD Pair read_back(const Pair& value) {
  if (!kSplit) return value;
  return {(F)((U)value.a & 0xffff0000u), (F)((U)value.b & 0xffff0000u)};
}

// Zeros in the lanes behind the first n elements.
QIRL_HD Pair first_of_pair(const Pair& value, int n) {
  const int of_b = n - kLanes;
  return {first_lanes(n < kLanes ? n : kLanes, value.a), first_lanes(of_b < 0 ? 0 : of_b, value.b)};
}

// Which element of its pair lane l of vector k is.
template <bool kSplit>
QIRL_HD int element_of(int k, int l) {
  return kSplit ? 2 * l + k : k * kLanes + l;
}

// Sums whose order depends on the element's place in the row alone: 16 kWays virtual lanes, kWays
// even; one accumulator would wait for itself.
template <int kWays, bool kSplit>
struct SumWays {
  static constexpr int kBlock = 16 * kWays, kPairs = kBlock / kPairLanes;
  F lanes[kBlock / kLanes] = {};

  // `pair` is the pair's number in its block.
  QIRL_INLINE void add(int pair, const Pair& value) {
    constexpr int kPerSumBlock = kSumBlock / kPairLanes;
    const int base = pair / kPerSumBlock * (2 * kPerSumBlock), r = pair % kPerSumBlock;
    lanes[base + (kSplit ? r : 2 * r)] += value.a;
    lanes[base + (kSplit ? kPerSumBlock + r : 2 * r + 1)] += value.b;
  }

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

// body(i, n, pair) for each pair of a row, in blocks of kPairs.
template <int kPairs, class Body>
QIRL_HD void for_pairs(int64_t size, Body body) {
  int64_t i = 0;
  for (; i + kPairs * kPairLanes <= size; i += kPairs * kPairLanes) {
#pragma GCC unroll 16
    for (int pair = 0; pair < kPairs; ++pair) body(i + pair * kPairLanes, kPairLanes, pair);
  }
  int pair = 0;
  for (; i + kPairLanes <= size; i += kPairLanes) body(i, kPairLanes, pair++);
  if (i < size) body(i, (int)(size - i), pair);
}

// One sample's rows in float32, as the loops use them: f(gate), 1 + scale, shift (0 if absent).
// Each is padded with zeros to whole pairs. `token` holds one token's values.
template <bool kSplit>
class NormScratch {
 public:
  explicit NormScratch(const NormArgs& a) : pitch_((a.width + 31) / 32 * 32) {
    memory_ = (float*)aligned_alloc(64, sizeof(float) * pitch_ * (2 * kNormRows + 1));
    if (memory_ == nullptr) abort();
  }
  ~NormScratch() { free(memory_); }
  NormScratch(const NormScratch&) = delete;
  NormScratch& operator=(const NormScratch&) = delete;

  template <class T>
  T* token() const {
    return (T*)memory_;
  }
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
    for (int64_t i = 0; i < pitch_; i += kPairLanes) {
      float ready[kPairLanes];
      for (int k = 0; k < 2; ++k) {
        F v = {};
        const int64_t at = i + k * kLanes, left = a.width - at;
        const int n = left < 0 ? 0 : left < kLanes ? (int)left : kLanes;
        if (r.p && n > 0) v = load_n((const R*)r.p + sample * r.stride + at, n);
        if (name == kGate && a.tanh) v = hyperbolic_tangent<Ops>(v);
        if (name == kScale) v = 1.0f + v;
        v = select(v == v, v, (F)splat_u(0x7fc00000u));
        store(ready + k * kLanes, first_lanes(n, v), false);
      }
      for (int k = 0; k < 2; ++k) {
        for (int l = 0; l < kLanes; ++l) to[i + k * kLanes + l] = ready[element_of<kSplit>(k, l)];
      }
    }
  }

  int64_t pitch_, sample_ = -1;
  float* memory_;
};

// Asks for a pair's memory ahead of its use; an address behind the array's end is no error.
template <class T>
QIRL_HD void prefetch_pair(const T* p) {
  for (size_t byte = 0; byte < kPairLanes * sizeof(T); byte += 64) {
    __builtin_prefetch((const char*)p + byte);
  }
}

// A scratch row's pair.
QIRL_HD Pair scratch_pair(const float* p) { return {load(p), load(p + kLanes)}; }

// Sums of one chunk, back in the order of the row.
template <bool kSplit>
QIRL_HD void in_row_order(float* sums, int64_t width) {
  if (!kSplit || sums == nullptr) return;
  for (int64_t i = 0; i < width; i += kPairLanes) {
    float ordered[kPairLanes];
    for (int k = 0; k < 2; ++k) {
      for (int l = 0; l < kLanes; ++l) ordered[element_of<true>(k, l)] = sums[i + k * kLanes + l];
    }
    memcpy(sums + i, ordered, sizeof ordered);
  }
}

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

// run.of<T, V, kSplit>(...) for the dtypes of the large tensors (T of x, V of u).
template <class Run>
QIRL_HD void for_dtypes(const NormArgs& a, Run run, int64_t begin, int64_t end) {
  const bool wide_u = a.u != nullptr && a.u_dtype == kFloat32;
  if (a.x_dtype == kFloat32) {
    wide_u || a.u == nullptr ? run.template of<float, float, false>(a, begin, end)
                             : run.template of<float, bf16, false>(a, begin, end);
  } else if (wide_u) {
    run.template of<bf16, float, false>(a, begin, end);
  } else if (a.width % kSumBlock == 0) {
    run.template of<bf16, bf16, true>(a, begin, end);
  } else {
    run.template of<bf16, bf16, false>(a, begin, end);
  }
}

}  // namespace QIRL_ISA
}  // namespace qirl
