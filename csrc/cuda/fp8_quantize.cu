// fp8_quantize on the GPU, from math/fp8.h: the bits of the CPU kernels on every architecture.
//
// A thread takes 16 elements: their codes are one 128-bit store. A CTA takes a row, 32 spans of 128
// elements of a row, or 64 columns when the transpose is wanted.
#include "cuda/fp8_quantize.h"

#include "cuda/fp8.cuh"
#include "cuda/launch.cuh"

namespace qirl::cuda {
namespace {

constexpr int kThreads = 256, kPerThread = 16, kChunk = kThreads * kPerThread;
constexpr int kSpan = kFp8Span, kSpanLanes = kSpan / kPerThread, kSpans = kThreads / kSpanLanes;
constexpr int kTile = 64, kColumns = 8, kColumnGroups = kTile / kColumns;
constexpr int kTileRows = kThreads / kColumnGroups;

template <class T>
__global__ void __launch_bounds__(kThreads) amax_kernel(Fp8Args args) {
  const int64_t row = blockIdx.x;
  const T* x = (const T*)args.x + row * args.x_stride;
  uint32_t most = 0;
  for (int64_t i = (int64_t)threadIdx.x * kPerThread; i < args.width; i += kChunk) {
    float value[kPerThread];
    load_vec_n(x + i, args.width - i, value);
    most = larger(most, largest_of(value));
  }
  most = block_max<kThreads>(most);
  if (threadIdx.x == 0) args.amax[row] = most;
}

template <class Format>
__global__ void __launch_bounds__(kThreads) whole_scale_kernel(Fp8Args args) {
  uint32_t most = 0;
  for (int64_t row = threadIdx.x; row < args.rows; row += kThreads) {
    most = larger(most, args.amax[row]);
  }
  most = block_max<kThreads>(most);
  if (threadIdx.x == 0) args.scale[0] = scale_of<Format>(most);
}

// The first kChunk elements stay in registers between the scale and the conversion. Told that three
// CTAs a multiprocessor will do, ptxas takes the registers for that on sm_80 too, where it spills
// otherwise.
template <class Format, class T, bool kWhole>
__global__ void __launch_bounds__(kThreads, 3) rows_kernel(Fp8Args args) {
  const int64_t row = blockIdx.x, start = (int64_t)threadIdx.x * kPerThread;
  const T* x = (const T*)args.x + row * args.x_stride;
  uint8_t* q = args.q + row * args.width;
  float first[kPerThread], value[kPerThread];
  load_vec_n(x + start, args.width - start, first);
  float scale;
  if constexpr (kWhole) {
    scale = args.scale[0];
  } else {
    uint32_t most = largest_of(first);
    for (int64_t i = start + kChunk; i < args.width; i += kChunk) {
      load_vec_n(x + i, args.width - i, value);
      most = larger(most, largest_of(value));
    }
    scale = scale_of<Format>(block_max<kThreads>(most));
    if (threadIdx.x == 0) args.scale[row] = scale;
  }
  const float inverse = 1.0f / scale;
  convert<Format>(q + start, args.width - start, first, inverse);
  for (int64_t i = start + kChunk; i < args.width; i += kChunk) {
    load_vec_n(x + i, args.width - i, value);
    convert<Format>(q + i, args.width - i, value, inverse);
  }
}

// kSpanLanes neighbouring lanes take a span of kSpan elements.
template <class Format, class T>
__global__ void __launch_bounds__(kThreads) spans_kernel(Fp8Args args, unsigned per_row) {
  const int64_t row = blockIdx.x / per_row, spans = (args.width + kSpan - 1) / kSpan;
  const int64_t span = (int64_t)(blockIdx.x % per_row) * kSpans + (int64_t)threadIdx.x / kSpanLanes;
  const int64_t i = span * kSpan + (int64_t)(threadIdx.x % kSpanLanes) * kPerThread;
  const int64_t left = args.width - i;
  float x[kPerThread];
  load_vec_n((const T*)args.x + row * args.x_stride + i, left, x);
  const float scale = scale_of<Format>(warp_max<kSpanLanes>(largest_of(x)));
  if (threadIdx.x % kSpanLanes == 0 && span < spans) args.scale[row * spans + span] = scale;
  convert<Format>(args.q + row * args.width + i, left, x, 1.0f / scale);
}

// Scales of kTile columns over the rows [first, last), one a column, in shared memory.
template <class Format, class T>
__device__ __forceinline__ void column_scales(const T* x, const Fp8Args& args, int64_t first,
                                              int64_t last, int64_t left, float* scales) {
  __shared__ uint32_t partial[kTileRows][kTile];
  const int group = threadIdx.x % kColumnGroups, lane_row = threadIdx.x / kColumnGroups;
  uint32_t most[kColumns] = {};
  for (int64_t m = first + lane_row; m < last; m += kTileRows) {
    float value[kColumns];
    load_vec_n(x + m * args.x_stride, left, value);
#pragma unroll
    for (int k = 0; k < kColumns; ++k) most[k] = larger(most[k], finite_magnitude(value[k]));
  }
#pragma unroll
  for (int k = 0; k < kColumns; ++k) partial[lane_row][group * kColumns + k] = most[k];
  __syncthreads();
  if (threadIdx.x < kTile) {
    uint32_t all = 0;
    for (int r = 0; r < kTileRows; ++r) all = larger(all, partial[r][threadIdx.x]);
    scales[threadIdx.x] = scale_of<Format>(all);
  }
}

// kTile columns over `unit` rows: their scales, then tiles converted and written by columns.
template <class Format, class T, bool kWhole>
__global__ void __launch_bounds__(kThreads)
    columns_kernel(Fp8Args args, unsigned units, int64_t unit) {
  __shared__ float scales[kTile];
  __shared__ uint8_t tile[kTile][kTile + kPerThread];  // [column][row]; rows stay 16-byte aligned
  const int64_t u = blockIdx.x % units, k0 = (int64_t)(blockIdx.x / units) * kTile;
  const int64_t first = u * unit, last = first + unit < args.rows ? first + unit : args.rows;
  const int group = threadIdx.x % kColumnGroups, lane_row = threadIdx.x / kColumnGroups;
  const int64_t k = k0 + group * kColumns, left = args.width - k;
  const T* x = (const T*)args.x + k;
  if constexpr (kWhole) {
    if (threadIdx.x < kTile) scales[threadIdx.x] = args.scale[0];
  } else {
    column_scales<Format>(x, args, first, last, left, scales);
    if (threadIdx.x < kTile && k0 + threadIdx.x < args.width) {
      args.scale[(k0 + threadIdx.x) * units + u] = scales[threadIdx.x];
    }
  }
  const int out_column = threadIdx.x / (kTile / kPerThread);
  const int out_row = threadIdx.x % (kTile / kPerThread) * kPerThread;
  for (int64_t m0 = first; m0 < last; m0 += kTile) {
    __syncthreads();  // the scales are there, and the previous tile has been read
    for (int r = lane_row; r < kTile; r += kTileRows) {
      float value[kColumns];
      load_vec_n(x + (m0 + r) * args.x_stride, m0 + r < last ? left : 0, value);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const float inverse = 1.0f / scales[group * kColumns + c];
        tile[group * kColumns + c][r] = (uint8_t)fp8_bits<ScalarOps, Format>(value[c], inverse);
      }
    }
    __syncthreads();
    if (k0 + out_column < args.width) {
      const uint8_t* codes = &tile[out_column][out_row];
      uint32_t words[4] = {};
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) words[i / 4] |= (uint32_t)codes[i] << (8 * (i % 4));
      const int64_t m = m0 + out_row;
      store_codes<kPerThread>(args.q + (k0 + out_column) * args.rows + m, last - m, words);
    }
  }
}

