// Launcher of group_advantage.cu.
#pragma once

#include <stdint.h>

namespace qirl::cuda {

// As cpu/group_advantage.h: N rows, K rewards, M groups; everything contiguous; `real` is double or
// float. Values are not checked by the caller.
struct AdvantageArgs {
  const void* rewards_NK;  // real
  const int64_t* group_N;
  const double* weights_NK;
  const bool* valid_NK;
  void* advantage_N;  // real
  bool* keep_N;
  void* mean_MK;       // real
  void* std_MK;        // real
  void* range_M;       // real
  double* total_N;     // scratch, and the rest:
  double* mean_ML;     // L = K + 1 columns: the rewards, then their weighted sum
  double* spread_ML;   //
  double* batch_L;     // spread of each column over the batch
  double* range64_M;   // highest minus lowest weighted sum
  int64_t* members_N;  // rows, group by group
  int64_t* state_M;    // GroupState
  int64_t n, k, m;
  double ddof, eps, std_floor, clamp, min_range;
  int mode;  // 0 zscore_sum, 1 sum_first, 2 gdpo
  bool global_std, is_double;
};

// A cudaError_t: 0, or why the launch failed. One launch, two with batch statistics.
int group_advantage(const AdvantageArgs& args, void* stream);

}  // namespace qirl::cuda
