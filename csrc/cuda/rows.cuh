// What the losses share: a CTA takes one block of one row, a thread 8 neighbouring elements of it;
// sums in the order of math/rows.h, which leaves no freedom: the bits of the CPU kernels.
#pragma once

#include "cuda/reduce.cuh"
#include "cuda/vec.cuh"
#include "math/rows.h"

namespace qirl::cuda {

constexpr int kRowThreads = 128, kPerThread = (int)kRowBlock / kRowThreads;

// The part of a row that this thread takes.
struct Span {
  int64_t row, start, left;  // its elements from `start` on; `left` of the row begin there

  __device__ __forceinline__ Span(int64_t row_size, unsigned per_row) {
    row = blockIdx.x / per_row;
    start = (int64_t)(blockIdx.x % per_row) * kRowBlock + threadIdx.x * kPerThread;
    left = row_size - start;
  }

  template <class T>
  __device__ __forceinline__ void load(const Operand& x, float (&value)[kPerThread]) const {
    load_vec_n((const T*)x.data + row * x.stride + start, left, value);
  }

  // For operands whose types may differ: looked up, the same for all threads.
  __device__ __forceinline__ void load_any(const Operand& x, float (&value)[kPerThread]) const {
    x.dtype == 0 ? load<float>(x, value) : load<bf16>(x, value);
  }

  template <class T>
  __device__ __forceinline__ void store(void* out, int64_t row_size,
                                        const float (&value)[kPerThread]) const {
    store_vec_n((T*)out + row * row_size + start, left, value);
  }
};

// sums[k] of the block from value[k] of every thread; elements behind the row's end are 0.
template <int K>
QIRL_DEVICE void sum_block(const float (&value)[K][kPerThread], float* sums) {
  constexpr int kParts = (int)(kRowBlock / kRowPart), kLanes = 16;
  __shared__ __align__(16) float staged[kRowBlock];
  __shared__ float partial[K][kParts][kLanes];
  const int lane = threadIdx.x % kLanes, part = threadIdx.x / kLanes;
  for (int k = 0; k < K; ++k) {
    store_vec(staged + threadIdx.x * kPerThread, value[k]);
    __syncthreads();
    if (part < kParts) {
      float sum = 0.0f;
      for (int i = lane; i < kRowPart; i += kLanes) sum += staged[part * kRowPart + i];
      partial[k][part][lane] = sum;
    }
    __syncthreads();
  }
  for (int k = threadIdx.x / 32; k < K; k += kRowThreads / 32) {  // a warp each, its halves alike
    float sum = 0.0f;
    for (int p = 0; p < kParts; ++p) sum += partial[k][p][lane];
    sum = warp_sum<kLanes>(sum);
    if (threadIdx.x % 32 == 0) sums[k] = sum;
  }
}

// Sum of `count` values that lie `step` apart, in turn, in float64, by a whole warp: 32 are loaded
// at once and then go round.
template <class T>
QIRL_DEVICE double ordered_sum(const T* values, int64_t count, int64_t step = 1) {
  const int lane = threadIdx.x % 32;
  double total = 0.0;
  for (int64_t first = 0; first < count; first += 32) {
    const T mine = first + lane < count ? values[(first + lane) * step] : T(0);
    for (int i = 0; i < 32; ++i) total += (double)__shfl_sync(0xffffffffu, mine, i);
  }
  return total;
}

}  // namespace qirl::cuda
