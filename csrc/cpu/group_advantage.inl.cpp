// group_advantage: z-scores inside groups, weighted and summed. All sums run in double, in row
// order, as one task: a batch holds thousands of numbers, and one order means one result.
#include "cpu/group_advantage.h"

#include "cpu/vec.h"
#include "math/group_advantage.h"

namespace qirl {
namespace QIRL_ISA {
namespace {

QIRL_HD double double_sqrt(double value) { return __builtin_sqrt(value); }

struct Moments {
  double mean, spread;
};

QIRL_HD void find_groups(const AdvantageArgs& a) {
  for (int64_t g = 0; g < a.m; ++g) {
    a.first_M[g] = -1;
    a.count_M[g] = 0;
    a.complete_M[g] = true;
  }
  for (int64_t i = 0; i < a.n; ++i) {
    const int64_t g = a.group_N[i];
    if (a.first_M[g] < 0) a.first_M[g] = i;
    ++a.count_M[g];
    for (int64_t k = 0; k < a.k; ++k) {
      const bool needed = a.weights_NK[i * a.k + k] != 0.0;
      if (needed && !a.valid_NK[i * a.k + k]) a.complete_M[g] = false;
    }
  }
}

// An invalid reward becomes NaN, whatever the caller left in its place.
template <class T>
QIRL_HD double reward_at(const AdvantageArgs& a, int64_t at) {
  return a.valid_NK[at] ? (double)((const T*)a.rewards_NK)[at] : __builtin_nan("");
}

// x_N: the weighted sum of the rewards that have a weight.
template <class T>
QIRL_HD void load_weighted_sum(const AdvantageArgs& a) {
  for (int64_t i = 0; i < a.n; ++i) {
    double sum = 0.0;
    for (int64_t at = i * a.k; at < (i + 1) * a.k; ++at) {
      if (a.weights_NK[at] != 0.0) sum += a.weights_NK[at] * reward_at<T>(a, at);
    }
    a.x_N[i] = sum;
  }
}

// mean_M and spread_M of x_N. Deviations are taken from a member first, so that equal rewards have
// exactly that mean and a spread of exactly zero.
QIRL_HD void group_moments(const AdvantageArgs& a) {
  for (int64_t g = 0; g < a.m; ++g) a.mean_M[g] = a.spread_M[g] = 0.0;
  for (int64_t i = 0; i < a.n; ++i) {
    const int64_t g = a.group_N[i];
    a.mean_M[g] += a.x_N[i] - a.x_N[a.first_M[g]];
  }
  for (int64_t g = 0; g < a.m; ++g) {
    a.mean_M[g] = a.x_N[a.first_M[g]] + a.mean_M[g] / (double)a.count_M[g];
  }
  for (int64_t i = 0; i < a.n; ++i) {
    const double d = a.x_N[i] - a.mean_M[a.group_N[i]];
    a.spread_M[a.group_N[i]] += d * d;
  }
  for (int64_t g = 0; g < a.m; ++g) {
    a.spread_M[g] = advantage_spread(a.spread_M[g], (double)a.count_M[g], a.ddof, double_sqrt);
  }
}

// The same over the rows marked in counted_N; groups have two members, so one row is never alone.
QIRL_HD Moments batch_moments(const AdvantageArgs& a, const double* x_N) {
  double first = 0.0, count = 0.0, sum = 0.0, squares = 0.0;
  for (int64_t i = 0; i < a.n; ++i) {
    if (!a.counted_N[i]) continue;
    if (count == 0.0) first = x_N[i];
    count += 1.0;
    sum += x_N[i] - first;
  }
  if (count == 0.0) return {0.0, 0.0};
  const double mean = first + sum / count;
  for (int64_t i = 0; i < a.n; ++i) {
    if (a.counted_N[i]) squares += (x_N[i] - mean) * (x_N[i] - mean);
  }
  return {mean, advantage_spread(squares, count, a.ddof, double_sqrt)};
}

// total_N += weight * z-score of x_N; weights_N is null for weight 1, else has stride K.
QIRL_HD void add_zscores(const AdvantageArgs& a, const double* weights_N) {
  double global_spread = 0.0;
  if (a.global_std) {
    for (int64_t i = 0; i < a.n; ++i) {
      const bool weighted = weights_N == nullptr || weights_N[i * a.k] != 0.0;
      a.counted_N[i] = weighted && a.complete_M[a.group_N[i]];
    }
    global_spread = batch_moments(a, a.x_N).spread;
  }
  for (int64_t i = 0; i < a.n; ++i) {
    const int64_t g = a.group_N[i];
    const double weight = weights_N == nullptr ? 1.0 : weights_N[i * a.k];
    if (weight == 0.0 || !a.complete_M[g]) continue;
    const double used = a.global_std ? global_spread : a.spread_M[g];
    const double divisor = advantage_divisor(a.spread_M[g], used, a.std_floor, a.eps);
    a.total_N[i] += weight * advantage_zscore(a.x_N[i], a.mean_M[g], divisor);
  }
}

QIRL_HD void normalise_batch(const AdvantageArgs& a) {
  for (int64_t i = 0; i < a.n; ++i) a.counted_N[i] = a.complete_M[a.group_N[i]];
  const Moments batch = batch_moments(a, a.total_N);
  for (int64_t i = 0; i < a.n; ++i) {
    a.total_N[i] = advantage_zscore(a.total_N[i], batch.mean, batch.spread + a.eps);
  }
}

// Range of x_N (the weighted sum) in each group; NaN for a group that is not complete.
template <class T>
QIRL_HD void write_ranges(const AdvantageArgs& a) {
  for (int64_t g = 0; g < a.m; ++g) a.low_M[g] = a.high_M[g] = a.x_N[a.first_M[g]];
  for (int64_t i = 0; i < a.n; ++i) {
    const int64_t g = a.group_N[i];
    if (a.x_N[i] < a.low_M[g]) a.low_M[g] = a.x_N[i];
    if (a.x_N[i] > a.high_M[g]) a.high_M[g] = a.x_N[i];
  }
  for (int64_t g = 0; g < a.m; ++g) {
    ((T*)a.range_M)[g] = (T)(a.complete_M[g] ? a.high_M[g] - a.low_M[g] : __builtin_nan(""));
  }
}

template <class T>
QIRL_HD void write_rows(const AdvantageArgs& a) {
  for (int64_t i = 0; i < a.n; ++i) {
    const int64_t g = a.group_N[i];
    const bool flat = a.min_range > 0.0 && a.high_M[g] - a.low_M[g] <= a.min_range;
    a.keep_N[i] = a.complete_M[g] && !flat;
    const double clamped = advantage_clamp(a.total_N[i], a.clamp);
    ((T*)a.advantage_N)[i] = (T)(a.keep_N[i] ? clamped : 0.0);
  }
}

template <class T>
QIRL_HD void all_groups(const AdvantageArgs& a) {
  find_groups(a);
  for (int64_t i = 0; i < a.n; ++i) a.total_N[i] = 0.0;
  for (int64_t k = 0; k < a.k; ++k) {
    for (int64_t i = 0; i < a.n; ++i) a.x_N[i] = reward_at<T>(a, i * a.k + k);
    group_moments(a);
    for (int64_t g = 0; g < a.m; ++g) {
      ((T*)a.mean_MK)[g * a.k + k] = (T)a.mean_M[g];
      ((T*)a.std_MK)[g * a.k + k] = (T)a.spread_M[g];
    }
    if (a.mode != kSumFirst) add_zscores(a, a.weights_NK + k);
  }
  load_weighted_sum<T>(a);
  write_ranges<T>(a);
  if (a.mode == kSumFirst) {
    group_moments(a);
    add_zscores(a, nullptr);
  }
  if (a.mode == kGdpo) normalise_batch(a);
  write_rows<T>(a);
}

}  // namespace

const char* group_advantage(const void* args, int64_t, int64_t) {
  const AdvantageArgs& a = *(const AdvantageArgs*)args;
  a.is_double ? all_groups<double>(a) : all_groups<float>(a);
  return kIsaName;
}

}  // namespace QIRL_ISA
}  // namespace qirl
