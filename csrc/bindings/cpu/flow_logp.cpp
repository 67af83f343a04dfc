#include <vector>

#include "bindings/cpu/flow.h"
#include "cpu/dtype.h"
#include "cpu/flow_step.h"

namespace qirl {
namespace {

// coefficients: a, c, w, b, each float32 [rows]. residual: absent when not wanted.
void flow_logp(const Array& x, const Array& x_next, const Array& v, const Array& delta,
               const std::tuple<Array, Array, Array, Array>& coefficients, const Array& logp_B,
               const Array& residual, int threads) {
  const auto [a, c, w, b] = coefficients;
  FlowArgs args = flow_inputs("flow_logp", x, v, delta, a, c, w);
  const int64_t rows = x.rows(), row_size = args.row_size;
  require_finite("flow_logp", "b", as_pointer<float>(b), rows);
  args.x_next_in = x_next.data;
  args.x_next_stride = x_next.stride[0];
  args.residual = as_pointer<float>(residual);
  const int64_t tasks = flow_tasks(rows, row_size);
  std::vector<float> sums(tasks);
  args.sums = sums.data();

  py::gil_scoped_release released;
  run_kernel(flow_logp_kernels, &args, tasks, kFlowGrain, threads);
  finish_log_prob(args, as_pointer<float>(b), as_pointer<float>(logp_B), rows);
}

// coefficients: a, c, w. dx, dv: absent when not wanted.
void flow_logp_backward(const Array& grad_B, const Array& residual,
                        const std::tuple<Array, Array, Array>& coefficients, const Array& dx,
                        const Array& dv, int threads) {
  const auto& [a, c, w] = coefficients;
  const int64_t rows = residual.rows(), row_size = residual.row_size();
  FlowArgs args{};
  args.a_B = as_pointer<float>(a);
  args.c_B = as_pointer<float>(c);
  args.w_B = as_pointer<float>(w);
  args.grad_B = as_pointer<float>(grad_B);
  args.residual = as_pointer<float>(residual);
  args.row_size = row_size;
  args.dx = dx.data;
  args.dv = dv.data;
  args.x_dtype = dx.dtype();
  args.v_dtype = dv.dtype();
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
