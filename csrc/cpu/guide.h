// Arguments of the guide kernels, see guide.inl.cpp.
#pragma once

#include "cpu/isa.h"

namespace qirl {

// B rows of `row_size` elements; with rescale each row is row_size / width tokens of `width`.
// c, u and dy have row strides (in elements) and dense rows; outputs are contiguous.
struct GuideArgs {
  const void* c;
  const void* u;
  const void* dy;  // backward only
  const float* scale_B;
  void* out;   // forward: y; backward: dc
  void* out2;  // backward: du
  int64_t row_size, width;
  int64_t c_stride, u_stride, dy_stride;
  int dtype;
  bool rescale, stream;
};

// A task is one token with rescale, else one block of kGuideBlock elements.
constexpr int64_t kGuideBlock = 4096;

}  // namespace qirl

QIRL_CPU_KERNEL(guide)
QIRL_CPU_KERNEL(guide_backward)
