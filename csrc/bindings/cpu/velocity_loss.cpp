#include "cpu/velocity_loss.h"

#include <vector>

#include "bindings/cpu/rows.h"

namespace qirl {
namespace {

// weight_B and dv may be absent.
void velocity_loss(const Array& v, const Array& target, const Array& weight_B, const Array& loss,
                   const Array& mse_B, const Array& dv, int threads) {
  const int64_t rows = v.rows(), row_size = v.row_size();
  VelocityArgs args{};
  args.v = operand(v);
  args.target = operand(target);
  args.weight_B = as_pointer<float>(weight_B);
  if (args.weight_B) require_finite("velocity_loss", "weight", args.weight_B, rows);
  args.dv = as_pointer(dv);
  args.rows = rows;
  args.row_size = row_size;
  args.stream =
      args.dv != nullptr && worth_streaming(args.dv, row_size * dtype_bytes(args.v.dtype), rows);
  const int64_t blocks = blocks_per_row(row_size);
  std::vector<float> sums(rows * blocks);
  args.sums = sums.data();

  py::gil_scoped_release released;
  run_kernel(velocity_loss_kernels, &args, rows * blocks, kRowGrain, threads);
  double total = 0.0;
  for (int64_t row = 0; row < rows; ++row) {
    const double mse = ordered_sum(&sums[row * blocks], blocks) / (double)row_size;
    as_pointer<float>(mse_B)[row] = (float)mse;
    total += (args.weight_B ? (double)args.weight_B[row] : 1.0) * mse;
  }
  *as_pointer<float>(loss) = (float)(total / (double)rows);
}

const Binding binding([](py::module_& m) { m.def("velocity_loss", &velocity_loss); });

}  // namespace

}  // namespace qirl
