#include "cpu/group_advantage.h"

#include <memory>

#include "bindings/cpu/ops.h"

namespace qirl {
namespace {

void forward(const Whole& rewards_NK, const Whole& group_N, const Whole& weights_NK,
             const Whole& valid_NK, const Array& advantage_N, const Array& keep_N,
             const Array& mean_MK, const Array& std_MK, const Array& range_M, int64_t n, int64_t k,
             int64_t m, int mode, bool global_std, int ddof, double eps, double std_floor,
             double clamp, double min_range, bool is_double) {
  const std::unique_ptr<double[]> reals(new double[2 * n + 4 * m]);
  const std::unique_ptr<int64_t[]> integers(new int64_t[2 * m]);
  const std::unique_ptr<bool[]> flags(new bool[m + n]);
  AdvantageArgs a{};
  a.rewards_NK = as_pointer<void>(rewards_NK);
  a.group_N = as_pointer<int64_t>(group_N);
  a.weights_NK = as_pointer<double>(weights_NK);
  a.valid_NK = as_pointer<bool>(valid_NK);
  a.advantage_N = as_pointer<void>(advantage_N);
  a.keep_N = as_pointer<bool>(keep_N);
  a.mean_MK = as_pointer<void>(mean_MK);
  a.std_MK = as_pointer<void>(std_MK);
  a.range_M = as_pointer<void>(range_M);
  a.x_N = reals.get();
  a.total_N = a.x_N + n;
  a.mean_M = a.total_N + n;
  a.spread_M = a.mean_M + m;
  a.low_M = a.spread_M + m;
  a.high_M = a.low_M + m;
  a.first_M = integers.get();
  a.count_M = a.first_M + m;
  a.complete_M = flags.get();
  a.counted_N = a.complete_M + m;
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
  py::gil_scoped_release released;
  run_kernel(group_advantage_kernels, &a, 1, 1, 1);
}

const Binding binding([](py::module_& m) { m.def("group_advantage", &forward); });

}  // namespace

}  // namespace qirl
