// qk_norm_rope and its gradients on the GPU, from the formulas of math/qk_norm_rope.h.
//
// A head belongs to width / 8 lanes of a warp (the next power of two), 8 elements each, so a load
// is 128 bits of bfloat16 and the norm needs no shared memory. The forward pass takes the heads of
// q, k and v of both streams in one launch. In the backward pass a block walks over kQkChunk tokens
// of one stream: its weight sums are added lane by lane in the order of the tokens, then group by
// group; a second kernel adds the blocks' sums in float64.
#include "cuda/qk_norm_rope.h"

#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vec.cuh"
#include "math/qk_norm_rope.h"

namespace qirl::cuda {
namespace {

constexpr int kThreads = 256, kN = 8, kFinishRows = 4;

QIRL_DEVICE float root(float value) { return __fsqrt_rn(value); }

QIRL_DEVICE float scale_of(const QkArgs& a, float sum_x2) {
  return qk_scale(sum_x2, (float)a.width, a.eps, [](float v) { return root(v); });
}

// The lane's 8 weights; ones where there are none.
QIRL_DEVICE void load_weight(const QkStream& s, int kind, int64_t column, int64_t left,
                             float (&w)[kN]) {
  if (s.weight[kind] == nullptr) {
#pragma unroll
    for (int i = 0; i < kN; ++i) w[i] = 1.0f;
  } else if (s.weight_dtype[kind] == 0) {
    load_vec_n((const float*)s.weight[kind] + column, left, w);
  } else {
    load_vec_n((const bf16*)s.weight[kind] + column, left, w);
  }
}

// Rotates the lane's 4 pairs by the token's angles; sign -1 turns back.
QIRL_DEVICE void rotate(const QkStream& s, int64_t b, int64_t token, int64_t column, int64_t left,
                        float sign, float (&x)[kN]) {
  if (s.rope == nullptr) return;
  float turn[kN];
  load_vec_n(s.rope + b * s.rope_strides[0] + token * s.rope_strides[1] + column, left, turn);
#pragma unroll
  for (int i = 0; i < kN; i += 2) {
    const float even = x[i], odd = x[i + 1], sine = sign * turn[i + 1];
    x[i] = qk_rotated(even, odd, turn[i], -sine);
    x[i + 1] = qk_rotated(odd, even, turn[i], sine);
  }
}

template <class T>
QIRL_DEVICE const T* head_at(const QkHeads& h, int64_t b, int64_t token, int64_t head) {
  return (const T*)h.data + b * h.batch_stride + token * h.token_stride + head * h.head_stride;
}

template <class T, int kLanes>
__global__ void __launch_bounds__(kThreads) forward_kernel(QkArgs a, int64_t items) {
  const int64_t slots = a.heads[0] + a.heads[1] * (a.out[2] == nullptr ? 1 : 2);
  const int64_t column = (int64_t)(threadIdx.x % kLanes) * kN;
  int64_t item = (int64_t)blockIdx.x * (kThreads / kLanes) + threadIdx.x / kLanes;
  const int64_t left = item < items ? a.width - column : 0;  // lanes without a head read zeros
  item = item < items ? item : items - 1;
  const int64_t b = item / slots / a.total, place = item / slots % a.total;
  int64_t head = item % slots;
  int kind = 0;
  while (head >= a.heads[kind > 0]) head -= a.heads[kind++ > 0];
  const QkStream& s = a.stream[place >= a.stream[1].first];
  const int64_t token = place - s.first;

  float x[kN], w[kN];
  load_vec_n(head_at<T>(s.in[kind], b, token, head) + column, left, x);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kN; ++i) sum += x[i] * x[i];
  sum = warp_sum<kLanes>(sum);
  if (kind < 2) {
    const float r = scale_of(a, sum);
    load_weight(s, kind, column, left, w);
#pragma unroll
    for (int i = 0; i < kN; ++i) x[i] = qk_normed(x[i], r, w[i]);
    rotate(s, b, token, column, left, 1.0f, x);
  }
  const int64_t row = (b * a.total + place) * a.heads[kind > 0] + head;
  store_vec_n((T*)a.out[kind] + row * a.width + column, left, x);
}

template <class T, int kLanes>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(QkArgs a, int64_t text_chunks, int64_t chunks) {
  constexpr int kGroups = kThreads / kLanes;
  const int kind = blockIdx.x % 2, group = threadIdx.x / kLanes;
  const int64_t chunk = blockIdx.x / 2 % chunks, b = blockIdx.x / 2 / chunks;
  const QkStream& s = a.stream[chunk >= text_chunks];
  const int64_t first = (chunk < text_chunks ? chunk : chunk - text_chunks) * kQkChunk;
  const int64_t tokens = s.length - first < kQkChunk ? s.length - first : kQkChunk;
  const int64_t heads = a.heads[kind], items = tokens * heads;
  const int64_t column = (int64_t)(threadIdx.x % kLanes) * kN;

  float w[kN], dw[kN] = {};
  load_weight(s, kind, column, a.width - column, w);
  for (int64_t begin = 0; begin < items; begin += kGroups) {
    const bool live = begin + group < items;
    const int64_t item = live ? begin + group : 0, left = live ? a.width - column : 0;
    const int64_t token = first + item / heads, head = item % heads;
    float x[kN], dn[kN], sums[2] = {};  // of x^2 and dn w x
    load_vec_n(head_at<T>(s.in[kind], b, token, head) + column, left, x);
    load_vec_n(head_at<T>(a.dy[kind], b, s.first + token, head) + column, left, dn);
    rotate(s, b, token, column, left, -1.0f, dn);
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      sums[0] += x[i] * x[i];
      sums[1] += (dn[i] * w[i]) * x[i];
    }
    warp_sum<kLanes>(sums);
    const float r = scale_of(a, sums[0]), mean = qk_grad_mean(sums[1], r, (float)a.width);
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      const float normed = x[i] * r;
      if (live) dw[i] += dn[i] * normed;  // r of a head that is not there may be infinite
      x[i] = qk_grad(normed, dn[i] * w[i], r, mean);
    }
    const int64_t row = (b * s.length + token) * heads + head;
    store_vec_n((T*)s.dx[kind] + row * a.width + column, left, x);
  }
  if (a.partials == nullptr) return;
  __shared__ float part[kGroups][kLanes * kN];
