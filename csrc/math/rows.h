// How the losses see their inputs and cut rows into sums, on the host and the device.
//
// A row is cut into blocks of kRowBlock elements. Element i of a block goes to lane i % 16 of part
// i / kRowPart; each lane of a part is added in turn, parts are added to each other in turn, then
// the lanes by a tree (i + i + 8, then + 4, + 2, + 1), all in float32; the blocks in turn, in
// float64. The short chains keep the rounding near that of PyTorch's sum.
#pragma once

#include <stdint.h>

namespace qirl {

constexpr int64_t kRowBlock = 1024;
constexpr int64_t kRowPart = 256;

inline int64_t blocks_per_row(int64_t row_size) { return (row_size + kRowBlock - 1) / kRowBlock; }

// Rows of a tensor: row stride in elements, dense rows, a Dtype code. Null: absent.
struct Operand {
  const void* data;
  int64_t stride;
  int dtype;
};

}  // namespace qirl
