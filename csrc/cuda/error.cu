#include "cuda/error.h"

#include <cuda_runtime.h>

namespace qirl::cuda {

const char* error_text(int error) { return cudaGetErrorString((cudaError_t)error); }

}  // namespace qirl::cuda
