// swiglu: silu(gate) * up, forward and backward.
#include "cpu/swiglu.h"

#include "cpu/pointwise_block.h"
#include "math/swiglu.h"

namespace qirl {
namespace QIRL_ISA {

const char* swiglu(const void* args, int64_t begin, int64_t end) {
  return map_blocks<2, 1>(args, begin, end,
                          [](const F* x, F* y) { y[0] = swiglu_value<Ops>(x[0], x[1]); });
}

const char* swiglu_backward(const void* args, int64_t begin, int64_t end) {
  return map_blocks<3, 2>(args, begin, end, [](const F* x, F* y) {
    swiglu_gradients<Ops>(x[0], x[1], x[2], y[0], y[1]);
  });
}

}  // namespace QIRL_ISA
}  // namespace qirl
