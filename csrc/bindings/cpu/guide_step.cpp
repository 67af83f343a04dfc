#include "cpu/guide_step.h"

#include "bindings/cpu/flow.h"
#include "cpu/dtype.h"

namespace qirl {
namespace {

// coefficients: a, c, s, w, b, each float32 [rows]. delta: absent for no frozen offset.
void guide_step(const Array& x, const Array& v_cond, const Array& v_uncond, const Array& scale_B,
                bool rescale, const std::tuple<Array, Array, Array, Array, Array>& coefficients,
                const Array& seed_B, int64_t offset, const Array& sums, const Array& x_next,
                const Array& logp_B, const Array& delta, int threads) {
  const auto [a, c, s, w, b] = coefficients;
  GuideStepArgs g{};
  g.flow = flow_inputs("guide_step", x, v_cond, Array{}, a, c, w);
  const int64_t rows = x.rows(), row_size = x.row_size();
  g.scale_B = as_pointer<float>(scale_B);
  g.flow.s_B = as_pointer<float>(s);
  require_finite("guide_step", "scale", g.scale_B, rows);
  require_finite("guide_step", "s", g.flow.s_B, rows);
  require_finite("guide_step", "b", as_pointer<float>(b), rows);
  g.u = v_uncond.data;
  g.u_stride = v_uncond.stride[0];
  g.rescale = rescale;
  g.width = x.last;
  g.delta_out = as_pointer(delta);
  g.flow.seed_B = as_pointer<int64_t>(seed_B);
  g.flow.offset = offset;
  g.flow.x_next_out = as_pointer(x_next);
  const int64_t row_bytes = row_size * dtype_bytes(g.flow.x_dtype);
  g.flow.stream = worth_streaming(g.flow.x_next_out, row_bytes, rows) &&
                  (g.delta_out == nullptr || worth_streaming(g.delta_out, row_bytes, rows));
  g.flow.sums = as_pointer<float>(sums);

  py::gil_scoped_release released;
  run_kernel(guide_step_kernels, &g, flow_tasks(rows, row_size), kFlowGrain, threads);
  finish_log_prob(g.flow, as_pointer<float>(b), as_pointer<float>(logp_B), rows);
}

const Binding binding([](py::module_& m) { m.def("guide_step", &guide_step); });

}  // namespace

}  // namespace qirl
