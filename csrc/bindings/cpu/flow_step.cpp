#include "cpu/flow_step.h"

#include <vector>

#include "bindings/cpu/flow.h"
#include "cpu/dtype.h"
#include "math/flow_step.h"

namespace qirl {

FlowArgs flow_inputs(const char* op, const Array& x, const Array& v, const Array& delta,
                     const Array& a_B, const Array& c_B, const Array& w_B) {
  const int64_t rows = x.rows();
  const FlowArgs args = flow_args<FlowArgs>(x, v, delta, a_B, c_B, w_B);
  require_finite(op, "a", args.a_B, rows);
  require_finite(op, "c", args.c_B, rows);
  require_finite(op, "w", args.w_B, rows);
  return args;
}

int64_t flow_tasks(int64_t rows, int64_t row_size) {
  return rows * ((row_size + kFlowBlock - 1) / kFlowBlock);
}

void finish_log_prob(const FlowArgs& args, const float* b_B, float* logp_B, int64_t rows) {
  const int64_t blocks = flow_tasks(1, args.row_size);
  for (int64_t row = 0; row < rows; ++row) {
    double sum = 0.0;
    for (int64_t block = 0; block < blocks; ++block) sum += args.sums[row * blocks + block];
    logp_B[row] = flow_log_prob(sum, args.row_size, args.w_B[row], b_B[row]);
  }
}

namespace {

// The coefficients are float32 [rows]. Returns x_next and logp_B.
py::tuple flow_step(const Rows& x, const Rows& v, const Rows& delta, const Whole& a, const Whole& c,
                    const Whole& s, const Whole& w, const Whole& b, const Whole& seed_B,
                    int64_t offset, int threads) {
  FlowArgs args = flow_inputs("flow_step", x, v, delta, a, c, w);
  const int64_t rows = x.rows(), tasks = flow_tasks(rows, args.row_size);
  args.s_B = as_pointer<float>(s);
  require_finite("flow_step", "s", args.s_B, rows);
  require_finite("flow_step", "b", as_pointer<float>(b), rows);
  args.seed_B = as_pointer<int64_t>(seed_B);
  args.offset = offset;
  const Output x_next = output_like(x, x.dtype()), logp_B = output_like(a, kFloat32);
  args.x_next_out = x_next.data;
  args.stream = streams(x_next, x, x.dtype());
  std::vector<float> sums(tasks);
  args.sums = sums.data();
  {
    py::gil_scoped_release released;
    run_kernel(flow_step_kernels, &args, tasks, kFlowGrain, threads);
    finish_log_prob(args, as_pointer<float>(b), logp_B.as<float>(), rows);
  }
  return py::make_tuple(x_next.tensor, logp_B.tensor);
}

const Binding binding([](py::module_& m) { m.def("flow_step", &flow_step); });

}  // namespace

}  // namespace qirl
