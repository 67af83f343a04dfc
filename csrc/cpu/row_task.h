// How the rows of the losses are cut into tasks, for kernels and bindings.
#pragma once

#include <stdint.h>

namespace qirl {

constexpr int64_t kRowBlock = 1024;
constexpr int64_t kRowPart = 256;  // elements of a block whose sums are one chain a lane

inline int64_t blocks_per_row(int64_t row_size) { return (row_size + kRowBlock - 1) / kRowBlock; }

}  // namespace qirl
