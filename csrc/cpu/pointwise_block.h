// The loop over blocks of the pointwise kernels.
#pragma once

#include <stdlib.h>

#include "cpu/dtype.h"
#include "cpu/fp8_row.h"
#include "cpu/pointwise.h"
#include "cpu/vec.h"

namespace qirl {
namespace QIRL_ISA {

template <int kIn, int kOut, class T, class Body>
QIRL_HD void map_vectors(const T* const* in, T* const* out, int64_t from, int64_t size, bool stream,
                         Body body) {
  for_vectors(size - from, [&](int64_t i, int n) {
    F x[kIn], y[kOut];
    for (int k = 0; k < kIn; ++k) x[k] = load_n(in[k] + from + i, n);
    body(x, y);
    for (int k = 0; k < kOut; ++k) {
      store_n(out[k] + from + i, round_own(out[k], y[k]), n, stream);
    }
  });
}

template <int kIn, int kOut, class Body>
QIRL_HD void map_span(const float* const* in, float* const* out, int64_t size, bool stream,
                      Body body) {
  map_vectors<kIn, kOut>(in, out, 0, size, stream, body);
}

// Two vectors at a time, the even elements and the odd ones: a shift and a mask take them apart and
// put them together, where widening and narrowing would cost three operations each.
template <int kIn, int kOut, class Body>
QIRL_HD void map_span(const bf16* const* in, bf16* const* out, int64_t size, bool stream,
                      Body body) {
  int64_t i = 0;
  for (; i + 2 * kLanes <= size; i += 2 * kLanes) {
    F even[kIn], odd[kIn], y_even[kOut], y_odd[kOut];
    for (int k = 0; k < kIn; ++k) {
      const U pair = (U)load((const float*)(in[k] + i));
      even[k] = (F)(pair << 16);
      odd[k] = (F)(pair & 0xffff0000u);
    }
    body(even, y_even);
    body(odd, y_odd);
    for (int k = 0; k < kOut; ++k) {
      const U low = (U)round_own(out[k], y_even[k]) >> 16;
      const U high = (U)round_own(out[k], y_odd[k]) & 0xffff0000u;
      store((float*)(out[k] + i), (F)(low | high), stream);
    }
  }
  map_vectors<kIn, kOut>(in, out, i, size, stream, body);
}

// body(row, start, size) for each task's block.
template <class Body>
QIRL_HD void for_blocks(const PointwiseArgs& a, int64_t begin, int64_t end, Body body) {
  const int64_t per_row = (a.width + a.block - 1) / a.block;
  int64_t row = begin / per_row, start = (begin % per_row) * a.block;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t left = a.width - start;
    body(row, start, left < a.block ? left : a.block);
    start += a.block;
    if (start >= a.width) {
      start = 0;
      ++row;
    }
  }
}

// body(in, out): reads one vector of each of kIn inputs, writes one of each of kOut outputs. An
// output that is wanted in 8-bit floats too waits in scratch for its scale.
template <int kIn, int kOut, class T, class Body>
QIRL_HD void map_blocks_of(const PointwiseArgs& a, int64_t begin, int64_t end, Body body) {
  T* scratch = nullptr;
  if (kOut == 1 && a.fp8.q != nullptr) {
    scratch = (T*)aligned_alloc(64, (sizeof(T) * a.block + 63) / 64 * 64);
    if (scratch == nullptr) abort();
  }
  for_blocks(a, begin, end, [&](int64_t row, int64_t start, int64_t size) {
    const T* in[kIn];
    T* out[kOut];
    for (int k = 0; k < kIn; ++k) in[k] = (const T*)a.in[k] + row * a.in_stride[k] + start;
    for (int k = 0; k < kOut; ++k) {
      out[k] = scratch ? scratch : (T*)a.out[k] + row * a.width + start;
    }
    map_span<kIn, kOut>(in, out, size, a.stream && !scratch, body);
    if (scratch) {
      store_quantized(scratch, (T*)a.out[0], a.fp8, row, a.width, start, size, a.stream);
    }
  });
  free(scratch);
  if (a.stream) stream_fence();
}

template <int kIn, int kOut, class Body>
QIRL_HD const char* map_blocks(const void* args, int64_t begin, int64_t end, Body body) {
  const PointwiseArgs& a = *(const PointwiseArgs*)args;
  a.dtype == kFloat32 ? map_blocks_of<kIn, kOut, float>(a, begin, end, body)
                      : map_blocks_of<kIn, kOut, bf16>(a, begin, end, body);
  return kIsaName;
}

}  // namespace QIRL_ISA
}  // namespace qirl
