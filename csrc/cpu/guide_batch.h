// Rescaled guidance of tokens of 64 elements: one in registers, several together.
#pragma once

#include "cpu/token_factor.h"
#include "cpu/vec.h"

namespace qirl {
namespace QIRL_ISA {

// A span of `size` elements of one row, handed to the loops below.
template <class T>
struct Span {
  const T* c;
  const T* u;
  const T* dy;
  T* out;
  T* out2;
  int64_t size;
  float scale;
  bool stream;
};

// A rescaled token of kShort elements, the width of most models' latents, stays in registers
// between its two passes: the operations and bits of forward_span() and backward_span().
constexpr int kShort = 64, kShortVectors = kShort / kLanes;

template <class T>
QIRL_HD void forward_short(const Span<T>& s) {
  const F w = splat(s.scale);
  F g[kShortVectors];
  Sum16 c2, g2;
#pragma GCC unroll 8
  for (int k = 0; k < kShortVectors; ++k) {
    const F c = load(s.c + k * kLanes);
    g[k] = guide_combine(c, load(s.u + k * kLanes), w);
    c2.add(k, c * c);
    g2.add(k, g[k] * g[k]);
  }
  const float factor = guide_factor(c2.total(), g2.total(), scalar_sqrt);
#pragma GCC unroll 8
  for (int k = 0; k < kShortVectors; ++k) {
    store(s.out + k * kLanes, round_own(s.out, g[k] * factor), s.stream);
  }
}

template <class T>
QIRL_HD void backward_short(const Span<T>& s) {
  const F w = splat(s.scale);
  F c[kShortVectors], g[kShortVectors], dy[kShortVectors];
  Sum16 c2, g2, gdy;
#pragma GCC unroll 8
  for (int k = 0; k < kShortVectors; ++k) {
    c[k] = load(s.c + k * kLanes);
    g[k] = guide_combine(c[k], load(s.u + k * kLanes), w);
    dy[k] = load(s.dy + k * kLanes);
    c2.add(k, c[k] * c[k]);
    g2.add(k, g[k] * g[k]);
    gdy.add(k, g[k] * dy[k]);
  }
  const float factor = guide_factor(c2.total(), g2.total(), scalar_sqrt);
  const float by = guide_grad_k(factor, gdy.total(), g2.total());
  const float m = guide_grad_m(factor, gdy.total(), c2.total());
#pragma GCC unroll 8
  for (int k = 0; k < kShortVectors; ++k) {
    const F dg = factor * dy[k] - by * g[k], dc = w * dg + m * c[k];
    store(s.out + k * kLanes, round_own(s.out, dc), s.stream);
    store(s.out2 + k * kLanes, round_own(s.out2, dg - w * dg), s.stream);
  }
}

#if QIRL_ISA_LEVEL == 2
// Such tokens kBatch at a time: one token's sums, roots and quotient are a chain that the processor
// spends its time waiting for, of several only once.
constexpr int kBatch = 8;

// Sum16's totals of 16 vectors, lane j that of sums[j / 4 + j % 4 * 4]: the same additions.
QIRL_HD F totals(const F sums[16]) {
  F half[8], quarter[4], pair[2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const __m512 a = (__m512)sums[2 * i], b = (__m512)sums[2 * i + 1];
    half[i] = (F)_mm512_shuffle_f32x4(a, b, 0x44) + (F)_mm512_shuffle_f32x4(a, b, 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512 a = (__m512)half[2 * i], b = (__m512)half[2 * i + 1];
    quarter[i] = (F)_mm512_shuffle_f32x4(a, b, 0x88) + (F)_mm512_shuffle_f32x4(a, b, 0xdd);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m512d a = (__m512d)quarter[2 * i], b = (__m512d)quarter[2 * i + 1];
    pair[i] = (F)_mm512_unpacklo_pd(a, b) + (F)_mm512_unpackhi_pd(a, b);
  }
  const __m512 a = (__m512)pair[0], b = (__m512)pair[1];
  return (F)_mm512_shuffle_ps(a, b, 0x88) + (F)_mm512_shuffle_ps(a, b, 0xdd);
}

// Place in totals()' argument of the sum that comes out in lane j.
QIRL_HD int place_of(int j) { return j / 4 + j % 4 * 4; }

typedef float F8 __attribute__((vector_size(32)));

QIRL_HD F8 first_half(F v) { return (F8)_mm512_castps512_ps256((__m512)v); }
QIRL_HD F8 second_half(F v) { return (F8)_mm512_extractf32x8_ps((__m512)v, 1); }
QIRL_HD F8 where_positive(F8 sum, F8 value) { return sum > 0.0f ? value : F8{}; }

// kBackward: adds the products with dy to by_dy.
template <bool kBackward, class T>
QIRL_HD void batch_sums(const Span<T>& s, F g[kBatch][kShortVectors], F norms[16], F by_dy[16]) {
  const F w = splat(s.scale);
#pragma GCC unroll 8
  for (int t = 0; t < kBatch; ++t) {
    Sum16 c2, g2, gdy;
#pragma GCC unroll 4
    for (int k = 0; k < kShortVectors; ++k) {
      const int64_t at = t * kShort + k * kLanes;
      const F c = load(s.c + at);
      g[t][k] = guide_combine(c, load(s.u + at), w);
      c2.add(k, c * c);
      g2.add(k, g[t][k] * g[t][k]);
      if (kBackward) gdy.add(k, g[t][k] * load(s.dy + at));
    }
    norms[place_of(t)] = c2.lanes[0];
    norms[place_of(t + kBatch)] = g2.lanes[0];
    if (kBackward) by_dy[place_of(t)] = gdy.lanes[0];
  }
}

// What scales the tokens of a batch.
struct Factors {
  F8 of_g, by, m;
};

template <bool kBackward>
QIRL_HD Factors batch_factors(const F norms[16], const F by_dy[16]) {
  const F squares = totals(norms), roots = square_root(squares);
  const F8 c2 = first_half(squares), g2 = second_half(squares);
  Factors f{};
  f.of_g = where_positive(g2, first_half(roots) / second_half(roots));
  if (kBackward) {
    const F8 scaled = f.of_g * first_half(totals(by_dy));
    f.by = where_positive(g2, scaled / g2);
    f.m = where_positive(c2, scaled / c2);
  }
  return f;
}

template <class T>
QIRL_HD void forward_batch(const Span<T>& s, const F g[kBatch][kShortVectors], const Factors& f) {
#pragma GCC unroll 8
  for (int t = 0; t < kBatch; ++t) {
#pragma GCC unroll 2
    for (int k = 0; k < kShortVectors; k += 2) {
      T* to = s.out + t * kShort + k * kLanes;
      store_two(to, g[t][k] * f.of_g[t], g[t][k + 1] * f.of_g[t], s.stream);
    }
  }
}

template <class T>
QIRL_HD void backward_batch(const Span<T>& s, const F g[kBatch][kShortVectors], const Factors& f) {
  const F w = splat(s.scale);
#pragma GCC unroll 8
  for (int t = 0; t < kBatch; ++t) {
#pragma GCC unroll 2
    for (int k = 0; k < kShortVectors; k += 2) {
      const int64_t at = t * kShort + k * kLanes;
      F dc[2], du[2];
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        const int64_t i = at + j * kLanes;
        const F dg = f.of_g[t] * load(s.dy + i) - f.by[t] * g[t][k + j];
        dc[j] = w * dg + f.m[t] * load(s.c + i);
        du[j] = dg - w * dg;
      }
      store_two(s.out + at, dc[0], dc[1], s.stream);
      store_two(s.out2 + at, du[0], du[1], s.stream);
    }
  }
}

// The span kBatch tokens behind.
template <class T>
QIRL_HD Span<T> next_batch(Span<T> s) {
  constexpr int kStep = kBatch * kShort;
  s.c += kStep;
  s.u += kStep;
  if (s.dy) s.dy += kStep;
  s.out += kStep;
  if (s.out2) s.out2 += kStep;
  return s;
}

// `count` batches of one row. The next one's sums are taken while this one's factors are on their
// way; not where five float32 arrays come and go: there it took a sixth longer.
template <bool kBackward, class T>
QIRL_HD void batches(Span<T> s, int64_t count) {
  constexpr bool kAhead = !kBackward || sizeof(T) == 2;
  F g[2][kBatch][kShortVectors], norms[16], by_dy[16] = {};
  batch_sums<kBackward>(s, g[0], norms, by_dy);
  for (int64_t b = 0; b < count; ++b) {
    const Factors f = batch_factors<kBackward>(norms, by_dy);
    const Span<T> next = next_batch(s);
    const auto sums_of_next = [&] {
      if (b + 1 < count) batch_sums<kBackward>(next, g[(b + 1) % 2], norms, by_dy);
    };
    if (kAhead) sums_of_next();
    kBackward ? backward_batch(s, g[b % 2], f) : forward_batch(s, g[b % 2], f);
    if (!kAhead) sums_of_next();
    s = next;
  }
}
#else
constexpr int kBatch = 1;

template <bool kBackward, class T>
QIRL_HD void batches(Span<T> s, int64_t) {
  kBackward ? backward_short(s) : forward_short(s);
}
#endif

}  // namespace QIRL_ISA
}  // namespace qirl