#pragma unroll
  for (int i = 0; i < kN; ++i) part[group][column + i] = dw[i];
  __syncthreads();
  for (int64_t i = threadIdx.x; i < a.width; i += kThreads) {
    float sum = part[0][i];
    for (int g = 1; g < kGroups; ++g) sum += part[g][i];
    a.partials[((b * chunks + chunk) * 2 + kind) * a.width + i] = sum;
  }
}

// Block (stream, kind): thread (row, column) adds every kFinishRows-th chunk in order.
__global__ void __launch_bounds__(kFinishRows* kQkMaxWidth)
    finish_kernel(QkArgs a, int64_t text_chunks, int64_t chunks) {
  __shared__ double part[kFinishRows][kQkMaxWidth];
  const int which = blockIdx.x / 2, kind = blockIdx.x % 2;
  const int64_t begin = which == 0 ? 0 : text_chunks, end = which == 0 ? text_chunks : chunks;
  const int64_t row = threadIdx.x / kQkMaxWidth, i = threadIdx.x % kQkMaxWidth;
  double sum = 0.0;
  if (i < a.width) {
    const int64_t per_sample = end - begin;
#pragma unroll 4
    for (int64_t n = row; n < a.batch * per_sample; n += kFinishRows) {
      const int64_t chunk = n / per_sample * chunks + begin + n % per_sample;
      sum += a.partials[(chunk * 2 + kind) * a.width + i];
    }
  }
  part[row][i] = sum;
  __syncthreads();
  if (row > 0 || i >= a.width) return;
  for (int k = 1; k < kFinishRows; ++k) sum += part[k][i];
  a.dw[blockIdx.x * a.width + i] = (float)sum;
}

// launch_lanes(integral_constant of the lanes of a head).
template <int kLanes>
struct Lanes {
  static constexpr int value = kLanes;
};

template <class Launch>
int with_lanes(int64_t width, Launch launch_lanes) {
  if (width > 128) return launch_lanes(Lanes<32>{});
  if (width > 64) return launch_lanes(Lanes<16>{});
  if (width > 32) return launch_lanes(Lanes<8>{});
  return launch_lanes(Lanes<4>{});
}

}  // namespace

int qk_norm_rope(const QkArgs& a, void* stream) {
  const int64_t slots = a.heads[0] + a.heads[1] * (a.out[2] == nullptr ? 1 : 2);
  const int64_t items = a.batch * a.total * slots;
  return with_storage_types({a.dtype}, [&](auto x) {
    return with_lanes(a.width, [&](auto lanes) {
      constexpr int kLanes = decltype(lanes)::value, kGroups = kThreads / kLanes;
      return launch(forward_kernel<typename decltype(x)::type, kLanes>,
                    (items + kGroups - 1) / kGroups, kThreads, stream, a, items);
    });
  });
}

int qk_norm_rope_backward(const QkArgs& a, void* stream) {
  const int64_t text_chunks = qk_chunks(a.stream[0]), chunks = qk_chunks(a);
  const int error = with_storage_types({a.dtype}, [&](auto x) {
    return with_lanes(a.width, [&](auto lanes) {
      return launch(backward_kernel<typename decltype(x)::type, decltype(lanes)::value>,
                    a.batch * chunks * 2, kThreads, stream, a, text_chunks, chunks);
    });
  });
  if (error != 0 || a.partials == nullptr) return error;
  return launch(finish_kernel, 4, kFinishRows * (int)kQkMaxWidth, stream, a, text_chunks, chunks);
}

}  // namespace qirl::cuda
