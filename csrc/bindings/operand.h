// Rows as the kernels of the losses take them.
#pragma once

#include "bindings/bind.h"
#include "math/rows.h"

namespace qirl {

inline Operand operand(const Rows& rows) {
  return {address_of(rows), stride_of(rows), dtype_of(rows)};
}

}  // namespace qirl
