// Launchers of guide.cu. Each returns a cudaError_t: 0, or why the launch failed.
#pragma once

#include <stdint.h>

namespace qirl::cuda {

// As cpu/guide.h: B rows of row_size elements, tokens of `width`, row strides in elements, outputs
// contiguous.
struct GuideArgs {
  const void* c;
  const void* u;
  const void* dy;  // backward only
  const float* scale_B;
  void* out;   // forward: y; backward: dc
  void* out2;  // backward: du
  int64_t rows, row_size, width;
  int64_t c_stride, u_stride, dy_stride;
  int dtype;
  bool rescale;
};

int guide(const GuideArgs& args, void* stream);
int guide_backward(const GuideArgs& args, void* stream);

}  // namespace qirl::cuda
