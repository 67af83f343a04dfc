#include "cpu/velocity_loss.h"

#include <vector>

#include "bindings/cpu/rows.h"

namespace qirl {
namespace {

// weight_B may be absent. Returns the loss, mse_B and, for `want_grad`, dv.
py::tuple velocity_loss(const Rows& v, const Rows& target, const Whole& weight_B, bool want_grad,
                        int threads) {
  const int64_t rows = v.rows(), row_size = v.row_size(), blocks = blocks_per_row(row_size);
  VelocityArgs args{};
  args.v = operand(v);
  args.target = operand(target);
  args.weight_B = as_pointer<float>(weight_B);
  if (args.weight_B) require_finite("velocity_loss", "weight", args.weight_B, rows);
  const Output loss = new_output({}, kFloat32), mse_B = new_output({rows}, kFloat32);
  const Output dv = want_grad ? output_like(v, v.dtype()) : no_output(v.dtype());
  args.dv = dv.data;
  args.rows = rows;
  args.row_size = row_size;
  args.stream = want_grad && streams(dv, v, v.dtype());
  std::vector<float> sums(rows * blocks);
  args.sums = sums.data();
  {
    py::gil_scoped_release released;
    run_kernel(velocity_loss_kernels, &args, rows * blocks, kRowGrain, threads);
    double total = 0.0;
    for (int64_t row = 0; row < rows; ++row) {
      const double mse = ordered_sum(&sums[row * blocks], blocks) / (double)row_size;
      mse_B.as<float>()[row] = (float)mse;
      total += (args.weight_B ? (double)args.weight_B[row] : 1.0) * mse;
    }
    *loss.as<float>() = (float)(total / (double)rows);
  }
  return py::make_tuple(loss.tensor, mse_B.tensor, dv.tensor);
}

const Binding binding([](py::module_& m) { m.def("velocity_loss", &velocity_loss); });

}  // namespace

}  // namespace qirl
