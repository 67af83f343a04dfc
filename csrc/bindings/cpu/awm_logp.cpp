#include "cpu/awm_logp.h"

#include <cmath>
#include <vector>

#include "bindings/cpu/rows.h"
#include "math/awm_logp.h"

namespace qirl {
namespace {

using Inputs = std::tuple<Rows, Rows, Rows>;  // v, noise, x0

AwmArgs arguments(const Inputs& inputs) {
  const auto& [v, noise, x0] = inputs;
  AwmArgs args{};
  args.v = operand(v);
  args.noise = operand(noise);
  args.x0 = operand(x0);
  args.row_size = v.row_size();
  return args;
}

// form: time_power, power, factor. Returns logp_B and slope_B.
py::tuple awm_logp(const Inputs& inputs, const Whole& time_B,
                   const std::tuple<int, double, double>& form, int threads) {
  AwmArgs args = arguments(inputs);
  const int64_t rows = std::get<0>(inputs).rows(), blocks = blocks_per_row(args.row_size);
  const float* time = as_pointer<float>(time_B);
  require_finite("awm_logp", "time", time, rows);
  const AwmForm shape{std::get<0>(form), std::get<1>(form), std::get<2>(form)};
  const Output logp_B = output_like(time_B, kFloat32), slope_B = output_like(time_B, kFloat32);
  std::vector<float> sums(rows * blocks);
  args.sums = sums.data();
  {
    py::gil_scoped_release released;
    run_kernel(awm_logp_kernels, &args, rows * blocks, kRowGrain, threads);
    for (int64_t row = 0; row < rows; ++row) {
      const double sum = ordered_sum(&sums[row * blocks], blocks);
      const AwmRow result = awm_row(sum, args.row_size, time[row], shape,
                                    [](double x, double y) { return std::pow(x, y); });
      logp_B.as<float>()[row] = result.logp;
      slope_B.as<float>()[row] = result.slope;
    }
  }
  return py::make_tuple(logp_B.tensor, slope_B.tensor);
}

// Returns dv.
py::object awm_logp_backward(const Whole& grad_B, const Whole& slope_B, const Inputs& inputs,
                             int threads) {
  const Rows& v = std::get<0>(inputs);
  AwmArgs args = arguments(inputs);
  args.grad_B = as_pointer<float>(grad_B);
  args.slope_B = as_pointer<float>(slope_B);
  const Output dv = output_like(v, v.dtype());
  args.dv = dv.data;
  args.stream = streams(dv, v, v.dtype());
  {
    py::gil_scoped_release released;
    run_kernel(awm_logp_backward_kernels, &args, v.rows() * blocks_per_row(args.row_size),
               kRowGrain, threads);
  }
  return dv.tensor;
}

const Binding binding([](py::module_& m) {
  m.def("awm_logp", &awm_logp);
  m.def("awm_logp_backward", &awm_logp_backward);
});

}  // namespace

}  // namespace qirl
