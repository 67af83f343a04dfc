#include "cpu/awm_logp.h"

#include <cmath>
#include <vector>

#include "bindings/cpu/rows.h"
#include "math/awm_logp.h"

namespace qirl {
namespace {

using Inputs = std::tuple<Array, Array, Array>;  // v, noise, x0

AwmArgs arguments(const Inputs& inputs) {
  AwmArgs args{};
  args.v = operand(std::get<0>(inputs));
  args.noise = operand(std::get<1>(inputs));
  args.x0 = operand(std::get<2>(inputs));
  args.row_size = std::get<0>(inputs).row_size();
  return args;
}

// form: time_power, power, factor.
void awm_logp(const Inputs& inputs, const Array& time_B,
              const std::tuple<int, double, double>& form, const Array& logp_B,
              const Array& slope_B, int threads) {
  AwmArgs args = arguments(inputs);
  const int64_t rows = std::get<0>(inputs).rows(), row_size = args.row_size;
  const float* time = as_pointer<float>(time_B);
  require_finite("awm_logp", "time", time, rows);
  const AwmForm shape{std::get<0>(form), std::get<1>(form), std::get<2>(form)};
  const int64_t blocks = blocks_per_row(row_size);
  std::vector<float> sums(rows * blocks);
  args.sums = sums.data();

  py::gil_scoped_release released;
  run_kernel(awm_logp_kernels, &args, rows * blocks, kRowGrain, threads);
  for (int64_t row = 0; row < rows; ++row) {
    const double sum = ordered_sum(&sums[row * blocks], blocks);
    const AwmRow result =
        awm_row(sum, row_size, time[row], shape, [](double x, double y) { return std::pow(x, y); });
    as_pointer<float>(logp_B)[row] = result.logp;
    as_pointer<float>(slope_B)[row] = result.slope;
  }
}

void awm_logp_backward(const Array& grad_B, const Array& slope_B, const Inputs& inputs,
                       const Array& dv, int threads) {
  AwmArgs args = arguments(inputs);
  const int64_t rows = dv.rows(), row_size = args.row_size;
  args.grad_B = as_pointer<float>(grad_B);
  args.slope_B = as_pointer<float>(slope_B);
  args.dv = as_pointer(dv);
  args.stream = worth_streaming(args.dv, row_size * dtype_bytes(args.v.dtype), rows);

  py::gil_scoped_release released;
  run_kernel(awm_logp_backward_kernels, &args, rows * blocks_per_row(row_size), kRowGrain, threads);
}

const Binding binding([](py::module_& m) {
  m.def("awm_logp", &awm_logp);
  m.def("awm_logp_backward", &awm_logp_backward);
});

}  // namespace

}  // namespace qirl
