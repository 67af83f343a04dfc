#include "bindings/cuda/flow.h"

namespace qirl::cuda {
namespace {

void step(const Rows& x, const Rows& v, const Rows& delta, const Coefficients& coefficients,
          uintptr_t s_B, uintptr_t seed_B, int64_t offset, uintptr_t sums, uintptr_t x_next,
          uintptr_t logp_B, int64_t rows, int64_t row_size, uintptr_t stream) {
  FlowArgs args = flow_inputs(x, v, delta, coefficients, rows, row_size);
  args.s_B = as_pointer<float>(s_B);
  args.seed_B = as_pointer<int64_t>(seed_B);
  args.offset = offset;
  args.sums = as_pointer<float>(sums);
  args.x_next_out = as_pointer(x_next);
  args.logp_B = as_pointer<float>(logp_B);
  check("flow_step", flow_step(args, as_pointer(stream)));
}

void logp(const Rows& x, const Rows& x_next, const Rows& v, const Rows& delta,
          const Coefficients& coefficients, uintptr_t sums, uintptr_t logp_B, uintptr_t residual,
          int64_t rows, int64_t row_size, uintptr_t stream) {
  FlowArgs args = flow_inputs(x, v, delta, coefficients, rows, row_size);
  args.x_next_in = address_of(x_next);
  args.x_next_stride = stride_of(x_next);
  args.sums = as_pointer<float>(sums);
  args.logp_B = as_pointer<float>(logp_B);
  args.residual = as_pointer<float>(residual);
  check("flow_logp", flow_logp(args, as_pointer(stream)));
}

// coefficients: addresses of a, c, w.
void logp_backward(uintptr_t grad_B, uintptr_t residual,
                   const std::tuple<uintptr_t, uintptr_t, uintptr_t>& coefficients, const Rows& dx,
                   const Rows& dv, int64_t rows, int64_t row_size, uintptr_t stream) {
  const auto [a, c, w] = coefficients;
  FlowArgs args{};
  args.a_B = as_pointer<float>(a);
  args.c_B = as_pointer<float>(c);
  args.w_B = as_pointer<float>(w);
  args.grad_B = as_pointer<float>(grad_B);
  args.residual = as_pointer<float>(residual);
  args.rows = rows;
  args.row_size = row_size;
  args.dx = address_of(dx);
  args.dv = address_of(dv);
  args.x_dtype = dtype_of(dx);
  args.v_dtype = dtype_of(dv);
  check("flow_logp_backward", flow_logp_backward(args, as_pointer(stream)));
}

const Binding binding([](py::module_& m) {
  m.def("flow_step", &step);
  m.def("flow_logp", &logp);
  m.def("flow_logp_backward", &logp_backward);
});

}  // namespace

}  // namespace qirl::cuda
