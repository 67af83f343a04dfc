// gelu: tanh approximation, forward and backward.
#include "cpu/gelu.h"

#include "cpu/pointwise_block.h"
#include "math/gelu.h"

namespace qirl {
namespace QIRL_ISA {

const char* gelu(const void* args, int64_t begin, int64_t end) {
  return map_blocks<1, 1>(args, begin, end, [](const F* x, F* y) { y[0] = gelu_value<Ops>(x[0]); });
}

const char* gelu_backward(const void* args, int64_t begin, int64_t end) {
  return map_blocks<2, 1>(args, begin, end,
                          [](const F* x, F* y) { y[0] = x[0] * gelu_slope<Ops>(x[1]); });
}

}  // namespace QIRL_ISA
}  // namespace qirl
