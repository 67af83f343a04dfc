#include "cpu/velocity_loss.h"

#include <vector>

#include "bindings/cpu/rows.h"

namespace qirl {
namespace {

// weight_B, dv: address 0 when absent.
void velocity_loss(const Rows& v, const Rows& target, uintptr_t weight_B, uintptr_t loss,
                   uintptr_t mse_B, uintptr_t dv, int64_t rows, int64_t row_size, int threads) {
  VelocityArgs args{};
  args.v = operand(v);
  args.target = operand(target);
  args.weight_B = as_pointer<float>(weight_B);
  if (args.weight_B) require_finite("velocity_loss", "weight", args.weight_B, rows);
  args.dv = as_pointer(dv);
  args.rows = rows;
  args.row_size = row_size;
  args.stream = dv != 0 && worth_streaming(args.dv, row_size * dtype_bytes(args.v.dtype), rows);
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
