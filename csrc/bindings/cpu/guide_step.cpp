#include "cpu/guide_step.h"

#include <vector>

#include "bindings/cpu/flow.h"
#include "cpu/dtype.h"

namespace qirl {
namespace {

// The coefficients are float32 [rows]. Returns x_next, logp_B and, for `frozen`, delta.
py::tuple guide_step(const Rows& x, const Rows& v_cond, const Rows& v_uncond, const Whole& scale_B,
                     bool rescale, const Whole& a, const Whole& c, const Whole& s, const Whole& w,
                     const Whole& b, const Whole& seed_B, int64_t offset, bool frozen,
                     int threads) {
  GuideStepArgs g{};
  g.flow = flow_inputs("guide_step", x, v_cond, Array{}, a, c, w);
  const int64_t rows = x.rows(), tasks = flow_tasks(rows, g.flow.row_size);
  g.scale_B = as_pointer<float>(scale_B);
  g.flow.s_B = as_pointer<float>(s);
  require_finite("guide_step", "scale", g.scale_B, rows);
  require_finite("guide_step", "s", g.flow.s_B, rows);
  require_finite("guide_step", "b", as_pointer<float>(b), rows);
  g.u = v_uncond.data;
  g.u_stride = v_uncond.stride[0];
  g.rescale = rescale;
  g.width = x.last;
  g.flow.seed_B = as_pointer<int64_t>(seed_B);
  g.flow.offset = offset;
  const Output x_next = output_like(x, x.dtype()), logp_B = output_like(a, kFloat32);
  const Output delta = frozen ? output_like(x, x.dtype()) : no_output(x.dtype());
  g.flow.x_next_out = x_next.data;
  g.delta_out = delta.data;
  g.flow.stream = streams(x_next, x, x.dtype()) && streams(delta, x, x.dtype());
  std::vector<float> sums(tasks);
  g.flow.sums = sums.data();
  {
    py::gil_scoped_release released;
    run_kernel(guide_step_kernels, &g, tasks, kFlowGrain, threads);
    finish_log_prob(g.flow, as_pointer<float>(b), logp_B.as<float>(), rows);
  }
  return py::make_tuple(x_next.tensor, logp_B.tensor, delta.tensor);
}

const Binding binding([](py::module_& m) { m.def("guide_step", &guide_step); });

}  // namespace

}  // namespace qirl
