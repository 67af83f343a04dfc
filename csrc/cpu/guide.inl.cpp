// guide: classifier-free guidance with optional norm rescale, forward and backward.
#include "cpu/guide.h"

#include "cpu/dtype.h"
#include "cpu/token_factor.h"

namespace qirl {
namespace QIRL_ISA {
namespace {

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

// The span of `unit` elements (fewer at the end of the row) that begins at `start`.
template <class T>
QIRL_HD Span<T> span_of(const GuideArgs& a, int64_t row, int64_t start, int64_t unit) {
  const int64_t left = a.row_size - start, at = row * a.row_size + start;
  Span<T> s;
  s.c = (const T*)a.c + row * a.c_stride + start;
  s.u = (const T*)a.u + row * a.u_stride + start;
  s.dy = a.dy ? (const T*)a.dy + row * a.dy_stride + start : nullptr;
  s.out = (T*)a.out + at;
  s.out2 = a.out2 ? (T*)a.out2 + at : nullptr;
  s.size = left < unit ? left : unit;
  s.scale = a.scale_B[row];
  s.stream = a.stream;
  return s;
}

template <class T>
QIRL_HD void forward_span(const Span<T>& s, bool rescale) {
  const F w = splat(s.scale);
  const float factor = rescale ? token_factor(s.c, s.u, s.size, w) : 1.0f;
  for_vectors(s.size, [&](int64_t i, int n) {
    F y = guide_combine(load_n(s.c + i, n), load_n(s.u + i, n), w);
    if (rescale) y *= factor;
    store_n(s.out + i, round_as(s.out, y), n, s.stream);
  });
}

// dg = f dy - k g;  dc = w dg + m c;  du = dg - w dg.
template <class T>
QIRL_HD void backward_span(const Span<T>& s, bool rescale) {
  const F w = splat(s.scale);
  float factor = 1.0f, k = 0.0f, m = 0.0f;
  if (rescale) {
    Sum16 c2, g2, gdy;
    for_vectors(s.size, [&](int64_t i, int n) {
      const F c = load_n(s.c + i, n), g = guide_combine(c, load_n(s.u + i, n), w);
      c2.add(i / kLanes, c * c);
      g2.add(i / kLanes, g * g);
      gdy.add(i / kLanes, g * load_n(s.dy + i, n));
    });
    factor = guide_factor(c2.total(), g2.total(), scalar_sqrt);
    k = guide_grad_k(factor, gdy.total(), g2.total());
    m = guide_grad_m(factor, gdy.total(), c2.total());
  }
  for_vectors(s.size, [&](int64_t i, int n) {
    F dg = load_n(s.dy + i, n), dc = w * dg;
    if (rescale) {
      const F c = load_n(s.c + i, n);
      dg = factor * dg - k * guide_combine(c, load_n(s.u + i, n), w);
      dc = w * dg + m * c;
    }
    store_n(s.out + i, round_as(s.out, dc), n, s.stream);
    store_n(s.out2 + i, round_as(s.out2, dg - w * dg), n, s.stream);
  });
}

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

template <class T>
QIRL_HD void forward_batch(const Span<T>& s) {
  F g[kBatch][kShortVectors], norms[16];
  batch_sums<false>(s, g, norms, nullptr);
  const F squares = totals(norms), roots = square_root(squares);
  const F8 factors = where_positive(second_half(squares), first_half(roots) / second_half(roots));
#pragma GCC unroll 8
  for (int t = 0; t < kBatch; ++t) {
#pragma GCC unroll 4
    for (int k = 0; k < kShortVectors; ++k) {
      T* to = s.out + t * kShort + k * kLanes;
      store(to, round_own(to, g[t][k] * factors[t]), s.stream);
    }
  }
}

template <class T>
QIRL_HD void backward_batch(const Span<T>& s) {
  const F w = splat(s.scale);
  F g[kBatch][kShortVectors], norms[16], by_dy[16] = {};
  batch_sums<true>(s, g, norms, by_dy);
  const F squares = totals(norms), roots = square_root(squares);
  const F8 c2 = first_half(squares), g2 = second_half(squares);
  const F8 factors = where_positive(g2, first_half(roots) / second_half(roots));
  const F8 scaled = factors * first_half(totals(by_dy));
  const F8 by = where_positive(g2, scaled / g2), m = where_positive(c2, scaled / c2);
#pragma GCC unroll 8
  for (int t = 0; t < kBatch; ++t) {
#pragma GCC unroll 4
    for (int k = 0; k < kShortVectors; ++k) {
      const int64_t at = t * kShort + k * kLanes;
      const F dg = factors[t] * load(s.dy + at) - by[t] * g[t][k];
      store(s.out + at, round_own(s.out, w * dg + m[t] * load(s.c + at)), s.stream);
      store(s.out2 + at, round_own(s.out2, dg - w * dg), s.stream);
    }
  }
}
#else
constexpr int kBatch = 1;

template <class T>
QIRL_HD void forward_batch(const Span<T>& s) {
  forward_short(s);
}

template <class T>
QIRL_HD void backward_batch(const Span<T>& s) {
  backward_short(s);
}
#endif

template <class T>
QIRL_HD void all_spans(const GuideArgs& a, int64_t begin, int64_t end, bool backward) {
  const int64_t unit = a.rescale ? a.width : kGuideBlock;
  const int64_t per_row = (a.row_size + unit - 1) / unit;
  const bool in_registers = a.rescale && a.width == kShort && kShortVectors <= 8;
  int64_t row = begin / per_row, start = (begin % per_row) * unit;
  int64_t taken = 1;
  for (int64_t task = begin; task < end; task += taken) {
    const Span<T> s = span_of<T>(a, row, start, unit);
    taken = 1;
    if (!in_registers) {
      backward ? backward_span(s, a.rescale) : forward_span(s, a.rescale);
    } else if (task + kBatch <= end && start + kBatch * kShort <= a.row_size) {
      taken = kBatch;
      backward ? backward_batch(s) : forward_batch(s);
    } else {
      backward ? backward_short(s) : forward_short(s);
    }
    start += taken * unit;
    if (start >= a.row_size) {
      start = 0;
      ++row;
    }
  }
  if (a.stream) stream_fence();
}

}  // namespace

const char* guide(const void* args, int64_t begin, int64_t end) {
  const GuideArgs& a = *(const GuideArgs*)args;
  a.dtype == kFloat32 ? all_spans<float>(a, begin, end, false)
                      : all_spans<bf16>(a, begin, end, false);
  return kIsaName;
}

const char* guide_backward(const void* args, int64_t begin, int64_t end) {
  const GuideArgs& a = *(const GuideArgs*)args;
  a.dtype == kFloat32 ? all_spans<float>(a, begin, end, true)
                      : all_spans<bf16>(a, begin, end, true);
  return kIsaName;
}

}  // namespace QIRL_ISA
}  // namespace qirl
