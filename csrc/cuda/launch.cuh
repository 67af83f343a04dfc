// The one way a kernel is launched: nvcc turns it into <<<...>>>, the emulator (csrc/emulate) into
// a loop over the threads of every block on the host.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

namespace qirl::cuda {

// kernel(args...) on grid x block threads; a cudaError_t. The arguments are converted to the
// kernel's parameter types.
template <class... Params, class... Args>
int launch(void (*kernel)(Params...), dim3 grid, dim3 block, void* stream, Args... args) {
#if defined(QIRL_EMULATED)
  (void)stream;
  return emulate::run(grid, block, [&] { kernel(args...); });
#else
  // clang-format off
  kernel<<<grid, block, 0, (cudaStream_t)stream>>>(args...);
  // clang-format on
  return cudaGetLastError();
#endif
}

// One-dimensional grid of any computed size; one that no GPU takes is an error, not a smaller grid.
template <class... Params, class... Args>
int launch(void (*kernel)(Params...), int64_t blocks, int threads, void* stream, Args... args) {
  if (blocks < 1 || blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  return launch(kernel, dim3((unsigned)blocks), dim3((unsigned)threads), stream, args...);
}

}  // namespace qirl::cuda
