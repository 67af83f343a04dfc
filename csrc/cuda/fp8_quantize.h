// Launcher of fp8_quantize.cu.
#pragma once

#include <stdint.h>

namespace qirl::cuda {

// As cpu/fp8_quantize.h. unit: elements a scale along a row of q; 0: one scale for everything.
struct Fp8Args {
  const void* x;
  uint8_t* q;
  float* scale;
  uint32_t* amax;  // scratch [rows] when unit is 0
  int64_t x_stride, rows, width, unit;
  int dtype, format;
  bool transposed;
};

// A cudaError_t: 0, or why the launch failed.
int fp8_quantize(const Fp8Args& args, void* stream);

}  // namespace qirl::cuda
