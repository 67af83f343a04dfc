#include "cpu/guide_step.h"

#include "bindings/cpu/flow.h"
#include "cpu/dtype.h"

namespace qirl {
namespace {

// coefficients: addresses of a, c, s, w, b, each float32 [rows]; delta 0: no frozen offset.
void guide_step(
    const Rows& x, const Rows& v_cond, const Rows& v_uncond, uintptr_t scale_B, bool rescale,
    int64_t width,
    const std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t>& coefficients,
    uintptr_t seed_B, int64_t offset, uintptr_t sums, uintptr_t x_next, uintptr_t logp_B,
    uintptr_t delta, int64_t rows, int64_t row_size, int threads) {
  const auto [a, c, s, w, b] = coefficients;
  GuideStepArgs g{};
  g.flow = flow_inputs("guide_step", x, v_cond, Rows{0, 0, 0}, a, c, w, rows, row_size);
  g.scale_B = as_pointer<float>(scale_B);
  g.flow.s_B = as_pointer<float>(s);
  require_finite("guide_step", "scale", g.scale_B, rows);
  require_finite("guide_step", "s", g.flow.s_B, rows);
  require_finite("guide_step", "b", as_pointer<float>(b), rows);
  g.u = address_of(v_uncond);
  g.u_stride = stride_of(v_uncond);
  g.rescale = rescale;
  g.width = width;
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
