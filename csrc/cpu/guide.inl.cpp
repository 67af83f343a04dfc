// guide: classifier-free guidance with optional norm rescale, forward and backward.
#include "cpu/guide.h"

#include "cpu/dtype.h"
#include "cpu/guide_batch.h"
#include "cpu/token_factor.h"

namespace qirl {
namespace QIRL_ISA {
namespace {

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
  const auto value = [&](int64_t i, int n) {
    const F g = guide_combine(load_n(s.c + i, n), load_n(s.u + i, n), w);
    return rescale ? g * factor : g;
  };
  int64_t i = 0;
  for (; i + 2 * kLanes <= s.size; i += 2 * kLanes) {
    store_two(s.out + i, value(i, kLanes), value(i + kLanes, kLanes), s.stream);
  }
  for (; i < s.size; i += kLanes) {
    const int n = (int)(s.size - i < kLanes ? s.size - i : kLanes);
    store_n(s.out + i, round_own(s.out, value(i, n)), n, s.stream);
  }
}

struct Gradients {
  F dc, du;
};

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
  const auto gradients = [&](int64_t i, int n) {
    F dg = load_n(s.dy + i, n), dc = w * dg;
    if (rescale) {
      const F c = load_n(s.c + i, n);
      dg = factor * dg - k * guide_combine(c, load_n(s.u + i, n), w);
      dc = w * dg + m * c;
    }
    return Gradients{dc, dg - w * dg};
  };
  int64_t i = 0;
  for (; i + 2 * kLanes <= s.size; i += 2 * kLanes) {
    const Gradients a = gradients(i, kLanes), b = gradients(i + kLanes, kLanes);
    store_two(s.out + i, a.dc, b.dc, s.stream);
    store_two(s.out2 + i, a.du, b.du, s.stream);
  }
  for (; i < s.size; i += kLanes) {
    const int n = (int)(s.size - i < kLanes ? s.size - i : kLanes);
    const Gradients g = gradients(i, n);
    store_n(s.out + i, round_own(s.out, g.dc), n, s.stream);
    store_n(s.out2 + i, round_own(s.out2, g.du), n, s.stream);
  }
}

template <bool kBackward, class T>
QIRL_HD void all_spans(const GuideArgs& a, int64_t begin, int64_t end) {
  const int64_t unit = a.rescale ? a.width : kGuideBlock;
  const int64_t per_row = (a.row_size + unit - 1) / unit;
  const bool in_registers = a.rescale && a.width == kShort && kShortVectors <= 8;
  int64_t row = begin / per_row, start = begin % per_row;  // in units
  for (int64_t left = end - begin; left > 0;) {
    const Span<T> s = span_of<T>(a, row, start * unit, unit);
    const int64_t in_row = per_row - start < left ? per_row - start : left;
    int64_t taken = 1;
    if (!in_registers) {
      kBackward ? backward_span(s, a.rescale) : forward_span(s, a.rescale);
    } else if (in_row >= kBatch) {
      taken = kBatch > 1 ? in_row / kBatch * kBatch : 1;
      batches<kBackward>(s, taken / kBatch);
    } else {
      kBackward ? backward_short(s) : forward_short(s);
    }
    left -= taken;
    start += taken;
    if (start == per_row) {
      start = 0;
      ++row;
    }
  }
  if (a.stream) stream_fence();
}

}  // namespace

const char* guide(const void* args, int64_t begin, int64_t end) {
  const GuideArgs& a = *(const GuideArgs*)args;
  a.dtype == kFloat32 ? all_spans<false, float>(a, begin, end)
                      : all_spans<false, bf16>(a, begin, end);
  return kIsaName;
}

const char* guide_backward(const void* args, int64_t begin, int64_t end) {
  const GuideArgs& a = *(const GuideArgs*)args;
  a.dtype == kFloat32 ? all_spans<true, float>(a, begin, end)
                      : all_spans<true, bf16>(a, begin, end);
  return kIsaName;
}

}  // namespace QIRL_ISA
}  // namespace qirl
