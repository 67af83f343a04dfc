// Reductions over lanes and blocks in an order that the shape alone fixes: a butterfly inside a
// warp (lane i with lane i + kWidth/2, then kWidth/4, ... 1; addition commutes, so every lane holds
// the same bits), then the warps one after another. All threads take part and all get the result.
#pragma once

#include <cuda_runtime.h>

#include "cuda/vec.cuh"

namespace qirl::cuda {

struct Add {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};

// A NaN wins, as in torch.amax.
struct Max {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a > b || a != a ? a : b;
  }
};

// Each group of kWidth neighbouring lanes reduces its own values; K results at once.
template <int kWidth = 32, class T, int K, class Combine>
QIRL_DEVICE void warp_reduce(T (&value)[K], Combine combine) {
  static_assert(kWidth <= 32 && (kWidth & (kWidth - 1)) == 0, "a power of two up to a warp");
#pragma unroll
  for (int step = kWidth / 2; step > 0; step /= 2) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      value[k] = combine(value[k], (T)__shfl_xor_sync(0xffffffffu, value[k], step));
    }
  }
}

// A block of kThreads threads; K results at once.
template <int kThreads, class T, int K, class Combine>
QIRL_DEVICE void block_reduce(T (&value)[K], Combine combine) {
  static_assert(kThreads % 32 == 0 && kThreads <= 1024, "whole warps");
  constexpr int kWarps = kThreads / 32;
  warp_reduce(value, combine);
  if constexpr (kWarps > 1) {
    __shared__ T partial[kWarps][K];
    __syncthreads();  // a previous call's results have been read
    if (threadIdx.x % 32 == 0) {
#pragma unroll
      for (int k = 0; k < K; ++k) partial[threadIdx.x / 32][k] = value[k];
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < K; ++k) {
      value[k] = partial[0][k];
#pragma unroll
      for (int warp = 1; warp < kWarps; ++warp) value[k] = combine(value[k], partial[warp][k]);
    }
  }
}

// A block of blockDim.x threads, whole warps; K results at once. The warps' results are reduced as
// the lanes' are; T{} stands in for warps that are not there, and is to leave a result as it is.
template <class T, int K, class Combine>
QIRL_DEVICE void row_reduce(T (&value)[K], Combine combine) {
  __shared__ T partial[32][K];
  warp_reduce(value, combine);
  __syncthreads();  // a previous call's results have been read
  if (threadIdx.x % 32 == 0) {
    for (int k = 0; k < K; ++k) partial[threadIdx.x / 32][k] = value[k];
  }
  __syncthreads();
  const bool mine = threadIdx.x % 32 < blockDim.x / 32;
  for (int k = 0; k < K; ++k) value[k] = mine ? partial[threadIdx.x % 32][k] : T{};
  warp_reduce(value, combine);
}

template <int kWidth = 32, class T, int K>
QIRL_DEVICE void warp_sum(T (&value)[K]) {
  warp_reduce<kWidth>(value, Add{});
}

template <int kWidth = 32, class T>
QIRL_DEVICE T warp_sum(T value) {
  T one[1] = {value};
  warp_reduce<kWidth>(one, Add{});
  return one[0];
}

template <int kThreads, class T, int K>
QIRL_DEVICE void block_sum(T (&value)[K]) {
  block_reduce<kThreads>(value, Add{});
}

template <int kThreads, class T>
QIRL_DEVICE T block_sum(T value) {
  T one[1] = {value};
  block_reduce<kThreads>(one, Add{});
  return one[0];
}

template <int kWidth = 32, class T>
QIRL_DEVICE T warp_max(T value) {
  T one[1] = {value};
  warp_reduce<kWidth>(one, Max{});
  return one[0];
}

template <int K>
QIRL_DEVICE void row_sum(float (&value)[K]) {
  row_reduce(value, Add{});
}

QIRL_DEVICE uint32_t row_max(uint32_t value) {
  uint32_t one[1] = {value};
  row_reduce(one, Max{});
  return one[0];
}

template <int kThreads, class T>
QIRL_DEVICE T block_max(T value) {
  T one[1] = {value};
  block_reduce<kThreads>(one, Max{});
  return one[0];
}

}  // namespace qirl::cuda
