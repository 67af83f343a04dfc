#include <vector>

#include "bindings/cpu/flow.h"
#include "cpu/dtype.h"
#include "cpu/flow_step.h"

namespace qirl {
namespace {

// The coefficients are float32 [rows]. Returns logp_B and, for `keep`, the residual.
py::tuple flow_logp(const Rows& x, const Rows& x_next, const Rows& v, const Rows& delta,
                    const Whole& a, const Whole& c, const Whole& w, const Whole& b, bool keep,
                    int threads) {
  FlowArgs args = flow_inputs("flow_logp", x, v, delta, a, c, w);
  const int64_t rows = x.rows(), tasks = flow_tasks(rows, args.row_size);
  require_finite("flow_logp", "b", as_pointer<float>(b), rows);
  args.x_next_in = x_next.data;
  args.x_next_stride = x_next.stride[0];
  const Output logp_B = output_like(a, kFloat32);
  const Output residual = keep ? output_like(x, kFloat32) : no_output(kFloat32);
  args.residual = residual.as<float>();
  std::vector<float> sums(tasks);
  args.sums = sums.data();
  {
    py::gil_scoped_release released;
    run_kernel(flow_logp_kernels, &args, tasks, kFlowGrain, threads);
    finish_log_prob(args, as_pointer<float>(b), logp_B.as<float>(), rows);
  }
  return py::make_tuple(logp_B.tensor, residual.tensor);
}

// x_dtype, v_dtype: Dtype codes of dx and dv, which are returned; -1: not wanted.
py::tuple flow_logp_backward(const Whole& grad_B, const Whole& residual, const Whole& a,
                             const Whole& c, const Whole& w, int x_dtype, int v_dtype,
                             int threads) {
  const auto gradient = [&](int dtype) {
    return dtype < 0 ? no_output(kFloat32) : output_like(residual, dtype);
  };
  const Output dx = gradient(x_dtype), dv = gradient(v_dtype);
  FlowArgs args{};
  args.a_B = as_pointer<float>(a);
  args.c_B = as_pointer<float>(c);
  args.w_B = as_pointer<float>(w);
  args.grad_B = as_pointer<float>(grad_B);
  args.residual = as_pointer<float>(residual);
  args.row_size = residual.row_size();
  args.dx = dx.data;
  args.dv = dv.data;
  args.x_dtype = x_dtype;
  args.v_dtype = v_dtype;
  args.stream = streams(dx, residual, x_dtype) && streams(dv, residual, v_dtype);
  {
    py::gil_scoped_release released;
    run_kernel(flow_logp_backward_kernels, &args, flow_tasks(residual.rows(), args.row_size),
               kFlowGrain, threads);
  }
  return py::make_tuple(dx.tensor, dv.tensor);
}

const Binding binding([](py::module_& m) {
  m.def("flow_logp", &flow_logp);
  m.def("flow_logp_backward", &flow_logp_backward);
});

}  // namespace

}  // namespace qirl
