#include <vector>

#include "bindings/cpu/flow.h"
#include "cpu/dtype.h"
#include "cpu/flow_step.h"

namespace qirl {
namespace {

// coefficients: addresses of a, c, w, b, each float32 [rows]. residual: address 0 when not wanted.
void flow_logp(const Rows& x, const Rows& x_next, const Rows& v, const Rows& delta,
               const std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t>& coefficients,
               uintptr_t logp_B, uintptr_t residual, int64_t rows, int64_t row_size, int threads) {
  const auto [a, c, w, b] = coefficients;
  FlowArgs args = flow_inputs("flow_logp", x, v, delta, a, c, w, rows, row_size);
  require_finite("flow_logp", "b", as_pointer<float>(b), rows);
  args.x_next_in = address_of(x_next);
  args.x_next_stride = stride_of(x_next);
  args.residual = as_pointer<float>(residual);
  const int64_t tasks = flow_tasks(rows, row_size);
  std::vector<float> sums(tasks);
  args.sums = sums.data();

  py::gil_scoped_release released;
  run_kernel(flow_logp_kernels, &args, tasks, kFlowGrain, threads);
  finish_log_prob(args, as_pointer<float>(b), as_pointer<float>(logp_B), rows);
}

// coefficients: addresses of a, c, w. dx, dv: address 0 when not wanted.
void flow_logp_backward(uintptr_t grad_B, uintptr_t residual,
                        const std::tuple<uintptr_t, uintptr_t, uintptr_t>& coefficients,
                        const Rows& dx, const Rows& dv, int64_t rows, int64_t row_size,
                        int threads) {
  const auto [a, c, w] = coefficients;
  FlowArgs args{};
  args.a_B = as_pointer<float>(a);
  args.c_B = as_pointer<float>(c);
  args.w_B = as_pointer<float>(w);
  args.grad_B = as_pointer<float>(grad_B);
  args.residual = as_pointer<float>(residual);
  args.row_size = row_size;
  args.dx = address_of(dx);
  args.dv = address_of(dv);
  args.x_dtype = dtype_of(dx);
  args.v_dtype = dtype_of(dv);
  args.stream =
      (!args.dx || worth_streaming(args.dx, row_size * dtype_bytes(args.x_dtype), rows)) &&
      (!args.dv || worth_streaming(args.dv, row_size * dtype_bytes(args.v_dtype), rows));

  py::gil_scoped_release released;
  run_kernel(flow_logp_backward_kernels, &args, flow_tasks(rows, row_size), kFlowGrain, threads);
}

const Binding binding([](py::module_& m) {
  m.def("flow_logp", &flow_logp);
  m.def("flow_logp_backward", &flow_logp_backward);
});

}  // namespace

}  // namespace qirl
