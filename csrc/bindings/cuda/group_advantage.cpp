#include "cuda/group_advantage.h"

#include "bindings/cuda/ops.h"

namespace qirl::cuda {
namespace {

// reals: 8-byte scratch, n + m (2 k + 3) + k + 1 doubles; integers: n + m.
void forward(const Whole& rewards_NK, const Whole& group_N, const Whole& weights_NK,
             const Whole& valid_NK, const Array& advantage_N, const Array& keep_N,
             const Array& mean_MK, const Array& std_MK, const Array& range_M, const Array& reals,
             const Array& integers, int64_t n, int64_t k, int64_t m, int mode, bool global_std,
             int ddof, double eps, double std_floor, double clamp, double min_range, bool is_double,
             uintptr_t stream) {
  AdvantageArgs a{};
  a.rewards_NK = as_pointer(rewards_NK);
  a.group_N = as_pointer<int64_t>(group_N);
  a.weights_NK = as_pointer<double>(weights_NK);
  a.valid_NK = as_pointer<bool>(valid_NK);
  a.advantage_N = as_pointer(advantage_N);
  a.keep_N = as_pointer<bool>(keep_N);
  a.mean_MK = as_pointer(mean_MK);
  a.std_MK = as_pointer(std_MK);
  a.range_M = as_pointer(range_M);
  a.total_N = as_pointer<double>(reals);
  a.mean_ML = a.total_N + n;
  a.spread_ML = a.mean_ML + m * (k + 1);
  a.batch_L = a.spread_ML + m * (k + 1);
  a.range64_M = a.batch_L + k + 1;
  a.members_N = as_pointer<int64_t>(integers);
  a.state_M = a.members_N + n;
  a.n = n;
  a.k = k;
  a.m = m;
  a.mode = mode;
  a.global_std = global_std;
  a.ddof = ddof;
  a.eps = eps;
  a.std_floor = std_floor;
  a.clamp = clamp;
  a.min_range = min_range;
  a.is_double = is_double;
  check("group_advantage", group_advantage(a, as_pointer(stream)));
}

const Binding binding([](py::module_& m) { m.def("group_advantage", &forward); });

}  // namespace

}  // namespace qirl::cuda
