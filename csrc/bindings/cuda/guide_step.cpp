#include "cuda/guide_step.h"

#include "bindings/cuda/flow.h"

namespace qirl::cuda {
namespace {

// coefficients: a, c, s, w, b, each float32 [rows]. delta: absent for no frozen offset.
void step(const Rows& x, const Rows& v_cond, const Rows& v_uncond, const Whole& scale_B,
          bool rescale, const std::tuple<Whole, Whole, Whole, Whole, Whole>& coefficients,
          const Whole& seed_B, int64_t offset, const Array& sums, const Array& x_next,
          const Array& logp_B, const Array& delta, uintptr_t stream) {
  const auto [a, c, s, w, b] = coefficients;
  GuideStepArgs g{};
  g.flow = flow_inputs(x, v_cond, Array{}, {a, c, w, b});
  g.flow.s_B = as_pointer<float>(s);
  g.flow.seed_B = as_pointer<int64_t>(seed_B);
  g.flow.offset = offset;
  g.flow.sums = as_pointer<float>(sums);
  g.flow.x_next_out = as_pointer(x_next);
  g.flow.logp_B = as_pointer<float>(logp_B);
  g.u = v_uncond.data;
  g.u_stride = v_uncond.stride[0];
  g.scale_B = as_pointer<float>(scale_B);
  g.rescale = rescale;
  g.width = x.last;
  g.delta_out = as_pointer(delta);
  check("guide_step", guide_step(g, as_pointer(stream)));
}

const Binding binding([](py::module_& m) { m.def("guide_step", &step); });

}  // namespace

}  // namespace qirl::cuda
