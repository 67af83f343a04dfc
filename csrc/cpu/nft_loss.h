// Arguments of the nft_loss kernels, see nft_loss.inl.cpp.
#pragma once

#include "cpu/isa.h"
#include "math/rows.h"
#include "math/nft_loss.h"

namespace qirl {

// Rows of row_size elements from first_row on; a task is one block of kRowBlock elements of one
// row, task 0 the first of first_row.
struct NftArgs {
  Operand v, v_old, v_ref, x_t, x0;  // v_ref may be absent
  const float* sigma_B;
  double beta;
  float* sums;         // [kNftSums] of each task from first_row on
  const NftRow* rows;  // gradient: from row 0 on
  void* dv;            // gradient: contiguous, dtype of v
  int64_t first_row, row_size;
  bool stream;
};

}  // namespace qirl

QIRL_CPU_KERNEL(nft_loss)
QIRL_CPU_KERNEL(nft_loss_gradient)
