// group_advantage on the GPU, without a word to the host: a CTA takes one group and lists its
// members in row order; then one thread a column adds them in that order, in double, as the CPU
// kernel does: the same bits. Statistics of the batch (std 'global', gdpo) take a second launch of
// one CTA, which adds all rows in order.
//
// Values cannot be refused here, so a bad one (see qirl_fast/ops/group_advantage.py) makes its
// group's results NaN and keep false, and with batch statistics those of the whole batch.
#include "cuda/group_advantage.h"

#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "math/group_advantage.h"

namespace qirl::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr double kLargest = 1e60;  // as in ops/_group_checks.py
enum Mode : int { kZscoreSum = 0, kSumFirst = 1, kGdpo = 2 };
enum GroupState : int64_t { kComplete = 0, kIncomplete = 1, kBad = 2 };

QIRL_DEVICE double nan64() { return __longlong_as_double(0x7ff8000000000000ll); }

struct Sqrt {
  __device__ __forceinline__ double operator()(double value) const { return __dsqrt_rn(value); }
};

QIRL_DEVICE double magnitude64(double value) { return value < 0.0 ? -value : value; }

// Reward `column` of a row, or the weighted sum of those with a weight; NaN for an invalid reward.
template <class T>
QIRL_DEVICE double value_at(const AdvantageArgs& a, int64_t row, int64_t column) {
  const T* rewards = (const T*)a.rewards_NK;
  if (column < a.k) {
    const int64_t at = row * a.k + column;
    return a.valid_NK[at] ? (double)rewards[at] : nan64();
  }
  double sum = 0.0;
  for (int64_t at = row * a.k; at < (row + 1) * a.k; ++at) {
    if (a.weights_NK[at] != 0.0) {
      sum += a.weights_NK[at] * (a.valid_NK[at] ? (double)rewards[at] : nan64());
    }
  }
  return sum;
}

// Rows of group g, in row order: their place in members_N, and their number.
QIRL_DEVICE void list_members(const AdvantageArgs& a, int64_t g, int64_t& begin, int64_t& count) {
  __shared__ int in_warp[kWarps];
  begin = count = 0;
  for (int64_t i = threadIdx.x; i < a.n; i += kThreads) {
    begin += a.group_N[i] >= 0 && a.group_N[i] < g;
  }
  begin = block_sum<kThreads>((long long)begin);
  for (int64_t first = 0; first < a.n; first += kThreads) {
    const int64_t i = first + threadIdx.x;
    const bool mine = i < a.n && a.group_N[i] == g;
    const unsigned ballot = __ballot_sync(0xffffffffu, mine);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    __syncthreads();
    if (lane == 0) in_warp[warp] = __popc(ballot);
    __syncthreads();
    int64_t at = begin + count + __popc(ballot & ((1u << lane) - 1u));
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) at += in_warp[w];
      count += in_warp[w];
    }
    if (mine) a.members_N[at] = i;
  }
  __syncthreads();
}

// What a row says of its group; `first` is the group's first row.
template <class T>
QIRL_DEVICE int64_t row_state(const AdvantageArgs& a, int64_t row, int64_t first) {
  bool bad = false, incomplete = false, weighted = false;
  for (int64_t k = 0; k < a.k; ++k) {
    const int64_t at = row * a.k + k;
    const double weight = a.weights_NK[at];
    const bool valid = a.valid_NK[at];
    bad |= valid && !(magnitude64((double)((const T*)a.rewards_NK)[at]) <= kLargest);
    bad |= !(magnitude64(weight) <= kLargest) || weight != a.weights_NK[first * a.k + k];
    incomplete |= weight != 0.0 && !valid;
    weighted |= weight != 0.0;
  }
  return bad || !weighted ? kBad : (incomplete ? kIncomplete : kComplete);
}

