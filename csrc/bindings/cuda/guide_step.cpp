#include "cuda/guide_step.h"

#include "bindings/cuda/flow.h"

namespace qirl::cuda {
namespace {

// coefficients: addresses of a, c, s, w, b, each float32 [rows]; delta 0: no frozen offset.
void step(const Rows& x, const Rows& v_cond, const Rows& v_uncond, uintptr_t scale_B, bool rescale,
          int64_t width,
          const std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t>& coefficients,
          uintptr_t seed_B, int64_t offset, uintptr_t sums, uintptr_t x_next, uintptr_t logp_B,
          uintptr_t delta, int64_t rows, int64_t row_size, uintptr_t stream) {
  const auto [a, c, s, w, b] = coefficients;
  GuideStepArgs g{};
  g.flow = flow_inputs(x, v_cond, Rows{0, 0, 0}, {a, c, w, b}, rows, row_size);
  g.flow.s_B = as_pointer<float>(s);
  g.flow.seed_B = as_pointer<int64_t>(seed_B);
  g.flow.offset = offset;
  g.flow.sums = as_pointer<float>(sums);
  g.flow.x_next_out = as_pointer(x_next);
  g.flow.logp_B = as_pointer<float>(logp_B);
  g.u = address_of(v_uncond);
  g.u_stride = stride_of(v_uncond);
  g.scale_B = as_pointer<float>(scale_B);
  g.rescale = rescale;
  g.width = width;
  g.delta_out = as_pointer(delta);
  check("guide_step", guide_step(g, as_pointer(stream)));
}

const Binding binding([](py::module_& m) { m.def("guide_step", &step); });

}  // namespace

}  // namespace qirl::cuda
