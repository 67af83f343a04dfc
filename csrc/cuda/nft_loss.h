// Launcher of nft_loss.cu: raw pointers, sizes, strides and a stream; no CUDA or torch types.
#pragma once

#include "math/nft_loss.h"
#include "math/rows.h"

namespace qirl::cuda {

struct NftArgs {
  Operand v, v_old, v_ref, x_t, x0;  // v_ref may be absent
  const float* sigma_B;
  const float* advantage_B;
  float* sums;      // scratch [B, blocks a row, kNftSums]
  float* slopes_B;  // scratch [3, B]
  double* terms_B;  // scratch [B]
  float* metrics;   // [4, B]
  float* loss;
  void* dv;  // contiguous, dtype of v; null: not wanted
  NftOptions options;
  int64_t rows, row_size;
};

// A cudaError_t: 0, or why the launch failed.
int nft_loss(const NftArgs& args, void* stream);

}  // namespace qirl::cuda