template <class T>
QIRL_DEVICE void column_moments(const AdvantageArgs& a, int64_t g, const int64_t* members,
                                int64_t count, int64_t column) {
  const double first = value_at<T>(a, members[0], column);
  double sum = 0.0, squares = 0.0, low = first, high = first;
  for (int64_t j = 0; j < count; ++j) sum += value_at<T>(a, members[j], column) - first;
  const double mean = first + sum / (double)count;
  for (int64_t j = 0; j < count; ++j) {
    const double x = value_at<T>(a, members[j], column), d = x - mean;
    squares += d * d;
    low = x < low ? x : low;
    high = x > high ? x : high;
  }
  a.mean_ML[g * (a.k + 1) + column] = mean;
  a.spread_ML[g * (a.k + 1) + column] = advantage_spread(squares, (double)count, a.ddof, Sqrt{});
  if (column == a.k) a.range64_M[g] = high - low;
}

// The advantage before clamping, without the normalisation of gdpo. The group is complete.
template <class T>
QIRL_DEVICE double row_total(const AdvantageArgs& a, int64_t row, int64_t g) {
  const bool sum_first = a.mode == kSumFirst;
  double total = 0.0;
  for (int64_t column = sum_first ? a.k : 0; column < (sum_first ? a.k + 1 : a.k); ++column) {
    const double weight = sum_first ? 1.0 : a.weights_NK[row * a.k + column];
    if (weight == 0.0) continue;
    const int64_t at = g * (a.k + 1) + column;
    const double spread = a.spread_ML[at], used = a.global_std ? a.batch_L[column] : spread;
    const double divisor = advantage_divisor(spread, used, a.std_floor, a.eps);
    total += weight * advantage_zscore(value_at<T>(a, row, column), a.mean_ML[at], divisor);
  }
  return total;
}

template <class T>
QIRL_DEVICE void write_row(const AdvantageArgs& a, int64_t row, int64_t g, int64_t state,
                           double total) {
  const bool flat = state == kComplete && a.min_range > 0.0 && a.range64_M[g] <= a.min_range;
  const bool keep = state == kComplete && !flat;
  a.keep_N[row] = keep;
  const double value = keep ? advantage_clamp(total, a.clamp) : 0.0;
  ((T*)a.advantage_N)[row] = (T)(state == kBad ? nan64() : value);
}

QIRL_DEVICE bool outside(const AdvantageArgs& a, int64_t row) {
  return a.group_N[row] < 0 || a.group_N[row] >= a.m;
}

// The 1 keeps the compiler from spilling to fit more CTAs, of which there are few.
template <class T>
__global__ void __launch_bounds__(kThreads, 1) groups_kernel(AdvantageArgs a) {
  const int64_t g = blockIdx.x;
  int64_t begin, count;
  list_members(a, g, begin, count);
  const int64_t* members = a.members_N + begin;
  int64_t state = count < 2 ? kBad : kComplete;
  for (int64_t j = threadIdx.x; j < count; j += kThreads) {
    const int64_t mine = row_state<T>(a, members[j], members[0]);
    state = mine > state ? mine : state;
  }
  const bool bad = __syncthreads_or(state == kBad);
  const bool incomplete = __syncthreads_or(state == kIncomplete);
  state = bad ? kBad : (incomplete ? kIncomplete : kComplete);
  for (int64_t column = threadIdx.x; column <= a.k; column += kThreads) {
    if (!bad) column_moments<T>(a, g, members, count, column);
    if (column < a.k) {
      const int64_t at = g * (a.k + 1) + column;
      ((T*)a.mean_MK)[g * a.k + column] = (T)(bad ? nan64() : a.mean_ML[at]);
      ((T*)a.std_MK)[g * a.k + column] = (T)(bad ? nan64() : a.spread_ML[at]);
    } else {
      ((T*)a.range_M)[g] = (T)(state == kComplete ? a.range64_M[g] : nan64());
    }
  }
  if (threadIdx.x == 0) a.state_M[g] = state;
  __syncthreads();
  if (a.global_std || a.mode == kGdpo) return;  // batch_kernel writes the rows
  for (int64_t j = threadIdx.x; j < count; j += kThreads) {
    const double total = state == kComplete ? row_total<T>(a, members[j], g) : 0.0;
    write_row<T>(a, members[j], g, state, total);
  }
  if (g > 0) return;
  for (int64_t i = threadIdx.x; i < a.n; i += kThreads) {
    if (outside(a, i)) write_row<T>(a, i, 0, kBad, 0.0);
  }
}

