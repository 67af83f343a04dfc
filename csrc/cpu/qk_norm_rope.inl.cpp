// qk_norm_rope: RMSNorm of the heads, rotation, and the copy into the joint buffers; the gradients.
#include "cpu/qk_norm_rope.h"

#include "cpu/dtype.h"
#include "cpu/vec.h"
#include "math/qk_norm_rope.h"

namespace qirl {
namespace QIRL_ISA {
namespace {

QIRL_HD float scalar_sqrt(float value) { return __builtin_sqrtf(value); }

// One number a channel of a head, as vectors; zeros behind the last channel.
template <int kMax>
struct Channels {
  F at[(kMax + kLanes - 1) / kLanes];
};

// The tokens of one task.
struct Span {
  const QkStream* stream;
  int64_t sample, begin, end;
};

QIRL_HD Span span_of(const QkArgs& a, int64_t task) {
  const int64_t first = qk_chunks(a.stream[0]), per_sample = qk_chunks(a);
  const int64_t within = task % per_sample;
  Span s;
  s.stream = &a.stream[within < first ? 0 : 1];
  s.sample = task / per_sample;
  s.begin = (within < first ? within : within - first) * kQkChunk;
  const int64_t left = s.stream->length - s.begin;
  s.end = s.begin + (left < kQkChunk ? left : kQkChunk);
  return s;
}

template <class T>
QIRL_HD const T* head_at(const QkHeads& h, int64_t sample, int64_t token) {
  return (const T*)h.data + sample * h.batch_stride + token * h.token_stride;
}

template <int kMax>
QIRL_HD void load_weight(const QkStream& s, int which, int64_t width, Channels<kMax>& w) {
  for_vectors(width, [&](int64_t i, int n) {
    F value = splat(1.0f);
    if (s.weight[which] && s.weight_dtype[which] == kFloat32) {
      value = load_n((const float*)s.weight[which] + i, n);
    } else if (s.weight[which]) {
      value = load_n((const bf16*)s.weight[which] + i, n);
    }
    w.at[i / kLanes] = value;
  });
}

// cos and signed sin of each channel at one token; `turn` is -1 for the inverse rotation.
template <int kMax>
QIRL_HD void load_rope(const QkStream& s, int64_t sample, int64_t token, int64_t width, float turn,
                       Channels<kMax>& cosine, Channels<kMax>& sine) {
  const float* rope = s.rope + sample * s.rope_strides[0] + token * s.rope_strides[1];
  const F sign = turn * alternating_signs();
  for_vectors(width, [&](int64_t i, int n) {
    const F pairs = load_n(rope + i, n);
    cosine.at[i / kLanes] = even_lanes(pairs);
    sine.at[i / kLanes] = odd_lanes(pairs) * sign;
  });
}

// 1 / sqrt(mean square + eps) of up to kHeadBlock heads: one head's chain of additions, square root
// and division is long, those of several overlap.
constexpr int kHeadBlock = 8;

template <class T>
QIRL_HD void load_scales(const T* x, int64_t head_stride, int heads, int64_t width, float eps,
                         float* r) {
  for (int h = 0; h < heads; ++h) {
    Sum16 x2;
    for_vectors(width, [&](int64_t i, int n) {
      const F value = load_n(x + h * head_stride + i, n);
      x2.add(i / kLanes, value * value);
    });
    r[h] = qk_scale(x2.total(), (float)width, eps, scalar_sqrt);
  }
}

template <class T, int kMax, bool kRope>
QIRL_HD void forward_head(const T* x, T* y, int64_t width, float r, const Channels<kMax>& w,
                          const Channels<kMax>& cosine, const Channels<kMax>& sine, bool streamed) {
  for_vectors(width, [&](int64_t i, int n) {
    const int64_t j = i / kLanes;
    F value = qk_normed(load_n(x + i, n), r, w.at[j]);
    if (kRope) value = qk_rotated(value, swap_pairs(value), cosine.at[j], sine.at[j]);
    store_n(y + i, round_as(y, value), n, streamed);
  });
}

// What the gradients of one head need besides x: dn, the gradient behind the rotation, and two
// numbers.
template <int kMax>
struct HeadGrad {
  Channels<kMax> dn;
  float r, mean;
};

template <class T, int kMax, bool kRope>
QIRL_HD void load_grad(const T* x, const T* dy, int64_t width, float eps, const Channels<kMax>& w,
                       const Channels<kMax>& cosine, const Channels<kMax>& sine,
                       HeadGrad<kMax>& grad) {
  Sum16 x2, dot;
  for_vectors(width, [&](int64_t i, int n) {
    const int64_t j = i / kLanes;
    const F value = load_n(x + i, n);
    F g = load_n(dy + i, n);
    if (kRope) g = qk_rotated(g, swap_pairs(g), cosine.at[j], sine.at[j]);
    grad.dn.at[j] = g;
    x2.add(j, value * value);
    dot.add(j, (g * w.at[j]) * value);
  });
  grad.r = qk_scale(x2.total(), (float)width, eps, scalar_sqrt);
  grad.mean = qk_grad_mean(dot.total(), grad.r, (float)width);
}

// dw gains the head's part of the weight gradient.
template <class T, int kMax>
QIRL_HD void backward_head(const T* x, T* dx, int64_t width, const Channels<kMax>& w,
                           const HeadGrad<kMax>& grad, Channels<kMax>* dw, bool streamed) {
  for_vectors(width, [&](int64_t i, int n) {
    const int64_t j = i / kLanes;
    const F normed = load_n(x + i, n) * grad.r, dn = grad.dn.at[j];
    if (dw) dw->at[j] += dn * normed;
    store_n(dx + i, round_as(dx, qk_grad(normed, dn * w.at[j], grad.r, grad.mean)), n, streamed);
  });
}

template <class T>
QIRL_HD void copy_heads(const QkArgs& a, const Span& s) {
  for (int64_t token = s.begin; token < s.end; ++token) {
    const T* from = head_at<T>(s.stream->in[2], s.sample, token);
    T* to = (T*)a.out[2] + (s.sample * a.total + s.stream->first + token) * a.heads[1] * a.width;
    for (int64_t h = 0; h < a.heads[1]; ++h) {
      const T* in = from + h * s.stream->in[2].head_stride;
      for_vectors(a.width, [&](int64_t i, int n) {
        store_n(to + h * a.width + i, load_n(in + i, n), n, a.streamed);
      });
    }
  }
}

// All tokens of q, then all of k: long runs through each tensor keep the prefetchers going.
template <class T, int kMax, bool kRope>
void forward_span(const QkArgs& a, const Span& s, int64_t width) {
  Channels<kMax> weight, cosine, sine;
  for (int which = 0; which < 2; ++which) {
    const int64_t heads = a.heads[which], head_stride = s.stream->in[which].head_stride;
    load_weight(*s.stream, which, width, weight);
    for (int64_t token = s.begin; token < s.end; ++token) {
      if (kRope) load_rope(*s.stream, s.sample, token, width, 1.0f, cosine, sine);
      const int64_t row = s.sample * a.total + s.stream->first + token;
      const T* x = head_at<T>(s.stream->in[which], s.sample, token);
      T* y = (T*)a.out[which] + row * heads * width;
      for (int64_t first = 0; first < heads; first += kHeadBlock) {
        const int count = heads - first < kHeadBlock ? (int)(heads - first) : kHeadBlock;
        const T* block = x + first * head_stride;
        float r[kHeadBlock];
        load_scales(block, head_stride, count, width, a.eps, r);
        for (int h = 0; h < count; ++h) {
          forward_head<T, kMax, kRope>(block + h * head_stride, y + (first + h) * width, width,
                                       r[h], weight, cosine, sine, a.streamed);
        }
      }
    }
  }
  if (a.out[2]) copy_heads<T>(a, s);
}

template <int kMax>
QIRL_HD void add_channels(Channels<kMax>& to, const Channels<kMax>* from, int64_t width) {
  for_vectors(width, [&](int64_t i, int) {
    const int64_t j = i / kLanes;
    to.at[j] = from ? to.at[j] + from->at[j] : F{};
  });
}

template <class T, int kMax, bool kRope>
void backward_span(const QkArgs& a, const Span& s, int64_t width, float* partials) {
  Channels<kMax> weight, cosine, sine;
  HeadGrad<kMax> grads[kHeadBlock];
  Channels<kMax> sums, dw;  // of all tokens, of one token: short chains of additions
  for (int which = 0; which < 2; ++which) {
    const QkHeads &in = s.stream->in[which], &grad = a.dy[which];
    const int64_t heads = a.heads[which];
    load_weight(*s.stream, which, width, weight);
    add_channels<kMax>(sums, nullptr, width);
    for (int64_t token = s.begin; token < s.end; ++token) {
      if (kRope) load_rope(*s.stream, s.sample, token, width, -1.0f, cosine, sine);
      const T* x = head_at<T>(in, s.sample, token);
      const T* dy = head_at<T>(grad, s.sample, s.stream->first + token);
      T* dx = (T*)s.stream->dx[which] + (s.sample * s.stream->length + token) * heads * width;
      add_channels<kMax>(dw, nullptr, width);
      for (int64_t first = 0; first < heads; first += kHeadBlock) {
        const int count = heads - first < kHeadBlock ? (int)(heads - first) : kHeadBlock;
        const T *block = x + first * in.head_stride, *dy_block = dy + first * grad.head_stride;
        for (int h = 0; h < count; ++h) {
          load_grad<T, kMax, kRope>(block + h * in.head_stride, dy_block + h * grad.head_stride,
                                    width, a.eps, weight, cosine, sine, grads[h]);
        }
        for (int h = 0; h < count; ++h) {
          backward_head<T, kMax>(block + h * in.head_stride, dx + (first + h) * width, width,
                                 weight, grads[h], partials ? &dw : nullptr, a.streamed);
        }
      }
      add_channels(sums, &dw, width);
    }
    if (!partials) continue;
    for_vectors(width, [&](int64_t i, int n) {
      store_n(partials + which * width + i, sums.at[i / kLanes], n, false);
    });
  }
}

template <class T, int kWidth, bool kRope>
void run_span(const QkArgs& a, int64_t task, bool backward) {
  constexpr int kMax = kWidth > 0 ? kWidth : (int)kQkMaxWidth;
  const int64_t width = kWidth > 0 ? kWidth : a.width;
  const Span s = span_of(a, task);
  if (backward) {
    float* partials = a.partials ? a.partials + task * 2 * width : nullptr;
    backward_span<T, kMax, kRope>(a, s, width, partials);
  } else {
    forward_span<T, kMax, kRope>(a, s, width);
  }
}

// The widths that models have get loops of known length.
template <class T, bool kRope>
void run_width(const QkArgs& a, int64_t task, bool backward) {
  if (a.width == 128) return run_span<T, 128, kRope>(a, task, backward);
  if (a.width == 64) return run_span<T, 64, kRope>(a, task, backward);
  run_span<T, 0, kRope>(a, task, backward);
}

template <class T>
QIRL_HD void all_spans(const QkArgs& a, int64_t begin, int64_t end, bool backward) {
  for (int64_t task = begin; task < end; ++task) {
    span_of(a, task).stream->rope ? run_width<T, true>(a, task, backward)
                                  : run_width<T, false>(a, task, backward);
  }
  if (a.streamed) stream_fence();
}

}  // namespace

const char* qk_norm_rope(const void* args, int64_t begin, int64_t end) {
  const QkArgs& a = *(const QkArgs*)args;
  a.dtype == kFloat32 ? all_spans<float>(a, begin, end, false)
                      : all_spans<bf16>(a, begin, end, false);
  return kIsaName;
}

const char* qk_norm_rope_backward(const void* args, int64_t begin, int64_t end) {
  const QkArgs& a = *(const QkArgs*)args;
  a.dtype == kFloat32 ? all_spans<float>(a, begin, end, true)
                      : all_spans<bf16>(a, begin, end, true);
  return kIsaName;
}

}  // namespace QIRL_ISA
}  // namespace qirl
