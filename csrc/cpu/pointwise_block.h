// The loop over blocks of the pointwise kernels.
#pragma once

#include "cpu/dtype.h"
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

// body(in, out): reads one vector of each of kIn inputs, writes one of each of kOut outputs.
template <int kIn, int kOut, class T, class Body>
QIRL_HD void map_blocks_of(const PointwiseArgs& a, int64_t begin, int64_t end, Body body) {
  const int64_t per_row = (a.width + kPointwiseBlock - 1) / kPointwiseBlock;
  int64_t row = begin / per_row, start = (begin % per_row) * kPointwiseBlock;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t left = a.width - start;
    const T* in[kIn];
    T* out[kOut];
    for (int k = 0; k < kIn; ++k) in[k] = (const T*)a.in[k] + row * a.in_stride[k] + start;
    for (int k = 0; k < kOut; ++k) out[k] = (T*)a.out[k] + row * a.width + start;
    map_span<kIn, kOut>(in, out, left < kPointwiseBlock ? left : kPointwiseBlock, a.stream, body);
    start += kPointwiseBlock;
    if (start >= a.width) {
      start = 0;
      ++row;
    }
  }
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
