// policy_loss on the GPU in one launch: a CTA takes kThreads rows at a time in double, and three
// threads of different warps add one quantity each, in row order as the CPU kernel.
#include "cuda/policy_loss.h"

#include "cuda/launch.cuh"
#include "math/policy_loss.h"

namespace qirl::cuda {
namespace {

constexpr int kThreads = 256, kQuantities = 3;  // loss, log ratio squared, outside

template <class T>
__global__ void __launch_bounds__(kThreads) policy_kernel(PolicyArgs args) {
  __shared__ double terms[kQuantities][kThreads];
  const double rows = (double)args.rows;
  const bool adds = threadIdx.x % 32 == 0 && threadIdx.x / 32 < kQuantities;
  const int quantity = threadIdx.x / 32;
  double total = 0.0;
  for (int64_t first = 0; first < args.rows; first += kThreads) {
    const int64_t i = first + threadIdx.x, left = args.rows - first;
    if (i < args.rows) {
      const double log_ratio =
          (double)((const T*)args.logp_B)[i] - (double)((const T*)args.logp_old_B)[i];
      const double ratio = exp(log_ratio);
      const double advantage = (double)((const T*)args.advantage_B)[i];
      const PolicyTerm<double> term = policy_term(ratio, advantage, args.low, args.high);
      terms[0][threadIdx.x] = term.loss;
      terms[1][threadIdx.x] = log_ratio * log_ratio;
      terms[2][threadIdx.x] = term.outside ? 1.0 : 0.0;
      ((T*)args.ratio_B)[i] = (T)ratio;
      ((T*)args.grad_B)[i] = (T)(term.grad / rows);
    }
    __syncthreads();
    if (adds) {
      const int count = left < kThreads ? (int)left : kThreads;
      for (int k = 0; k < count; ++k) total += terms[quantity][k];
    }
    __syncthreads();
  }
  if (!adds) return;
  if (quantity == 0) *(T*)args.loss = (T)(total / rows);
  if (quantity == 1) *(T*)args.approx_kl = (T)(0.5 * total / rows);
  if (quantity == 2) *(T*)args.clip_fraction = (T)(total / rows);
}

}  // namespace

int policy_loss(const PolicyArgs& args, void* stream) {
  return args.is_double ? launch(policy_kernel<double>, (int64_t)1, kThreads, stream, args)
                        : launch(policy_kernel<float>, (int64_t)1, kThreads, stream, args);
}

}  // namespace qirl::cuda
