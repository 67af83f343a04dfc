// Rows as the kernels of the losses take them.
#pragma once

#include "bindings/bind.h"
#include "math/rows.h"

namespace qirl {

inline Operand operand(const Array& rows) { return {rows.data, rows.stride[0], rows.dtype()}; }

}  // namespace qirl
