#include "cpu/awm_logp.h"

#include <cmath>
#include <vector>

#include "bindings/cpu/rows.h"
#include "math/awm_logp.h"

namespace qirl {
namespace {

using Inputs = std::tuple<Rows, Rows, Rows>;  // v, noise, x0

AwmArgs arguments(const Inputs& inputs, int64_t row_size) {
  AwmArgs args{};
  args.v = operand(std::get<0>(inputs));
  args.noise = operand(std::get<1>(inputs));
  args.x0 = operand(std::get<2>(inputs));
  args.row_size = row_size;
  return args;
}

// form: time_power, power, factor.
void awm_logp(const Inputs& inputs, uintptr_t time_B, const std::tuple<int, double, double>& form,
              uintptr_t logp_B, uintptr_t slope_B, int64_t rows, int64_t row_size, int threads) {
  AwmArgs args = arguments(inputs, row_size);
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

void awm_logp_backward(uintptr_t grad_B, uintptr_t slope_B, const Inputs& inputs, uintptr_t dv,
                       int64_t rows, int64_t row_size, int threads) {
  AwmArgs args = arguments(inputs, row_size);
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
