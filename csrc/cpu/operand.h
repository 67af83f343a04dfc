// A large input as the kernels of several inputs take it, whatever its storage type.
#pragma once

#include <stdint.h>

namespace qirl {

// Rows of a tensor: row stride in elements, dense rows, a Dtype code. Null: absent.
struct Operand {
  const void* data;
  int64_t stride;
  int dtype;
};

}  // namespace qirl
