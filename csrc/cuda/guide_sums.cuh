// Sums over a token in the order of the CPU kernels: lane i of 16 neighbouring threads takes
// elements i, i + 16, ...; the 16 are added by a fixed tree. All kernels that rescale use these, so
// that they agree on a token's factor to the bit.
#pragma once

#include "cuda/reduce.cuh"
#include "cuda/vec.cuh"
#include "math/guide.h"

namespace qirl::cuda {

constexpr int kTokenLanes = 16;
constexpr int kTokenHeld = 8;  // elements of a lane that are in flight together

QIRL_DEVICE float exact_sqrt(float value) { return __fsqrt_rn(value); }

// sums = {|c|^2, |g|^2, <g, dy>} of one token of n elements (the third with kWithGrad), the same in
// all of its lanes. n <= 0: zeros, for lanes without a token, which must take part in the shuffles.
template <bool kWithGrad, class T>
QIRL_DEVICE void token_sums(const T* c, const T* u, const T* dy, int64_t n, float w,
                            float (&sums)[2 + kWithGrad]) {
  constexpr int64_t kStep = kTokenLanes * kTokenHeld;
#pragma unroll
  for (int k = 0; k < 2 + kWithGrad; ++k) sums[k] = 0.0f;
  for (int64_t first = threadIdx.x % kTokenLanes; first < n; first += kStep) {
    float cv[kTokenHeld], uv[kTokenHeld], dv[kTokenHeld];
#pragma unroll
    for (int j = 0; j < kTokenHeld; ++j) {
      const int64_t i = first + j * kTokenLanes;
      cv[j] = i < n ? load(c + i) : 0.0f;
      uv[j] = i < n ? load(u + i) : 0.0f;
      if constexpr (kWithGrad) dv[j] = i < n ? load(dy + i) : 0.0f;
    }
#pragma unroll
    for (int j = 0; j < kTokenHeld; ++j) {
      const float g = guide_combine(cv[j], uv[j], w);
      sums[0] += cv[j] * cv[j];
      sums[1] += g * g;
      if constexpr (kWithGrad) sums[2] += g * dv[j];
    }
  }
  warp_sum<kTokenLanes>(sums);
}

}  // namespace qirl::cuda
