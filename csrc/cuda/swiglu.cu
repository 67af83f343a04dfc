// swiglu and its gradients on the GPU, from the formulas of math/swiglu.h: the bits of the CPU
// kernels.
#include "cuda/swiglu.h"

#include "cuda/pointwise.cuh"
#include "math/swiglu.h"

namespace qirl::cuda {
namespace {

struct Swiglu {
  static constexpr int kIn = 2, kOut = 1;
  static __device__ __forceinline__ void apply(const float* in, float* out) {
    out[0] = swiglu_value<ScalarOps>(in[0], in[1]);
  }
};

struct SwigluBackward {
  static constexpr int kIn = 3, kOut = 2;
  static __device__ __forceinline__ void apply(const float* in, float* out) {
    swiglu_gradients<ScalarOps>(in[0], in[1], in[2], out[0], out[1]);
  }
};

}  // namespace

int swiglu(const PointwiseArgs& args, void* stream) { return run_quantized<Swiglu>(args, stream); }

int swiglu_backward(const PointwiseArgs& args, void* stream) {
  return run_pointwise<SwigluBackward>(args, stream);
}

}  // namespace qirl::cuda
