// guide and its gradients on the GPU, from the formulas of math/guide.h: the bits of the CPU
// kernels, plain and rescaled.
//
// Plain: a thread takes 8 elements of one row, in 128-bit accesses. Rescaled: 16 lanes take a
// token, neighbouring lanes neighbouring elements, since that is the order of the sums; the second
// reading of a token comes from L1.
#include "cuda/guide.h"

#include "cuda/guide_sums.cuh"
#include "cuda/launch.cuh"

namespace qirl::cuda {
namespace {

constexpr int kThreads = 256, kPerThread = 8, kTokens = kThreads / kTokenLanes;

template <class T, bool kBackward>
__global__ void __launch_bounds__(kThreads) plain_kernel(GuideArgs args, unsigned per_row) {
  const int64_t row = blockIdx.x / per_row;
  const int64_t start =
      ((int64_t)(blockIdx.x % per_row) * kThreads + (int64_t)threadIdx.x) * kPerThread;
  const int64_t left = args.row_size - start, at = row * args.row_size + start;
  const float w = args.scale_B[row];
  float a[kPerThread], b[kPerThread];
  if constexpr (kBackward) {
    load_vec_n((const T*)args.dy + row * args.dy_stride + start, left, b);
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      a[k] = w * b[k];
      b[k] = b[k] - a[k];
    }
    store_vec_n((T*)args.out2 + at, left, b);
  } else {
    load_vec_n((const T*)args.c + row * args.c_stride + start, left, a);
    load_vec_n((const T*)args.u + row * args.u_stride + start, left, b);
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) a[k] = guide_combine(a[k], b[k], w);
  }
  store_vec_n((T*)args.out + at, left, a);
}

template <class T, bool kBackward>
__global__ void __launch_bounds__(kThreads) rescale_kernel(GuideArgs args, int64_t tokens) {
  const int64_t token = (int64_t)blockIdx.x * kTokens + threadIdx.x / kTokenLanes;
  const int64_t per_row = args.row_size / args.width;
  const int64_t row = token < tokens ? token / per_row : 0;
  const int64_t start = token < tokens ? (token - row * per_row) * args.width : 0;
  const int64_t n = token < tokens ? args.width : 0, at = row * args.row_size + start;
  const T* c = (const T*)args.c + row * args.c_stride + start;
  const T* u = (const T*)args.u + row * args.u_stride + start;
  const T* dy = kBackward ? (const T*)args.dy + row * args.dy_stride + start : nullptr;
  const float w = args.scale_B[row];
  float sums[2 + kBackward], k = 0.0f, m = 0.0f;
  token_sums<kBackward>(c, u, dy, n, w, sums);
  const float factor = guide_factor(sums[0], sums[1], exact_sqrt);
  if constexpr (kBackward) {
    k = guide_grad_k(factor, sums[2], sums[1]);
    m = guide_grad_m(factor, sums[2], sums[0]);
  }
#pragma unroll 4
  for (int64_t i = threadIdx.x % kTokenLanes; i < n; i += kTokenLanes) {
    const float cv = load(c + i), g = guide_combine(cv, load(u + i), w);
    if constexpr (kBackward) {
      const float dg = factor * load(dy + i) - k * g;
      store((T*)args.out + at + i, w * dg + m * cv);
      store((T*)args.out2 + at + i, dg - w * dg);
    } else {
      store((T*)args.out + at + i, g * factor);
    }
  }
}

template <bool kBackward>
int run(const GuideArgs& args, void* stream) {
  return with_storage_types({args.dtype}, [&](auto x) {
    using T = typename decltype(x)::type;
    if (args.rescale) {
      const int64_t tokens = args.rows * (args.row_size / args.width);
      const int64_t grid = (tokens + kTokens - 1) / kTokens;
      return launch(rescale_kernel<T, kBackward>, grid, kThreads, stream, args, tokens);
    }
    constexpr int64_t kBlock = (int64_t)kThreads * kPerThread;
    const int64_t per_row = (args.row_size + kBlock - 1) / kBlock;
    return launch(plain_kernel<T, kBackward>, args.rows * per_row, kThreads, stream, args,
                  (unsigned)per_row);
  });
}

}  // namespace

int guide(const GuideArgs& args, void* stream) { return run<false>(args, stream); }

int guide_backward(const GuideArgs& args, void* stream) { return run<true>(args, stream); }

}  // namespace qirl::cuda
