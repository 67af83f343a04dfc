// The kernels of the pointwise ops: a thread takes 8 elements of one row, in 128-bit accesses, or
// 16 where the result is wanted in 8-bit floats too: their codes are one store.
#pragma once

#include "cuda/fp8.cuh"
#include "cuda/launch.cuh"
#include "cuda/pointwise.h"

namespace qirl::cuda {

constexpr int kPointwiseThreads = 256, kPointwisePerThread = 8;

// Elements of all outputs of one row from `start` on, `left` of which are in the row.
// Map::apply(in, out) takes one element of each of Map::kIn inputs to one of each of Map::kOut.
template <class Map, class T, int N>
QIRL_DEVICE void map_elements(const PointwiseArgs& args, int64_t row, int64_t start,
                              float (&y)[Map::kOut][N]) {
  float x[Map::kIn][N];
#pragma unroll
  for (int k = 0; k < Map::kIn; ++k) {
    const T* in = (const T*)args.in[k] + row * args.in_stride[k] + start;
    load_vec_n(in, args.width - start, x[k]);
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    float in[Map::kIn], out[Map::kOut];
#pragma unroll
    for (int k = 0; k < Map::kIn; ++k) in[k] = x[k][i];
    Map::apply(in, out);
#pragma unroll
    for (int k = 0; k < Map::kOut; ++k) y[k][i] = out[k];
  }
#pragma unroll
  for (int k = 0; k < Map::kOut; ++k) {
    store_vec_n((T*)args.out[k] + row * args.width + start, args.width - start, y[k]);
  }
}

template <class Map, class T>
__global__ void __launch_bounds__(kPointwiseThreads)
    pointwise_kernel(PointwiseArgs args, unsigned per_row) {
  const int64_t row = blockIdx.x / per_row;
  const int64_t block = (int64_t)(blockIdx.x % per_row) * kPointwiseThreads;
  float y[Map::kOut][kPointwisePerThread];
  map_elements<Map, T>(args, row, (block + (int64_t)threadIdx.x) * kPointwisePerThread, y);
}

constexpr int kQuantizedPerThread = 16;

// The one output, rounded, zeros behind the row's end.
template <class Map, class T>
QIRL_DEVICE void map_rounded(const PointwiseArgs& args, int64_t row, int64_t start,
                             float (&y)[1][kQuantizedPerThread]) {
  map_elements<Map, T>(args, row, start, y);
  round_row<T>(args.width - start, y[0]);
}

// A block takes a row. What one pass over the block holds stays in registers for the codes; behind
// that a thread reads back what it stored itself.
template <class Map, class T>
__global__ void __launch_bounds__(kPointwiseThreads, 3) quantized_rows_kernel(PointwiseArgs args) {
  constexpr int kN = kQuantizedPerThread;
  constexpr int64_t kStep = (int64_t)kPointwiseThreads * kN;
  const int64_t row = blockIdx.x, start = (int64_t)threadIdx.x * kN, at = row * args.width;
  float first[1][kN], y[1][kN];
  map_rounded<Map, T>(args, row, start, first);
  uint32_t most = largest_of(first[0]);
  for (int64_t i = start + kStep; i < args.width; i += kStep) {
    map_rounded<Map, T>(args, row, i, y);
    most = larger(most, largest_of(y[0]));
  }
  const float scale = scale_of<E4m3fn>(block_max<kPointwiseThreads>(most)), inverse = 1.0f / scale;
  if (threadIdx.x == 0) args.fp8.scale[row] = scale;
  convert<E4m3fn>(args.fp8.q + at + start, args.width - start, first[0], inverse);
  for (int64_t i = start + kStep; i < args.width; i += kStep) {
    load_vec_n((const T*)args.out[0] + at + i, args.width - i, y[0]);
    convert<E4m3fn>(args.fp8.q + at + i, args.width - i, y[0], inverse);
  }
}

// kLanes neighbouring lanes take a span of kFp8Span elements.
template <class Map, class T>
__global__ void __launch_bounds__(kPointwiseThreads)
    quantized_spans_kernel(PointwiseArgs args, unsigned per_row) {
  constexpr int kN = kQuantizedPerThread, kLanes = kFp8Span / kN;
  const int64_t row = blockIdx.x / per_row, spans = (args.width + kFp8Span - 1) / kFp8Span;
  const int64_t block = (int64_t)(blockIdx.x % per_row) * kPointwiseThreads;
  const int64_t start = (block + (int64_t)threadIdx.x) * kN, left = args.width - start;
  float y[1][kN];
  map_rounded<Map, T>(args, row, start, y);
  const float scale = scale_of<E4m3fn>(warp_max<kLanes>(largest_of(y[0])));
  if (threadIdx.x % kLanes == 0 && left > 0) {
    args.fp8.scale[row * spans + start / kFp8Span] = scale;
  }
  convert<E4m3fn>(args.fp8.q + row * args.width + start, left, y[0], 1.0f / scale);
}

inline int64_t pointwise_blocks(const PointwiseArgs& args, int per_thread) {
  const int64_t block = (int64_t)kPointwiseThreads * per_thread;
  return (args.width + block - 1) / block;
}

template <class Map>
int run_pointwise(const PointwiseArgs& args, void* stream) {
  const int64_t per_row = pointwise_blocks(args, kPointwisePerThread);
  return with_storage_types({args.dtype}, [&](auto x) {
    using T = typename decltype(x)::type;
    return launch(pointwise_kernel<Map, T>, args.rows * per_row, kPointwiseThreads, stream, args,
                  (unsigned)per_row);
  });
}

// As run_pointwise; where args.fp8 is wanted, with the kernels that write it.
template <class Map>
int run_quantized(const PointwiseArgs& args, void* stream) {
  if (args.fp8.q == nullptr) return run_pointwise<Map>(args, stream);
  const bool rows = args.fp8.unit == args.width;
  if (!rows && args.fp8.unit != kFp8Span) return cudaErrorInvalidValue;
  const int64_t per_row = pointwise_blocks(args, kQuantizedPerThread);
  return with_storage_types({args.dtype}, [&](auto x) {
    using T = typename decltype(x)::type;
    return rows ? launch(quantized_rows_kernel<Map, T>, args.rows, kPointwiseThreads, stream, args)
                : launch(quantized_spans_kernel<Map, T>, args.rows * per_row, kPointwiseThreads,
                         stream, args, (unsigned)per_row);
  });
}

}  // namespace qirl::cuda
