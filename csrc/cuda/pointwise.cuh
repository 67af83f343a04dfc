// The kernel of the pointwise ops: a thread takes 8 elements of one row, in 128-bit accesses.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/pointwise.h"
#include "cuda/vec.cuh"

namespace qirl::cuda {

constexpr int kPointwiseThreads = 256, kPointwisePerThread = 8;

// Map::apply(in, out) takes one element of each of Map::kIn inputs to one of each of Map::kOut.
template <class Map, class T>
__global__ void __launch_bounds__(kPointwiseThreads)
    pointwise_kernel(PointwiseArgs args, unsigned per_row) {
  constexpr int kN = kPointwisePerThread;
  const int64_t row = blockIdx.x / per_row;
  const int64_t start =
      ((int64_t)(blockIdx.x % per_row) * kPointwiseThreads + (int64_t)threadIdx.x) * kN;
  const int64_t left = args.width - start;
  float x[Map::kIn][kN], y[Map::kOut][kN];
#pragma unroll
  for (int k = 0; k < Map::kIn; ++k) {
    load_vec_n((const T*)args.in[k] + row * args.in_stride[k] + start, left, x[k]);
  }
#pragma unroll
  for (int i = 0; i < kN; ++i) {
    float in[Map::kIn], out[Map::kOut];
#pragma unroll
    for (int k = 0; k < Map::kIn; ++k) in[k] = x[k][i];
    Map::apply(in, out);
#pragma unroll
    for (int k = 0; k < Map::kOut; ++k) y[k][i] = out[k];
  }
#pragma unroll
  for (int k = 0; k < Map::kOut; ++k) {
    store_vec_n((T*)args.out[k] + row * args.width + start, left, y[k]);
  }
}

template <class Map>
int run_pointwise(const PointwiseArgs& args, void* stream) {
  constexpr int64_t kBlock = (int64_t)kPointwiseThreads * kPointwisePerThread;
  const int64_t per_row = (args.width + kBlock - 1) / kBlock;
  return with_storage_types({args.dtype}, [&](auto x) {
    using T = typename decltype(x)::type;
    return launch(pointwise_kernel<Map, T>, args.rows * per_row, kPointwiseThreads, stream, args,
                  (unsigned)per_row);
  });
}

}  // namespace qirl::cuda
