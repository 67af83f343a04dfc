// gelu and its gradient on the GPU, from the formulas of math/gelu.h: the bits of the CPU kernels.
#include "cuda/gelu.h"

#include "cuda/pointwise.cuh"
#include "math/gelu.h"

namespace qirl::cuda {
namespace {

struct Gelu {
  static constexpr int kIn = 1, kOut = 1;
  static __device__ __forceinline__ void apply(const float* in, float* out) {
    out[0] = gelu_value<ScalarOps>(in[0]);
  }
};

struct GeluBackward {
  static constexpr int kIn = 2, kOut = 1;
  static __device__ __forceinline__ void apply(const float* in, float* out) {
    out[0] = in[0] * gelu_slope<ScalarOps>(in[1]);
  }
};

}  // namespace

int gelu(const PointwiseArgs& args, void* stream) { return run_quantized<Gelu>(args, stream); }

int gelu_backward(const PointwiseArgs& args, void* stream) {
  return run_pointwise<GeluBackward>(args, stream);
}

}  // namespace qirl::cuda
