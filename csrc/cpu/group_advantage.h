// Arguments of the group_advantage kernel, see group_advantage.inl.cpp.
#pragma once

#include "cpu/isa.h"

namespace qirl {

enum AdvantageMode : int { kZscoreSum = 0, kSumFirst = 1, kGdpo = 2 };

// N rows, K rewards, M groups; everything contiguous. `real` below is double or float.
// group_N holds 0..M-1, every group has two members or more, the rows of weights_NK agree inside a
// group, and every reward that is valid or weighted is finite: the caller has checked.
struct AdvantageArgs {
  const void* rewards_NK;  // real
  const int64_t* group_N;
  const double* weights_NK;
  const bool* valid_NK;
  void* advantage_N;  // real
  bool* keep_N;
  void* mean_MK;     // real
  void* std_MK;      // real
  void* range_M;     // real
  double* x_N;       // scratch: one reward, or the weighted sum
  double* total_N;   // scratch: the advantage so far
  double* mean_M;    // scratch
  double* spread_M;  // scratch
  double* low_M;     // scratch
  double* high_M;    // scratch
  int64_t* first_M;  // scratch: first row of each group
  int64_t* count_M;  // scratch
  bool* complete_M;  // scratch: no weighted reward of a member is invalid
  bool* counted_N;   // scratch: rows that enter a batch statistic
  int64_t n, k, m;
  double ddof, eps, std_floor, clamp, min_range;
  int mode;
  bool global_std, is_double;
};

}  // namespace qirl

QIRL_CPU_KERNEL(group_advantage)
