// qirl_fast._cuda: CUDA kernels, bound with tensors and a stream.
#include <stdexcept>
#include <string>

#include "bindings/cuda/ops.h"
#include "cuda/error.h"

namespace qirl::cuda {

void check(const char* op, int error) {
  if (error == 0) return;
  throw std::runtime_error(std::string(op) + ": CUDA launch failed: " + error_text(error) + " (" +
                           std::to_string(error) + ").");
}

}  // namespace qirl::cuda

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels; arguments are tensors, None for absent, and a stream.";
  qirl::Binding::bind_all(m);
}