template <class Format, class T>
int quantize(const Fp8Args& args, void* stream) {
  const bool whole = args.unit == 0;
  if (whole) {
    int error = launch(amax_kernel<T>, args.rows, kThreads, stream, args);
    if (error == 0) error = launch(whole_scale_kernel<Format>, 1, kThreads, stream, args);
    if (error != 0) return error;
  }
  if (args.transposed) {
    const int64_t unit = whole ? args.rows : args.unit, units = (args.rows + unit - 1) / unit;
    const int64_t blocks = (args.width + kTile - 1) / kTile * units;
    const auto kernel = whole ? columns_kernel<Format, T, true> : columns_kernel<Format, T, false>;
    return launch(kernel, blocks, kThreads, stream, args, (unsigned)units, unit);
  }
  if (whole) return launch(rows_kernel<Format, T, true>, args.rows, kThreads, stream, args);
  if (args.unit == args.width) {
    return launch(rows_kernel<Format, T, false>, args.rows, kThreads, stream, args);
  }
  if (args.unit != kSpan) return cudaErrorInvalidConfiguration;
  const int64_t spans = (args.width + kSpan - 1) / kSpan, per_row = (spans + kSpans - 1) / kSpans;
  return launch(spans_kernel<Format, T>, args.rows * per_row, kThreads, stream, args,
                (unsigned)per_row);
}

}  // namespace

int fp8_quantize(const Fp8Args& args, void* stream) {
  return with_storage_types({args.dtype}, [&](auto x) {
    using T = typename decltype(x)::type;
    return args.format == 0 ? quantize<E4m3fn, T>(args, stream) : quantize<E5m2, T>(args, stream);
  });
}

}  // namespace qirl::cuda
