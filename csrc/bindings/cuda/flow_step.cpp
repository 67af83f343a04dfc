#include "bindings/cuda/flow.h"

namespace qirl::cuda {
namespace {

void step(const Rows& x, const Rows& v, const Rows& delta, const Coefficients& coefficients,
          const Whole& s_B, const Whole& seed_B, int64_t offset, const Array& sums,
          const Array& x_next, const Array& logp_B, uintptr_t stream) {
  FlowArgs args = flow_inputs(x, v, delta, coefficients);
  args.s_B = as_pointer<float>(s_B);
  args.seed_B = as_pointer<int64_t>(seed_B);
  args.offset = offset;
  args.sums = as_pointer<float>(sums);
  args.x_next_out = as_pointer(x_next);
  args.logp_B = as_pointer<float>(logp_B);
  check("flow_step", flow_step(args, as_pointer(stream)));
}

void logp(const Rows& x, const Rows& x_next, const Rows& v, const Rows& delta,
          const Coefficients& coefficients, const Array& sums, const Array& logp_B,
          const Array& residual, uintptr_t stream) {
  FlowArgs args = flow_inputs(x, v, delta, coefficients);
  args.x_next_in = x_next.data;
  args.x_next_stride = x_next.stride[0];
  args.sums = as_pointer<float>(sums);
  args.logp_B = as_pointer<float>(logp_B);
  args.residual = as_pointer<float>(residual);
  check("flow_logp", flow_logp(args, as_pointer(stream)));
}

// coefficients: a, c, w.
void logp_backward(const Whole& grad_B, const Whole& residual,
                   const std::tuple<Whole, Whole, Whole>& coefficients, const Array& dx,
                   const Array& dv, uintptr_t stream) {
  const auto [a, c, w] = coefficients;
  FlowArgs args{};
  args.a_B = as_pointer<float>(a);
  args.c_B = as_pointer<float>(c);
  args.w_B = as_pointer<float>(w);
  args.grad_B = as_pointer<float>(grad_B);
  args.residual = as_pointer<float>(residual);
  args.rows = residual.rows();
  args.row_size = residual.row_size();
  args.dx = dx.data;
  args.dv = dv.data;
  args.x_dtype = dx.dtype();
  args.v_dtype = dv.dtype();
  check("flow_logp_backward", flow_logp_backward(args, as_pointer(stream)));
}

const Binding binding([](py::module_& m) {
  m.def("flow_step", &step);
  m.def("flow_logp", &logp);
  m.def("flow_logp_backward", &logp_backward);
});

}  // namespace

}  // namespace qirl::cuda