// Mean and spread of value(row) over the rows that counts(row) names, in row order.
template <class Counts, class Value>
QIRL_DEVICE void batch_moments(const AdvantageArgs& a, Counts counts, Value value, double& mean,
                               double& spread) {
  double first = 0.0, count = 0.0, sum = 0.0, squares = 0.0;
  for (int64_t i = 0; i < a.n; ++i) {
    if (!counts(i)) continue;
    if (count == 0.0) first = value(i);
    count += 1.0;
    sum += value(i) - first;
  }
  mean = spread = 0.0;
  if (count == 0.0) return;
  mean = first + sum / count;
  for (int64_t i = 0; i < a.n; ++i) {
    if (!counts(i)) continue;
    const double d = value(i) - mean;
    squares += d * d;
  }
  spread = advantage_spread(squares, count, a.ddof, Sqrt{});
}

// One CTA.
template <class T>
__global__ void __launch_bounds__(kThreads, 1) batch_kernel(AdvantageArgs a) {
  __shared__ double batch[2];
  bool bad = false;
  for (int64_t i = threadIdx.x; i < a.n; i += kThreads) bad |= outside(a, i);
  for (int64_t g = threadIdx.x; g < a.m; g += kThreads) bad |= a.state_M[g] == kBad;
  if (__syncthreads_or(bad)) {
    for (int64_t i = threadIdx.x; i < a.n; i += kThreads) write_row<T>(a, i, 0, kBad, 0.0);
    return;
  }
  const auto complete = [&](int64_t i) { return a.state_M[a.group_N[i]] == kComplete; };
  if (a.global_std) {
    const bool sum_first = a.mode == kSumFirst;
    for (int64_t column = threadIdx.x; column <= a.k; column += kThreads) {
      if (sum_first != (column == a.k)) continue;
      double mean;
      batch_moments(
          a,
          [&](int64_t i) {
            return complete(i) && (sum_first || a.weights_NK[i * a.k + column] != 0.0);
          },
          [&](int64_t i) { return value_at<T>(a, i, column); }, mean, a.batch_L[column]);
    }
    __syncthreads();
  }
  for (int64_t i = threadIdx.x; i < a.n; i += kThreads) {
    a.total_N[i] = complete(i) ? row_total<T>(a, i, a.group_N[i]) : 0.0;
  }
  __syncthreads();
  if (a.mode == kGdpo && threadIdx.x == 0) {
    batch_moments(a, complete, [&](int64_t i) { return a.total_N[i]; }, batch[0], batch[1]);
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < a.n; i += kThreads) {
    const int64_t g = a.group_N[i];
    double total = a.total_N[i];
    if (a.mode == kGdpo) total = advantage_zscore(total, batch[0], batch[1] + a.eps);
    write_row<T>(a, i, g, a.state_M[g], total);
  }
}

template <class T>
int run(const AdvantageArgs& args, void* stream) {
  const int error = launch(groups_kernel<T>, args.m, kThreads, stream, args);
  if (error != 0 || !(args.global_std || args.mode == kGdpo)) return error;
  return launch(batch_kernel<T>, int64_t{1}, kThreads, stream, args);
}

}  // namespace

int group_advantage(const AdvantageArgs& args, void* stream) {
  return args.is_double ? run<double>(args, stream) : run<float>(args, stream);
}

}  // namespace qirl::cuda
