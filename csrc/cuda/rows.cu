// The mean over rows that ends a loss.
#include "cuda/rows.h"

#include "cuda/launch.cuh"
#include "cuda/rows.cuh"

namespace qirl::cuda {
namespace {

__global__ void __launch_bounds__(32) mean_kernel(const double* terms, int64_t rows, float* loss) {
  const double total = ordered_sum(terms, rows);
  if (threadIdx.x == 0) *loss = (float)(total / (double)rows);
}

}  // namespace

int mean_of_rows(const double* terms, int64_t rows, float* loss, void* stream) {
  return launch(mean_kernel, (int64_t)1, 32, stream, terms, rows, loss);
}

}  // namespace qirl::cuda
